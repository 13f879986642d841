//! The command line of `serve`: options to typed steps, in the order in which they stand.
//!
//! Nothing is done here: a step is executed by the daemon. All options are read before the first step runs, so a
//! typing mistake in the last one leaves no trace.
//!
//! ```text
//! argv ─► lexopt ─► Serve { steps: [blockdev, nbd-server, export, chardev, monitor, …], pidfile, cores, … }
//! ```

mod help;

use lexopt::{Arg, Parser, ValueExt};
use ringblock_drivers::options::blockdev::BlockdevOptions;
use ringblock_drivers::options::export::{BlockExportOptions, NbdServerOptions};
use ringblock_drivers::options::object::ObjectOptions;
use ringblock_drivers::options::{Qapi, Size, from_arg, from_tree, keyval, size};
use ringblock_engine::error::Error;
use std::ffi::OsString;
use std::path::PathBuf;

pub use help::{serve_help, storage_daemon_help};

/// Who is asking: decides which options there are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Flavour {
    /// `ringblock serve`.
    Serve,
    /// Called as `qemu-storage-daemon`: its options and no others.
    StorageDaemon,
}

ringblock_drivers::qapi! {
    /// What a monitor may be.
    enum MonitorMode {
        /// QMP.
        Control = "control",
    }

    /// A monitor: QMP on a character device.
    struct MonitorOptions {
        /// The character device.
        chardev: String = "chardev",
        /// Its name.
        id: Option<String> = "id",
        /// Its kind (default: control).
        mode: Option<MonitorMode> = "mode",
        /// Whether the output is indented (default: off).
        pretty: Option<bool> = "pretty",
    }

    /// What every character device has.
    struct ChardevBase {
        /// Its name.
        id: String = "id",
    }

    /// A socket.
    struct ChardevSocket {
        /// The path of a unix socket.
        path: Option<String> = "path",
        /// Host name or address of a TCP socket.
        host: Option<String> = "host",
        /// Port of a TCP socket.
        port: Option<String> = "port",
        /// Number of an inherited descriptor (of a listening socket with server=on).
        fd: Option<String> = "fd",
        /// Whether to listen and not connect (default: off).
        server: Option<bool> = "server",
        /// Whether to wait for the first client before going on (default: on with server=on).
        wait: Option<bool> = "wait",
    }

    /// Standard input and output.
    struct ChardevStdio {
        /// Whether Ctrl-C ends the program (default: on).
        signal: Option<bool> = "signal",
    }

    /// A character device.
    union ChardevOptions {
        base: ChardevBase,
        tag backend: ChardevBackend = "backend",
        /// A socket.
        Socket(ChardevSocket) = "socket",
        /// Standard input and output.
        Stdio(ChardevStdio) = "stdio",
    }
}

/// One thing to do.
#[derive(Clone, PartialEq, Debug)]
pub enum Action {
    /// `--blockdev`
    Blockdev(Box<BlockdevOptions>),
    /// `--chardev`
    Chardev(ChardevOptions),
    /// `--export`
    Export(Box<BlockExportOptions>),
    /// `--monitor`
    Monitor(MonitorOptions),
    /// `--nbd-server`
    NbdServer(NbdServerOptions),
    /// `--object`
    Object(ObjectOptions),
}

/// An action and the option that asked for it, for error texts.
#[derive(Clone, PartialEq, Debug)]
pub struct Step {
    /// "--blockdev driver=…"
    pub written: String,
    /// What to do.
    pub action: Action,
}

/// The simple form: one image, everything else chosen for the user.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Simple {
    /// The image; none for the one in the data folder.
    pub image: Option<PathBuf>,
    /// Its format, if named.
    pub format: Option<String>,
    /// The folder for sockets and the image.
    pub data: Option<PathBuf>,
    /// Size of a new image.
    pub size: Option<Size>,
    /// Whether clients may not write.
    pub read_only: bool,
}

