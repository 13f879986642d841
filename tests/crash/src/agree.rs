//! `crash agree`: our independent checker, `qemu-img check` and our own `img check` on the same images.
//!
//! ```text
//!   crash states, sound ───────────────┐      ┌─ tests/checker
//!   crash states of ordering mutants ──┼─► image ─ qemu-img check   ─► same verdict: sound, leaks, errors, refused
//!   damaged and mutated metadata ──────┘      └─ ringblock img check
//! ```

use ringblock_checker::Checker;
use ringblock_engine::host::sim::Rng;

use crate::args::Args;
use crate::cases::cases;
use crate::damage::Layout;
use crate::peer::{self, Folder};
use crate::recover::{Mode, single};
use crate::repair::Sources;
use crate::subject::{Subject, random_states};
use crate::trials::{self, Sum};
use crate::work::plan;

/// The classes that are compared: exit code, errors, leaks. Where nothing could be checked the rest says nothing.
type Class = (i32, bool, bool);

fn class(code: i32, corruptions: u64, leaks: u64) -> Class {
    if code == 1 { (1, false, false) } else { (code, corruptions > 0, leaks > 0) }
}

/// The figures.
#[derive(Default)]
struct Figures {
    samples: u64,
    /// Not compared: the peer opens backing files for a check, and the mutated name leads nowhere.
    nameless: u64,
    /// By exit code of the peer.
    codes: [u64; 4],
    checker: u64,
    own: u64,
    failures: Vec<String>,
}

impl Sum for Figures {
    fn add(&mut self, o: Figures) {
        self.samples += o.samples;
        self.nameless += o.nameless;
        self.codes.iter_mut().zip(o.codes).for_each(|(a, b)| *a += b);
        self.checker += o.checker;
        self.own += o.own;
        self.failures.extend(o.failures);
    }

    fn counted(&self) -> u64 {
        self.samples
    }

    fn failures(&self) -> &[String] {
        &self.failures
    }
}

/// Images of one trial.
const IMAGES: usize = 8;

/// States of a run in which a rule was left out.
#[cfg(feature = "mutants")]
fn wrong_runs(rng: &mut Rng) -> Vec<Subject> {
    use ringblock_engine::mutants::{MUTANTS, with};
    let (name, _) = MUTANTS[rng.index(MUTANTS.len())];
    let plan = plan(&cases(), rng.below(1 << 20), rng.next());
    let mut out = Vec::new();
    // some of them end in an assertion
    if let Ok(recording) = with(Some(name), || plan.record()) {
        random_states(&recording, rng, IMAGES, |s| {
            let mut subject = Subject::of_state(&plan.case, s);
            subject.name = format!("{} without {name}", subject.name);
            out.push(subject);
        });
    }
    out
}

/// Without the mutants: a run like others.
#[cfg(not(feature = "mutants"))]
fn wrong_runs(rng: &mut Rng) -> Vec<Subject> {
    let plan = plan(&cases(), rng.below(1 << 20), rng.next());
    let mut out = Vec::new();
    if let Ok(recording) = plan.record() {
        random_states(&recording, rng, IMAGES, |s| out.push(Subject::of_state(&plan.case, s)));
    }
    out
}

fn trial(sources: &Sources, args: &Args, number: u64) -> Figures {
    let mut rng = trials::rng(args, number);
    let mutant = rng.chance(300);
    let images = if mutant { wrong_runs(&mut rng) } else { sources.some(&mut rng, IMAGES) };
    let folder = Folder::new();
    let mut figures = Figures::default();
    for (i, mut subject) in images.into_iter().enumerate() {
        let mut what = subject.name.clone();
        let mut own = rng.fork();
        let steps = if mutant { 0 } else { own.pick(&[0, 1, 1, 2, 3]) };
        if let Some(layout) = Layout::of(&subject.of_image()) {
            let image = subject.image_mut();
            what += &match own.chance(600) {
                true => (0..steps).map(|_| format!(", {}", layout.mutate(image, &mut own))).collect(),
                false => format!(": {}", layout.hurt(image, steps, &mut own)),
            };
        }
        if args.get("image").is_some_and(|n| n != i.to_string()) {
            continue;
        }
        peer::put(&folder, &subject);
        let mut one = one(&folder, &subject, &what);
        let again = format!("  cargo xtask crash agree --seed {} --trial {number} --image {i}", args.seed);
        one.failures.iter_mut().for_each(|f| *f = format!("{f}\n{again}"));
        if let Some(dir) = args.get("save") {
            subject.save(std::path::Path::new(dir)).unwrap_or_else(|e| panic!("{dir}: {e}"));
        }
        figures.add(one);
    }
    figures
}

/// One image, three opinions.
fn one(folder: &Folder, subject: &Subject, what: &str) -> Figures {
    let mut checker = Checker::default();
    let report = checker.check(&subject.of_image());
    let theirs = peer::check(folder);
    if theirs.text.contains("Could not open backing file") {
        return Figures { nameless: 1, ..Figures::default() };
    }
    let peer = class(theirs.code, theirs.corruptions, theirs.leaks);
    let mine = class(report.exit_code(), report.corruptions.into(), report.leaks.into());
    let mut figures = Figures { samples: 1, ..Figures::default() };
    figures.codes[theirs.code as usize] += 1;
    if mine != peer {
        figures.checker += 1;
        let text =
            format!("{what}: checker {mine:?}: {}\n  peer {peer:?}: {}", report.explain(), theirs.text);
        figures.failures.push(text);
    }
    let own = match single(subject, Mode::Look, 1) {
        Ok((said, _)) => (class(said.code, said.corruptions, said.leaks), said.text),
        Err(text) => ((-1, false, false), text),
    };
    if own.0 != peer {
        figures.own += 1;
        let text = format!("{what}: img check {:?}: {}\n  peer {peer:?}: {}", own.0, own.1, theirs.text);
        figures.failures.push(text);
    }
    figures
}

/// `crash agree`.
pub fn command(args: &[String]) -> bool {
    let args = match Args::parse(args, 2_000) {
        Ok(args) => args,
        Err(why) => {
            eprintln!("crash: {why}");
            return false;
        }
    };
    let sources = Sources::new(args.seed);
    let (f, seconds) = trials::run(&args, |number| trial(&sources, &args, number));
    let [sound, refused, corrupt, leaks] = f.codes;
    println!(
        "proof: our checker and qemu-img: {} samples; disagreements {}; of img check {}; sound {sound}, leaks {leaks}, \
         corrupt {corrupt}, refused {refused}; not compared for a lost backing file {}; {seconds:.1} s",
        f.samples, f.checker, f.own, f.nameless
    );
    f.failures.is_empty() && f.samples > 0
}
