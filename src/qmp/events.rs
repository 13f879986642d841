//! Events: told to every client that has negotiated, with the time at which they happened.
//!
//! Some events can come by the thousand (a failing disk). Those are limited to one a second for each key; of those
//! held back the last is told when the second is over.
//!
//! ```text
//! emit ───────────────► all outboxes
//! emit_limited ─ first in a second ─► all outboxes
//!              └ later ─► held (replaces the one held before) ─ timer thread ─► all outboxes
//! ```

use super::outbox::Outbox;
use ringblock_drivers::options::{Qapi, Value, json};
use serde_json::json;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

const SECOND: Duration = Duration::from_secs(1);
/// Keys whose rate is watched at the same time; beyond it events go out unlimited.
const MAX_KEYS: usize = 1024;

/// A client as events see it.
pub(crate) struct Listener {
    pub(crate) outbox: Outbox,
    pub(crate) pretty: bool,
    pub(crate) negotiated: AtomicBool,
    /// Breaks the connection.
    pub(crate) disconnect: Box<dyn Fn() + Send + Sync>,
}

impl Listener {
    /// A message in the form that this client wants, with its line end.
    pub(crate) fn format(&self, v: &Value) -> Arc<str> {
        (json::write(v, self.pretty) + "\r\n").into()
    }

    fn event(&self, v: &Value) {
        if !self.negotiated.load(Ordering::Acquire) || self.outbox.offer(self.format(v)) {
            return;
        }
        self.outbox.abandon();
        (self.disconnect)();
    }
}

struct Limited {
    until: Instant,
    held: Option<Value>,
}

#[derive(Default)]
struct State {
    listeners: Vec<Weak<Listener>>,
    limited: BTreeMap<(&'static str, String), Limited>,
    timer: bool,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

/// The place where events are told; clones share their clients.
#[derive(Clone, Default)]
pub struct Events {
    shared: Arc<Shared>,
}

impl Events {
    /// Tells an event.
    pub fn emit<T: Qapi>(&self, name: &'static str, data: &T) {
        tell(&mut self.lock(), &message(name, data));
    }

    /// Tells an event at most once a second for each `key` (a node, a device).
    pub fn emit_limited<T: Qapi>(&self, name: &'static str, key: &str, data: &T) {
        let now = Instant::now();
        let message = message(name, data);
        let mut s = self.lock();
        let key = (name, key.to_owned());
        if let Some(l) = s.limited.get_mut(&key)
            && l.until > now
        {
            l.held = Some(message);
            self.start_timer(s);
            return;
        }
        s.limited.retain(|_, l| l.until > now || l.held.is_some());
        if s.limited.len() < MAX_KEYS {
            s.limited.insert(key, Limited { until: now + SECOND, held: None });
        }
        tell(&mut s, &message);
    }

    pub(crate) fn subscribe(&self, listener: &Arc<Listener>) {
        let mut s = self.lock();
        s.listeners.retain(|l| l.strong_count() > 0);
        s.listeners.push(Arc::downgrade(listener));
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn start_timer(&self, mut s: MutexGuard<'_, State>) {
        if s.timer {
            return;
        }
        let shared = self.shared.clone();
        // Without a thread the held event is told with the next one of its key.
        s.timer = std::thread::Builder::new().name("events".into()).spawn(move || timer(&shared)).is_ok();
    }
}

/// Tells held events when their second is over; ends when none is held.
fn timer(shared: &Shared) {
    let mut s = shared.state.lock().unwrap_or_else(PoisonError::into_inner);
    loop {
        let now = Instant::now();
        let mut due = Vec::new();
        for l in s.limited.values_mut().filter(|l| l.until <= now) {
            if let Some(held) = l.held.take() {
                l.until = now + SECOND;
                due.push(held);
            }
        }
        for message in due {
            tell(&mut s, &message);
        }
        let next = s.limited.values().filter(|l| l.held.is_some()).map(|l| l.until).min();
        let Some(next) = next else {
            s.timer = false;
            return;
        };
        let wait = next.saturating_duration_since(Instant::now());
        s = shared.changed.wait_timeout(s, wait).unwrap_or_else(PoisonError::into_inner).0;
    }
}

fn tell(s: &mut State, message: &Value) {
    // The lock is held, so events reach every client in the same order; offering never waits.
    s.listeners.retain(|l| l.upgrade().inspect(|l| l.event(message)).is_some());
}

fn message<T: Qapi>(name: &str, data: &T) -> Value {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    json!({
        "timestamp": {"seconds": now.as_secs(), "microseconds": now.subsec_micros()},
        "event": name,
        "data": data.write(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listener(events: &Events) -> Arc<Listener> {
        let l = Arc::new(Listener {
            outbox: Outbox::default(),
            pretty: false,
            negotiated: AtomicBool::new(true),
            disconnect: Box::new(|| {}),
        });
        events.subscribe(&l);
        l
    }

    /// Goal: a flood is one event a second and the last one is not lost. Method: 100 at once, then wait.
    #[test]
    fn floods_are_limited() {
        let events = Events::default();
        let a = listener(&events);
        for i in 0..100u64 {
            events.emit_limited("E", "disk", &i);
            events.emit_limited("E", &format!("other{}", i % 2), &i);
        }
        events.emit("DONE", &0u64);
        let data = |l: &Listener| {
            let v = json::parse(&l.outbox.next().unwrap()).unwrap();
            (v["event"].clone(), v["data"].clone())
        };
        assert_eq!(data(&a), (json!("E"), json!(0)));
        assert_eq!(data(&a), (json!("E"), json!(0)));
        assert_eq!(data(&a), (json!("E"), json!(1)));
        assert_eq!(data(&a).0, json!("DONE"));
        let late: Vec<_> = (0..3).map(|_| data(&a).1).collect();
        assert_eq!(late, [json!(99), json!(98), json!(99)]);
    }

    /// Goal: only negotiated clients hear events; a full client is dropped, the other is not touched.
    #[test]
    fn slow_clients_go() {
        let events = Events::default();
        let (slow, quick, shy) = (listener(&events), listener(&events), listener(&events));
        shy.negotiated.store(false, Ordering::Release);
        let big = "x".repeat(100 << 10);
        for _ in 0..20 {
            events.emit("E", &big);
            assert!(quick.outbox.next().is_some());
        }
        assert!(slow.outbox.next().is_none(), "abandoned");
        shy.outbox.close();
        assert!(shy.outbox.next().is_none());
    }
}