/// What the command line of `serve` asks for.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Serve {
    /// The simple form, if no step is given.
    pub simple: Simple,
    /// Whether the simple form is meant: no step is given, and the program was not called as a storage daemon.
    pub simple_form: bool,
    /// What to do, in order.
    pub steps: Vec<Step>,
    /// Where the process number is written.
    pub pidfile: Option<PathBuf>,
    /// Whether to go to the background.
    pub daemonize: bool,
    /// How many cores serve (0: all).
    pub cores: usize,
}

/// The outcome of reading a command line.
#[derive(Clone, PartialEq, Debug)]
pub enum Parsed {
    /// Serve.
    Serve(Box<Serve>),
    /// Print this and end well.
    Print(String),
}

/// Reads the arguments after the command's name. Errors name the option and its value.
pub fn parse(flavour: Flavour, args: impl IntoIterator<Item = OsString>) -> Result<Parsed, Error> {
    let mut parser = Parser::from_args(args);
    let mut serve = Serve::default();
    while let Some(arg) = parser.next().map_err(usage)? {
        // Owned, because the option's value comes from the parser too.
        let (long, arg) = match arg {
            Arg::Long(name) => (name.to_owned(), None),
            Arg::Short(c) => (short(c).to_owned(), None),
            Arg::Value(v) => (String::new(), Some(v)),
        };
        match (long.as_str(), arg) {
            ("help", _) => {
                return Ok(Parsed::Print(match flavour {
                    Flavour::Serve => serve_help(),
                    Flavour::StorageDaemon => storage_daemon_help(),
                }));
            }
            ("version", _) => return Ok(Parsed::Print(version_text(flavour))),
            ("daemonize", _) => serve.daemonize = true,
            ("pidfile", _) => serve.pidfile = Some(parser.value().map_err(usage)?.into()),
            (name, None) if is_step(name) => {
                let value = parser.value().and_then(|v| v.string()).map_err(usage)?;
                match step(name, &value)? {
                    Ok(step) => serve.steps.push(step),
                    Err(help) => return Ok(Parsed::Print(help)),
                }
            }
            (name, None) if flavour == Flavour::Serve => simple(name, &mut parser, &mut serve)?,
            (_, Some(v)) if flavour == Flavour::Serve && serve.simple.image.is_none() => {
                serve.simple.image = Some(v.into());
            }
            (_, Some(v)) => return Err(Error::invalid(format!("{}: Unexpected argument", v.display()))),
            (name, None) => return Err(unknown(name)),
        }
    }
    check(&serve)?;
    serve.simple_form = flavour == Flavour::Serve && serve.steps.is_empty();
    Ok(Parsed::Serve(Box::new(serve)))
}

fn usage(e: lexopt::Error) -> Error {
    Error::invalid(e.to_string())
}

/// The long name of an option's letter.
fn short(letter: char) -> &'static str {
    match letter {
        'h' => "help",
        'V' => "version",
        'f' => "format",
        'r' => "read-only",
        _ => "?",
    }
}

fn unknown(name: &str) -> Error {
    Error::invalid(if name == "?" {
        "unknown option".to_owned()
    } else {
        format!("invalid option '--{name}'")
    })
}

fn simple(name: &str, parser: &mut Parser, serve: &mut Serve) -> Result<(), Error> {
    let simple = &mut serve.simple;
    match name {
        "cores" => {
            let n: usize = parser.value().and_then(|v| v.parse()).map_err(usage)?;
            if !(1..=256).contains(&n) {
                return Err(Error::invalid("--cores takes a number from 1 to 256"));
            }
            serve.cores = n;
        }
        "format" => simple.format = Some(parser.value().and_then(|v| v.string()).map_err(usage)?),
        "data" => simple.data = Some(parser.value().map_err(usage)?.into()),
        "size" => {
            let text = parser.value().and_then(|v| v.string()).map_err(usage)?;
            let bytes = size::parse(&text, 0);
            simple.size =
                Some(Size(bytes.map_err(|_| Error::invalid(format!("--size {text}: not a size")))?));
        }
        "read-only" => simple.read_only = true,
        other => return Err(unknown(other)),
    }
    Ok(())
}

