//! Corpora: inputs worth keeping, a folder for each target.
//!
//! ```text
//!   corpus/TARGET/NAME     NAME is a hash; of an input that once found something, it says what that was
//! ```
//!
//! Invariants: a corpus is read in the order of names; an input that adds no feature is not kept; a target's corpus stays
//! below [`LIMIT`].

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

use crate::Target;

/// Bytes of one target's corpus, at most.
pub const LIMIT: usize = 160 << 10;

/// The folder of a target's corpus.
pub fn folder(target: &Target) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target.name)
}

/// The inputs of a folder with their names, in order; none if there is no such folder.
pub fn read(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let entries = fs::read_dir(folder).map(|dir| dir.flatten().collect::<Vec<_>>());
    let mut list: Vec<_> = entries
        .unwrap_or_default()
        .iter()
        .filter_map(|e| Some((e.file_name().into_string().ok()?, fs::read(e.path()).ok()?)))
        .collect();
    list.sort();
    list
}

/// The inputs that a target begins with: its own seeds, then its corpus.
pub fn start(target: &Target) -> Vec<Vec<u8>> {
    let kept = read(&folder(target)).into_iter().map(|(_, input)| input);
    (target.seeds)().into_iter().chain(kept).collect()
}

/// The name of an input that says nothing.
pub fn name(input: &[u8]) -> String {
    let mix = |h: u64, b: &u8| (h ^ u64::from(*b)).wrapping_mul(0x100_0000_01b3);
    format!("{:016x}", input.iter().fold(0xcbf2_9ce4_8422_2325, mix))
}

/// Adds inputs from elsewhere to a target's corpus, the shortest first, as long as each shows something new. Gives how
/// many there are now, and their bytes.
///
/// # Errors
/// Those of the file system.
pub fn gather(target: &Target, more: Vec<Vec<u8>>) -> std::io::Result<(usize, usize)> {
    let folder = folder(target);
    fs::create_dir_all(&folder)?;
    let mut seen = HashSet::new();
    for input in (target.seeds)() {
        seen.extend((target.run)(&input).features);
    }
    let (findings, hashes): (Vec<_>, Vec<_>) =
        read(&folder).into_iter().partition(|(name, input)| *name != self::name(input));
    for (name, _) in &hashes {
        fs::remove_file(folder.join(name))?;
    }
    let mut bytes: usize = findings.iter().map(|(_, input)| input.len()).sum();
    let mut count = findings.len();
    let mut all: Vec<Vec<u8>> = hashes.into_iter().map(|(_, input)| input).chain(more).collect();
    all.sort_by(|a, b| (a.len(), a).cmp(&(b.len(), b)));
    for input in all {
        let features = (target.run)(&input).features;
        let is_new = features.iter().any(|f| !seen.contains(f));
        if is_new && bytes + input.len() <= LIMIT {
            seen.extend(features);
            fs::write(folder.join(name(&input)), &input)?;
            (count, bytes) = (count + 1, bytes + input.len());
        }
    }
    Ok((count, bytes))
}
