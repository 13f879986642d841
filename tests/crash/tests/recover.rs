//! Small slices of `crash repair`, `crash lazy` and `crash agree`.

/// The words of a command line.
fn words(line: &str) -> Vec<String> {
    line.split_whitespace().map(String::from).collect()
}

/// Goal: a power cut during a recovery changes no data, and recovering again ends it. Method: some hundred states.
#[test]
fn crashes_during_repair() {
    assert!(ringblock_crash::repair::command(&words("--count 250 --seed 7")));
}

/// Goal: lazy and dirty images are sound after opening. Method: some hundred states, a few of them opened by QEMU.
#[test]
fn lazy_and_dirty_images() {
    assert!(ringblock_crash::lazy::command(&words("--count 250 --seed 7")));
}

/// Goal: our checker, our check and the peer's agree. Method: a few dozen images, sound and not.
#[test]
fn checkers_agree() {
    assert!(ringblock_crash::agree::command(&words("--count 40 --seed 7")));
}
