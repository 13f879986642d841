//! Opening an image for a tool: from what the user typed to a root.
//!
//! Invariants: without a named format the image is probed through a read-only node of its own that is gone before the
//! real one opens; a raw image that was only guessed guards its first sector when it is writable; whatever is opened
//! here is closed by [`Image::close`] or at the end of the tool.
//!
//! ```text
//! Source { name, format | image options } ─► tree ─► [probe] ─► BlockdevOptions + how to open ─► Graph ─► Root
//! ```

use super::cache::Cache;
use super::{Tool, err, names};
use ringblock_drivers::format::probe;
use ringblock_drivers::format::qcow2::header::{self, Header};
use ringblock_drivers::format::qcow2::open::is_plain_path;
use ringblock_drivers::open::{self, How};
use ringblock_drivers::options::blockdev::{BlockdevDriver, BlockdevOptions, BlockdevRef};
use ringblock_drivers::options::types::{
    BlockdevAioOptions, BlockdevCacheOptions, BlockdevDetectZeroesOptions, BlockdevDiscardOptions,
};
use ringblock_drivers::options::{Mode, Value, from_tree};
use ringblock_engine::Error;
use ringblock_engine::driver::perm;
use ringblock_engine::graph::{Graph, NodeId, NodeInfo, RootSpec};
use ringblock_engine::mem::Buf;
use ringblock_engine::path::Root;

/// What the user typed to say which image.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Source {
    /// File name, or the argument of `--image-opts`.
    pub name: String,
    /// `-f`.
    pub format: Option<String>,
    /// Whether `name` is a list of options.
    pub image_opts: bool,
}

/// How to open it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Access {
    /// Writes are allowed.
    pub write: bool,
    /// The size may change (with `write`).
    pub resize: bool,
    /// Cache mode.
    pub cache: Cache,
    /// Takes no locks that would keep writers away.
    pub force_share: bool,
    /// Discards are passed on.
    pub unmap: bool,
    /// Writes of zeroes are looked for.
    pub detect_zeroes: bool,
    /// The backing file is not opened.
    pub no_backing: bool,
    /// Refuses an image that somebody else writes to (unless `force_share`).
    pub no_writers: bool,
    /// aio mode, if named: only its checks matter.
    pub aio: Option<BlockdevAioOptions>,
}

/// An open image.
#[derive(Clone, Debug)]
pub struct Image {
    /// As the user typed it.
    pub name: String,
    /// Where requests enter.
    pub root: Root,
    /// Name of the top node.
    pub node: String,
    /// Its number.
    pub id: NodeId,
    /// Size in bytes when it was opened.
    pub size: u64,
    /// Its driver.
    pub format: &'static str,
    /// How it was opened.
    pub access: Access,
}

impl Source {
    /// A file by name.
    pub fn file(name: impl Into<String>, format: Option<&str>) -> Source {
        Source { name: name.into(), format: format.map(str::to_owned), image_opts: false }
    }

    /// The typed options, without regard to how it will be opened. `true` if the format was guessed.
    pub async fn options(&self) -> Result<(BlockdevOptions, bool), Error> {
        let mut tree = if self.image_opts {
            names::from_options(&self.name)?
        } else {
            names::from_name(&self.name, self.format.as_deref())?
        };
        let guessed = fill_format(&mut tree).await?;
        Ok((from_tree(&tree, Mode::Keyval)?, guessed))
    }

    /// Opens it. Errors begin with "Could not open 'NAME': ".
    pub async fn open(&self, tool: &Tool, access: Access) -> Result<Image, Error> {
        let opened = self.open_quietly(tool, access).await;
        opened.map_err(|e| lock_hint(e.context(format_args!("Could not open '{}'", self.name)), &self.name))
    }

    /// Opens it, naming its external data file where it has one.
    pub async fn open_with(&self, data_file: Option<&str>, access: Access) -> Result<Image, Error> {
        let (mut options, guessed) = self.options().await?;
        if let (Some(path), BlockdevDriver::Qcow2(o)) = (data_file, &mut options.driver) {
            let file = BlockdevOptions {
                base: Default::default(),
                driver: ringblock_drivers::image::protocol(path),
            };
            o.data_file = Some(ringblock_drivers::options::blockdev::BlockdevRef::Definition(Box::new(file)));
        }
        let opened = attach_guessed(&self.name, options, guessed, access).await;
        opened.map_err(|e| lock_hint(e.context(format_args!("Could not open '{}'", self.name)), &self.name))
    }

    async fn open_quietly(&self, _tool: &Tool, access: Access) -> Result<Image, Error> {
        let (options, guessed) = self.options().await?;
        attach_guessed(&self.name, options, guessed, access).await
    }
}

