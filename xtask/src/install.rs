//! The programs the tests use: what each is for, whether it is there and new enough, how it gets installed.
//!
//! Installing needs Debian's apt-get and root, directly or by `sudo -n`; otherwise the line to type is
//! printed and the step fails. An installed newer version is never replaced: apt-get runs with `--no-remove`
//! and is asked only for packages that are missing or too old.

use crate::steps::Places;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The oldest QEMU whose tools the tests are compared with. Version 9 changed texts, and older ones lack
/// options that the tests pass; Debian bookworm's own suite has 7.2, its backports have 10.
const QEMU_MAJOR: u32 = 9;

/// A program and the Debian package that has it.
const PROGRAMS: [(&str, &str); 15] = [
    ("qemu-img", "qemu-utils"),
    ("qemu-io", "qemu-utils"),
    ("qemu-nbd", "qemu-utils"),
    ("qemu-storage-daemon", "qemu-utils"),
    ("fio", "fio"),
    ("nbdinfo", "libnbd-bin"),
    ("nbdcopy", "libnbd-bin"),
    ("nbdsh", "libnbd-bin"),
    ("nbdfuse", "libnbd-bin"),
    ("nbdkit", "nbdkit"),
    ("mkfs.ext4", "e2fsprogs"),
    ("e2fsck", "e2fsprogs"),
    ("losetup", "mount"),
    ("strace", "strace"),
    ("python3", "python3"),
];

/// The Python package with the QMP client that the tests drive the control pipe with.
const QMP_CLIENT: &str = "qemu.qmp==0.0.6";

/// Makes sure that everything is there.
pub(crate) fn all(places: &Places) -> Result<(), String> {
    let missing = missing();
    if !missing.is_empty() {
        println!("missing or too old: {}", missing.join(", "));
        apt(places, &missing)?;
        let still = self::missing();
        if !still.is_empty() {
            return Err(format!("still missing after the installation: {}", still.join(", ")));
        }
    }
    venv(places)?;
    let qemu = qemu_version().unwrap_or_default();
    println!("qemu-img {}.{}, and all other programs, are there", qemu.0, qemu.1);
    Ok(())
}

/// The packages that are missing, or too old.
fn missing() -> Vec<&'static str> {
    let mut packages: Vec<&str> = Vec::new();
    let mut need = |package| {
        if !packages.contains(&package) {
            packages.push(package);
        }
    };
    for (program, package) in PROGRAMS {
        if find(program).is_none() {
            need(package);
        }
    }
    if qemu_version().is_none_or(|(major, _)| major < QEMU_MAJOR) {
        need("qemu-utils");
    }
    // nbdsh runs Debian's python with these bindings; a venv needs the ensurepip that Debian packs apart.
    if !python_has("nbd") {
        need("python3-libnbd");
    }
    if !python_has("ensurepip") {
        need("python3-venv");
    }
    packages
}

/// The path of a program: in `PATH` or in the system's directories, which a user's `PATH` may leave out.
fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let system = ["/usr/bin", "/usr/sbin", "/bin", "/sbin"].map(PathBuf::from);
    // Only Debian's own python can see the bindings that Debian packs.
    let own: Vec<PathBuf> =
        if program == "python3" { Vec::new() } else { std::env::split_paths(&path).collect() };
    own.into_iter().chain(system).map(|dir| dir.join(program)).find(|file| file.is_file())
}

