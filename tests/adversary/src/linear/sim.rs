//! The simulator as a source of histories: every session is a world of its own, exactly repeatable from its seed.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;

use ringblock_engine::host::sim::{Faults, Image, Setup, World};

use super::history::{self, Looked, Rules};
use super::session::Session;
use super::shape::Shape;

/// Requests of one session.
pub const REQUESTS: u64 = 2000;

/// What a session showed.
pub struct Shown {
    /// What was checked.
    pub looked: Looked,
    /// Disturbances.
    pub disturbances: u64,
    /// The world's trace.
    pub trace: u64,
}

/// Runs one session and checks it. Errors tell what was found.
pub fn run(shape: Shape, seed: u64, requests: u64) -> Result<Shown, String> {
    catch_unwind(AssertUnwindSafe(|| session(shape, seed, requests)))
        .unwrap_or_else(|panic| Err(format!("panic: {}", crate::panic_text(&*panic))))
}

fn session(shape: Shape, seed: u64, requests: u64) -> Result<Shown, String> {
    let mut setup = Setup::new(seed, shape.cores);
    setup.align = shape.align;
    for (name, data) in shape.files()? {
        setup = setup.file(Path::new("/").join(name), Image::from_bytes(&data));
    }
    let mut world = World::new(setup);
    let (shape, faults) = (Arc::new(shape.clone()), shape.faults);
    let of = shape.clone();
    let opened =
        world.run(move || Box::pin(async move { Session::open(of, Path::new("/"), false, seed).await }));
    let mut session = opened?;
    world.set_faults(faults);
    let (session, worked) = world.run(move || {
        Box::pin(async move {
            let worked = session.work(requests, seed).await;
            (session, worked)
        })
    });
    worked?;
    world.set_faults(Faults::default());
    let (session, finished) = world.run(move || {
        Box::pin(async move {
            let mut session = session;
            let finished = session.finish().await;
            (session, finished)
        })
    });
    finished?;
    let looked = history::check(&shape.grid, &session.initial, &session.ops, Rules::default())?;
    Ok(Shown { looked, disturbances: session.disturbances, trace: world.trace() })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: sessions of every shape are linearizable and repeat exactly. Method: some seeds, one of them twice.
    #[test]
    fn sessions() {
        for seed in 0..40 {
            let shape = Shape::of(seed);
            let what = format!("seed {seed}: {}", shape.describe());
            let shown = run(shape.clone(), seed, 300).unwrap_or_else(|e| panic!("{what}: {e}"));
            assert!(shown.looked.ops >= 250 && shown.looked.torn == 0, "{what}");
            if seed == 7 {
                assert_eq!(run(shape, seed, 300).map(|s| s.trace), Ok(shown.trace), "{what}");
            }
        }
    }
}
