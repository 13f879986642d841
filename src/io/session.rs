//! The state of a run of `io`: the open image and the requests that were started and not waited for.
//!
//! Invariant: an image is closed only after the last request under way on it.

use super::open::How;
use crate::img::temporary_overlay;
use crate::tool::image::{self, Access, Image, Source};
use crate::tool::{Tool, names};
use ringblock_drivers::open as nodes;
use ringblock_drivers::options::blockdev::BlockdevOptions;
use ringblock_drivers::options::{Map, Mode, Value, from_tree, keyval};
use ringblock_engine::graph::Graph;
use ringblock_engine::sync::Event;
use ringblock_engine::{Errno, Error};
use std::cell::Cell;
use std::rc::Rc;

/// Requests under way.
#[derive(Default)]
pub(super) struct Pending {
    count: Cell<usize>,
    changed: Event,
}

impl Pending {
    pub(super) fn start(&self) {
        self.count.set(self.count.get() + 1);
    }

    pub(super) fn done(&self) {
        self.count.set(self.count.get() - 1);
        self.changed.notify();
    }

    pub(super) async fn wait(&self) {
        while self.count.get() > 0 {
            self.changed.wait().await;
        }
    }
}

/// The open image.
pub(super) struct Open {
    pub(super) image: Image,
    /// As the node was opened, for reopening.
    options: BlockdevOptions,
    /// Each write is made durable.
    pub(super) writethrough: bool,
}

/// A run of the tool.
pub(super) struct Session {
    pub(super) tool: Tool,
    pub(super) open: Option<Open>,
    pub(super) pending: Rc<Pending>,
    /// `quit` was given.
    pub(super) quit: bool,
}

impl Session {
    pub(super) fn new(tool: Tool) -> Session {
        Session { tool, open: None, pending: Rc::default(), quit: false }
    }

    /// Opens the image.
    pub(super) async fn open(&mut self, how: How) -> Result<(), Error> {
        let name = how.name.clone().unwrap_or_default();
        let source = Source { name: name.clone(), format: how.format.clone(), image_opts: how.image_opts };
        let access = Access {
            write: !how.read_only,
            resize: false,
            cache: how.cache,
            force_share: how.force_share,
            unmap: how.unmap,
            aio: how.aio,
            ..Access::default()
        };
        let (mut options, guessed) = match how.options.is_empty() {
            true => source.options().await?,
            false => with_options(&how).await?,
        };
        options.base.node_name.get_or_insert_with(|| "disk".into());
        if how.snapshot {
            options = temporary_overlay(options, access).await?;
        }
        let image = image::attach_guessed(&name, options.clone(), guessed, access).await?;
        access.apply(&mut options);
        self.open = Some(Open { image, options, writethrough: how.cache.writethrough });
        Ok(())
    }

    /// Waits for requests under way.
    pub(super) async fn wait_all(&self) {
        self.pending.wait().await;
    }

    /// Closes the image, if one is open.
    pub(super) async fn close(&mut self) -> Result<(), Error> {
        self.wait_all().await;
        match self.open.take() {
            Some(open) => open.image.close().await,
            None => Ok(()),
        }
    }

    /// Changes how the image is open: the root goes, the node changes, the root comes back.
    pub(super) async fn reopen(
        &mut self,
        read_only: Option<bool>,
        cache: Option<crate::tool::cache::Cache>,
        extra: &[String],
    ) -> Result<(), Error> {
        self.wait_all().await;
        let Some(open) = &mut self.open else { return Ok(()) };
        let mut options = open.options.clone();
        if let Some(read_only) = read_only {
            options.base.read_only = Some(read_only);
        }
        if let Some(mode) = cache {
            let c = options.base.cache.get_or_insert_default();
            (c.direct, c.no_flush) = (Some(mode.direct), Some(mode.no_flush));
        }
        options = merged(&options, extra)?;
        if options.base.read_only == Some(true) && open.image.access.write && read_only != Some(true) {
            let node = &open.image.node;
            let text = format!("Read-only block node '{node}' cannot support read-write users");
            return Err(Error::new(Errno::EPERM, text));
        }
        let graph = Graph::current();
        open.image.root.flush().await?;
        graph.detach(open.image.root).await?;
        let changed = match nodes::reopen(vec![options.clone()], &graph.info()) {
            Ok(items) => graph.reopen(items).await,
            Err(e) => Err(e),
        };
        if changed.is_ok() {
            open.image.access.write = options.base.read_only != Some(true);
            open.options = options;
            if let Some(mode) = cache {
                open.writethrough = mode.writethrough;
            }
        }
        open.image.root = image::root_on(&open.image.node, open.image.access).await?;
        changed
    }
}

/// Options of the command `open`: those of `-o`, and the file name if there is one.
async fn with_options(how: &How) -> Result<(BlockdevOptions, bool), Error> {
    let mut text = how.options.join(",");
    if let Some(name) = &how.name {
        text += &format!(",file.filename={}", name.replace(',', ",,"));
    }
    let source = Source { name: text.trim_start_matches(',').to_owned(), format: None, image_opts: true };
    source.options().await
}

/// The options with `key=value` pairs over them.
fn merged(options: &BlockdevOptions, extra: &[String]) -> Result<BlockdevOptions, Error> {
    use ringblock_drivers::options::Qapi;
    if extra.is_empty() {
        return Ok(options.clone());
    }
    let mut tree = names::strings(options.write());
    for text in extra {
        let more = keyval::parse(text, None)?;
        if let (Value::Object(into), Value::Object(from)) = (&mut tree, more) {
            merge(into, from);
        }
    }
    let changed: BlockdevOptions = from_tree(&tree, Mode::Keyval).map_err(|e| unknown(e, extra))?;
    Ok(changed)
}

fn merge(into: &mut Map<String, Value>, from: Map<String, Value>) {
    for (key, value) in from {
        match (into.get_mut(&key), value) {
            (Some(Value::Object(a)), Value::Object(b)) => merge(a, b),
            (_, value) => {
                into.insert(key, value);
            }
        }
    }
}

/// An option that a node does not have cannot be changed.
fn unknown(e: Error, extra: &[String]) -> Error {
    let key = extra.iter().find_map(|t| {
        let key = t.split(['=', ',']).next()?;
        e.message.contains(&format!("'{key}' is unexpected")).then_some(key)
    });
    match key {
        Some(key) => Error::invalid(format!("Cannot change the option '{key}'")),
        None => e,
    }
}
