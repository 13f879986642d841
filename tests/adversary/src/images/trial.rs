//! What is done with every case: all the commands that open an image, each judged by the same rules.
//!
//! | command | may open beside the image | may change |
//! |---|---|---|
//! | `info`, `check` | nothing | nothing |
//! | `check -r all` | nothing | the image, unless it refuses it |
//! | `map`, `convert`, `io -r`, `serve` read-only | what the image names by a plain path | nothing |
//! | the same with `"backing": null` and no data file | nothing | nothing |
//! | `io`, `serve` writable | what the image names by a plain path | image and data file, unless it refuses them |

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use ringblock_tests::nbd::{self, Nbd};
use ringblock_tests::tools::{self, Cmd};

use super::bench::{Bench, Digest, Done, MEMORY, TIME, stalled};
use super::case::Case;

/// A disk up to this size is copied whole, of a larger one only the beginning.
const WINDOW: u64 = 16 << 20;
/// How often a program that took too long is run in all: the machine may have been busy.
const CHANCES: u32 = 3;

/// One way to look at a case.
struct Step {
    what: &'static str,
    cmd: Cmd,
    writes: bool,
    follows: bool,
    serves: bool,
    /// Traced where the case is: the others open files in the same way.
    traced: bool,
}

/// What was wrong.
pub(super) struct Fault {
    pub(super) kind: Wrong,
    pub(super) text: String,
}

/// The kinds of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Wrong {
    Time,
    Memory,
    Open,
    Panic,
    Change,
}

/// What the runs of a case showed.
#[derive(Default)]
pub(super) struct Seen {
    pub(super) runs: u64,
    pub(super) traced: u64,
    pub(super) refused: u64,
    pub(super) faults: Vec<Fault>,
    pub(super) peak: u64,
    pub(super) slowest: Duration,
}

/// The paths that the programs open whatever the image.
pub(super) type Usual = BTreeSet<PathBuf>;

impl Step {
    fn new(what: &'static str, cmd: Cmd) -> Step {
        let traced = ["info", "check", "read", "chain", "alone", "write"].contains(&what);
        Step { what, cmd, writes: false, follows: false, serves: false, traced }
    }

    fn follows(self) -> Step {
        Step { follows: true, ..self }
    }

    fn writes(self) -> Step {
        Step { writes: true, ..self }
    }
}

/// With the format that the case gives, if any.
fn of_format(cmd: Cmd, case: &Case) -> Cmd {
    match case.format {
        Some(format) => cmd.args(["-f", format]),
        None => cmd,
    }
}

/// The steps that a case takes: of the many that differ in one field only, each leaves out some, in turn.
fn taken(case: &Case, all: Vec<Step>) -> Vec<Step> {
    let turn = ["map", "convert", "serve", "serve-rw"];
    let mine = turn[case.name.bytes().fold(0, |n, b| n + usize::from(b)) % turn.len()];
    all.into_iter().filter(|s| !case.plenty || !turn.contains(&s.what) || s.what == mine).collect()
}

/// The options of the image as a node, with nothing below it.
fn alone(case: &Case, image: &str, size: Option<u64>) -> String {
    let file = serde_json::json!({"driver": "file", "filename": image});
    let node = match (case.format, size) {
        (Some("qcow2"), None) if case.external() => {
            let data = serde_json::json!({"driver": "null-co", "size": 4 << 20, "read-zeroes": true});
            serde_json::json!({"driver": "qcow2", "backing": null, "data-file": data, "file": file})
        }
        (Some("qcow2"), None) => serde_json::json!({"driver": "qcow2", "backing": null, "file": file}),
        (Some("qcow2"), Some(size)) => {
            serde_json::json!({"driver": "raw", "size": size, "file": {"driver": "qcow2", "file": file}})
        }
        (_, None) => serde_json::json!({"driver": "raw", "file": file}),
        (_, Some(size)) => serde_json::json!({"driver": "raw", "size": size, "file": file}),
    };
    format!("json:{node}")
}

