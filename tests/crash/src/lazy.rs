//! `crash lazy`: crash states of images with lazy refcounts or the dirty bit, opened for writing by us, a sample by QEMU.
//!
//! ```text
//!   ours: states of our own runs, lazy refcounts on, some marked dirty ────────────┐
//!   lagging: the same, dirty, counters as they were before, as a lazy writer's are ┼─► our open ─► sound, same data
//!   QEMU's: states of its lazy runs, logged by blklogwrites ───────────────────────┘      └ a sample: QEMU's open ─► the same
//! ```
//!
//! What QEMU makes of an image that our engine left counts as ours. What it makes of images that a lazy writer left is its
//! own affair (it trusts the end of the file where that was lost), and is only told.

use ringblock_checker::Checker;
use ringblock_engine::host::sim::Rng;

use crate::allowed::Allowed;
use crate::args::Args;
use crate::cases::{Case, cases};
use crate::damage::Layout;
use crate::judge::Contract;
use crate::peer::{self, Folder};
use crate::recover::{Mode, single};
use crate::subject::{Content, Subject, random_states};
use crate::trials::{self, Sum};
use crate::work::{Work, plan};

/// Who left the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Writer {
    /// Our engine.
    Ours,
    /// A writer whose counters lag behind.
    Lagging,
    /// QEMU.
    Peer,
}

/// Of so many states one is opened by QEMU.
const SAMPLE: u64 = 150;
/// States of one recording.
const STATES: usize = 60;

/// The figures.
#[derive(Default)]
struct Figures {
    states: u64,
    /// States that had to be repaired.
    repaired: u64,
    /// States of QEMU that are not dirty and yet corrupt, that it marked corrupt itself, or that nobody can read: no recovery is asked for, or can help.
    beyond: u64,
    after_us: u64,
    after_peer: u64,
    opened_by_peer: u64,
    /// Of lazy writers' images: opened by QEMU, and corrupt or changed then.
    lazy: u64,
    lazy_bad: u64,
    failures: Vec<String>,
}

impl Sum for Figures {
    fn add(&mut self, o: Figures) {
        self.states += o.states;
        self.repaired += o.repaired;
        self.beyond += o.beyond;
        self.after_us += o.after_us;
        self.after_peer += o.after_peer;
        self.opened_by_peer += o.opened_by_peer;
        self.lazy += o.lazy;
        self.lazy_bad += o.lazy_bad;
        self.failures.extend(o.failures);
    }

    fn counted(&self) -> u64 {
        self.states
    }

    fn failures(&self) -> &[String] {
        &self.failures
    }
}

/// What one thread needs.
struct Bench<'a> {
    args: &'a Args,
    number: u64,
    checker: Checker,
    contract: Contract,
    folder: Folder,
    figures: Figures,
}

impl Bench<'_> {
    fn fail(&mut self, i: usize, writer: Writer, subject: &Subject, why: &str) {
        let again = format!("cargo xtask crash lazy --seed {} --trial {}", self.args.seed, self.number);
        self.figures
            .failures
            .push(format!("state {i}, {writer:?}, {}: {why}\n  {again} --state {i}", subject.name));
    }

    /// One state.
    fn look(&mut self, i: usize, writer: Writer, subject: &Subject, allowed: Option<&Allowed>) {
        if self.args.get("state").is_some_and(|s| s != i.to_string()) {
            return;
        }
        if let Some(dir) = self.args.get("save") {
            subject.save(std::path::Path::new(dir)).unwrap_or_else(|e| panic!("{dir}: {e}"));
        }
        let Ok(before) = Content::read(&mut self.checker, &subject.of_image()) else {
            if writer == Writer::Peer {
                self.figures.beyond += 1;
                return;
            }
            self.figures.after_us += 1;
            return self.fail(i, writer, subject, "it cannot be read");
        };
        let report = self.checker.check(&subject.of_image());
        let beyond = report.marked_corrupt || !report.is_sound() && !report.dirty;
        if writer == Writer::Peer && beyond {
            self.figures.beyond += 1;
            return;
        }
        self.figures.states += 1;
        self.figures.repaired += u64::from(!report.is_sound());
        if let Err(why) = self.ours(subject, &before, allowed) {
            self.figures.after_us += 1;
            return self.fail(i, writer, subject, &format!("after our open: {why}"));
        }
        let sampled = (self.number * STATES as u64 + i as u64).is_multiple_of(SAMPLE);
        if !sampled && self.args.get("state").is_none() {
            return;
        }
        let good = self.peers(subject, &before);
        match (writer, good) {
            (Writer::Ours, Ok(())) => self.figures.opened_by_peer += 1,
            (Writer::Ours, Err(why)) => {
                self.figures.opened_by_peer += 1;
                self.figures.after_peer += 1;
                self.fail(i, writer, subject, &format!("after QEMU's open: {why}"));
            }
            (_, good) => {
                self.figures.lazy += 1;
                self.figures.lazy_bad += u64::from(good.is_err());
            }
        }
    }

    /// Opened by our engine.
    fn ours(&mut self, subject: &Subject, before: &Content, allowed: Option<&Allowed>) -> Result<(), String> {
        let dirty = self.checker.report().dirty;
        let (said, then) = single(subject, Mode::Open, 1)?;
        if said.code != 0 {
            return Err(said.text);
        }
        self.unchanged(&then, before)?;
        if said.guest.is_some_and(|g| g != before.guest) {
            return Err("the engine reads other data".into());
        }
        let report = self.checker.check(&then.of_image());
        if !report.is_sound() || report.dirty || (dirty && report.leaks > 0) {
            return Err(report.explain());
        }
        match allowed {
            Some(allowed) => {
                self.contract.look(&then.of_image(), allowed).map(drop).map_err(|b| b.to_string())
            }
            None => Ok(()),
        }
    }

    /// Opened by QEMU.
    fn peers(&mut self, subject: &Subject, before: &Content) -> Result<(), String> {
        peer::put(&self.folder, subject);
        peer::open_for_writing(&self.folder)?;
        let verdict = peer::check(&self.folder);
        if verdict.code != 0 && verdict.code != 3 {
            return Err(format!("qemu-img check: {} {}", verdict.code, verdict.text));
        }
        let then = peer::take(&self.folder, subject);
        self.unchanged(&then, before)
    }

    fn unchanged(&mut self, then: &Subject, before: &Content) -> Result<(), String> {
        let now = Content::read(&mut self.checker, &then.of_image()).map_err(|f| f.to_string())?;
        before.difference(&now).map_or(Ok(()), Err)
    }
}

