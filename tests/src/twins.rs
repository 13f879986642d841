//! Two folders with the same files: in one our program runs, in the other the peer's; every command line must
//! have the same exit code, output, error text and effect in both.

use crate::dir::TestDir;
use crate::normal;
use crate::tools::{self, Cmd, Output};
use std::path::Path;

/// A pair of folders and what differed so far.
#[derive(Debug)]
pub struct Twins {
    ours: TestDir,
    theirs: TestDir,
    seen: usize,
    wrong: Vec<String>,
}

impl Twins {
    /// Two empty folders.
    pub fn new(name: &str) -> Self {
        Self {
            ours: TestDir::new(&format!("{name}-ours")),
            theirs: TestDir::new(&format!("{name}-peer")),
            seen: 0,
            wrong: Vec::new(),
        }
    }

    /// Prepares both folders in the same way.
    pub fn both(&self, prepare: impl Fn(&TestDir)) {
        prepare(&self.ours);
        prepare(&self.theirs);
    }

    /// Runs the peer's image tool in both folders; it must succeed.
    pub fn qemu_img(&self, line: &str) {
        self.both(|dir| drop(words(tools::qemu_img().dir(dir.path()), line).ok()));
    }

    /// Runs the peer's I/O tool in both folders; it must succeed.
    pub fn qemu_io(&self, line: &str) {
        self.both(|dir| drop(words(tools::qemu_io().dir(dir.path()), line).ok()));
    }

    /// Runs `line` with the image tools: ours in our folder, the peer's in its own.
    pub fn img(&mut self, line: &str) {
        self.same(line, words(tools::img(), line), words(tools::qemu_img(), line));
    }

    /// Runs `line` with the I/O tools likewise.
    pub fn io(&mut self, line: &str) {
        self.same(line, words(tools::io(), line), words(tools::qemu_io(), line));
    }

    /// Runs `line` with the image tools where our words or our map are known to differ, and says why: only the
    /// exit codes must be the same.
    pub fn img_codes(&mut self, line: &str, why: &str) {
        let ours = words(tools::img(), line).dir(self.ours.path()).run();
        let theirs = words(tools::qemu_img(), line).dir(self.theirs.path()).run();
        println!("known difference: {line}: {why}");
        self.seen += 1;
        if ours.code != theirs.code {
            self.wrong.push(format!("### {line}\n{}{}", ours.describe(), theirs.describe()));
        }
    }

    /// Runs `line` with our image tool, which must refuse it by name: something that is not here yet.
    pub fn img_refuses(&mut self, line: &str, name: &str) {
        if tools::is_product("RINGBLOCK_IMG") {
            let ours = words(tools::img(), line).dir(self.ours.path()).run();
            self.seen += 1;
            if ours.code != 1 || !ours.stderr.contains(name) || !ours.stderr.contains("not supported") {
                self.wrong.push(format!("### {line}: no refusal of {name}\n{}", ours.describe()));
            }
        }
    }

    /// Runs two commands, each in its folder, and notes every difference.
    pub fn same(&mut self, line: &str, ours: Cmd, theirs: Cmd) {
        let ours = ours.dir(self.ours.path()).run();
        let theirs = theirs.dir(self.theirs.path()).run();
        self.seen += 1;
        let (a, b) = (comparable(&ours), comparable(&theirs));
        if a != b {
            self.wrong.push(format!("### {line}\n{}", difference(&a, &b)));
        }
    }

