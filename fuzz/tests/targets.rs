//! Goal: every target holds in the ordinary test run. Method: seeds and corpus, then some mutants with a seed of their own;
//! `cargo xtask fuzz run` makes millions. A failure names a file; `cargo xtask fuzz replay` runs it again.

use ringblock_fuzz::campaign::{self, Bench, Plan};
use ringblock_fuzz::{corpus, find};

fn hold(name: &str, mutants: u64) {
    let target = find(name).expect("a target");
    for (file, input) in corpus::read(&corpus::folder(target)) {
        if let Err(what) = campaign::execute(target, &input) {
            panic!("fuzz/corpus/{name}/{file}: {what}");
        }
    }
    let count = corpus::start(target).len() as u64 + mutants;
    let tally = campaign::run(target, &Plan { count, seed: 0x1234, until: None }, &Bench::default());
    assert_eq!(tally.executions, count);
    if let Some(finding) = tally.findings.first() {
        panic!("{name}: {}; input {:02x?}", finding.what, finding.input);
    }
}

macro_rules! targets {
    ($($name:ident: $mutants:literal),* $(,)?) => { $(
        #[test]
        fn $name() {
            hold(stringify!($name), $mutants);
        }
    )*

        /// Goal: no target is forgotten here.
        #[test]
        fn all_of_them() {
            let here = [$(stringify!($name)),*];
            let there: Vec<_> = ringblock_fuzz::TARGETS.iter().map(|t| t.name).collect();
            assert_eq!(here[..], there[..]);
        }
    };
}

targets! {
    qcow2_header: 20_000,
    snapshot_table: 20_000,
    nbd_handshake: 20_000,
    json: 10_000,
    options: 10_000,
    names: 10_000,
    image_open: 300,
    qcow2_ops: 150,
    qcow2_image: 300,
    nbd_transmission: 300,
    qmp_commands: 300,
}
