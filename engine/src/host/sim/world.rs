//! A simulated world: all cores of an engine on the calling thread, one bounded turn of one of them at a time.
//!
//! ```text
//!   step: any core runnable? ─ yes ─► pick one ─► a few task polls in seeded order ─► its ring ─► clock + a little
//!                            └ no ──► clock to the next completion or timer           (none left: deadlock, panic)
//! ```
//!
//! Invariant: the same seed, files, faults and program give the same trace ([`World::trace`]).

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use super::kernel::{Kernel, SimRing};
use super::{Disks, Faults, Image, Journal, Rng, Saboteur};
use crate::core::Core;
use crate::driver::LocalFuture;
use crate::engine::{Engine, EngineShared};
use crate::exec;
use crate::host::{Clock, Host};
use crate::inbox::CoreShared;
use crate::pool::Pool;
use crate::throttle::Groups;

/// Virtual time without a completion after which a run is called stuck, in ns. Periodic timers alone are no progress.
const PATIENCE: u64 = 1_000_000_000_000;
/// Turns without a completion after which a run is called stuck.
const TURNS: u64 = 20_000_000;

/// What a world is made of.
#[derive(Clone, Debug)]
pub struct Setup {
    /// Where all choices come from.
    pub seed: u64,
    /// Number of cores.
    pub cores: usize,
    /// Request alignment of the disks: 1, or a sector as with `O_DIRECT`.
    pub align: u32,
    /// What goes wrong.
    pub faults: Faults,
    /// Files that exist, all of it durable.
    pub files: BTreeMap<PathBuf, Image>,
    /// Where everything that happens to the disks is written down.
    pub journal: Option<Arc<Journal>>,
    /// Who harms single operations.
    pub saboteur: Option<Arc<Saboteur>>,
}

impl Setup {
    /// A world without faults and files.
    pub fn new(seed: u64, cores: usize) -> Setup {
        let files = BTreeMap::new();
        Setup { seed, cores, align: 1, faults: Faults::default(), files, journal: None, saboteur: None }
    }

    /// With this file.
    pub fn file(mut self, path: impl Into<PathBuf>, image: Image) -> Setup {
        self.files.insert(path.into(), image);
        self
    }
}

/// A simulated machine with an engine on it.
pub struct World {
    seed: u64,
    kernel: Rc<RefCell<Kernel>>,
    cores: Vec<Rc<Core>>,
    /// Last: dropping the engine empties the inboxes.
    engine: Engine,
}

impl World {
    /// Starts an engine in a new world.
    pub fn new(setup: Setup) -> World {
        let cores = setup.cores.max(1);
        let disks = Arc::new(Disks::new(setup.align, setup.files, setup.journal));
        let mut kernel = Kernel::new(Rng::new(setup.seed), cores, disks.clone(), setup.faults);
        kernel.saboteur = setup.saboteur;
        let clock = Clock::Sim(kernel.time.clone());
        let kernel = Rc::new(RefCell::new(kernel));
        let inboxes = (0..cores).map(|i| Arc::new(CoreShared::new(i).expect("an eventfd"))).collect();
        let shared = Arc::new(EngineShared {
            cores: inboxes,
            pool: Pool::inline(),
            host: Host::Sim(disks),
            slots: Mutex::default(),
            listener: Mutex::default(),
            groups: Groups::default(),
        });
        let made = shared.cores.iter().enumerate().map(|(i, me)| {
            let slot = exec::claim_slot(me.clone()).expect("few worlds at a time");
            let ring = SimRing { kernel: kernel.clone(), core: i };
            Core::new(me.clone(), slot, shared.clone(), Box::new(ring), clock.clone())
        });
        let made = made.collect();
        World { seed: setup.seed, kernel, cores: made, engine: Engine::simulated(shared) }
    }

    /// The engine's handle, for what asks for one. Its `run` is not for use here: it would wait for ever.
    pub fn engine(&self) -> Engine {
        self.engine.clone()
    }

    /// The world's files.
    pub fn disks(&self) -> Arc<Disks> {
        self.kernel.borrow().disks.clone()
    }

