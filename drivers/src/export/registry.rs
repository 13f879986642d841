//! The exports of a process, of whatever type: ids, removal, and the news that one is gone.
//!
//! Invariants:
//! - An id belongs to at most one export; it is free again only when the export is wholly gone, which is
//!   when the deleted callback has been called (reference, part 5 item 55).
//! - Adding is all-or-nothing: a [`Reservation`] that is dropped leaves no trace.
//! - Nothing foreign is called while the table is locked.
//!
//! ```text
//! reserve(id) ──► Reservation ── publish ──► live ── remove ──► shutting down ── gone ──► deleted(id)
//!                     └ drop: id free again
//! ```

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

use ringblock_engine::Error;
use ringblock_engine::sync::{Receiver, Sender, oneshot};

/// One export of some type.
pub trait Export: Send + Sync {
    /// The type as the control pipe spells it: "nbd".
    fn kind(&self) -> &'static str;
    /// The node it shows now.
    fn node_name(&self) -> String;
    /// Whether clients are connected.
    fn in_use(&self) -> bool;
    /// Takes no more clients and cuts those there are. Called once. `gone` is called, on any thread, when
    /// the last client has left and the node is released.
    fn shut_down(self: Arc<Self>, gone: Box<dyn FnOnce() + Send>);
}

/// How to remove an export that has clients.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum RemoveMode {
    /// Refuse.
    #[default]
    Safe,
    /// Cut them.
    Hard,
}

/// What `query-block-exports` says of one export.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ExportStatus {
    /// Its id.
    pub id: String,
    /// Its type.
    pub kind: &'static str,
    /// The node it shows.
    pub node_name: String,
    /// Whether its removal has begun.
    pub shutting_down: bool,
}

enum Entry {
    Reserved,
    Live(Arc<dyn Export>),
    Leaving { kind: &'static str, node_name: String, waiters: Vec<Sender<()>> },
}

type Deleted = Box<dyn Fn(&str) + Send + Sync>;

/// The table of exports.
pub struct Exports {
    table: Mutex<BTreeMap<String, Entry>>,
    deleted: Deleted,
}

/// An id that nobody else can take while this lives.
pub struct Reservation {
    exports: Arc<Exports>,
    id: String,
    published: bool,
}

impl Exports {
    /// An empty table; `deleted` hears of each export that is gone (the event `BLOCK_EXPORT_DELETED`).
    pub fn new(deleted: impl Fn(&str) + Send + Sync + 'static) -> Arc<Exports> {
        Arc::new(Exports { table: Mutex::default(), deleted: Box::new(deleted) })
    }

    fn table(&self) -> MutexGuard<'_, BTreeMap<String, Entry>> {
        self.table.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Takes an id for an export about to be made.
    ///
    /// # Errors
    /// "Invalid block export id", "Block export id 'x' is already in use".
    pub fn reserve(self: &Arc<Exports>, id: &str) -> Result<Reservation, Error> {
        if !well_formed(id) {
            return Err(Error::invalid("Invalid block export id"));
        }
        let mut table = self.table();
        if table.contains_key(id) {
            return Err(Error::invalid(format!("Block export id '{id}' is already in use")));
        }
        table.insert(id.to_owned(), Entry::Reserved);
        Ok(Reservation { exports: self.clone(), id: id.to_owned(), published: false })
    }

    /// Begins the removal of an export; the deleted callback tells of its end.
    ///
    /// # Errors
    /// "Export 'x' is not found", "export 'x' still in use", "Export 'x' is already shutting down".
    pub fn remove(self: &Arc<Exports>, id: &str, mode: RemoveMode) -> Result<(), Error> {
        self.begin_removal(id, mode, None)
    }

    /// Removes every export of a type, cutting its clients, and waits until all are gone.
    pub async fn remove_all(self: &Arc<Exports>, kind: &str) {
        let ids: Vec<String> = self.query().into_iter().filter(|e| e.kind == kind).map(|e| e.id).collect();
        let mut ends: Vec<Receiver<()>> = Vec::new();
        for id in ids {
            let (tx, rx) = oneshot();
            ends.push(rx);
            // Only "not found" can come, when it went by itself; the sender is then dropped and nobody waits.
            let _ = self.begin_removal(&id, RemoveMode::Hard, Some(tx));
        }
        for end in ends {
            end.await;
        }
    }

    fn begin_removal(
        self: &Arc<Exports>,
        id: &str,
        mode: RemoveMode,
        waiter: Option<Sender<()>>,
    ) -> Result<(), Error> {
        let export = {
            let mut table = self.table();
            match table.get_mut(id) {
                None | Some(Entry::Reserved) => {
                    return Err(Error::invalid(format!("Export '{id}' is not found")));
                }
                Some(Entry::Leaving { waiters, .. }) => {
                    return match waiter {
                        Some(w) => {
                            waiters.push(w);
                            Ok(())
                        }
                        None => Err(Error::invalid(format!("Export '{id}' is already shutting down"))),
                    };
                }
                Some(Entry::Live(e)) if mode == RemoveMode::Safe && e.in_use() => {
                    let hint = format!("export '{id}' still in use");
                    return Err(Error::new(ringblock_engine::Errno::EBUSY, hint));
                }
                Some(Entry::Live(e)) => {
                    let (kind, node_name) = (e.kind(), e.node_name());
                    let waiters = waiter.into_iter().collect();
                    let leaving = Entry::Leaving { kind, node_name, waiters };
                    match table.insert(id.to_owned(), leaving) {
                        Some(Entry::Live(e)) => e,
                        _ => return Ok(()),
                    }
                }
            }
        };
        let (me, name) = (self.clone(), id.to_owned());
        export.shut_down(Box::new(move || me.gone(&name)));
        Ok(())
    }