fn steps(case: &Case, bench: &Bench, image: &str, size: Option<u64>) -> Vec<Step> {
    let img = |line: &str| of_format(tools::img().line(line), case).arg(image);
    let io = |line: &str| of_format(tools::io().line(line), case);
    let out = bench.out("out.raw").to_string_lossy().into_owned();
    let whole = size.is_none_or(|s| s <= WINDOW);
    let mut list = vec![Step::new("check", img("check"))];
    list.push(match size.filter(|_| !whole) {
        Some(_) => Step::new(
            "convert",
            tools::img().line("convert -O raw").args([&alone(case, image, Some(WINDOW)), &out]),
        ),
        None => Step::new("convert", img("convert -O raw").arg(&out)),
    });
    list.push(Step::new("map", img(if whole { "map --output=json" } else { "map --output=json -l 16M" })));
    let ends = size.map_or(0, |s| s.saturating_sub(4096));
    let reads = ["-c".to_owned(), "read 0 4k".into(), "-c".into(), format!("read {ends} 4k")];
    list.push(Step::new("read", io("-r").args(&reads).arg(image)));
    list.iter_mut().skip(1).for_each(|s| s.follows = true);
    if !case.follows.is_empty() || case.traced {
        list.push(Step::new("chain", img("info --backing-chain")).follows());
        list.push(Step::new("alone", tools::io().arg("-r").args(&reads).arg(alone(case, image, None))));
    }
    list.push(served(Step::new("serve", serve(case, bench, image, true)).follows()));
    // what writes comes last; the files are laid anew for each
    list.push(Step::new("repair", img("check -r all")).writes());
    let writes = ["write -P 7 0 9k", "write -P 8 20k 1k", "discard 4k 8k", "write -z 16k 4k", "flush"];
    let writes = writes.iter().flat_map(|c| ["-c", c]);
    list.push(Step::new("write", io("").args(writes).arg(image)).follows().writes());
    list.push(served(Step::new("serve-rw", serve(case, bench, image, false)).follows().writes()));
    list
}

fn served(step: Step) -> Step {
    Step { serves: true, ..step }
}

fn serve(case: &Case, bench: &Bench, image: &str, read_only: bool) -> Cmd {
    let path = |name: &str| bench.out(name).to_string_lossy().into_owned();
    let on = if read_only { "on" } else { "off" };
    let format = case.format.unwrap_or("raw");
    let node = format!("driver={format},node-name=q,read-only={on},file.driver=file,file.filename={image}");
    let writable = if read_only { "off" } else { "on" };
    tools::serve()
        .args(["--blockdev", &node])
        .args(["--nbd-server", &format!("addr.type=unix,addr.path={}", path("nbd"))])
        .args(["--export", &format!("type=nbd,id=e,node-name=q,name=d,writable={writable}")])
        .args(["--cores", "1", "--pidfile", &path("pid")])
}

/// Runs all commands on a case.
pub(super) fn run(case: &Case, bench: &mut Bench, usual: &Usual, trace: bool) -> Result<Seen, String> {
    let mut seen = Seen::default();
    let image = bench.ground.dir.join(&case.image).to_string_lossy().into_owned();
    let mut before = bench.lay(case)?;
    let info = of_format(tools::img().line("info --output=json"), case).arg(&image);
    let done = one(&Step::new("info", info), case, bench, &mut before, usual, trace, &mut seen)?;
    let told: Option<serde_json::Value> = serde_json::from_str(&done.stdout).ok();
    let size = told.and_then(|v| v["virtual-size"].as_u64());
    for step in taken(case, steps(case, bench, &image, size)) {
        one(&step, case, bench, &mut before, usual, trace, &mut seen)?;
    }
    Ok(seen)
}

/// Runs one command and judges it.
fn one(
    step: &Step,
    case: &Case,
    bench: &mut Bench,
    before: &mut Digest,
    usual: &Usual,
    trace: bool,
    seen: &mut Seen,
) -> Result<Done, String> {
    let mut done = execute(step, bench)?;
    let mut after = bench.digest();
    judge(step, case, bench, &done, before, &after, seen);
    for _ in 1..CHANCES {
        if done.took() <= TIME {
            break;
        }
        if after != *before {
            *before = bench.lay(case)?;
        }
        let again = execute(step, bench)?;
        after = bench.digest();
        if again.took() < done.took() {
            done = again;
        }
    }
    seen.runs += 1;
    seen.refused += u64::from(done.refused());
    seen.peak = seen.peak.max(done.ended.peak);
    seen.slowest = seen.slowest.max(done.took());
    if done.took() > TIME {
        let text = format!("{:.2} s, CPU {:.2} s", done.took().as_secs_f64(), done.ended.cpu.as_secs_f64());
        fault(seen, Wrong::Time, step, text);
    }
    if done.ended.peak > MEMORY {
        fault(seen, Wrong::Memory, step, format!("{} MiB", done.ended.peak >> 20));
    }
    if trace && step.traced && !done.ended.late {
        if after != *before {
            *before = bench.lay(case)?;
        }
        seen.traced += 1;
        let opened = bench.trace(&step.cmd)?;
        after = bench.digest();
        let own = |path: &PathBuf| usual.contains(path) || descriptor(path) || mine(path, bench);
        let opened: BTreeSet<PathBuf> = opened.into_iter().filter(|p| !own(p)).collect();
        foreign(step, case, bench, &opened, "traced", seen);
    }
    if after != *before {
        *before = bench.lay(case)?;
    }
    Ok(done)
}

/// A descriptor of the program's own, opened once more: not one that it was born with.
fn descriptor(path: &Path) -> bool {
    let number =
        path.to_str().and_then(|p| p.strip_prefix("/proc/self/fd/")).and_then(|n| n.parse::<u32>().ok());
    number.is_some_and(|n| n > 2)
}

