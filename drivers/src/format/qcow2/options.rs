//! Options of an open qcow2 node, and the sizes of its caches.
//!
//! Invariant: whatever the options say, both caches have room for a few entries and an upper bound.
//!
//! ```text
//! cache-size = l2-cache-size + refcount-cache-size      defaults: min(needed, 32 MiB) and 4 clusters
//! ```
//! Source: reference part 2.6; texts as `qemu-img` gives them.

use std::sync::Arc;

use ringblock_engine::Error;
use ringblock_engine::driver::Role;
use ringblock_engine::graph::{ChildSpec, Common};

use super::geometry::Geometry;

/// Default bound of the L2 cache, bytes.
const L2_CACHE_DEFAULT: u64 = 32 << 20;
/// Clusters that the refcount cache holds at least.
const REFCOUNT_CLUSTERS: u64 = 4;
/// Seconds after which unused slices leave the cache, by default.
pub const CLEAN_INTERVAL_DEFAULT: u32 = 600;

/// What the backing file is.
pub enum Backing {
    /// The one that the image names, if it names one.
    FromImage,
    /// None, whatever the image names.
    None,
    /// This one.
    Node(ChildSpec),
}

/// A file that the image names and the options do not.
pub struct NamedInImage<'a> {
    /// Its path, relative paths already joined with the folder of the image.
    pub path: &'a str,
    /// Its format, where the image names one.
    pub format: Option<&'a str>,
    /// What it is for.
    pub role: Role,
    /// Node options that it inherits.
    pub common: Common,
}

/// Turns a name found in an image into a node to open, or refuses it.
pub type NameOpener = Arc<dyn Fn(&NamedInImage<'_>) -> Result<ChildSpec, Error> + Send + Sync>;

/// Cache options as given.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct CacheOptions {
    /// `cache-size`, bytes.
    pub total: Option<u64>,
    /// `l2-cache-size`, bytes.
    pub l2: Option<u64>,
    /// `l2-cache-entry-size`, bytes. Checked; slices are always 4 KiB, or a cluster where that is smaller.
    pub l2_entry: Option<u64>,
    /// `refcount-cache-size`, bytes.
    pub refcount: Option<u64>,
    /// `cache-clean-interval`, seconds; 0 never.
    pub clean_interval: Option<u32>,
}

/// The options of a qcow2 node.
pub struct Qcow2Options {
    /// The image file.
    pub file: ChildSpec,
    /// The backing file.
    pub backing: Backing,
    /// The external data file.
    pub data_file: Option<ChildSpec>,
    /// Caches.
    pub cache: CacheOptions,
    /// Guest discards reach the file; by default as the node's own `discard`.
    pub pass_discard_request: Option<bool>,
    /// Opens files that the image names. Without it such an image opens only when the options name the files.
    pub opener: Option<NameOpener>,
    /// The external data file may be the one that the image names.
    pub trust_data_file_name: bool,
    /// Opened to be checked: damage is no reason to refuse it, and nothing is written by the node itself.
    pub check: bool,
}

impl Qcow2Options {
    /// Options with defaults on `file`.
    pub fn new(file: ChildSpec) -> Qcow2Options {
        Qcow2Options {
            file,
            backing: Backing::FromImage,
            data_file: None,
            cache: CacheOptions::default(),
            pass_discard_request: None,
            opener: None,
            trust_data_file_name: false,
            check: false,
        }
    }
}

/// Sizes of the caches.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct CacheSizes {
    /// Frames of L2 slices.
    pub(super) frames: u32,
    /// Bytes of refcount blocks.
    pub(super) refcount: u64,
}

impl CacheOptions {
    /// The sizes for an image of `size` bytes.
    ///
    /// # Errors
    /// `EINVAL` for combinations that contradict each other.
    pub(super) fn sizes(&self, g: &Geometry, size: u64) -> Result<CacheSizes, Error> {
        let fail = |text: &str| Err(Error::invalid(text));
        if let Some(n) = self.l2_entry
            && (!n.is_power_of_two() || n < 512 || n > g.cluster_size())
        {
            return Err(Error::invalid(format!(
                "L2 cache entry size must be a power of two between 512 and the cluster size ({})",
                g.cluster_size()
            )));
        }
        let needed = (g.clusters_for(size) << g.l2_entry_bits()).next_multiple_of(g.cluster_size());
        let least = REFCOUNT_CLUSTERS * g.cluster_size();
        let (l2, refcount) = match (self.total, self.l2, self.refcount) {
            (Some(_), Some(_), Some(_)) => {
                return fail(
                    "cache-size, l2-cache-size and refcount-cache-size may not be set at the same time",
                );
            }
            (Some(t), Some(l), _) if l > t => return fail("l2-cache-size may not exceed cache-size"),
            (Some(t), _, Some(r)) if r > t => return fail("refcount-cache-size may not exceed cache-size"),
            (Some(t), Some(l), None) => (l, t - l),
            (Some(t), None, Some(r)) => (t - r, r),
            (Some(t), None, None) if t >= needed.saturating_add(least) => (needed, t - needed),
            (Some(t), None, None) => (t - t.min(least), t.min(least)),
            (None, l, r) => (l.unwrap_or(L2_CACHE_DEFAULT), r.unwrap_or(least)),
        };
        if l2 > i32::MAX as u64 * g.cluster_size() {
            return fail("L2 cache size too big");
        }
        if refcount > i32::MAX as u64 * g.cluster_size() {
            return fail("Refcount cache size too big");
        }
        let frames = (l2.min(needed) / g.slice_size()).clamp(16, 1 << 24);
        Ok(CacheSizes { frames: frames as u32, refcount })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: defaults follow the disk up to 32 MiB. Method: a small and a large disk.
    #[test]
    fn default_sizes() {
        let g = Geometry::new(16, 4, false).unwrap();
        let d = CacheOptions::default();
        assert_eq!(d.sizes(&g, 1 << 40).unwrap(), CacheSizes { frames: 8192, refcount: 4 << 16 });
        assert_eq!(d.sizes(&g, 1 << 30).unwrap().frames, 32);
        assert_eq!(d.sizes(&g, 0).unwrap().frames, 16);
    }

    /// Goal: contradictions are refused with the known texts. Method: one of each.
    #[test]
    fn contradictions() {
        let g = Geometry::new(16, 4, false).unwrap();
        let text = |o: CacheOptions| o.sizes(&g, 1 << 30).unwrap_err().message;
        let all = CacheOptions { total: Some(1), l2: Some(1), refcount: Some(1), ..Default::default() };
        assert!(text(all).starts_with("cache-size, l2-cache-size and refcount-cache-size"));
        let l2 = CacheOptions { total: Some(1), l2: Some(2), ..Default::default() };
        assert_eq!(text(l2), "l2-cache-size may not exceed cache-size");
        let rc = CacheOptions { total: Some(1), refcount: Some(2), ..Default::default() };
        assert_eq!(text(rc), "refcount-cache-size may not exceed cache-size");
        let entry = CacheOptions { l2_entry: Some(300), ..Default::default() };
        assert!(text(entry).contains("between 512 and the cluster size (65536)"));
    }
}
