//! The rules of a `blkdebug` node: which are in force, in which state the node is, who is held up.
//!
//! Invariant: nothing here waits; who is held up polls [`Rules::is_held`] and is woken when that changes.

use crate::options::blockdev::BlkdebugIOType;
use ringblock_engine::debug::DebugEvent;
use ringblock_engine::error::Errno;
use std::sync::Arc;
use std::task::Waker;

/// An error that requests get.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Inject {
    /// 0: none, and later rules are not looked at.
    pub(super) errno: Errno,
    /// Kinds of requests, one bit each.
    pub(super) iotypes: u8,
    /// Only requests that touch this byte.
    pub(super) offset: Option<u64>,
    /// Gone after one request.
    pub(super) once: bool,
    /// The error is returned at once, and not by way of the scheduler.
    pub(super) immediately: bool,
}

impl Inject {
    /// Every kind but block status, whose errors nobody expects unless asked for.
    pub(super) const ALL_BUT_STATUS: u8 = 0b1_1111;

    /// The bit of a kind.
    pub(super) fn bit(kind: BlkdebugIOType) -> u8 {
        1 << match kind {
            BlkdebugIOType::Read => 0,
            BlkdebugIOType::Write => 1,
            BlkdebugIOType::WriteZeroes => 2,
            BlkdebugIOType::Discard => 3,
            BlkdebugIOType::Flush => 4,
            BlkdebugIOType::BlockStatus => 5,
        }
    }

    fn fits(&self, kind: BlkdebugIOType, at: u64, len: u64) -> bool {
        let here = |o| o >= at && o - at < len;
        self.iotypes & Inject::bit(kind) != 0 && self.offset.is_none_or(here)
    }
}

/// What a rule does.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Action {
    /// Requests fail from now on.
    Inject(Inject),
    /// The node changes its state.
    SetState(i64),
    /// Whoever raises the event waits until this tag is resumed.
    Break(String),
}

/// A rule.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Rule {
    pub(super) event: DebugEvent,
    /// Counts in this state only; 0 in any.
    pub(super) state: i64,
    pub(super) action: Action,
}

