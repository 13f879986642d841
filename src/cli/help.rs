//! Help texts. What an option takes comes from the declarations that read it.

use super::{ChardevOptions, MonitorOptions, type_help};
use ringblock_drivers::options::blockdev::BlockdevOptions;
use ringblock_drivers::options::export::{BlockExportOptions, NbdServerOptions};
use ringblock_drivers::options::object::ObjectOptions;

const STEPS: &str = "\
  --blockdev [driver=]DRIVER[,node-name=NAME][,...]   open a block node
  --nbd-server addr.type=unix,addr.path=PATH[,...]    start the NBD server
  --nbd-server addr.type=inet,addr.host=HOST,addr.port=PORT[,...]
  --export [type=]nbd,id=ID,node-name=NAME[,...]      export a node
  --object [qom-type=]iothread,id=ID                  name a core, for iothread=ID of exports
  --chardev socket,id=ID,path=PATH,server=on,wait=off make a socket for a monitor
  --chardev stdio,id=ID                               standard input and output for a monitor
  --monitor [chardev=]ID[,pretty=on]                  serve QMP on a character device

These are done in the order in which they stand. Each takes dotted keys or a JSON object;
OPTION help lists what it knows, --blockdev qcow2,help what one driver knows.

  --daemonize            go to the background when everything is up
  --pidfile PATH         write the process number there when everything is up
  -h, --help             this text
  -V, --version          the version
";

/// The help of `serve`.
pub fn serve_help() -> String {
    format!(
        "\
Usage: ringblock serve [IMAGE] [OPTION]...
       ringblock serve STEP...

Serves a disk over NBD under a QMP control socket.

Without an image: makes a folder with a sparse 10 GiB qcow2 image if there is none, and serves that.
With an image: serves it. Its name must end in .qcow2 or .raw, or --format must tell what it is.

  -f, --format FORMAT    qcow2 or raw
  -r, --read-only        clients cannot write
      --data FOLDER      where sockets (and the new image) are (default: ~/.local/share/ringblock)
      --size SIZE        size of the new image (default: 10G)
      --cores N          number of cores that serve (default: all)

Or step by step, as qemu-storage-daemon:

{STEPS}"
    )
}

/// The help under the name of `qemu-storage-daemon`.
pub fn storage_daemon_help() -> String {
    format!(
        "\
Usage: qemu-storage-daemon [OPTION]...

Serves block nodes as QEMU's storage daemon does (this is Ringblock).

{STEPS}"
    )
}

/// The help text that an option's value asks for: `help`, or `DRIVER,help`.
pub(super) fn of_option(name: &str, value: &str) -> Option<String> {
    let (of, word) = value.rsplit_once(',').map_or(("", value), |(of, w)| (of, w));
    if word != "help" && word != "?" {
        return None;
    }
    let all = match name {
        "blockdev" => type_help::<BlockdevOptions>(),
        "export" => type_help::<BlockExportOptions>(),
        "nbd-server" => type_help::<NbdServerOptions>(),
        "object" => type_help::<ObjectOptions>(),
        "monitor" => type_help::<MonitorOptions>(),
        _ => type_help::<ChardevOptions>(),
    };
    let branch = of.split(',').next().unwrap_or("").rsplit('=').next().unwrap_or("");
    Some(one_branch(&all, branch).unwrap_or(all))
}

/// The lines of one branch of a union.
fn one_branch(all: &str, branch: &str) -> Option<String> {
    if branch.is_empty() {
        return None;
    }
    let mut lines = all.lines().skip_while(|l| !l.contains(&format!("={branch}: ")));
    let head = lines.next()?.trim_start();
    let body: Vec<_> = lines.take_while(|l| l.starts_with("    ")).collect();
    Some(format!("{head}\n{}\n", body.join("\n")))
}
