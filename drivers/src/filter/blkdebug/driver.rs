//! The driver: requests and events come in, limits go out.

use super::config::Sections;
use super::rules::{Listener, Note, Rules};
use crate::filter::pass;
use crate::open::child;
use crate::options::blockdev::{BlkdebugIOType, BlockdevDriver, BlockdevOptions, BlockdevOptionsBlkdebug};
use crate::options::types::BlockPermission;
use crate::options::{Qapi, Size, Value};
use ringblock_engine::core::{Core, yield_now};
use ringblock_engine::debug::DebugEvent;
use ringblock_engine::driver::{
    Driver, Kind, Limits, LocalFuture, Op, OpenFn, Opened, Preallocation, Request, Role, Status, perm,
};
use ringblock_engine::error::{Errno, Error};
use ringblock_engine::graph::{ChildSpec, Common, OpenCx, Prepared, Reopen};
use ringblock_engine::path::Child;
use std::any::Any;
use std::future::poll_fn;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::Poll;

/// What cannot change while the node is open, kept to say so.
struct Config {
    options: BlockdevOptionsBlkdebug,
    limits: Limits,
}

/// A filter that injects errors.
pub struct Blkdebug {
    config: Config,
    image: Child,
    rules: Mutex<Rules>,
    /// Told when a request is held up or goes on.
    listener: Mutex<Option<Listener>>,
    /// Changes that were made, and those of them that a flush has covered: a flush of nothing is nobody's error.
    changes: AtomicU64,
    flushed: AtomicU64,
}

/// What opens a node.
pub(crate) fn open_fn(o: &BlockdevOptionsBlkdebug, common: &Common) -> Result<OpenFn, Error> {
    let image = child(&o.image, common, Role::Filtered)?;
    let options = o.clone();
    Ok(Box::new(move |cx| Box::pin(open(cx, options, image))))
}

async fn open(cx: OpenCx, options: BlockdevOptionsBlkdebug, image: ChildSpec) -> Result<Opened, Error> {
    let mut sections = Sections::default();
    if let Some(name) = options.config.clone().filter(|n| !n.is_empty()) {
        let text = Core::current().blocking(move || std::fs::read_to_string(name)).await;
        let text = text.map_err(|e| {
            let errno = Errno(e.raw_os_error().unwrap_or(Errno::EINVAL.0));
            Error::io(errno, "Could not read blkdebug config file")
        })?;
        sections.parse(&text)?;
    }
    sections.add(options.inject_error.as_deref().unwrap_or(&[]), options.set_state.as_deref().unwrap_or(&[]));
    let mut rules = Rules::new(sections.rules()?);
    let take = permissions(options.take_child_perms.as_deref());
    let keep = permissions(options.unshare_child_perms.as_deref());
    let image = cx.open_child_taking("image", Role::Filtered, image, take, keep).await?;
    let limits = limits(&options, &image.limits()?)?;
    rules.event(DebugEvent::None);
    let config = Config { options, limits };
    let driver = Blkdebug {
        config,
        image,
        rules: Mutex::new(rules),
        listener: Mutex::default(),
        changes: AtomicU64::new(0),
        flushed: AtomicU64::new(0),
    };
    Ok(Opened { driver: Arc::new(driver), owner: None })
}

fn permissions(list: Option<&[BlockPermission]>) -> u8 {
    list.unwrap_or(&[]).iter().fold(0, |bits, p| {
        bits | match p {
            BlockPermission::ConsistentRead => perm::CONSISTENT_READ,
            BlockPermission::Write => perm::WRITE,
            BlockPermission::WriteUnchanged => perm::WRITE_UNCHANGED,
            BlockPermission::Resize => perm::RESIZE,
        }
    })
}

/// The limits that the options ask for, where they fit together and with the child's.
fn limits(o: &BlockdevOptionsBlkdebug, child: &Limits) -> Result<Limits, Error> {
    let given = |s: Option<Size>| s.map_or(0, |s| s.0);
    let refusal = |name: &str, n: u64| Error::invalid(format!("Cannot meet constraints with {name} {n}"));
    let own = given(o.align);
    if own >= i32::MAX as u64 || own != 0 && !own.is_power_of_two() {
        return Err(refusal("align", own));
    }
    let align = own.max(u64::from(child.request_alignment)).max(1);
    let bound = |name: &str, s: Option<Size>, unit: u64| match given(s) {
        n if n >= i32::MAX as u64 || !n.is_multiple_of(unit) => Err(refusal(name, n)),
        n => Ok(n),
    };
    let most = bound("max-transfer", o.max_transfer, align)?;
    let zero = bound("opt-write-zero", o.opt_write_zero, align)?;
    let max_zero = bound("max-write-zero", o.max_write_zero, zero.max(align))?;
    let discard = bound("opt-discard", o.opt_discard, align)?;
    let max_discard = bound("max-discard", o.max_discard, discard.max(align))?;
    let default = Limits::default();
    Ok(Limits {
        request_alignment: own.max(1) as u32,
        max_transfer: if most == 0 { default.max_transfer } else { most as u32 },
        zero_alignment: zero.max(1) as u32,
        max_zero,
        discard_alignment: discard.max(1) as u32,
        max_discard,
        ..default
    })
}

