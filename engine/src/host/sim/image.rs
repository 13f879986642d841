//! The bytes of a simulated file: sparse pages and a length. Copies share pages, so crash states are cheap.
//!
//! ```text
//!   page 0 [data]   page 1 (hole)   page 2 [data|len ends here]
//! ```
//!
//! Invariant: bytes past the length read as zeroes when the length grows over them.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use crate::host::linux::extent::{Extent, ExtentKind};

const PAGE: u64 = 4096;
type Page = Arc<[u8; PAGE as usize]>;

/// A sparse file image.
#[derive(Clone, Debug, Default)]
pub struct Image {
    pages: BTreeMap<u64, Page>,
    len: u64,
}

impl Image {
    /// An image with this content.
    pub fn from_bytes(data: &[u8]) -> Image {
        let mut image = Image::default();
        image.write(0, data);
        image
    }

    /// All of it, as one piece.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = vec![0; self.len as usize];
        self.read(0, &mut out);
        out
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes that take space.
    pub fn allocated(&self) -> u64 {
        self.pages.len() as u64 * PAGE
    }

    /// Fills the buffer from `off`; returns how much of it is inside the image. The rest is zeroes.
    pub fn read(&self, off: u64, buf: &mut [u8]) -> usize {
        let there = self.len.saturating_sub(off).min(buf.len() as u64) as usize;
        buf.fill(0);
        for_pages(off..off + there as u64, |page, inside, at| {
            if let Some(data) = self.pages.get(&page) {
                let n = inside.len();
                buf[at..at + n].copy_from_slice(&data[inside]);
            }
        });
        there
    }

    /// Writes at `off`; grows the image.
    pub fn write(&mut self, off: u64, data: &[u8]) {
        self.write_raw(off, data);
        self.len = self.len.max(off + data.len() as u64);
    }

    /// Writes without touching the length: what lies past it is kept until [`Image::set_len`] decides.
    pub(super) fn write_raw(&mut self, off: u64, data: &[u8]) {
        for_pages(off..off + data.len() as u64, |page, inside, at| {
            let place = self.pages.entry(page).or_insert_with(|| Arc::new([0; PAGE as usize]));
            let n = inside.len();
            Arc::make_mut(place)[inside].copy_from_slice(&data[at..at + n]);
        });
    }

    /// Zeroes a range; whole pages become holes if `punch`. Does not touch the length.
    pub(super) fn zero_raw(&mut self, range: Range<u64>, punch: bool) {
        if range.is_empty() {
            return;
        }
        let mut edges = Vec::new();
        let present: Vec<u64> =
            self.pages.range(range.start / PAGE..=(range.end - 1) / PAGE).map(|p| *p.0).collect();
        for page in present {
            let (start, end) = (range.start.max(page * PAGE), range.end.min((page + 1) * PAGE));
            if punch && end - start == PAGE {
                self.pages.remove(&page);
            } else {
                edges.push((page, (start % PAGE) as usize..(end - page * PAGE) as usize));
            }
        }
        for (page, inside) in edges {
            if let Some(data) = self.pages.get_mut(&page) {
                Arc::make_mut(data)[inside].fill(0);
            }
        }
    }

    /// Changes the length; what is cut off is gone.
    pub fn set_len(&mut self, len: u64) {
        let keep_to = len.min(self.len);
        self.cut(keep_to);
        self.len = len;
    }

    /// Sets the length to `len` and keeps bytes up to it, wherever the length was before.
    pub(super) fn settle(&mut self, len: u64) {
        self.cut(len);
        self.len = len;
    }

    fn cut(&mut self, at: u64) {
        self.pages.split_off(&at.div_ceil(PAGE));
        let page = at / PAGE;
        if !at.is_multiple_of(PAGE)
            && let Some(data) = self.pages.get_mut(&page)
        {
            Arc::make_mut(data)[(at % PAGE) as usize..].fill(0);
        }
    }

    /// What `SEEK_DATA` and `SEEK_HOLE` would say of the range from `from`, as
    /// [`crate::host::linux::extent::extent_at`] reports it.
    pub fn extent_at(&self, from: u64, to: u64) -> Extent {
        if from >= self.len {
            return Extent { kind: ExtentKind::Beyond, len: to - from };
        }
        let end = to.min(self.len);
        let mut page = from / PAGE;
        let data = self.pages.contains_key(&page);
        while page * PAGE < end && self.pages.contains_key(&page) == data {
            page += 1;
        }
        let kind = if data { ExtentKind::Data } else { ExtentKind::Hole };
        Extent { kind, len: (page * PAGE).min(end) - from }
    }
}

/// Calls `f(page, range inside it, position in the range)` for every page that a range touches.
fn for_pages(range: Range<u64>, mut f: impl FnMut(u64, Range<usize>, usize)) {
    let mut at = range.start;
    while at < range.end {
        let inside = at % PAGE;
        let n = (PAGE - inside).min(range.end - at);
        f(at / PAGE, inside as usize..(inside + n) as usize, (at - range.start) as usize);
        at += n;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::sim::Rng;

    /// Goal: sparse storage equals plain bytes. Method: random operations on both.
    #[test]
    fn equals_a_vector() {
        let mut rng = Rng::new(3);
        let (mut image, mut plain) = (Image::default(), Vec::<u8>::new());
        for i in 0..4000u64 {
            let (off, n) = (rng.below(60_000), rng.below(9000));
            match rng.below(4) {
                0 => {
                    let data = vec![i as u8; n as usize];
                    image.write(off, &data);
                    plain.resize(plain.len().max((off + n) as usize), 0);
                    plain[off as usize..(off + n) as usize].copy_from_slice(&data);
                }
                1 => {
                    let end = (off + n).min(image.len()).max(off);
                    image.zero_raw(off..end, rng.chance(500));
                    plain.get_mut(off as usize..end as usize).into_iter().for_each(|s| s.fill(0));
                }
                2 => {
                    image.set_len(off);
                    plain.resize(off as usize, 0);
                }
                _ => {
                    let mut buf = vec![1; n as usize];
                    let there = image.read(off, &mut buf);
                    let want = plain.get(off as usize..).map_or(&[][..], |s| &s[..s.len().min(n as usize)]);
                    assert_eq!(&buf[..there], want);
                    assert!(buf[there..].iter().all(|&b| b == 0));
                }
            }
        }
        assert_eq!(image.to_bytes(), plain);
    }
}