/// Says what a refused image lock means.
pub fn lock_hint(mut e: Error, name: &str) -> Error {
    if e.message.contains("Failed to get ") && e.message.ends_with(" lock") {
        e.message.push_str(&format!("\nIs another process using the image [{name}]?"));
    }
    e
}

/// Adds options to how an image is opened and opens it; warns if it is a raw image only by guess.
pub async fn attach_guessed(
    name: &str,
    mut options: BlockdevOptions,
    guessed: bool,
    access: Access,
) -> Result<Image, Error> {
    let probed = guessed && access.write && matches!(options.driver, BlockdevDriver::Raw(_));
    if probed {
        warn_guess(name);
    }
    allow_data_file(&mut options).await?;
    access.apply(&mut options);
    attach(name, options, How { probed, ..How::default() }, access).await
}

/// Puts the external data file that a qcow2 image names into its options, where the user did not name one: who runs a
/// tool on an image asks for its data. Only plain paths are taken, seen from the working directory as by the peer.
async fn allow_data_file(options: &mut BlockdevOptions) -> Result<(), Error> {
    let BlockdevDriver::Qcow2(o) = &mut options.driver else { return Ok(()) };
    let (None, BlockdevRef::Definition(file)) = (&o.data_file, &o.file) else { return Ok(()) };
    let start = head((**file).clone(), probe::HEAD as u64).await?;
    let features = start.get(72..80).and_then(|b| b.try_into().ok()).map_or(0, u64::from_be_bytes);
    let version = start.get(4..8).and_then(|b| b.try_into().ok()).map_or(0, u32::from_be_bytes);
    if version < 3 || features & header::incompatible::DATA_FILE == 0 {
        return Ok(());
    }
    // what is wrong with the header is for the driver to say
    let Ok(bits) = header::peek_cluster_bits(&start) else { return Ok(()) };
    let Ok(parsed) = Header::parse(&head((**file).clone(), 1 << bits).await?) else { return Ok(()) };
    if let Some(name) = parsed.extensions.data_file.filter(|n| is_plain_path(n)) {
        let data: BlockdevOptions = from_tree(&names::protocol_node(&name)?, Mode::Keyval)?;
        o.data_file = Some(BlockdevRef::Definition(Box::new(data)));
    }
    Ok(())
}

/// A root on a node that is there.
pub async fn root_on(node: &str, access: Access) -> Result<Root, Error> {
    root_sharing(node, access, perm::ALL).await
}

async fn root_sharing(node: &str, access: Access, shared: u8) -> Result<Root, Error> {
    let spec = RootSpec {
        node: node.to_owned(),
        perm: access.perms(),
        shared,
        user: "a command line tool".into(),
        throttle: None,
    };
    Graph::current().attach(spec).await
}

impl Access {
    /// Writes what is asked for into options, where the user did not say otherwise.
    pub fn apply(&self, options: &mut BlockdevOptions) {
        let base = &mut options.base;
        base.read_only.get_or_insert(!self.write);
        let cache = base.cache.get_or_insert_with(BlockdevCacheOptions::default);
        cache.direct.get_or_insert(self.cache.direct);
        cache.no_flush.get_or_insert(self.cache.no_flush);
        if self.force_share {
            base.force_share = Some(true);
        }
        if self.unmap {
            base.discard.get_or_insert(BlockdevDiscardOptions::Unmap);
        }
        if self.detect_zeroes {
            base.detect_zeroes.get_or_insert(BlockdevDetectZeroesOptions::Unmap);
        }
        if self.no_backing
            && let BlockdevDriver::Qcow2(o) = &mut options.driver
        {
            o.backing = Some(ringblock_drivers::options::blockdev::BlockdevRefOrNull::Null(()));
        }
        if let (Some(aio), Some(file)) = (self.aio, protocol_options(options)) {
            file.aio.get_or_insert(aio);
        }
    }

    fn perms(&self) -> u8 {
        let write = if self.write { perm::WRITE } else { 0 };
        let resize = if self.write && self.resize { perm::RESIZE } else { 0 };
        perm::CONSISTENT_READ | write | resize
    }
}

/// The options of the host file at the bottom, where they stand in place.
fn protocol_options(
    options: &mut BlockdevOptions,
) -> Option<&mut ringblock_drivers::options::blockdev::BlockdevOptionsFile> {
    use ringblock_drivers::options::blockdev::BlockdevRef::Definition;
    match &mut options.driver {
        BlockdevDriver::File(f) | BlockdevDriver::HostDevice(f) => Some(f),
        BlockdevDriver::Raw(r) => match &mut r.file {
            Definition(below) => protocol_options(below),
            _ => None,
        },
        BlockdevDriver::Qcow2(q) => match &mut q.file {
            Definition(below) => protocol_options(below),
            _ => None,
        },
        BlockdevDriver::Blkdebug(b) => match &mut b.image {
            Definition(below) => protocol_options(below),
            _ => None,
        },
        _ => None,
    }
}

