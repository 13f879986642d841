//! How `io` opens its image: process options, and those of the command `open`.

use crate::tool::Fail;
use crate::tool::cache::Cache;
use ringblock_drivers::options::types::BlockdevAioOptions;

/// What the options say.
#[derive(Clone, Debug)]
pub(super) struct How {
    pub(super) name: Option<String>,
    pub(super) format: Option<String>,
    pub(super) image_opts: bool,
    pub(super) read_only: bool,
    pub(super) snapshot: bool,
    pub(super) force_share: bool,
    pub(super) unmap: bool,
    pub(super) cache: Cache,
    pub(super) aio: Option<BlockdevAioOptions>,
    /// `-o` of the command `open`.
    pub(super) options: Vec<String>,
}

impl Default for How {
    fn default() -> How {
        How {
            name: None,
            format: None,
            image_opts: false,
            read_only: false,
            snapshot: false,
            force_share: false,
            unmap: true,
            cache: Cache::WRITETHROUGH,
            aio: None,
            options: Vec::new(),
        }
    }
}

impl How {
    /// Takes one option.
    pub(super) fn take(&mut self, option: &str, value: &str) -> Result<(), Fail> {
        match option {
            "image-opts" => self.image_opts = true,
            "format" => self.format = Some(value.to_owned()),
            "read-only" => self.read_only = true,
            "snapshot" => self.snapshot = true,
            "nocache" => self.cache = Cache::NONE,
            "native-aio" => self.aio = Some(BlockdevAioOptions::Native),
            "aio" => self.aio = Some(aio(value)?),
            "cache" => self.cache = cache(value)?,
            "discard" => self.unmap = discard(value)?,
            "force-share" => self.force_share = true,
            "options" => self.options.push(value.to_owned()),
            other => return Err(format!("Option '--{other}' is not supported").into()),
        }
        Ok(())
    }
}

/// An aio mode by name.
fn aio(text: &str) -> Result<BlockdevAioOptions, Fail> {
    Ok(match text {
        "threads" => BlockdevAioOptions::Threads,
        "native" => BlockdevAioOptions::Native,
        "io_uring" => BlockdevAioOptions::IoUring,
        other => return Err(format!("Invalid aio option: {other}").into()),
    })
}

/// A cache mode by name.
pub(super) fn cache(text: &str) -> Result<Cache, Fail> {
    Cache::parse(text).ok_or_else(|| Fail::from(format!("Invalid cache option: {text}")))
}

fn discard(text: &str) -> Result<bool, Fail> {
    match text {
        "ignore" | "off" => Ok(false),
        "unmap" | "on" => Ok(true),
        other => Err(format!("Invalid discard option: {other}").into()),
    }
}