/// What becomes known of those who are held up.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Note<'a> {
    /// A request waits at the breakpoint of this tag.
    Suspended(&'a str),
    /// It goes on.
    Resuming(&'a str),
}

/// Who is told.
pub(super) type Listener = Arc<dyn Fn(Note<'_>) + Send + Sync>;

struct Held {
    id: u64,
    tag: String,
    waker: Option<Waker>,
}

/// The rules and their state.
pub(super) struct Rules {
    /// With numbers that are never used again.
    rules: Vec<(u64, Rule)>,
    next: u64,
    state: i64,
    /// Errors in force, first come, first tried.
    active: Vec<(u64, Inject)>,
    held: Vec<Held>,
    /// Waiting for a tag to be held up.
    watchers: Vec<Waker>,
}

impl Rules {
    pub(super) fn new(list: Vec<Rule>) -> Rules {
        let next = list.len() as u64;
        let rules = (0..).zip(list).collect();
        Rules { rules, next, state: 1, active: Vec::new(), held: Vec::new(), watchers: Vec::new() }
    }

    /// Carries out an event. Returns those that its raiser has to wait at, one after the other.
    pub(super) fn event(&mut self, event: DebugEvent) -> Vec<String> {
        let state = self.state;
        let here = |r: &&(u64, Rule)| r.1.event == event && (r.1.state == 0 || r.1.state == state);
        let (mut errors, mut next_state, mut breaks) = (Vec::new(), None, Vec::new());
        for (id, rule) in self.rules.iter().filter(here) {
            match &rule.action {
                Action::Inject(i) => errors.push((*id, i.clone())),
                Action::SetState(s) => next_state = next_state.or(Some(*s)),
                Action::Break(tag) => breaks.push((*id, tag.clone())),
            }
        }
        if !errors.is_empty() {
            self.active = errors;
        }
        self.state = next_state.unwrap_or(state);
        // a breakpoint holds one request
        self.rules.retain(|(id, _)| !breaks.iter().any(|(b, _)| b == id));
        breaks.into_iter().map(|(_, tag)| tag).collect()
    }

    /// The error for a request, and whether it comes at once.
    pub(super) fn check(&mut self, kind: BlkdebugIOType, at: u64, len: u64) -> Option<(Errno, bool)> {
        let found = self.active.iter().find(|(_, i)| i.fits(kind, at, len));
        let (id, inject) = found.filter(|(_, i)| i.errno.0 != 0)?.clone();
        if inject.once {
            self.active.retain(|(a, _)| *a != id);
            self.rules.retain(|(r, _)| *r != id);
        }
        Some((inject.errno, inject.immediately))
    }

    /// Adds a breakpoint.
    pub(super) fn add_break(&mut self, event: DebugEvent, tag: &str) {
        let rule = Rule { event, state: 0, action: Action::Break(tag.to_owned()) };
        self.rules.push((self.next, rule));
        self.next += 1;
    }

    /// Removes the breakpoints of a tag; false if there is none, and nobody is held there.
    pub(super) fn remove_break(&mut self, tag: &str) -> bool {
        let before = self.rules.len();
        self.rules.retain(|(_, r)| !matches!(&r.action, Action::Break(t) if t == tag));
        self.rules.len() < before || self.is_suspended(tag)
    }

    /// Removes all breakpoints and lets everyone go; their tags.
    pub(super) fn remove_all_breaks(&mut self) -> Vec<String> {
        self.rules.retain(|(_, r)| !matches!(r.action, Action::Break(_)));
        let let_go = |h: Held| {
            if let Some(waker) = h.waker {
                waker.wake();
            }
            h.tag
        };
        self.held.drain(..).map(let_go).collect()
    }

    /// Lets one go that is held at a tag, the latest first; false if none is.
    pub(super) fn resume(&mut self, tag: &str) -> bool {
        let Some(at) = self.held.iter().rposition(|h| h.tag == tag) else { return false };
        if let Some(waker) = self.held.remove(at).waker {
            waker.wake();
        }
        true
    }

    /// Somebody is held up from now on. Returns the number under which to ask.
    pub(super) fn hold(&mut self, tag: &str) -> u64 {
        let id = self.next;
        self.next += 1;
        self.held.push(Held { id, tag: tag.to_owned(), waker: None });
        for w in self.watchers.drain(..) {
            w.wake();
        }
        id
    }

    /// Whether that one still waits; if so, it is woken when it need not.
    pub(super) fn is_held(&mut self, id: u64, waker: &Waker) -> bool {
        let held = self.held.iter_mut().find(|h| h.id == id);
        held.map(|h| h.waker = Some(waker.clone())).is_some()
    }

    /// Whether somebody is held at a tag.
    pub(super) fn is_suspended(&self, tag: &str) -> bool {
        self.held.iter().any(|h| h.tag == tag)
    }

    /// Woken when somebody is held up.
    pub(super) fn watch(&mut self, waker: &Waker) {
        self.watchers.push(waker.clone());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use BlkdebugIOType::{BlockStatus, Flush, Read, Write};

    fn error(event: DebugEvent, state: i64, errno: i32) -> Rule {
        let (iotypes, offset) = (Inject::ALL_BUT_STATUS, None);
        let inject = Inject { errno: Errno(errno), iotypes, offset, once: false, immediately: false };
        Rule { event, state, action: Action::Inject(inject) }
    }

    fn errno(found: Option<(Errno, bool)>) -> i32 {
        found.map_or(0, |(e, _)| e.0)
    }

    /// Goal: rules count in their state, and from one event to the next that has any. Method: a small machine.
    #[test]
    fn states() {
        let (load, update, free) = (DebugEvent::L2Load, DebugEvent::L2Update, DebugEvent::ClusterFree);
        let to = |event, state, new| Rule { event, state, action: Action::SetState(new) };
        let mut r = Rules::new(vec![error(load, 2, 5), error(update, 0, 28), to(load, 1, 2), to(load, 2, 1)]);
        r.event(load);
        assert_eq!(errno(r.check(Read, 0, 512)), 0, "the state changes when the event is over");
        r.event(load);
        assert_eq!(errno(r.check(Read, 0, 512)), 5);
        assert_eq!(errno(r.check(Flush, 0, 0)), 5);
        assert_eq!(errno(r.check(BlockStatus, 0, 512)), 0);
        r.event(free);
        assert_eq!(errno(r.check(Write, 0, 512)), 5, "in force until another event has errors");
        r.event(update);
        assert_eq!(errno(r.check(Write, 0, 512)), 28);
        r.event(load);
        assert_eq!(errno(r.check(Write, 0, 512)), 28, "back in state 1 the first rule does not count");
    }

    /// Goal: `once` and `sector`. Method: requests that touch the place and that do not.
    #[test]
    fn once_and_place() {
        let mut rule = error(DebugEvent::None, 0, 5);
        if let Action::Inject(i) = &mut rule.action {
            (i.once, i.offset) = (true, Some(1024));
        }
        let mut r = Rules::new(vec![rule]);
        r.event(DebugEvent::None);
        assert_eq!(errno(r.check(Read, 0, 1024)), 0);
        assert_eq!(errno(r.check(Flush, 0, 0)), 0);
        assert_eq!(errno(r.check(Write, 1024, 1)), 5);
        r.event(DebugEvent::None);
        assert_eq!(errno(r.check(Write, 1024, 1)), 0, "gone for good");
    }

    /// Goal: a breakpoint holds one request, until its tag is resumed or removed.
    #[test]
    fn breakpoints() {
        let mut r = Rules::new(Vec::new());
        r.add_break(DebugEvent::ReadAio, "A");
        assert_eq!(r.event(DebugEvent::WriteAio), Vec::<String>::new());
        assert_eq!(r.event(DebugEvent::ReadAio), ["A"]);
        assert_eq!(r.event(DebugEvent::ReadAio), Vec::<String>::new());
        let id = r.hold("A");
        assert!(r.is_suspended("A") && r.is_held(id, Waker::noop()));
        assert!(!r.resume("B") && r.resume("A") && !r.resume("A"));
        assert!(!r.is_held(id, Waker::noop()) && !r.remove_break("A"));
        r.add_break(DebugEvent::ReadAio, "A");
        assert!(r.remove_break("A"));
        assert!(r.event(DebugEvent::ReadAio).is_empty());
    }
}
