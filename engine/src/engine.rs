//! The engine: a set of cores and what they share. How a program starts one, talks to it, and stops it.
//!
//! ```text
//!   any thread ── Engine::run(core, future) ──► that core's inbox ──► task ──► one-shot result back
//! ```
//!
//! Invariant: cores are stopped in order of their index, after the graph is closed; the last handle dropped stops them.

use std::collections::BTreeSet;
use std::io;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use crate::core::Core;
use crate::driver::LocalFuture;
use crate::error::{Errno, Error};
use crate::event::{Event, Listener};
use crate::exec;
use crate::host::{Clock, Host};
use crate::inbox::{CoreShared, Msg};
use crate::mem::{self, Arena};
use crate::pool::Pool;
use crate::ring::Uring;
use crate::sync::{block_on, oneshot};
use crate::throttle::Groups;

/// What all cores share.
pub(crate) struct EngineShared {
    pub(crate) cores: Vec<Arc<CoreShared>>,
    pub(crate) pool: Pool,
    pub(crate) host: Host,
    pub(crate) slots: Mutex<Slots>,
    pub(crate) listener: Mutex<Option<Listener>>,
    pub(crate) groups: Groups,
}

/// Free registered-file slots.
#[derive(Default)]
pub(crate) struct Slots {
    used: BTreeSet<u32>,
}

impl Slots {
    /// The lowest free slot.
    pub(crate) fn take(&mut self) -> Option<u32> {
        let slot = (0..crate::ring::FILES_MAX).find(|s| !self.used.contains(s))?;
        self.used.insert(slot);
        Some(slot)
    }

    pub(crate) fn give(&mut self, slot: u32) {
        self.used.remove(&slot);
    }
}

/// How to start an engine.
#[derive(Clone, Debug)]
pub struct Config {
    /// Number of cores; 0 takes as many as the process may use.
    pub cores: usize,
    /// Whether core `i` is pinned to the `i`-th allowed CPU.
    pub pin: bool,
    /// Registered buffer memory per core in bytes; rounded up to 256 KiB.
    pub arena: usize,
    /// Threads for blocking calls, at most.
    pub blocking_threads: usize,
}

impl Default for Config {
    fn default() -> Config {
        Config { cores: 0, pin: true, arena: 4 << 20, blocking_threads: 8 }
    }
}

struct Running {
    shared: Arc<EngineShared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

/// A running engine; clones are handles on the same one.
#[derive(Clone)]
pub struct Engine {
    running: Arc<Running>,
}

impl Engine {
    /// Starts the cores. Errors: no io_uring (`ENOSYS`, `EPERM`), no memory, no threads.
    pub fn start(config: &Config) -> Result<Engine, Error> {
        let cpus = crate::host::linux::cpu::allowed()
            .map_err(|e| Error::io(e, "Could not read the CPU affinity"))?;
        let count = if config.cores == 0 { cpus.len() } else { config.cores }.clamp(1, 256);
        let cores = (0..count).map(|i| CoreShared::new(i).map(Arc::new)).collect::<io::Result<Vec<_>>>();
        let cores = cores.map_err(|e| Error::io(Errno::of(&e), "Could not create an eventfd"))?;
        let shared = Arc::new(EngineShared {
            cores,
            pool: Pool::new(config.blocking_threads),
            host: Host::Linux,
            slots: Mutex::default(),
            listener: Mutex::default(),
            groups: Groups::default(),
        });
        let running = Arc::new(Running { shared: shared.clone(), threads: Mutex::default() });
        let engine = Engine { running };
        let clock = Clock::Real(std::time::Instant::now());
        for i in 0..count {
            let cpu = config.pin.then(|| cpus[i % cpus.len()]);
            engine.start_core(i, cpu, config.arena, clock.clone())?;
        }
        Ok(engine)
    }

    /// A handle for the simulator, which runs the cores itself.
    pub(crate) fn simulated(shared: Arc<EngineShared>) -> Engine {
        Engine { running: Arc::new(Running { shared, threads: Mutex::default() }) }
    }

