//! A repair tried out: what it would write stays in memory, so that an image that cannot be put right is left as it is.
//!
//! Invariants: the file is only read; memory is bounded by what a repair writes, which is metadata.
//!
//! ```text
//! check::run ─► Rehearsal ─┬ write ─► pages
//!                          └ read ──► file, with the pages over it
//! ```

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::ops::Range;

use ringblock_engine::Errno;
use ringblock_engine::driver::LocalFuture;
use ringblock_engine::mem::Buf;

use super::io::Store;

/// Bytes of a page.
const PAGE: u64 = 4096;

/// A file as it would be.
pub(super) struct Rehearsal<'a> {
    file: &'a dyn Store,
    pages: RefCell<BTreeMap<u64, Buf>>,
    size: Cell<u64>,
}

impl<'a> Rehearsal<'a> {
    /// Nothing is written yet.
    pub(super) fn of(file: &'a dyn Store) -> Result<Rehearsal<'a>, Errno> {
        Ok(Rehearsal { file, pages: RefCell::default(), size: Cell::new(file.size()?) })
    }

    /// The part of page `p` that lies in a range of the file: where in the page, and where in the range.
    fn part(p: u64, range: &Range<u64>) -> (Range<usize>, Range<usize>) {
        let (from, to) = (range.start.max(p * PAGE), range.end.min(p.saturating_add(1).saturating_mul(PAGE)));
        let within = |base: u64| (from - base) as usize..(to - base) as usize;
        (within(p * PAGE), within(range.start))
    }

    async fn change(&self, off: u64, bytes: &[u8]) -> Result<(), Errno> {
        let range = off..off.checked_add(bytes.len() as u64).ok_or(Errno::EFBIG)?;
        for p in off / PAGE..range.end.div_ceil(PAGE) {
            if !self.pages.borrow().contains_key(&p) {
                let (result, page) = self.file.read(p * PAGE, Buf::new(PAGE as usize)).await;
                result?;
                self.pages.borrow_mut().insert(p, page);
            }
            let (page, part) = Self::part(p, &range);
            if let Some(to) = self.pages.borrow_mut().get_mut(&p) {
                to[page].copy_from_slice(&bytes[part]);
            }
        }
        self.size.set(self.size.get().max(range.end));
        Ok(())
    }
}

impl Store for Rehearsal<'_> {
    fn read(&self, off: u64, buf: Buf) -> LocalFuture<'_, (Result<(), Errno>, Buf)> {
        Box::pin(async move {
            let (result, mut buf) = self.file.read(off, buf).await;
            let range = off..off.saturating_add(buf.len() as u64);
            for (&p, from) in self.pages.borrow().range(off / PAGE..range.end.div_ceil(PAGE)) {
                let (page, part) = Self::part(p, &range);
                buf[part].copy_from_slice(&from[page]);
            }
            (result, buf)
        })
    }

    fn write(&self, off: u64, buf: Buf) -> LocalFuture<'_, Result<(), Errno>> {
        Box::pin(async move { self.change(off, &buf).await })
    }

    fn zero(&self, off: u64, len: u64, _unmap: bool) -> LocalFuture<'_, Result<(), Errno>> {
        Box::pin(async move { self.change(off, &Buf::zeroed(len as usize)).await })
    }

    fn discard(&self, _off: u64, _len: u64) -> LocalFuture<'_, Result<(), Errno>> {
        Box::pin(async { Ok(()) })
    }

    fn flush(&self) -> LocalFuture<'_, Result<(), Errno>> {
        Box::pin(async { Ok(()) })
    }

    fn size(&self) -> Result<u64, Errno> {
        Ok(self.size.get())
    }

    fn used(&self) -> Result<u64, Errno> {
        Ok(self.file.used()? + self.pages.borrow().len() as u64 * PAGE)
    }

    fn truncate(&self, size: u64) -> LocalFuture<'_, Result<(), Errno>> {
        // A repair only makes files longer.
        self.size.set(self.size.get().max(size));
        Box::pin(async { Ok(()) })
    }
}

#[cfg(test)]
mod tests {
    use super::super::simkit::{Sim, SimFile};
    use super::*;

    /// Goal: what was written is read back, over the file and across pages, and the file stays as it is. Method: a write over
    /// two pages, one behind the end, a read of all.
    #[test]
    fn writes_stay_in_memory() {
        let sim = Sim::new(1);
        let file = SimFile::new(&sim, vec![1; 10_000]);
        let f = file.clone();
        let got = sim.run(async move {
            let r = Rehearsal::of(&*f).unwrap();
            r.write(4000, Buf::from_slice(&[2; 200])).await.unwrap();
            r.write(12_000, Buf::from_slice(&[3; 10])).await.unwrap();
            let (result, buf) = r.read(3990, Buf::new(8100)).await;
            result.unwrap();
            (r.size().unwrap(), buf.to_vec())
        });
        let mut want =
            [vec![1; 10], vec![2; 200], vec![1; 5800], vec![0; 2000], vec![3; 10], vec![0; 80]].concat();
        want.truncate(8100);
        assert_eq!(got, (12_010, want));
        assert_eq!(file.content(), vec![1; 10_000]);
    }
}