/// Adds the node to the graph and a root on it.
pub async fn attach(name: &str, options: BlockdevOptions, how: How, access: Access) -> Result<Image, Error> {
    let writers = if access.no_writers && !access.force_share { perm::WRITE | perm::RESIZE } else { 0 };
    attach_sharing(name, options, how, access, perm::ALL & !writers).await
}

/// As [`attach`], for one who lets others do only what is in `shared` (bits of [`perm`]).
pub async fn attach_sharing(
    name: &str,
    options: BlockdevOptions,
    how: How,
    access: Access,
    shared: u8,
) -> Result<Image, Error> {
    let graph = Graph::current();
    let node = graph.add(open::node_with(options, how)?).await?;
    let root = match root_sharing(&node, access, shared).await {
        Ok(root) => root,
        Err(e) => {
            // the node alone is of no use; its own error could only hide this one
            let _ = graph.del(&node).await;
            return Err(e);
        }
    };
    let info = graph.info().nodes.into_iter().find(|n| n.name == node);
    let info = info.ok_or_else(|| Error::invalid("The node is gone"))?;
    let size = root.size()?;
    let (id, format) = (info.id, info.driver.name());
    Ok(Image { name: name.to_owned(), root, node, id, size, format, access })
}

impl Image {
    /// Closes it. What is written but not flushed may be lost in a crash; errors are those of closing its metadata.
    pub async fn close(self) -> Result<(), Error> {
        let graph = Graph::current();
        graph.detach(self.root).await?;
        graph.del(&self.node).await
    }

    /// The top node.
    pub fn info(&self) -> Option<NodeInfo> {
        Graph::current().info().nodes.into_iter().find(|n| n.id == self.id)
    }

    /// The node below the top one on an edge.
    pub fn child(&self, edge: &str) -> Option<NodeInfo> {
        let info = Graph::current().info();
        let top = info.nodes.iter().find(|n| n.id == self.id)?;
        let id = top.edges.iter().find(|e| e.name == edge)?.node;
        info.nodes.into_iter().find(|n| n.id == id)
    }
}

/// Gives every image in the tree whose format nobody named the one it looks like; says whether the top one was guessed.
async fn fill_format(tree: &mut Value) -> Result<bool, Error> {
    let Some(map) = tree.as_object_mut() else { return Ok(false) };
    let mut guessed = false;
    if !map.contains_key("driver") {
        let file = map.get("file").cloned().unwrap_or(Value::Null);
        let format = match file {
            Value::Object(_) => probe_node(&file).await?,
            _ => return Err(Error::invalid("Must specify either driver or file")),
        };
        map.insert("driver".into(), format.into());
        guessed = true;
    }
    if let Some(backing @ Value::Object(_)) = map.get_mut("backing") {
        Box::pin(fill_format(backing)).await?;
    }
    Ok(guessed)
}

/// The format that the bytes of a protocol node look like. Errors: it cannot be opened or read.
async fn probe_node(tree: &Value) -> Result<&'static str, Error> {
    let options: BlockdevOptions = from_tree(tree, Mode::Keyval)?;
    let head = head(options, probe::HEAD as u64).await?;
    Ok(probe::probe(&head))
}

/// The first bytes of a node that is opened only for that, without keeping anyone from using it.
async fn head(mut options: BlockdevOptions, len: u64) -> Result<Vec<u8>, Error> {
    let access = Access { force_share: true, ..Access::default() };
    access.apply(&mut options);
    options.base.node_name = None;
    let image = attach("", options, How::default(), access).await?;
    let len = image.size.min(len) as usize;
    let (done, buf) = match len {
        // even that may wait on a device that has nothing
        0 => (Ok(()), Buf::new(0)),
        _ => image.root.read(0, Buf::new(len)).await,
    };
    image.close().await?;
    done.map_err(|e| Error::io(e, "Could not read image for determining its format"))?;
    Ok(buf.to_vec())
}

fn warn_guess(name: &str) {
    err(&format!(
        "WARNING: Image format was not specified for '{name}' and probing guessed raw.\n         \
         Automatically detecting the format is dangerous for raw images, write operations on block 0 will be restricted.\n         \
         Specify the 'raw' format explicitly to remove the restrictions.\n"
    ));
}
