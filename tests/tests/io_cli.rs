//! The I/O tool beside the peer's: the same commands, the same outputs, exit codes and effects.
//!
//! Method common to all: [`Twins`]: two folders with equal images, each line run in both; rates and times are
//! taken out of the outputs, everything else is compared; then the images.

use ringblock_tests::{Twins, tools};

fn samples(twins: &Twins) {
    for line in [
        "create -q -f qcow2 data.qcow2 10M",
        "create -q -f qcow2 -b data.qcow2 -F qcow2 top.qcow2 20M",
        "create -q -f qcow2 -o extended_l2=on ext.qcow2 4M",
        "create -q -f qcow2 -o compat=0.10 v2.qcow2 4M",
        "create -q -f raw plain.raw 1M",
    ] {
        twins.qemu_img(line);
    }
    twins.qemu_io("-c 'write -P 1 1M 2M' -c 'write -z 5M 1M' data.qcow2");
    twins.qemu_img("convert -c -O qcow2 data.qcow2 packed.qcow2");
}

/// Goal: reading commands and their outputs.
#[test]
fn reads() {
    let mut twins = Twins::new("reads");
    samples(&twins);
    for line in [
        "-c 'read 0 512' data.qcow2",
        "-c 'read 1M 64k' -c 'read 0 10M' data.qcow2",
        "-c 'read -v 1048570 40' data.qcow2",
        "-c 'read -v 0 16' data.qcow2",
        "-c 'read -P 1 1M 2M' data.qcow2",
        "-c 'read -P 2 1M 512' data.qcow2",
        "-c 'read -P 0 0 2M' data.qcow2",
        "-c 'read -P 1 -s 512 -l 100 1M 4k' data.qcow2",
        "-c 'read -P 1 -s 8192 -l 100 1M 4k' data.qcow2",
        "-c 'read -q 0 512' data.qcow2",
        "-c 'read -C 1M 1M' data.qcow2",
        "-c 'read 10M 512' data.qcow2",
        "-c 'read 9M 2M' data.qcow2",
        "-c 'read 1 1' -c 'read 513 1000' data.qcow2",
        "-c 'read 0 0' data.qcow2",
        "-c 'read -1 512' data.qcow2",
        "-c 'read abc 512' data.qcow2",
        "-c 'read 0 1x' data.qcow2",
        "-c 'read 0' data.qcow2",
        "-c read data.qcow2",
        "-c 'read 0 512 512' data.qcow2",
        "-c 'read -Z 0 512' data.qcow2",
        "-c 'read -P 300 0 512' data.qcow2",
        "-c 'read -s 10 0 512' data.qcow2",
        "-c 'read 0x200 0x400' data.qcow2",
        "-c 'readv 0 512 1k 4k' data.qcow2",
        "-c 'readv -P 1 1M 512 512' data.qcow2",
        "-c 'aio_read 0 64k' -c aio_flush data.qcow2",
        "-c 'aio_read -P 1 1M 64k' -c aio_flush data.qcow2",
        "-c 'aio_read -P 9 1M 64k' -c aio_flush data.qcow2",
        "-r -c 'read 1M 512' data.qcow2",
        "-c 'read -P 1 1M 1M' -c 'read -P 0 15M 1M' top.qcow2",
        "-c 'read -P 1 1M 2M' packed.qcow2",
        "-f raw -c 'read -P 0 0 1M' plain.raw",
        "-U -r -c 'read 0 512' data.qcow2",
    ] {
        twins.io(line);
    }
    twins.finish();
}

