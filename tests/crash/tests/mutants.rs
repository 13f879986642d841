//! Every ordering mutant stands at exactly one place in the sources.

use std::path::{Path, PathBuf};

use ringblock_engine::mutants::MUTANTS;

/// Rust sources below a folder.
fn sources(folder: &Path, out: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, out);
        } else if path.extension().is_some_and(|e| e == "rs") {
            out.push(path);
        }
    }
}

/// Goal: no mutant is left out, or in, twice. Method: the sources are read, all but the table itself.
#[test]
fn every_mutant_has_one_place() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let mut files = Vec::new();
    ["engine/src", "drivers/src", "jobs/src", "src"].iter().for_each(|f| sources(&root.join(f), &mut files));
    files.retain(|f| !f.ends_with("engine/src/mutants.rs"));
    let text: String = files.iter().map(|f| std::fs::read_to_string(f).unwrap()).collect();
    assert!(MUTANTS.len() >= 30);
    for (i, (name, what)) in MUTANTS.iter().enumerate() {
        let places = text.matches(&format!("mutant!(\"{name}\")")).count();
        assert_eq!(places, 1, "{name} ({what})");
        assert!(MUTANTS[..i].iter().all(|m| m.0 != *name), "{name} is in the table twice");
    }
}