/// Counters as they were at the beginning, in some sectors: a lazy writer has not written them since.
fn lag(subject: &mut Subject, old: &[u8], rng: &mut Rng) {
    let Some(layout) = Layout::of(&subject.of_image()) else { return };
    let entries = layout.table_entries(subject.image());
    let share = rng.pick(&[300, 700, 1000]);
    let image = subject.image_mut();
    for at in entries {
        let block = crate::damage::be64(image, at);
        for sector in (block..block + layout.cluster()).step_by(512) {
            let range = sector as usize..(sector as usize + 512).min(image.len());
            if range.is_empty() || !rng.chance(share) {
                continue;
            }
            match old.get(range.clone()) {
                Some(bytes) => image[range].copy_from_slice(bytes),
                None => image[range].fill(0),
            }
        }
    }
    image[79] |= 1;
}

fn lazy_cases() -> Vec<Case> {
    let mut all = cases();
    all.retain(|c| c.options.version == 3);
    all.iter_mut().for_each(|c| c.options.lazy_refcounts = true);
    all
}

fn trial(cases: &[Case], args: &Args, number: u64) -> Figures {
    let mut rng = trials::rng(args, number);
    let mut bench = Bench {
        args,
        number,
        checker: Checker::default(),
        contract: Contract::default(),
        folder: Folder::new(),
        figures: Figures::default(),
    };
    let mut i = 0;
    if rng.chance(300) {
        let (subject, recording) = peer::lazy_run(rng.below(1 << 30));
        random_states(&recording, &mut rng, STATES, |state| {
            let state = subject.of_files(state);
            bench.look(i, Writer::Peer, &state, None);
            i += 1;
        });
        return bench.figures;
    }
    let mut plan = plan(cases, rng.below(1 << 20), rng.next());
    if plan.work == Work::Create {
        // there is no image yet that could be dirty
        return bench.figures;
    }
    if let Work::Short(_) = plan.work {
        plan.case.options.lazy_refcounts = true;
    }
    let recording = match plan.record() {
        Ok(recording) => recording,
        Err(text) => {
            bench.figures.failures.push(format!("{plan}: {text}"));
            return bench.figures;
        }
    };
    let of_image = |f: &&(std::path::PathBuf, Vec<u8>)| f.0 == recording.roles.image;
    let before = recording.files.iter().find(of_image).map_or(&[][..], |f| &f.1);
    let mut own = rng.fork();
    random_states(&recording, &mut rng, STATES, |state| {
        let mut subject = Subject::of_state(&plan.case, state);
        let (writer, dirty) =
            own.pick(&[(Writer::Ours, false), (Writer::Ours, true), (Writer::Lagging, true)]);
        if writer == Writer::Lagging {
            lag(&mut subject, before, &mut own);
        }
        if dirty {
            subject.image_mut()[79] |= 1;
        }
        bench.look(i, writer, &subject, Some(state.allowed));
        i += 1;
    });
    bench.figures
}

/// `crash lazy`.
pub fn command(args: &[String]) -> bool {
    let args = match Args::parse(args, 50_000) {
        Ok(args) => args,
        Err(why) => {
            eprintln!("crash: {why}");
            return false;
        }
    };
    let cases = lazy_cases();
    let (f, seconds) = trials::run(&args, |number| trial(&cases, &args, number));
    println!(
        "proof: lazy and dirty images: {} states; corrupt after our open {}, after QEMU's {} (of {} left by us); {} had to \
         be repaired; left by lazy writers: QEMU's own open spoils {} of {} (not counted), QEMU left {} corrupt and not dirty or \
         marked so (not counted); {seconds:.1} s",
        f.states, f.after_us, f.after_peer, f.opened_by_peer, f.repaired, f.lazy_bad, f.lazy, f.beyond
    );
    f.failures.is_empty() && f.states > 0
}
