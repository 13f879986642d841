//! A journal of one simulated run: what was asked of the disks, what completed, and what the guests were told, in one order.
//!
//! ```text
//!   Disk ── submitted, completed, dropped, flush ─┐
//!   Oracle ── write, zero, flush: began, ended ───┼─► Journal ─► Vec<Event>  (crash states are made of it, offline)
//!   whoever runs operations ── began, ended ──────┘
//! ```
//!
//! Invariant: the journal and the files as they were at the beginning determine every state that a power cut at any moment
//! of the run may leave, and what a guest may find there. A world without a journal pays nothing.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use super::disk::Change;

/// One thing that happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A file that was not there before.
    Created {
        /// Its number.
        disk: i32,
        /// Its name.
        path: PathBuf,
    },
    /// A change is on its way; from now on a crash may find it. `id` is unique for the disk.
    Submitted {
        /// The file.
        disk: i32,
        /// Its name among the changes of the file.
        id: u64,
        /// What changes.
        change: Change,
    },
    /// A change completed.
    Completed {
        /// The file.
        disk: i32,
        /// Which change.
        id: u64,
        /// Of data, so many bytes from the start were written.
        kept: u64,
        /// It is durable at once.
        durable: bool,
    },
    /// A change failed, or never started: nothing of it lands. Parts that did land are changes of their own.
    Dropped {
        /// The file.
        disk: i32,
        /// Which change.
        id: u64,
    },
    /// A flush is on its way.
    FlushSubmitted {
        /// The file.
        disk: i32,
        /// Its name among changes and flushes of the file.
        id: u64,
    },
    /// A flush ended.
    FlushCompleted {
        /// The file.
        disk: i32,
        /// Which flush.
        id: u64,
        /// Whether it succeeded.
        ok: bool,
    },
    /// A guest asks for new data, or zeroes, in sectors of its disk.
    GuestBegan {
        /// Its name, and with the number of the sector its data.
        stamp: u64,
        /// First sector.
        first: usize,
        /// Number of sectors.
        count: usize,
        /// Zeroes instead of data.
        zero: bool,
    },
    /// That has ended.
    GuestEnded {
        /// Which.
        stamp: u64,
        /// It succeeded; otherwise (errors, and discards, which are advice) old and new are both possible.
        sure: bool,
        /// It was acknowledged as durable.
        durable: bool,
    },
    /// A guest's flush begins.
    GuestFlushBegan {
        /// Its name.
        id: u64,
    },
    /// A guest's flush has succeeded.
    GuestFlushed {
        /// Which.
        id: u64,
    },
    /// The disk's size is about to change, or has changed: both sizes are possible in between. In sectors.
    Resize {
        /// The new size.
        sectors: usize,
        /// It is settled.
        settled: bool,
    },
    /// A management operation begins, or (with its outcome) ends.
    Operation {
        /// What is done.
        name: String,
        /// How it ended.
        ok: Option<bool>,
    },
}

/// The events of one run.
#[derive(Debug, Default)]
pub struct Journal(Mutex<Vec<Event>>);

impl Journal {
    /// A journal for [`super::Setup::journal`] and [`super::Oracle::set_journal`].
    pub fn new() -> Arc<Journal> {
        Arc::default()
    }

    /// Adds an event.
    pub fn add(&self, event: Event) {
        self.0.lock().unwrap_or_else(|e| e.into_inner()).push(event);
    }

    /// Everything so far; the journal goes on empty.
    pub fn take(&self) -> Vec<Event> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(|e| e.into_inner()))
    }

    /// Number of events so far.
    pub fn len(&self) -> usize {
        self.0.lock().unwrap_or_else(|e| e.into_inner()).len()
    }

    /// Whether nothing happened yet.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