    fn gone(&self, id: &str) {
        let entry = self.table().remove(id);
        (self.deleted)(id);
        if let Some(Entry::Leaving { waiters, .. }) = entry {
            waiters.into_iter().for_each(|w| w.send(()));
        }
    }

    /// All exports, by id.
    pub fn query(&self) -> Vec<ExportStatus> {
        let table = self.table();
        let status = |(id, entry): (&String, &Entry)| {
            let (kind, node_name, shutting_down) = match entry {
                Entry::Reserved => return None,
                Entry::Live(e) => (e.kind(), e.node_name(), false),
                Entry::Leaving { kind, node_name, .. } => (*kind, node_name.clone(), true),
            };
            Some(ExportStatus { id: id.clone(), kind, node_name, shutting_down })
        };
        table.iter().filter_map(status).collect()
    }
}

impl Reservation {
    /// The id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Puts the finished export in the table.
    pub fn publish(mut self, export: Arc<dyn Export>) {
        self.published = true;
        self.exports.table().insert(self.id.clone(), Entry::Live(export));
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if !self.published {
            self.exports.table().remove(&self.id);
        }
    }
}

/// The rule for ids that people choose: a letter, then letters, digits, '-', '.', '_'.
fn well_formed(id: &str) -> bool {
    let rest = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_');
    id.starts_with(|c: char| c.is_ascii_alphabetic()) && id.chars().all(rest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use ringblock_engine::sync::block_on;
    use std::sync::atomic::{AtomicBool, Ordering};

    #[derive(Default)]
    struct Fake {
        used: AtomicBool,
        slow: bool,
        gone: Mutex<Option<Box<dyn FnOnce() + Send>>>,
    }
    impl Export for Fake {
        fn kind(&self) -> &'static str {
            "nbd"
        }
        fn node_name(&self) -> String {
            "n".into()
        }
        fn in_use(&self) -> bool {
            self.used.load(Ordering::Relaxed)
        }
        fn shut_down(self: Arc<Self>, gone: Box<dyn FnOnce() + Send>) {
            match self.slow {
                true => *self.gone.lock().unwrap() = Some(gone),
                false => gone(),
            }
        }
    }
    fn table() -> (Arc<Exports>, Arc<Mutex<Vec<String>>>) {
        let news = Arc::new(Mutex::new(Vec::new()));
        let to = news.clone();
        (Exports::new(move |id| to.lock().unwrap().push(id.into())), news)
    }

    /// Goal: an id is taken from reservation to deletion and free otherwise, failures included. Method: walk
    /// through the life of one id.
    #[test]
    fn an_id_lives_once() {
        let (t, news) = table();
        drop(t.reserve("e0").unwrap());
        let r = t.reserve("e0").unwrap();
        assert_eq!(t.reserve("e0").err().unwrap().message, "Block export id 'e0' is already in use");
        assert!(t.query().is_empty());
        assert_eq!(t.remove("e0", RemoveMode::Hard).unwrap_err().message, "Export 'e0' is not found");
        let fake = Arc::new(Fake { slow: true, ..Fake::default() });
        r.publish(fake.clone());
        fake.used.store(true, Ordering::Relaxed);
        assert_eq!(t.remove("e0", RemoveMode::Safe).unwrap_err().message, "export 'e0' still in use");
        t.remove("e0", RemoveMode::Hard).unwrap();
        let e = t.remove("e0", RemoveMode::Hard).unwrap_err();
        assert_eq!(e.message, "Export 'e0' is already shutting down");
        assert!(t.query()[0].shutting_down && t.reserve("e0").is_err() && news.lock().unwrap().is_empty());
        (fake.gone.lock().unwrap().take().unwrap())();
        assert_eq!(*news.lock().unwrap(), ["e0"]);
        assert!(t.reserve("e0").is_ok());
    }

    /// Goal: removing all waits for those that go slowly, also if they were going already. Method: one quick
    /// and one slow export, the slow one let go by another thread.
    #[test]
    fn remove_all_waits() {
        let (t, news) = table();
        let slow = Arc::new(Fake { slow: true, ..Fake::default() });
        t.reserve("a").unwrap().publish(Arc::new(Fake::default()));
        t.reserve("b").unwrap().publish(slow.clone());
        t.remove("b", RemoveMode::Safe).unwrap();
        let release = std::thread::spawn(move || {
            std::thread::sleep(std::time::Duration::from_millis(20));
            (slow.gone.lock().unwrap().take().unwrap())();
        });
        block_on(t.remove_all("nbd"));
        release.join().unwrap();
        assert_eq!(*news.lock().unwrap(), ["a", "b"]);
        assert!(t.query().is_empty());
    }

    /// Goal: ids follow the rule of the control pipe. Method: samples.
    #[test]
    fn ids() {
        assert!(well_formed("e0.a-b_C"));
        for bad in ["", "0e", "#x", "a b", "a/b", "é", "-x"] {
            assert!(!well_formed(bad), "{bad}");
        }
    }
}