/// A file that the program was told to make.
fn mine(path: &Path, bench: &Bench) -> bool {
    path.starts_with(bench.out("").parent().unwrap_or(path))
}

fn fault(seen: &mut Seen, kind: Wrong, step: &Step, text: String) {
    seen.faults.push(Fault { kind, text: format!("{}: {text}\n  {:?}", step.what, step.cmd.command()) });
}

fn judge(
    step: &Step,
    case: &Case,
    bench: &Bench,
    done: &Done,
    before: &Digest,
    after: &Digest,
    seen: &mut Seen,
) {
    if let Some(text) = done.death() {
        fault(seen, Wrong::Panic, step, text);
    }
    foreign(step, case, bench, &done.opened, "opened", seen);
    let changed: BTreeSet<&PathBuf> = before
        .iter()
        .filter(|(p, s)| after.get(*p) != Some(*s))
        .map(|(p, _)| p)
        .chain(after.keys().filter(|p| !before.contains_key(*p)))
        .collect();
    // the data file is written to, a backing file never is
    let own = |p: &Path| p == bench.ground.dir.join(&case.image) || p == bench.ground.dir.join("data.raw");
    let allowed = step.writes && !done.refused();
    if changed.iter().any(|p| !(allowed && (own(p) || data_is(p, case, bench)))) {
        let why = if done.refused() { "though refused: " } else { "" };
        fault(seen, Wrong::Change, step, format!("{why}{changed:?} {}", done.stderr.trim()));
    }
}

/// Whether the case's image has its data in this file.
fn data_is(path: &Path, case: &Case, bench: &Bench) -> bool {
    case.external() && case.follows.iter().any(|f| path == resolved(f, bench))
}

fn resolved(path: &Path, bench: &Bench) -> PathBuf {
    let full = bench.ground.dir.join(path);
    full.canonicalize().unwrap_or(full)
}

/// Opens of files that were not named.
fn foreign(step: &Step, case: &Case, bench: &Bench, opened: &BTreeSet<PathBuf>, how: &str, seen: &mut Seen) {
    let mut named: BTreeSet<PathBuf> =
        [resolved(Path::new(&case.image), bench), bench.ground.dir.join(&case.image)].into();
    if step.follows {
        for f in &case.follows {
            named.extend([resolved(f, bench), bench.ground.dir.join(f), f.clone()]);
        }
    }
    let canonical = |p: &PathBuf| bench.ground.dir.join(p).canonicalize().unwrap_or_else(|_| p.clone());
    let others: Vec<_> =
        opened.iter().filter(|p| !named.contains(*p) && !named.contains(&canonical(p))).collect();
    if !others.is_empty() {
        fault(seen, Wrong::Open, step, format!("{how} {others:?}"));
    }
}

/// Runs the command; a server is asked for something and ended.
fn execute(step: &Step, bench: &mut Bench) -> Result<Done, String> {
    let _ = std::fs::remove_file(bench.out("out.raw"));
    if !step.serves {
        return bench.run(&step.cmd);
    }
    let (pid, socket) = (bench.out("pid"), bench.out("nbd"));
    for path in [&pid, &socket] {
        let _ = std::fs::remove_file(path);
    }
    let started = bench.start(&step.cmd)?;
    let (began, before) = (Instant::now(), stalled());
    while !pid.exists() && !over(started.pid()) && began.elapsed() < 4 * TIME {
        std::thread::sleep(Duration::from_micros(500));
    }
    let opening = began.elapsed();
    let stall = stalled().saturating_sub(before);
    if pid.exists() {
        // whatever it answers: what counts is how it behaves
        let _ = visit(&socket.to_string_lossy(), step.writes);
        let _ = std::process::Command::new("kill").args(["-TERM", &started.pid().to_string()]).status();
    }
    let mut done = bench.end(started)?;
    (done.wall, done.stall) = (opening, stall);
    Ok(done)
}

/// Whether a process has ended.
fn over(pid: u32) -> bool {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    text.rsplit_once(')').is_none_or(|(_, rest)| rest.trim_start().starts_with(['Z', 'X']))
}

/// A client with a few requests.
fn visit(socket: &str, writes: bool) -> std::io::Result<()> {
    let mut nbd = Nbd::connect(socket, "d")?;
    nbd.patience(Duration::from_secs(4))?;
    let (size, mut buf) = (nbd.size, vec![0; 4096]);
    for at in [0, size / 2, size.saturating_sub(4096)] {
        if at + 4096 <= size {
            let _ = nbd.read(at, &mut buf);
            if writes {
                let _ = nbd.write(at, &buf, nbd::FLAG_FUA);
                let _ = nbd.trim(at, 4096);
            }
        }
    }
    nbd.close();
    Ok(())
}