fn check(serve: &Serve) -> Result<(), Error> {
    let plain = Simple { ..Simple::default() };
    if !serve.steps.is_empty() && serve.simple != plain {
        return Err(Error::invalid(
            "An image, --data, --size, --format and --read-only cannot be used together with --blockdev, --export, \
             --nbd-server, --object, --chardev or --monitor",
        ));
    }
    if serve.simple.image.is_some() && serve.simple.size.is_some() {
        return Err(Error::invalid("--size is for a new image only"));
    }
    Ok(())
}

fn is_step(name: &str) -> bool {
    matches!(name, "blockdev" | "chardev" | "export" | "monitor" | "nbd-server" | "object")
}

/// Reads one step; the inner error is a help text that was asked for.
fn step(name: &str, value: &str) -> Result<Result<Step, String>, Error> {
    let written = format!("--{name} {value}");
    if let Some(help) = help::of_option(name, value) {
        return Ok(Err(help));
    }
    let action = match name {
        "blockdev" => from_arg(value, Some("driver")).map(|o| Action::Blockdev(Box::new(o))),
        "export" => from_arg(value, Some("type")).map(|o| Action::Export(Box::new(o))),
        "nbd-server" => from_arg(value, None).map(Action::NbdServer),
        "object" => from_arg(value, Some("qom-type")).map(Action::Object),
        "monitor" => from_arg(value, Some("chardev")).map(Action::Monitor),
        _ => chardev(value).map(Action::Chardev),
    };
    action.map(|action| Ok(Step { written: written.clone(), action })).map_err(|e| e.context(written))
}

/// `--chardev` has a syntax of its own: `server` and `nowait` may stand without a value.
fn chardev(text: &str) -> Result<ChardevOptions, Error> {
    let spelled = |part: &str| match part {
        "server" => "server=on".to_owned(),
        "noserver" => "server=off".to_owned(),
        "wait" => "wait=on".to_owned(),
        "nowait" => "wait=off".to_owned(),
        other => other.to_owned(),
    };
    let text = text.split(',').map(spelled).collect::<Vec<_>>().join(",");
    let (tree, mode) = keyval::parse_either(&text, Some("backend"))?;
    if tree.get("id").is_none() {
        return Err(Error::invalid("chardev: no id specified"));
    }
    let known = ["socket", "stdio"];
    if let Some(name) = tree.get("backend").and_then(|b| b.as_str())
        && !known.contains(&name)
    {
        return Err(Error::invalid(format!("'{name}' is not a valid char driver name")));
    }
    from_tree(&tree, mode)
}

fn version_text(flavour: Flavour) -> String {
    let version = env!("CARGO_PKG_VERSION");
    match flavour {
        Flavour::Serve => format!("ringblock {version}\n"),
        Flavour::StorageDaemon => {
            let level = crate::qmp::introspect::version().qemu;
            format!(
                "qemu-storage-daemon version {}.{}.{} (Ringblock {version})\n",
                level.major, level.minor, level.micro
            )
        }
    }
}

