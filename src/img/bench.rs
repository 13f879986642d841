//! `bench`: how fast an image takes requests.
//!
//! The load is one task for each request in flight, on the core that serves them, with one buffer each: what is measured
//! is the engine, and a request costs no memory.
//!
//! Invariants: requests are numbered in the order they are sent; after each multiple of the flush interval a flush is
//! sent once all requests before it are done (or, without draining, as soon as its last one is done).
//!
//! ```text
//! [worker] x depth ─► next(): offset ─► root.read | root.write ─► done() ─► flush due? ─► next()
//! ```

use super::{Command, Common, FORMAT, IMAGE_OPTS, QUIET, SHARE, one_image};
use crate::tool::cache::Cache;
use crate::tool::getopt::{Parsed, opt};
use crate::tool::image::{Access, Image};
use crate::tool::{Fail, Outcome, Tool, on_engine, out, size_option};
use ringblock_drivers::options::types::BlockdevAioOptions;
use ringblock_engine::Errno;
use ringblock_engine::core::Core;
use ringblock_engine::driver::Flags;
use ringblock_engine::mem::Buf;
use ringblock_engine::path::Root;
use ringblock_engine::sync::Event;
use std::cell::Cell;
use std::rc::Rc;
use std::time::Instant;

pub(super) const COMMAND: Command = Command {
    name: "bench",
    summary: "Measure how fast an image takes requests",
    operands: "FILENAME",
    options: &[
        QUIET,
        FORMAT,
        IMAGE_OPTS,
        opt('t', "cache", "CACHE", "cache mode (default: writeback)"),
        opt('c', "count", "COUNT", "requests to send (default: 75000)"),
        opt('d', "depth", "DEPTH", "requests in flight (default: 64)"),
        opt('s', "buffer-size", "SIZE", "bytes of each request (default: 4096)"),
        opt('S', "step-size", "SIZE", "from one request's offset to the next (default: the request's size)"),
        opt('o', "offset", "OFFSET", "where the first request starts (default: 0)"),
        opt('i', "aio", "AIO", "threads, native or io_uring; io_uring is what is used"),
        opt('n', "native", "", "the same as -i native"),
        opt('w', "write", "", "write (default: read)"),
        opt('\0', "pattern", "BYTE", "what is written (default: 0)"),
        opt('\0', "flush-interval", "COUNT", "flush after this many requests"),
        opt('\0', "no-drain", "", "go on sending while a flush is in flight"),
        SHARE,
    ],
    run,
};

const INT_MAX: u64 = i32::MAX as u64;
/// Memory for buffers, at most.
const BUFFERS_MAX: u64 = 16 << 30;

/// What to send.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Plan {
    write: bool,
    count: u64,
    depth: u64,
    size: u64,
    step: u64,
    offset: u64,
    pattern: u8,
    /// 0 for no flushes.
    flush_interval: u64,
    drain: bool,
    flags: Flags,
}

impl Default for Plan {
    fn default() -> Plan {
        Plan {
            write: false,
            count: 75_000,
            depth: 64,
            size: 4096,
            step: 0,
            offset: 0,
            pattern: 0,
            flush_interval: 0,
            drain: true,
            flags: Flags::NONE,
        }
    }
}

fn run(tool: &Tool, parsed: Parsed) -> Outcome {
    let (mut common, mut plan, mut access) = (Common::default(), Plan::default(), Access::default());
    for (option, value) in &parsed.options {
        match *option {
            "cache" => {
                access.cache = Cache::parse(value).ok_or_else(|| Fail::from("Invalid cache mode"))?;
            }
            "aio" => access.aio = Some(aio(value)?),
            "native" => access.aio = Some(BlockdevAioOptions::Native),
            other => {
                if !plan.take(other, value)? {
                    common.take(other, value)?;
                }
            }
        }
    }
    let name = one_image(&parsed)?;
    plan.check()?;
    common.check()?;
    if access.cache.writethrough && plan.write {
        plan.flags = Flags::FUA;
    }
    access.write = plan.write;
    access.force_share = common.force_share;
    let tool = tool.clone();
    on_engine(1, move || {
        Box::pin(async move {
            let image = common.source(&name).open(&tool, access).await?;
            out(&plan.announcement());
            let result = measure(plan, &image).await;
            let closed = image.close().await;
            let seconds = result.map_err(|e| format!("Failed request: {}", e.text()))?;
            closed?;
            out(&format!("Run completed in {seconds:.3} seconds.\n"));
            Ok(0)
        })
    })
}

