//! Kill -9 under write load, some cycles on every kind of image; `cargo xtask adversary kill9` runs hundreds.
//!
//! Method: see [`ringblock_tests::kill9`].

use ringblock_tests::Rng;
use ringblock_tests::kill9::{CASES, Trial};

/// Runs some cycles on each image whose name `belongs`.
fn trials(cycles: u64, belongs: fn(&str) -> bool) {
    let seed = Rng::run_seed();
    let mut run = 0;
    for case in CASES.iter().filter(|c| belongs(c.name)) {
        println!("{}: RINGBLOCK_SEED={seed}", case.name);
        let mut trial = Trial::new(case, seed);
        let ended = (0..cycles).try_for_each(|_| trial.cycle()).and_then(|()| trial.finish());
        let tally = ended.unwrap_or_else(|e| panic!("{} (RINGBLOCK_SEED={seed}): {e}", case.name));
        assert!(tally.cycles >= cycles && tally.restarts > cycles, "{tally:?}");
        run += 1;
    }
    assert!(run >= 2, "{run} kinds of image");
}

/// Goal: the crash contract at its simplest: the default image, around the page cache and through it.
#[test]
fn default_image() {
    trials(6, |name| name.starts_with("v3"));
}

/// Goal: the same where tables grow all the time: tiny clusters.
#[test]
fn tiny_clusters() {
    trials(6, |name| name.starts_with("c512"));
}

/// Goal: the same with 4 KiB clusters, one-bit refcounts, a backing file.
#[test]
fn small_clusters() {
    trials(6, |name| name.starts_with("c4k"));
}

/// Goal: the same with subclusters.
#[test]
fn subclusters() {
    trials(6, |name| name.starts_with("sub"));
}

/// Goal: the same with lazy refcounts, where opening again repairs.
#[test]
fn lazy_refcounts() {
    trials(6, |name| name.starts_with("lazy"));
}

/// Goal: the same with an external data file and with the old version.
#[test]
fn data_file_and_version_two() {
    trials(4, |name| name.starts_with("data-file") || name.starts_with("v2"));
}