fn qemu_version() -> Option<(u32, u32)> {
    let out = Command::new(find("qemu-img")?).arg("--version").output().ok()?;
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    let mut numbers = text.strip_prefix("qemu-img version ")?.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn python_has(module: &str) -> bool {
    let Some(python) = find("python3") else {
        return false;
    };
    let mut command = Command::new(python);
    command.args(["-c", &format!("import {module}")]).stderr(Stdio::null());
    command.status().is_ok_and(|s| s.success())
}

/// Installs `packages` with apt-get.
fn apt(places: &Places, packages: &[&str]) -> Result<(), String> {
    let sources = if packages.contains(&"qemu-utils") { backports(places)? } else { None };
    let mut apt = vec!["apt-get".to_string()];
    if let Some(dir) = &sources {
        apt.extend(dir.options());
    }
    let update = words(&apt, &["update", "-q"]);
    let mut install = words(&apt, &["install", "-q", "-y", "--no-remove", "--no-install-recommends"]);
    install.extend(packages.iter().filter(|p| **p != "qemu-utils").map(|p| p.to_string()));
    if packages.contains(&"qemu-utils") {
        let suite = sources.map(|s| format!("/{}", s.suite)).unwrap_or_default();
        install.push(format!("qemu-utils{suite}"));
    }
    let Some(prefix) = root_prefix() else {
        return Err(format!(
            "not root, and `sudo -n` does not work. Type:\n  sudo {} && sudo {}\nthen run this again",
            update.join(" "),
            install.join(" ")
        ));
    };
    run(&prefix, &update)?;
    run(&prefix, &install)
}

fn words(front: &[String], back: &[&str]) -> Vec<String> {
    front.iter().cloned().chain(back.iter().map(|w| w.to_string())).collect()
}

/// What to put in front of a command to run it as root; `None` if there is no way.
fn root_prefix() -> Option<Vec<String>> {
    let uid = Command::new("id").arg("-u").output().ok()?;
    if String::from_utf8_lossy(&uid.stdout).trim() == "0" {
        return Some(Vec::new());
    }
    let mut sudo = Command::new("sudo");
    sudo.args(["-n", "true"]).stderr(Stdio::null());
    sudo.status().ok()?.success().then(|| vec!["sudo".to_string(), "-n".to_string()])
}

fn run(prefix: &[String], line: &[String]) -> Result<(), String> {
    let line: Vec<&String> = prefix.iter().chain(line).collect();
    println!("+ {}", line.iter().map(|w| w.as_str()).collect::<Vec<_>>().join(" "));
    let mut command = Command::new(line[0]);
    command.args(&line[1..]).env("DEBIAN_FRONTEND", "noninteractive").stdin(Stdio::null());
    let status = command.status().map_err(|e| format!("{}: {e}", line[0]))?;
    if status.success() { Ok(()) } else { Err(format!("{} ended with {status}", line[0])) }
}

/// Package lists of our own: the system's sources and the backports suite, kept apart from the system's.
struct Sources {
    suite: String,
    file: PathBuf,
    lists: PathBuf,
}

impl Sources {
    fn options(&self) -> Vec<String> {
        let set = |key: &str, value: &Path| ["-o".to_string(), format!("{key}={}", value.display())];
        let mut options = Vec::new();
        options.extend(set("Dir::Etc::sourcelist", &self.file));
        options.extend(set("Dir::Etc::sourceparts", Path::new("/dev/null")));
        options.extend(set("Dir::State::lists", &self.lists));
        options
    }
}

/// On a Debian whose own suite has an older QEMU than the tests need: sources that add its backports, taken
/// from the same mirror. `None` where the system's own sources will do.
fn backports(places: &Places) -> Result<Option<Sources>, String> {
    let release = std::fs::read_to_string("/etc/os-release").unwrap_or_default();
    let field = |key: &str| release.lines().find_map(|l| l.strip_prefix(key)).unwrap_or("").trim_matches('"');
    let (id, version, codename) = (field("ID="), field("VERSION_ID="), field("VERSION_CODENAME="));
    // Debian 13 and later have QEMU 10 or newer themselves.
    if id != "debian" || version.parse::<u32>().is_ok_and(|v| v >= 13) {
        return Ok(None);
    }
    let mirror = mirror(codename).ok_or("cannot find the Debian mirror in /etc/apt/sources.list*")?;
    let suite = format!("{codename}-backports");
    let dir = places.target.join("apt");
    let sources = Sources { file: dir.join("sources.list"), lists: dir.join("lists"), suite };
    std::fs::create_dir_all(sources.lists.join("partial")).map_err(|e| format!("{}: {e}", dir.display()))?;
    let signed = Path::new("/usr/share/keyrings/debian-archive-keyring.gpg");
    let signed = if signed.exists() { format!("[signed-by={}] ", signed.display()) } else { String::new() };
    let line = |suite: &str| format!("deb {signed}{mirror} {suite} main\n");
    let text = format!("{}{}{}", line(codename), line(&format!("{codename}-updates")), line(&sources.suite));
    std::fs::write(&sources.file, text).map_err(|e| format!("{}: {e}", sources.file.display()))?;
    Ok(Some(sources))
}

/// The address that the system takes the suite `codename` from, out of both styles of source list.
fn mirror(codename: &str) -> Option<String> {
    let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
    if let Ok(entries) = std::fs::read_dir("/etc/apt/sources.list.d") {
        files.extend(entries.flatten().map(|e| e.path()));
    }
    files.iter().filter_map(|f| std::fs::read_to_string(f).ok()).find_map(|text| mirror_in(&text, codename))
}

fn mirror_in(text: &str, codename: &str) -> Option<String> {
    for line in text.lines() {
        // One-line style: deb [options] URI SUITE COMPONENT...
        let Some(rest) = line.trim().strip_prefix("deb ") else {
            continue;
        };
        let rest = match rest.trim_start().strip_prefix('[') {
            Some(options) => options.split_once(']')?.1,
            None => rest,
        };
        let mut words = rest.split_whitespace();
        if let (Some(uri), Some(suite)) = (words.next(), words.next())
            && suite == codename
        {
            return Some(uri.to_string());
        }
    }
    // The style of fields: paragraphs with "URIs:" and "Suites:".
    for paragraph in text.split("\n\n") {
        let field = |key: &str| paragraph.lines().find_map(|l| l.trim().strip_prefix(key)).map(str::trim);
        if let (Some(uris), Some(suites)) = (field("URIs:"), field("Suites:"))
            && suites.split_whitespace().any(|s| s == codename)
        {
            return uris.split_whitespace().next().map(String::from);
        }
    }
    None
}

/// The python of the environment with the QMP client.
pub(crate) fn venv_python(places: &Places) -> PathBuf {
    places.target.join("qmp-venv/bin/python")
}

/// Makes the environment with the QMP client, once.
fn venv(places: &Places) -> Result<(), String> {
    let python = venv_python(places);
    let works = |python: &Path| {
        let mut command = Command::new(python);
        command.args(["-c", "import qemu.qmp"]).stderr(Stdio::null());
        command.status().is_ok_and(|s| s.success())
    };
    if works(&python) {
        return Ok(());
    }
    let dir = places.target.join("qmp-venv");
    let text = |p: &Path| p.to_string_lossy().into_owned();
    let system = find("python3").ok_or("python3 is missing")?;
    run(&[], &[text(&system), "-m".into(), "venv".into(), "--clear".into(), text(&dir)])?;
    let pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", QMP_CLIENT];
    run(&[], &words(&[text(&python)], &pip))?;
    if works(&python) { Ok(()) } else { Err("qemu.qmp was installed but cannot be imported".to_string()) }
}

#[cfg(test)]
mod tests {
    use super::mirror_in;

    /// Goal: the mirror is found in both styles of source list, and only for the right suite.
    #[test]
    fn finds_the_mirror() {
        let lines = "deb-src a://x suite main\ndeb [arch=amd64 a=b] b://mirror/debian suite main\n";
        assert_eq!(mirror_in(lines, "suite").as_deref(), Some("b://mirror/debian"));
        assert_eq!(mirror_in(lines, "other"), None);
        let fields = "Types: deb\nURIs: c://sec\nSuites: suite-security\n\nTypes: deb\nURIs: c://m/debian\nSuites: suite suite-updates\n";
        assert_eq!(mirror_in(fields, "suite").as_deref(), Some("c://m/debian"));
    }
}