fn kind_of(op: Op) -> BlkdebugIOType {
    match op {
        Op::Read => BlkdebugIOType::Read,
        Op::Write => BlkdebugIOType::Write,
        Op::WriteZeroes => BlkdebugIOType::WriteZeroes,
        Op::Discard => BlkdebugIOType::Discard,
        Op::Flush => BlkdebugIOType::Flush,
    }
}

impl Blkdebug {
    fn rules(&self) -> MutexGuard<'_, Rules> {
        self.rules.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// The error that a rule has for a request.
    async fn check(&self, kind: BlkdebugIOType, at: u64, len: u64) -> Result<(), Errno> {
        let found = self.rules().check(kind, at, len);
        let Some((errno, immediately)) = found else { return Ok(()) };
        if !immediately {
            yield_now().await;
        }
        Err(errno)
    }

    /// A flush: rules are asked only if something was changed since the last.
    async fn flush(&self) -> Result<(), Errno> {
        let changes = self.changes.load(Ordering::Acquire);
        if changes != self.flushed.load(Ordering::Acquire) {
            self.check(BlkdebugIOType::Flush, 0, 0).await?;
        }
        self.image.flush().await?;
        self.flushed.fetch_max(changes, Ordering::AcqRel);
        Ok(())
    }

    /// Any other request.
    async fn request(&self, req: Request) -> (Result<(), Errno>, Request) {
        let op = req.op;
        if let Err(e) = self.check(kind_of(op), req.offset, req.len).await {
            return (Err(e), req);
        }
        let done = pass(&self.image, req).await;
        if matches!(op, Op::Write | Op::WriteZeroes | Op::Discard) {
            self.changes.fetch_add(1, Ordering::AcqRel);
        }
        done
    }

    async fn resize(&self, size: u64, prealloc: Preallocation) -> Result<(), Error> {
        let done = self.image.truncate(size, prealloc).await;
        self.changes.fetch_add(1, Ordering::AcqRel);
        done
    }

    fn note(&self, note: Note<'_>) {
        let listener = self.listener.lock().unwrap_or_else(|e| e.into_inner()).clone();
        if let Some(tell) = listener {
            tell(note);
        }
    }

    async fn suspend(&self, tag: &str) {
        let id = self.rules().hold(tag);
        self.note(Note::Suspended(tag));
        poll_fn(|cx| match self.rules().is_held(id, cx.waker()) {
            true => Poll::Pending,
            false => Poll::Ready(()),
        })
        .await;
    }

    /// Sets who is told when a request is held up or goes on.
    pub fn set_listener(&self, tell: impl Fn(Note<'_>) + Send + Sync + 'static) {
        *self.listener.lock().unwrap_or_else(|e| e.into_inner()) = Some(Arc::new(tell));
    }

    /// The next request that raises `event` is held up. `ENOENT` if there is no such event.
    pub fn add_break(&self, event: &str, tag: &str) -> Result<(), Errno> {
        let event = DebugEvent::from_word(event).ok_or(Errno::ENOENT)?;
        self.rules().add_break(event, tag);
        Ok(())
    }

    /// Removes a breakpoint and lets go whoever is held there. `ENOENT` if there is none.
    pub fn remove_break(&self, tag: &str) -> Result<(), Errno> {
        let found = self.rules().remove_break(tag);
        while self.resume(tag).is_ok() {}
        if found { Ok(()) } else { Err(Errno::ENOENT) }
    }

    /// Removes every breakpoint and lets go whoever is held.
    pub fn remove_all_breaks(&self) {
        let held = self.rules().remove_all_breaks();
        for tag in held {
            self.note(Note::Resuming(&tag));
        }
    }

    /// Lets a request go on. `ENOENT` if none is held at this tag.
    pub fn resume(&self, tag: &str) -> Result<(), Errno> {
        if !self.rules().resume(tag) {
            return Err(Errno::ENOENT);
        }
        self.note(Note::Resuming(tag));
        Ok(())
    }

    /// Waits until a request is held at this tag.
    pub async fn wait_break(&self, tag: &str) {
        poll_fn(|cx| {
            let mut rules = self.rules();
            if rules.is_suspended(tag) {
                return Poll::Ready(());
            }
            rules.watch(cx.waker());
            Poll::Pending
        })
        .await
    }

    /// The first option that differs; all of them are fixed while the node is open.
    fn same(&self, new: &Reopen) -> Result<(), Error> {
        let Some(BlockdevDriver::Blkdebug(new)) =
            new.config.downcast_ref::<BlockdevOptions>().map(|o| &o.driver)
        else {
            return Err(Error::invalid("Cannot change the option 'driver'"));
        };
        let (old, new) = (flat(&self.config.options), flat(new));
        if let Some((key, _)) = old.iter().find(|(key, _)| !new.iter().any(|(k, _)| k == key)) {
            return Err(Error::invalid(format!("Option '{key}' cannot be reset to its default value")));
        }
        match new.iter().find(|option| !old.contains(option)) {
            Some((key, _)) => Err(Error::invalid(format!("Cannot change the option '{key}'"))),
            None => Ok(()),
        }
    }
}

/// The options but the child, under dotted names.
fn flat(options: &BlockdevOptionsBlkdebug) -> Vec<(String, Value)> {
    fn add(prefix: &str, value: &Value, out: &mut Vec<(String, Value)>) {
        let mut inner = |key: &str, value: &Value| {
            let key = if prefix.is_empty() { key.to_owned() } else { format!("{prefix}.{key}") };
            add(&key, value, out);
        };
        match value {
            Value::Object(m) => m.iter().for_each(|(k, v)| inner(k, v)),
            Value::Array(a) => a.iter().enumerate().for_each(|(i, v)| inner(&i.to_string(), v)),
            scalar => out.push((prefix.to_owned(), scalar.clone())),
        }
    }
    let (mut tree, mut out) = (options.write(), Vec::new());
    if let Some(map) = tree.as_object_mut() {
        map.remove("image");
    }
    add("", &tree, &mut out);
    out
}

impl Driver for Blkdebug {
    fn name(&self) -> &'static str {
        "blkdebug"
    }

