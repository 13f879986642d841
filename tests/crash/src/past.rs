//! What an image has been through before its recording begins: guests wrote to it, and then other things happened.
//!
//! ```text
//!   new image ─► World (not recorded): writes, close ─► craft ─► the files of the recording, and a tape that knows them
//! ```

use std::path::Path;

use ringblock_engine::driver::{Flags, LocalFuture};
use ringblock_engine::graph::Graph;
use ringblock_engine::host::sim::{Image, Rng, SECTOR, Setup, World, lock};
use ringblock_engine::mem::Buf;

use crate::cases::{Case, attach};
use crate::craft::Craft;
use crate::record::Tape;

/// The past of an image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Past {
    /// Just made.
    #[default]
    New,
    /// Guests wrote to half of it.
    Written,
    /// An internal snapshot was taken after that.
    Snapshot,
    /// The refcount table is about to grow.
    Worn,
    /// After that the free clusters are single ones, with leaked ones in between.
    Holes,
    /// The same, behind the end of the file.
    Gaps,
    /// It has a persistent bitmap, valid and empty.
    Bitmap,
    /// It has an autoclear bit that we do not know.
    Foreign,
    /// Dirty, half of the counters are 0.
    Undercounted,
    /// Dirty, what is shared with a snapshot is counted once.
    Miscounted,
    /// Dirty, no counters at all.
    Uncounted,
    /// The same, and the end of the file is lost, with data that was not flushed.
    CutOff,
}

/// Sectors at the end of the disk that are written last.
const LAST: usize = 4;

/// The files of `setup` after all that.
pub(crate) fn live_through(case: &Case, setup: Setup, tape: &Tape, past: Past) -> Setup {
    if past == Past::New {
        return setup;
    }
    if past == Past::Worn {
        return craft(setup, |image| image.worn(24));
    }
    let setup = written(case, setup, tape, past == Past::CutOff);
    match past {
        Past::Snapshot => craft(setup, Craft::snapshot),
        Past::Holes => craft(setup, |image| image.holes(case.options.size / case.cluster() * 3 / 2, false)),
        Past::Gaps => craft(setup, |image| image.holes(case.options.size / case.cluster() * 3 / 2, true)),
        Past::Bitmap => craft(setup, Craft::bitmap),
        Past::Foreign => craft(setup, Craft::foreign),
        Past::Undercounted => craft(setup, Craft::undercounted),
        Past::Miscounted => craft(setup, |image| image.snapshot().miscounted()),
        Past::Uncounted => craft(setup, Craft::uncounted),
        Past::CutOff => craft(setup, |image| image.uncounted().cut_off(2)),
        Past::New | Past::Written | Past::Worn => setup,
    }
}

fn craft(mut setup: Setup, change: impl FnOnce(Craft) -> Craft) -> Setup {
    let image = setup.files.get_mut(Path::new("/img")).expect("the image");
    let made = change(Craft::new(image.to_bytes())).into_bytes();
    *image = Image::from_bytes(&made);
    setup
}

/// One write of the past.
struct Write {
    at: u64,
    data: Vec<u8>,
}

/// A guest wrote here and there, and the image was closed. The last write goes to the end of the file; it may be `lost`.
fn written(case: &Case, setup: Setup, tape: &Tape, lost: bool) -> Setup {
    let mut rng = Rng::new(setup.seed ^ 0x9a57);
    let sectors = case.sectors();
    let mut writes = Vec::new();
    let mut durable = |first: usize, count: usize| {
        let mut data = vec![0; count * SECTOR as usize];
        let stamp = lock(&tape.oracle).write(first, &mut data);
        lock(&tape.oracle).wrote_through(first..first + count, stamp, true);
        writes.push(Write { at: first as u64 * SECTOR, data });
    };
    let mut at = 0;
    while at + 2 * LAST < sectors {
        let count = rng.between(1, 6) as usize;
        let count = count.min(sectors - LAST - at);
        // what lies just before the last piece is there, and so is its table
        if rng.chance(500) || at + count + 2 * LAST >= sectors {
            durable(at, count);
        }
        at += count;
    }
    let first = sectors - LAST;
    let mut data = vec![0; LAST * SECTOR as usize];
    let stamp = lock(&tape.oracle).write(first, &mut data);
    lock(&tape.oracle).wrote_through(first..sectors, stamp, !lost);
    writes.push(Write { at: first as u64 * SECTOR, data });
    let again = Setup { faults: crate::record::calm(0, Default::default(), 1).faults, ..setup.clone() };
    let node = case.node(false);
    let mut world = World::new(again);
    world.run(move || -> LocalFuture<'static, ()> {
        Box::pin(async move {
            let root = attach(node, true).await.expect("the image opens");
            for w in writes {
                root.write(w.at, Buf::from_slice(&w.data), Flags::NONE).await.0.expect("a write");
            }
            Graph::current().shutdown().await.expect("it closes");
        })
    });
    let files = setup.files.keys().filter_map(|path| Some((path.clone(), world.live(path)?)));
    Setup { files: files.collect(), ..setup.clone() }
}
