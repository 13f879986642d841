//! A case: files, which of them is the image, and which others a reader of the image may open.

use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// The places of a worker.
pub(super) struct Ground {
    /// Where the files of the case are; also the working directory of the programs.
    pub(super) dir: PathBuf,
    /// Where nothing is to be opened: `secret.raw`.
    pub(super) outside: PathBuf,
}

/// What a file is.
#[derive(Clone, Debug)]
pub(super) enum Kind {
    /// Bytes at offsets in a file of a length.
    Data(u64, Vec<(u64, Vec<u8>)>),
    /// A symbolic link.
    Link(PathBuf),
    /// Another name of a file made before.
    Hard(String),
    /// A pipe with a name.
    Fifo,
    /// A folder.
    Folder,
}

/// One case.
#[derive(Clone, Debug)]
pub(super) struct Case {
    pub(super) name: String,
    pub(super) image: String,
    /// As the options say; `None`: probed.
    pub(super) format: Option<&'static str>,
    pub(super) files: Vec<(String, Kind)>,
    /// Files that the image names by a plain path, so that reading its data means reading them.
    pub(super) follows: Vec<PathBuf>,
    /// Names files where opens are seen only by tracing.
    pub(super) traced: bool,
    /// One of many that are nearly alike.
    pub(super) plenty: bool,
}

/// A case that is made when its turn comes.
pub(super) struct Named {
    pub(super) name: String,
    make: Box<dyn Fn(&Ground) -> Case + Send + Sync>,
}

impl Named {
    pub(super) fn new(name: String, make: impl Fn(&Ground) -> Case + Send + Sync + 'static) -> Named {
        Named { name, make: Box::new(make) }
    }

    pub(super) fn make(&self, ground: &Ground) -> Case {
        Case { name: self.name.clone(), ..(self.make)(ground) }
    }
}

impl Case {
    /// An image that is said to be qcow2.
    pub(super) fn qcow2(name: &str, bytes: Vec<u8>) -> Case {
        Case::of(name, Some("qcow2"), bytes)
    }

    /// An image of a format, or of one to be guessed.
    pub(super) fn of(name: &str, format: Option<&'static str>, bytes: Vec<u8>) -> Case {
        let (len, image) = (bytes.len() as u64, "image".to_owned());
        let files = vec![(image.clone(), Kind::Data(len, vec![(0, bytes)]))];
        Case {
            name: name.to_owned(),
            image,
            format,
            files,
            follows: Vec::new(),
            traced: false,
            plenty: false,
        }
    }

    /// The image file is longer than what is in it.
    pub(super) fn long(mut self, to: u64) -> Case {
        if let Some((_, Kind::Data(len, _))) = self.files.first_mut() {
            *len = to.max(*len);
        }
        self
    }

    /// More bytes in the image.
    pub(super) fn more(mut self, at: u64, bytes: Vec<u8>) -> Case {
        if let Some((_, Kind::Data(len, parts))) = self.files.first_mut() {
            *len = (*len).max(at + bytes.len() as u64);
            parts.push((at, bytes));
        }
        self
    }

    /// Another file.
    pub(super) fn with(mut self, name: impl Into<String>, kind: Kind) -> Case {
        self.files.push((name.into(), kind));
        self
    }

    /// Another file of these bytes.
    pub(super) fn with_data(self, name: impl Into<String>, bytes: Vec<u8>) -> Case {
        self.with(name, Kind::Data(bytes.len() as u64, vec![(0, bytes)]))
    }

    /// A file that may be opened by readers of data: relative to the case's folder, or anywhere.
    pub(super) fn following(mut self, path: impl Into<PathBuf>) -> Case {
        self.follows.push(path.into());
        self
    }

    /// Its data are in another file.
    pub(super) fn external(&self) -> bool {
        ["data/", "mutation-data-"].iter().any(|s| self.name.starts_with(s)) || self.name.contains("/data")
    }

    /// To be traced.
    pub(super) fn traced(mut self) -> Case {
        self.traced = true;
        self
    }

    /// Puts the files there.
    pub(super) fn lay(&self, dir: &Path) -> io::Result<()> {
        for (name, kind) in &self.files {
            let path = dir.join(name);
            match kind {
                Kind::Data(len, parts) => {
                    let file = std::fs::File::create(&path)?;
                    parts.iter().try_for_each(|(at, bytes)| file.write_all_at(bytes, *at))?;
                    file.set_len(*len)?;
                }
                Kind::Link(to) => std::os::unix::fs::symlink(to, &path)?,
                Kind::Hard(of) => std::fs::hard_link(dir.join(of), &path)?,
                Kind::Fifo => {
                    std::process::Command::new("mkfifo").arg(&path).status()?;
                }
                Kind::Folder => std::fs::create_dir(&path)?,
            }
        }
        Ok(())
    }
}
