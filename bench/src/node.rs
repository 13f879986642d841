//! The smallest possible drivers: what is measured above them is the engine.

use std::any::Any;
use std::path::PathBuf;
use std::sync::Arc;

use ringblock_engine::Error;
use ringblock_engine::driver::{Driver, Kind, Leaf, Opened, perm};
use ringblock_engine::graph::{Common, Graph, NodeSpec, RootSpec};
use ringblock_engine::host::file::{Access, Expect, File, OpenOptions};
use ringblock_engine::path::Root;
use ringblock_engine::throttle::Member;

struct Plain {
    leaf: Leaf,
    size: u64,
}

impl Driver for Plain {
    fn name(&self) -> &'static str {
        "plain"
    }
    fn size(&self) -> u64 {
        self.size
    }
    fn kind(&self) -> Kind<'_> {
        Kind::Leaf(&self.leaf)
    }
    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// What to put under a root.
#[derive(Clone, Debug)]
pub enum Below {
    /// Nothing.
    Null,
    /// A file through the page cache or with O_DIRECT.
    File {
        /// Its path.
        path: PathBuf,
        /// O_DIRECT.
        direct: bool,
    },
}

/// Opens a leaf node and attaches a root to it; runs on core 0.
pub async fn leaf(below: Below) -> Result<Root, Error> {
    limited(below, None).await
}

/// The same, with limits at the root.
pub async fn limited(below: Below, throttle: Option<Arc<Member>>) -> Result<Root, Error> {
    let graph = Graph::current();
    let open: ringblock_engine::driver::OpenFn = Box::new(move |_cx| {
        Box::pin(async move {
            let (leaf, size) = match below {
                Below::Null => (Leaf::Null { read_zeroes: false, latency_ns: 0 }, 1 << 30),
                Below::File { path, direct } => {
                    let options = OpenOptions { expect: Expect::Any, access: Access::ReadWrite, direct };
                    let file = File::open(&path, options).await?;
                    let size = file.size().await?;
                    (Leaf::File(file), size)
                }
            };
            Ok(Opened { driver: Arc::new(Plain { leaf, size }), owner: None })
        })
    });
    let spec = NodeSpec { name: None, common: Common::default(), home: Some(0), config: Arc::new(()), open };
    let node = graph.add(spec).await?;
    let user = "a benchmark".to_owned();
    let perms = perm::CONSISTENT_READ | perm::WRITE;
    graph.attach(RootSpec { node, perm: perms, shared: perm::ALL, user, throttle }).await
}