fn aio(text: &str) -> Result<BlockdevAioOptions, Fail> {
    match text {
        "threads" => Ok(BlockdevAioOptions::Threads),
        "native" => Ok(BlockdevAioOptions::Native),
        "io_uring" => Ok(BlockdevAioOptions::IoUring),
        other => Err(format!("Invalid aio option: {other}").into()),
    }
}

/// A plain number, decimal or `0x…`.
fn number(what: &str, text: &str, least: u64, most: u64) -> Result<u64, Fail> {
    let n = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(hex) => u64::from_str_radix(hex, 16),
        None => text.parse(),
    };
    match n {
        Ok(n) if (least..=most).contains(&n) => Ok(n),
        Ok(_) => Err(format!("Invalid {what} specified. Must be between {least} and {most}.").into()),
        Err(_) => Err(format!("Invalid {what} specified: '{text}'.").into()),
    }
}

impl Plan {
    /// Takes an option if it is one of the plan's.
    fn take(&mut self, option: &str, value: &str) -> Result<bool, Fail> {
        match option {
            "count" => self.count = number("request count", value, 1, INT_MAX)?,
            "depth" => self.depth = number("queue depth", value, 1, INT_MAX)?,
            "buffer-size" => self.size = size_option("buffer size", value, 1, INT_MAX)?,
            "step-size" => self.step = size_option("step size", value, 0, INT_MAX)?,
            "offset" => self.offset = size_option("offset", value, 0, i64::MAX as u64)?,
            "write" => self.write = true,
            "pattern" => self.pattern = number("pattern byte", value, 0, 255)? as u8,
            "flush-interval" => self.flush_interval = number("flush interval", value, 0, INT_MAX)?,
            "no-drain" => self.drain = false,
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn check(&mut self) -> Result<(), Fail> {
        if !self.write && self.flush_interval > 0 {
            return Err("--flush-interval is only available in write tests".into());
        }
        if self.flush_interval > 0 && self.flush_interval < self.depth {
            return Err("Flush interval can't be smaller than depth".into());
        }
        if self.step == 0 {
            self.step = self.size;
        }
        Ok(())
    }

    fn announcement(&self) -> String {
        let mut text = format!(
            "Sending {} {} requests, {} bytes each, {} in parallel (starting at offset {}, step size {})\n",
            self.count,
            if self.write { "write" } else { "read" },
            self.size,
            self.depth,
            self.offset,
            self.step,
        );
        if self.flush_interval > 0 {
            text += &format!("Sending flush every {} requests\n", self.flush_interval);
        }
        text
    }
}

/// A run on its way, shared by its workers.
struct Load {
    plan: Plan,
    root: Root,
    image_size: u64,
    /// Requests not sent yet.
    left: Cell<u64>,
    offset: Cell<u64>,
    in_flight: Cell<u64>,
    /// Requests done.
    done: Cell<u64>,
    /// Nothing is sent until the flush that is due is done.
    held: Cell<bool>,
    flushes: Cell<u64>,
    failed: Cell<Option<Errno>>,
    /// Something of this changed for one who waits.
    changed: Event,
}

/// Sends all requests; gives the seconds from the first to the last one's end.
async fn measure(plan: Plan, image: &Image) -> Result<f64, Errno> {
    let load = Rc::new(Load {
        plan,
        root: image.root,
        image_size: image.size,
        left: Cell::new(plan.count),
        offset: Cell::new(plan.offset),
        in_flight: Cell::new(0),
        done: Cell::new(0),
        held: Cell::new(false),
        flushes: Cell::new(0),
        failed: Cell::new(None),
        changed: Event::default(),
    });
    load.check_range(plan.offset)?;
    let workers = plan.depth.min(plan.count);
    if workers.saturating_mul(plan.size) > BUFFERS_MAX {
        return Err(Errno::ENOMEM);
    }
    let core = Core::current();
    let started = Instant::now();
    for _ in 0..workers {
        core.spawn(work(Rc::clone(&load)));
    }
    while !load.finished() {
        load.changed.wait().await;
    }
    let seconds = started.elapsed().as_secs_f64();
    while load.flushes.get() > 0 {
        load.changed.wait().await;
    }
    load.failed.get().map_or(Ok(seconds), Err)
}

async fn work(load: Rc<Load>) {
    let size = load.plan.size as usize;
    let mut buf = Buf::new(size);
    if load.plan.write {
        buf.fill(load.plan.pattern);
    }
    loop {
        while load.held.get() {
            load.changed.wait().await;
        }
        let Some(at) = load.next() else { return };
        let result = match load.check_range(at) {
            Err(e) => Err(e),
            Ok(()) => {
                let (result, back) = match load.plan.write {
                    true => load.root.write(at, buf, load.plan.flags).await,
                    false => load.root.read(at, buf).await,
                };
                buf = back;
                result
            }
        };
        load.done(result);
    }
}

impl Load {
    /// The peer's answer to a request that is not inside the image.
    fn check_range(&self, at: u64) -> Result<(), Errno> {
        let inside = at.checked_add(self.plan.size).is_some_and(|end| end <= self.image_size);
        if inside { Ok(()) } else { Err(Errno::EIO) }
    }

    fn finished(&self) -> bool {
        let sent = self.left.get() == 0 || self.failed.get().is_some();
        sent && self.in_flight.get() == 0 && !self.held.get()
    }

    /// The offset of the next request to send; `None` if there is none.
    fn next(&self) -> Option<u64> {
        if self.left.get() == 0 || self.failed.get().is_some() {
            return None;
        }
        let at = self.offset.get();
        let next = at.saturating_add(self.plan.step);
        self.offset.set(next.checked_rem(self.image_size).unwrap_or(0));
        self.left.set(self.left.get() - 1);
        self.in_flight.set(self.in_flight.get() + 1);
        let interval = self.plan.flush_interval;
        let sent = self.plan.count - self.left.get();
        if self.plan.drain && interval > 0 && sent.is_multiple_of(interval) {
            self.held.set(true);
        }
        Some(at)
    }

    fn done(self: &Rc<Load>, result: Result<(), Errno>) {
        self.in_flight.set(self.in_flight.get() - 1);
        self.done.set(self.done.get() + 1);
        if let Err(e) = result {
            self.fail(e);
        }
        let interval = self.plan.flush_interval;
        let due = match self.plan.drain {
            true => self.held.get() && self.in_flight.get() == 0,
            false => interval > 0 && self.done.get().is_multiple_of(interval),
        };
        if due {
            self.flushes.set(self.flushes.get() + 1);
            Core::current().spawn(Rc::clone(self).flush());
        }
        if self.finished() {
            self.changed.notify();
        }
    }

    async fn flush(self: Rc<Load>) {
        if let Err(e) = self.root.flush().await {
            self.fail(e);
        }
        self.flushes.set(self.flushes.get() - 1);
        self.held.set(false);
        self.changed.notify();
    }

    fn fail(&self, errno: Errno) {
        if self.failed.get().is_none() {
            self.failed.set(Some(errno));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: mistakes get the peer's texts. Method: a table.
    #[test]
    fn mistakes() {
        for (option, value, want) in [
            ("count", "0", "Invalid request count specified. Must be between 1 and 2147483647."),
            ("count", "1k", "Invalid request count specified: '1k'."),
            ("depth", "x", "Invalid queue depth specified: 'x'."),
            ("buffer-size", "4G", "Invalid buffer size specified. Must be between 1 and 2147483647."),
            ("step-size", "4G", "Invalid step size specified. Must be between 0 and 2147483647."),
            ("offset", "x", "Invalid offset specified: 'x'."),
            ("pattern", "300", "Invalid pattern byte specified. Must be between 0 and 255."),
            ("flush-interval", "x", "Invalid flush interval specified: 'x'."),
        ] {
            let fail = Plan::default().take(option, value).unwrap_err();
            assert_eq!(fail.message, want, "{option}={value}");
        }
        let mut plan = Plan { flush_interval: 3, ..Plan::default() };
        assert!(plan.check().unwrap_err().message.contains("only available in write tests"));
        plan.write = true;
        assert!(plan.check().unwrap_err().message.contains("smaller than depth"));
    }

    /// Goal: what is announced is what will be sent. Method: a plan with everything in it.
    #[test]
    fn announcement() {
        let mut plan = Plan::default();
        for (option, value) in
            [("write", ""), ("count", "100"), ("pattern", "0x41"), ("flush-interval", "64")]
        {
            assert_eq!(plan.take(option, value), Ok(true));
        }
        assert_eq!(plan.check(), Ok(()));
        assert_eq!((plan.step, plan.pattern), (4096, 0x41));
        assert_eq!(
            plan.announcement(),
            "Sending 100 write requests, 4096 bytes each, 64 in parallel (starting at offset 0, step size 4096)\n\
             Sending flush every 64 requests\n"
        );
    }
}