/// The help text of a declared type.
fn type_help<T: Qapi>() -> String {
    T::ty().def().map(|d| d.help()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(flavour: Flavour, args: &[&str]) -> Result<Serve, String> {
        match parse(flavour, args.iter().map(OsString::from)) {
            Ok(Parsed::Serve(s)) => Ok(*s),
            Ok(Parsed::Print(text)) => Err(text),
            Err(e) => Err(e.message),
        }
    }

    /// Goal: order is kept and every option has its type. Method: one command line with all of them.
    #[test]
    fn steps_in_order() {
        let s = read(
            Flavour::StorageDaemon,
            &[
                "--chardev",
                "socket,id=m,path=q.sock,server,nowait",
                "--monitor=m,pretty=on",
                "--object",
                "iothread,id=io0",
                "--blockdev",
                "null-co,node-name=n,size=1M",
                "--nbd-server=addr.type=unix,addr.path=n.sock",
                "--export",
                "{'type':'nbd','id':'e','node-name':'n','writable':true}",
                "--pidfile",
                "p",
                "--daemonize",
            ],
        )
        .unwrap();
        let kinds: Vec<_> = s.steps.iter().map(|s| s.written.split(' ').next().unwrap()).collect();
        assert_eq!(kinds, ["--chardev", "--monitor", "--object", "--blockdev", "--nbd-server", "--export"]);
        assert!(s.daemonize && s.pidfile == Some("p".into()));
        let Action::Chardev(c) = &s.steps[0].action else { panic!() };
        assert!(
            matches!(&c.backend, ChardevBackend::Socket(s) if s.server == Some(true) && s.wait == Some(false))
        );
        assert!(
            matches!(&s.steps[1].action, Action::Monitor(m) if m.chardev == "m" && m.pretty == Some(true))
        );
    }

    /// Goal: mistakes are named with option and value. Method: one of each kind.
    #[test]
    fn mistakes() {
        let d = Flavour::StorageDaemon;
        for (args, want) in [
            (&["--foo"][..], "invalid option '--foo'"),
            (&["foo"], "foo: Unexpected argument"),
            (&["--cores", "2"], "invalid option '--cores'"),
            (&["--blockdev"], "missing argument for option '--blockdev'"),
            (
                &["--blockdev", "driver=nope"],
                "--blockdev driver=nope: Parameter 'driver' does not accept value 'nope'",
            ),
            (
                &["--object", "nope,id=a"],
                "--object nope,id=a: Parameter 'qom-type' does not accept value 'nope'",
            ),
            (&["--chardev", "nope,id=a"], "--chardev nope,id=a: 'nope' is not a valid char driver name"),
            (&["--chardev", "stdio"], "--chardev stdio: chardev: no id specified"),
            (
                &["--monitor", "a,mode=readline"],
                "--monitor a,mode=readline: Parameter 'mode' does not accept value 'readline'",
            ),
        ] {
            assert_eq!(read(d, args).unwrap_err(), want, "{args:?}");
        }
        let s = Flavour::Serve;
        assert!(read(s, &["a.qcow2", "--blockdev", "null-co,node-name=n"]).is_err());
        assert!(read(s, &["a", "b"]).is_err() && read(s, &["--cores", "0"]).is_err());
        assert!(read(s, &["a", "--size", "1G"]).is_err() && read(s, &["--size", "x"]).is_err());
    }

    /// Goal: the simple form. Method: all its options.
    #[test]
    fn simple_form() {
        let s = read(Flavour::Serve, &["-f", "raw", "disk.img", "--cores=2", "-r", "--data", "d"]).unwrap();
        assert_eq!((s.cores, s.simple.read_only), (2, true));
        assert_eq!(s.simple.image, Some("disk.img".into()));
        let plain = Serve { simple_form: true, ..Serve::default() };
        assert_eq!(read(Flavour::Serve, &[]).unwrap(), plain);
    }

    /// Goal: help exists for the program and for each option. Method: ask.
    #[test]
    fn help_texts() {
        assert!(read(Flavour::Serve, &["--help"]).unwrap_err().contains("--cores"));
        let text = read(Flavour::StorageDaemon, &["-h"]).unwrap_err();
        assert!(text.contains("--nbd-server") && !text.contains("--cores"));
        assert!(read(Flavour::Serve, &["--blockdev", "help"]).unwrap_err().contains("driver=qcow2"));
        assert!(read(Flavour::Serve, &["--blockdev", "qcow2,help"]).unwrap_err().contains("l2-cache-size"));
    }
}