    fn start_core(&self, index: usize, cpu: Option<usize>, arena: usize, clock: Clock) -> Result<(), Error> {
        let shared = self.running.shared.clone();
        let (tx, rx) = oneshot::<Result<(), Error>>();
        let body = move || {
            if let Some(cpu) = cpu {
                // a container may forbid it; the core then runs where the scheduler likes
                let _ = crate::host::linux::cpu::pin(cpu);
            }
            // without it delays are up to 50 us longer, and all else is as well
            let _ = crate::host::linux::cpu::precise_timers();
            match make_core(&shared, index, arena, clock) {
                Ok(core) => {
                    tx.send(Ok(()));
                    // a core that dies would leave everybody waiting for ever, and images half written
                    let run = std::panic::AssertUnwindSafe(|| core.enter(|| core.run()));
                    if std::panic::catch_unwind(run).is_err() {
                        std::process::abort();
                    }
                    exec::release_slot(core.slot);
                    drop(core);
                    mem::set_pool(None);
                }
                Err(e) => tx.send(Err(e)),
            }
        };
        let thread = std::thread::Builder::new().name(format!("rb-core-{index}")).spawn(body);
        let thread = thread.map_err(|e| Error::io(Errno::of(&e), "Could not start a core's thread"))?;
        self.running.threads.lock().unwrap_or_else(|e| e.into_inner()).push(thread);
        block_on(rx).unwrap_or_else(|| Err(Error::new(Errno::EIO, "A core's thread died while starting")))
    }

    /// Has `listener` told of events, on the core where they happen; it must not block. Replaces an earlier one.
    pub fn on_event(&self, listener: impl Fn(Event) + Send + 'static) {
        *self.running.shared.listener.lock().unwrap_or_else(|e| e.into_inner()) = Some(Box::new(listener));
    }

    /// The groups of I/O limits, by name.
    pub fn throttle_groups(&self) -> &Groups {
        &self.running.shared.groups
    }

    /// Number of cores.
    pub fn cores(&self) -> usize {
        self.running.shared.cores.len()
    }

    /// Runs a task on a core and hands its result to whoever awaits the returned future, on any thread.
    /// `None` if the core has stopped.
    pub fn spawn_on<T, M>(&self, core: usize, make: M) -> crate::sync::Receiver<T>
    where
        T: Send + 'static,
        M: FnOnce() -> LocalFuture<'static, T> + Send + 'static,
    {
        let (tx, rx) = oneshot();
        let job = Box::new(move |core: &std::rc::Rc<Core>| core.spawn(async move { tx.send(make().await) }));
        if let Some(target) = self.running.shared.cores.get(core) {
            Core::send_from_anywhere(target, Msg::Run(job));
        }
        rx
    }

    /// Runs a task on a core and waits for it. Not for use on a core's own thread. Panics if the core has stopped.
    pub fn run<T, M>(&self, core: usize, make: M) -> T
    where
        T: Send + 'static,
        M: FnOnce() -> LocalFuture<'static, T> + Send + 'static,
    {
        block_on(self.spawn_on(core, make)).expect("a core runs as long as a handle of its engine exists")
    }
}

fn make_core(
    shared: &Arc<EngineShared>,
    index: usize,
    arena: usize,
    clock: Clock,
) -> Result<std::rc::Rc<Core>, Error> {
    let me = shared.cores[index].clone();
    let arena = Arena::new(arena);
    let ring = Uring::new(me.wake_fd(), arena.as_ref().map(|a| a.range()))
        .map_err(|e| Error::io(Errno::of(&e), "Could not set up an io_uring"))?;
    let slot = exec::claim_slot(me.clone())
        .ok_or_else(|| Error::new(Errno::EAGAIN, "Too many cores in one process"))?;
    mem::set_pool(arena);
    Ok(Core::new(me, slot, shared.clone(), Box::new(ring), clock))
}

impl Drop for Running {
    fn drop(&mut self) {
        for core in &self.shared.cores {
            Core::send_from_anywhere(core, Msg::Stop);
        }
        let own = std::thread::current().id();
        let threads = std::mem::take(&mut *self.threads.lock().unwrap_or_else(|e| e.into_inner()));
        for thread in threads {
            if thread.thread().id() != own {
                let _ = thread.join();
            }
        }
        // messages that came too late hold files, and those hold what is dropped here
        for core in &self.shared.cores {
            while core.queue.pop().is_some() {}
        }
    }
}