/// Goal: writing commands, their outputs and what they leave.
#[test]
fn writes() {
    let mut twins = Twins::new("writes");
    samples(&twins);
    for line in [
        "-c 'write 0 512' data.qcow2",
        "-c 'write -P 7 3M 64k' -c 'read -P 7 3M 64k' data.qcow2",
        "-c 'write -P 0x1f 100 1000' data.qcow2",
        "-c 'write -z 2M 100k' -c 'write -z -u 2500k 200k' data.qcow2",
        "-c 'write -z -n 0 1M' data.qcow2",
        "-c 'write -f -P 3 4M 4k' data.qcow2",
        "-c 'write -q -P 3 4M 4k' data.qcow2",
        "-c 'write -c -P 5 6M 64k' data.qcow2",
        "-c 'write -c -P 5 6M 100' data.qcow2",
        "-c 'write -C -P 5 7M 64k' data.qcow2",
        "-c 'write -P 1 -z 0 512' data.qcow2",
        "-c 'write -u 0 512' data.qcow2",
        "-c 'write 10M 512' data.qcow2",
        "-c 'write 9M 2M' data.qcow2",
        "-c 'write 0' data.qcow2",
        "-c 'write -P x 0 512' data.qcow2",
        "-c 'writev -P 4 8M 512 1k 64k' data.qcow2",
        "-c 'aio_write -P 6 9M 64k' -c 'aio_write -P 7 9100k 64k' -c aio_flush -c 'read -P 6 9M 64k' data.qcow2",
        "-c 'aio_write -z 9M 64k' -c aio_flush data.qcow2",
        "-c 'aio_write -q -P 6 1M 64k' data.qcow2",
        "-c flush data.qcow2",
        "-c 'flush now' data.qcow2",
        "-d unmap -c 'discard 1M 1M' -c 'read -P 0 1M 1M' data.qcow2",
        "-c 'discard 4M 64k' data.qcow2",
        "-c 'discard -q 4M 64k' data.qcow2",
        "-c 'discard 10M 64k' data.qcow2",
        "-c 'discard 0' data.qcow2",
        "-r -c 'write 0 512' data.qcow2",
        "-c 'write -P 9 1500k 1k' -c 'write -z 19M 64k' top.qcow2",
        "-c 'write -P 9 5k 1k' -c 'write -z 2k 2k' -c 'discard 0 64k' ext.qcow2",
        "-c 'write -z 0 64k' -c 'write -P 1 1M 64k' -c 'discard 1M 64k' v2.qcow2",
        "-c 'write -P 2 1M 1k' packed.qcow2",
        "-f raw -c 'write -P 1 1000 100' -c 'write -P 2 1M 512' plain.raw",
        "plain.raw -c 'write 0 512'",
        "-n -c 'write 0 512' data.qcow2",
        "-t none -c 'write -P 8 0 4k' data.qcow2",
        "-t writethrough -c 'write -P 8 0 4k' data.qcow2",
        "-t nosuch -c 'write -P 8 0 4k' data.qcow2",
        "-d nosuch -c 'write -P 8 0 4k' data.qcow2",
        "-i io_uring -c 'write -P 8 8k 4k' data.qcow2",
        "-i nosuch -c 'write -P 8 8k 4k' data.qcow2",
    ] {
        twins.io(line);
    }
    for name in ["data.qcow2", "top.qcow2", "ext.qcow2", "v2.qcow2", "packed.qcow2", "plain.raw"] {
        twins.same_disk(name, if name == "plain.raw" { "raw" } else { "qcow2" });
    }
    twins.finish();
}

/// Goal: the commands about the image, and those about the tool.
#[test]
fn other_commands() {
    let mut twins = Twins::new("others");
    samples(&twins);
    for line in [
        "-c length data.qcow2",
        "-c info data.qcow2",
        "-c info -f raw plain.raw",
        "-c map data.qcow2",
        "-c map top.qcow2",
        "-c map ext.qcow2",
        "-f raw -c map plain.raw",
        "-c 'alloc 1M' data.qcow2",
        "-c 'alloc 0 10M' data.qcow2",
        "-c 'alloc 1M 1M' -c 'alloc 3000k 1M' -c 'alloc 5M 64k' data.qcow2",
        "-c 'alloc 1M 4M' top.qcow2",
        "-c 'alloc 11M' data.qcow2",
        "-c alloc data.qcow2",
        "-c 'truncate 12M' -c length data.qcow2",
        "-c 'truncate 1000' data.qcow2",
        "-c 'truncate -m metadata 16M' data.qcow2",
        "-c 'truncate -m nosuch 17M' data.qcow2",
        "-c truncate data.qcow2",
        "-c 'reopen -r' -c 'write 0 512' data.qcow2",
        "-c 'reopen -r' -c 'reopen -w' -c 'write 0 512' data.qcow2",
        "-c 'reopen -c nosuch' data.qcow2",
        "-c 'reopen -o nosuch=1' data.qcow2",
        "-c 'reopen -o l2-cache-size=1M' -c 'read 0 512' data.qcow2",
        "-c 'sleep 10' data.qcow2",
        "-c sleep data.qcow2",
        "-c nosuch data.qcow2",
        "-c quit -c 'write 0 512' data.qcow2",
        "-c q data.qcow2",
        "-c '' data.qcow2",
        "-c length nosuch.qcow2",
        "-f qcow2 -c length plain.raw",
        "-f nosuch -c length plain.raw",
        "--image-opts -c length driver=qcow2,file.driver=file,file.filename=data.qcow2",
        "--image-opts -f qcow2 -c length driver=qcow2,file.filename=data.qcow2",
        "-c length",
        "-c 'write -P 5 0 64k' -c nosuch -c 'read -P 5 0 64k' data.qcow2",
        "-c 'read -P 9 1M 512' -c 'read -P 1 1M 512' data.qcow2",
    ] {
        twins.io(line);
    }
    twins.same_disk("data.qcow2", "qcow2");
    twins.finish();
}

/// Goal: without `-c` commands come from standard input, prompts and all. Method: a script on the pipe.
#[test]
fn commands_from_standard_input() {
    let mut twins = Twins::new("stdin");
    samples(&twins);
    for script in [
        "write -P 3 0 64k\nread -P 3 0 64k\nlength\nquit\n",
        "length\n",
        "",
        "nosuch\nlength\n",
        "read -v 0 16\nq\nlength\n",
    ] {
        let ours = tools::io().arg("data.qcow2").stdin(script);
        let theirs = tools::qemu_io().arg("data.qcow2").stdin(script);
        twins.same(&format!("(stdin {script:?}) data.qcow2"), ours, theirs);
    }
    twins.same_disk("data.qcow2", "qcow2");
    twins.finish();
}
