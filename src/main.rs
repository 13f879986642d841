//! The Ringblock program: one binary, many commands, also by the names of QEMU's tools.

use ringblock::cli::{self, Flavour, Parsed};
use ringblock::daemon;
use ringblock::tool::Tool;
use ringblock::{img, io};
use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;

const USAGE: &str = "\
Usage: ringblock COMMAND [ARGUMENT]...

  serve    serve a disk over NBD (serve --help tells more)
  img      images at rest: create, info, check, map, convert, compare, resize, bench
  io       single requests to an image, as typed commands

  -h, --help       this text
  -V, --version    the version
";

fn main() -> ExitCode {
    let mut args = std::env::args_os();
    let called = args.next().unwrap_or_default();
    let name = Path::new(&called).file_name().unwrap_or_default().to_string_lossy().into_owned();
    if name == "qemu-storage-daemon" {
        return serve(&name, Flavour::StorageDaemon, args);
    }
    if name == "qemu-img" {
        return tool(&name, &called.to_string_lossy(), args, img::main);
    }
    if name == "qemu-io" {
        return tool(&name, &called.to_string_lossy(), args, io::main);
    }
    let command = args.next().unwrap_or_default();
    match command.to_string_lossy().as_ref() {
        "serve" => serve("ringblock", Flavour::Serve, args),
        "io" => tool("ringblock", "ringblock io", args, io::main),
        "img" => tool("ringblock", "ringblock img", args, img::main),
        "-h" | "--help" | "help" => print(USAGE),
        "-V" | "--version" => print(concat!("ringblock ", env!("CARGO_PKG_VERSION"), "\n")),
        "" => {
            eprint!("{USAGE}");
            ExitCode::FAILURE
        }
        other => {
            eprintln!("ringblock: unknown command '{other}'\n\n{USAGE}");
            ExitCode::FAILURE
        }
    }
}

fn print(text: &str) -> ExitCode {
    use std::io::Write;
    match std::io::stdout().write_all(text.as_bytes()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

fn serve(program: &str, flavour: Flavour, args: impl Iterator<Item = OsString>) -> ExitCode {
    match cli::parse(flavour, args) {
        Ok(Parsed::Serve(serve)) => daemon::run(program, &serve),
        Ok(Parsed::Print(text)) => print(&text),
        Err(e) => {
            eprintln!("{program}: {e}");
            ExitCode::FAILURE
        }
    }
}

/// Runs one of the command line tools.
fn tool(
    name: &str,
    command: &str,
    args: impl Iterator<Item = OsString>,
    main: fn(&Tool, &[String]) -> i32,
) -> ExitCode {
    let tool = Tool { name: name.to_owned(), command: command.to_owned() };
    let args: Result<Vec<String>, OsString> = args.map(OsString::into_string).collect();
    match args {
        Ok(args) => ExitCode::from(u8::try_from(main(&tool, &args)).unwrap_or(1)),
        Err(bad) => {
            tool.error(format!("Argument {bad:?} is not valid UTF-8"));
            ExitCode::FAILURE
        }
    }
}