    /// The file at `path` as readers see it now.
    pub fn live(&self, path: &Path) -> Option<Image> {
        self.disks().open(path).ok().map(|d| d.live())
    }

    /// Changes what goes wrong from now on.
    pub fn set_faults(&self, faults: Faults) {
        self.kernel.borrow_mut().faults = faults;
    }

    /// Virtual time in ns since the world began.
    pub fn now(&self) -> u64 {
        self.kernel.borrow().now()
    }

    /// A number that depends on every choice, completion and time so far.
    pub fn trace(&self) -> u64 {
        self.kernel.borrow().trace()
    }

    /// Operations completed so far.
    pub fn completions(&self) -> u64 {
        self.kernel.borrow().completions
    }

    /// Adds a task to a core. `make` runs there.
    pub fn spawn(&self, core: usize, make: impl FnOnce() -> LocalFuture<'static, ()>) {
        let core = &self.cores[core];
        core.enter(|| core.spawn(make()));
    }

    /// Runs a task on core 0, and everything else meanwhile, until it has finished. Panics, naming the seed, if nothing
    /// can go on.
    pub fn run<T: 'static>(&mut self, make: impl FnOnce() -> LocalFuture<'static, T>) -> T {
        let result = Rc::new(RefCell::new(None));
        let out = result.clone();
        self.spawn(0, move || {
            let future = make();
            Box::pin(async move {
                let value = future.await;
                *out.borrow_mut() = Some(value);
            })
        });
        let (mut seen, mut since, mut turns) = (self.completions(), self.now(), 0u64);
        loop {
            if let Some(value) = result.borrow_mut().take() {
                return value;
            }
            let went_on = self.step();
            assert!(went_on, "seed {}: deadlock: no task, completion or timer is left", self.seed);
            turns += 1;
            if self.completions() != seen {
                (seen, since, turns) = (self.completions(), self.now(), 0);
            }
            let stuck = self.now() - since > PATIENCE || turns > TURNS;
            assert!(!stuck, "seed {}: stuck: no operation completed for {turns} turns", self.seed);
        }
    }

    /// Takes `n` steps, or fewer if nothing is left to do.
    pub fn steps(&mut self, n: u64) -> bool {
        (0..n).all(|_| self.step())
    }

    /// One turn of one core, or one jump of the clock. False if nothing is left that could happen.
    pub fn step(&mut self) -> bool {
        let now = self.now();
        let runnable: Vec<usize> = (0..self.cores.len())
            .filter(|&i| self.cores[i].is_runnable(now) || self.kernel.borrow().is_busy(i))
            .collect();
        if runnable.is_empty() {
            return self.jump();
        }
        let (index, polls, pause) = {
            let mut k = self.kernel.borrow_mut();
            let index = runnable[k.rng.index(runnable.len())];
            let (polls, pause) = (k.rng.between(1, 6), k.rng.below(3000));
            k.note(index as u64 | polls << 32);
            (index, polls, pause)
        };
        let core = &self.cores[index];
        core.enter(|| {
            core.begin_turn();
            for _ in 0..polls {
                let rotate = self.kernel.borrow_mut().rng.next();
                core.poll_one(rotate);
            }
            core.end_turn();
            core.enter_ring(None);
        });
        self.pass(now + pause);
        true
    }

    /// To the next completion or timer.
    fn jump(&mut self) -> bool {
        let timers = self.cores.iter().filter_map(|c| c.next_alarm());
        let next = timers.chain(self.kernel.borrow().next_due()).min();
        let Some(next) = next else { return false };
        self.pass(next.max(self.now()));
        true
    }

    fn pass(&self, to: u64) {
        let mut k = self.kernel.borrow_mut();
        k.time.store(to, Ordering::Relaxed);
        k.complete_due();
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // tasks of a failed run may panic again: leave them
            for core in self.cores.drain(..) {
                exec::release_slot(core.slot);
                std::mem::forget(core);
            }
            return;
        }
        for core in &self.cores {
            core.enter(|| core.teardown());
            exec::release_slot(core.slot);
        }
    }
}