    fn size(&self) -> u64 {
        self.image.size().unwrap_or(0)
    }

    fn limits(&self) -> Limits {
        self.config.limits
    }

    fn kind(&self) -> Kind<'_> {
        Kind::Full
    }

    fn is_filter(&self) -> bool {
        true
    }

    fn listens(&self) -> bool {
        true
    }

    fn debug_event(&self, event: DebugEvent) -> LocalFuture<'_, ()> {
        Box::pin(async move {
            let breaks = self.rules().event(event);
            for tag in breaks {
                self.suspend(&tag).await;
            }
        })
    }

    fn submit(&self, req: Request) -> LocalFuture<'_, (Result<(), Errno>, Request)> {
        Box::pin(async move {
            match req.op {
                Op::Flush => (self.flush().await, req),
                _ => self.request(req).await,
            }
        })
    }

    fn status(&self, range: Range<u64>, want_zero: bool) -> LocalFuture<'_, Result<Status, Errno>> {
        Box::pin(async move {
            let len = range.end - range.start;
            self.check(BlkdebugIOType::BlockStatus, range.start, len).await?;
            let at = range.start;
            let mut status = self.image.status(range, want_zero).await?;
            status.offset = status.offset.map(|_| at);
            Ok(status)
        })
    }

    fn truncate(&self, size: u64, prealloc: Preallocation) -> LocalFuture<'_, Result<(), Error>> {
        Box::pin(self.resize(size, prealloc))
    }

    /// `blkdebug:CONFIG:IMAGE` where that says it all, otherwise the options.
    fn filename(&self) -> String {
        let below = self.image.filename().unwrap_or_default();
        let own = flat(&self.config.options);
        let plain = own.iter().all(|(key, _)| key == "config") && !below.is_empty();
        if plain && !below.starts_with("json:") {
            return format!("blkdebug:{}:{below}", self.config.options.config.as_deref().unwrap_or(""));
        }
        let mut all: crate::options::Map<String, Value> = own.into_iter().collect();
        all.insert("driver".into(), "blkdebug".into());
        all.insert("image".into(), self.below(&below));
        format!("json:{}", Value::Object(all))
    }

    fn supports_reopen(&self) -> bool {
        true
    }

    fn reopen_prepare<'a>(&'a self, new: &'a Reopen) -> LocalFuture<'a, Result<Prepared, Error>> {
        Box::pin(async move {
            self.same(new)?;
            Ok(Prepared { commit: Box::new(|| {}), abort: Box::new(|| {}) })
        })
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl Blkdebug {
    /// The child in a `json:` name.
    fn below(&self, name: &str) -> Value {
        if let Some(tree) = name.strip_prefix("json:").and_then(|t| serde_json::from_str(t).ok()) {
            return tree;
        }
        let driver = self.image.driver_name().unwrap_or_default();
        match name {
            "" => serde_json::json!({ "driver": driver }),
            _ => serde_json::json!({ "driver": driver, "filename": name }),
        }
    }
}