    /// Notes a difference unless the file `name` has the same contents as a disk in both folders, and the
    /// peer finds both sound.
    pub fn same_disk(&mut self, name: &str, format: &str) {
        let file = |dir: &TestDir| dir.file(name);
        let (a, b) = (file(&self.ours), file(&self.theirs));
        self.seen += 1;
        match (Path::new(&a).exists(), Path::new(&b).exists()) {
            (true, true) => {}
            (false, false) => return,
            (a, _) => {
                self.wrong
                    .push(format!("### {name} exists only {}", if a { "with us" } else { "with the peer" }));
                return;
            }
        }
        // The peer looks for a relatively named data file from the current directory, so no one command can
        // read both images; their data files are compared as files.
        let data = |path: &str| path.strip_suffix(".qcow2").map(|stem| std::fs::read(format!("{stem}.data")));
        if let (Some(Ok(a)), Some(Ok(b))) = (data(&a), data(&b)) {
            if a != b {
                self.wrong.push(format!("### the data file of {name} differs"));
            }
        } else {
            // Not strictly: which zeroes take space is each program's own choice.
            let same = tools::qemu_img().line("compare -f").args([format, "-F", format, &a, &b]).run();
            let len = |path: &str| std::fs::metadata(path).map_or(0, |m| m.len());
            if format == "raw" && len(&a) != len(&b) {
                self.wrong.push(format!("### {name}: {} bytes with us, {} with the peer", len(&a), len(&b)));
            }
            if same.code != 0 {
                self.wrong.push(format!("### {name} differs: {}", same.describe()));
            }
        }
        if format == "qcow2" {
            let check = tools::qemu_img().dir(self.ours.path()).line("check -q -f qcow2").arg(name).run();
            if check.code != 0 {
                self.wrong.push(format!("### our {name} is not sound: {}", check.describe()));
            }
        }
    }

    /// Notes a difference if a failed command of ours left the file `name` behind.
    pub fn nothing_left(&mut self, name: &str) {
        self.seen += 1;
        // The peer itself does, now and then.
        if tools::is_product("RINGBLOCK_IMG") && Path::new(&self.ours.file(name)).exists() {
            self.wrong.push(format!("### our failed command left {name}"));
        }
    }

    /// Notes a difference unless the peer reports both files `name` alike.
    pub fn same_info(&mut self, name: &str) {
        let line = format!("info {name}");
        self.same(
            &format!("(the peer's) {line}"),
            words(tools::qemu_img(), &line),
            words(tools::qemu_img(), &line),
        );
    }

    /// Fails if anything differed; shows all of it.
    pub fn finish(self) {
        let (wrong, seen) = (self.wrong.len(), self.seen);
        assert!(
            wrong == 0,
            "{wrong} of {seen} comparisons differ (-: ours, +: the peer's)\n{}",
            self.wrong.join("\n")
        );
    }
}

/// Adds the words of `line`; a part in single quotes is one word.
fn words(mut cmd: Cmd, line: &str) -> Cmd {
    for (n, part) in line.split('\'').enumerate() {
        cmd = if n % 2 == 1 { cmd.arg(part) } else { cmd.line(part) };
    }
    cmd
}

fn comparable(out: &Output) -> (i32, String, String) {
    let (code, stdout, stderr) = normal::output(out);
    (code, normal::disk_size(&stdout), stderr)
}

fn difference(ours: &(i32, String, String), theirs: &(i32, String, String)) -> String {
    let mut text = String::new();
    if ours.0 != theirs.0 {
        text += &format!("exit code: -{} +{}\n", ours.0, theirs.0);
    }
    for (what, a, b) in [("stdout", &ours.1, &theirs.1), ("stderr", &ours.2, &theirs.2)] {
        if a != b {
            text += &format!("{what}:\n{}", lines(a, b));
        }
    }
    text
}

/// The lines that are not common to both, without the common start and end.
fn lines(a: &str, b: &str) -> String {
    let (a, b): (Vec<&str>, Vec<&str>) = (a.lines().collect(), b.lines().collect());
    let front = a.iter().zip(&b).take_while(|(x, y)| x == y).count();
    let most = a.len().min(b.len()) - front;
    let back = a.iter().rev().zip(b.iter().rev()).take_while(|(x, y)| x == y).count().min(most);
    let part = |lines: &[&str], sign: char| -> String {
        lines[front..lines.len() - back].iter().take(25).map(|l| format!("  {sign}{l}\n")).collect()
    };
    part(&a, '-') + &part(&b, '+')
}

#[cfg(test)]
mod tests {
    use super::lines;

    /// Goal: a report shows what differs and nothing else. Method: one changed line in the middle.
    #[test]
    fn shows_only_what_differs() {
        assert_eq!(lines("a\nb\nc", "a\nx\ny\nc"), "  -b\n  +x\n  +y\n");
        assert_eq!(lines("", "z"), "  +z\n");
    }
}
