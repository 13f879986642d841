//! Commands that change the graph: blockdev-add, -del, -reopen, block_resize.

use super::Daemon;
use crate::qmp::dispatch::{Call, Registry};
use crate::{Errno, Error};
use ringblock_drivers::open;
use ringblock_drivers::options::blockdev::BlockdevOptions;
use ringblock_drivers::options::types::Empty;
use ringblock_engine::graph::NodeInfo;

ringblock_drivers::qapi! {
    /// Arguments of blockdev-del.
    struct BlockdevDelArgs {
        /// The node.
        node_name: String = "node-name",
    }

    /// Arguments of blockdev-reopen.
    struct BlockdevReopenArgs {
        /// Each node's new options, all of them: what is left out is at its default.
        options: Vec<BlockdevOptions> = "options",
    }

    /// Arguments of block_resize.
    struct BlockResizeArgs {
        /// The device of a guest that shows the node; this program has none.
        device: Option<String> = "device",
        /// The node.
        node_name: Option<String> = "node-name",
        /// The new size in bytes.
        size: i64 = "size",
    }
}

type DaemonCall<'a> = Call<'a, Daemon>;

/// Adds the commands.
pub(super) fn register(registry: &mut Registry<Daemon>) {
    registry.command("blockdev-add", |call: &DaemonCall<'_>, options: BlockdevOptions| {
        call.context.blockdev_add(options).map(|()| Empty {})
    });
    registry.command("blockdev-del", |call: &DaemonCall<'_>, args: BlockdevDelArgs| {
        call.context.storage()?.del(&args.node_name).map(|()| Empty {})
    });
    registry.command("blockdev-reopen", |call: &DaemonCall<'_>, args: BlockdevReopenArgs| {
        call.context.blockdev_reopen(args.options).map(|()| Empty {})
    });
    registry.command("block_resize", |call: &DaemonCall<'_>, args: BlockResizeArgs| {
        let name = args.node_name.unwrap_or_default();
        call.context.known(&args.device.unwrap_or_default(), &name)?;
        let size =
            u64::try_from(args.size).map_err(|_| Error::invalid("Parameter 'size' expects a >0 size"))?;
        call.context.storage()?.resize(&name, size).map(|()| Empty {})
    });
}

impl Daemon {
    /// The node of this name. There are no devices here: `device` is only for the text of the error.
    pub(super) fn known(&self, device: &str, node: &str) -> Result<NodeInfo, Error> {
        let found = self.storage()?.info().nodes.into_iter().find(|n| n.name == node);
        let text = || format!("Cannot find device='{device}' nor node-name='{node}'");
        found.ok_or_else(|| Error::new(Errno::ENODEV, text()))
    }

    /// Opens a node and the nodes in its options.
    pub fn blockdev_add(&self, options: BlockdevOptions) -> Result<(), Error> {
        if options.node_name().is_none() {
            return Err(Error::invalid("'node-name' must be specified for the root node"));
        }
        self.storage()?.add(options).map(drop)
    }

    fn blockdev_reopen(&self, list: Vec<BlockdevOptions>) -> Result<(), Error> {
        let storage = self.storage()?;
        let graph = storage.info();
        let items = open::reopen(list, &graph)?;
        storage.on_graph(move |graph| Box::pin(async move { graph.reopen(items).await }))
    }
}
