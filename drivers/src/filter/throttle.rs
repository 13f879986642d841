//! `throttle`: limits the requests that pass, by a throttle-group that other nodes may share.
//!
//! ```text
//!   root ─► throttle ─► qcow2       admitted at the root, before anything is held; the request itself passes by
//!   qcow2 ── file ─► throttle ─► file       comes to `submit`: waits here; drains let it through
//! ```
//!
//! Invariants: every request is charged once per throttle node it meets; flushes never are; the node changes nothing else.

use super::pass;
use crate::options::blockdev::{BlockdevDriver, BlockdevOptions, BlockdevOptionsThrottle};
use ringblock_engine::core::{Core, yield_now};
use ringblock_engine::driver::{Driver, Kind, LocalFuture, Op, Opened, Preallocation, Request, Role, Status};
use ringblock_engine::error::{Errno, Error};
use ringblock_engine::graph::{ChildSpec, OpenCx, Prepared, Reopen};
use ringblock_engine::path::Child;
use ringblock_engine::throttle::{DEFAULT_WEIGHT, Member, Outcome, WEIGHT_MAX};
use std::any::Any;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

/// A throttle node.
pub struct ThrottleDriver {
    file: Child,
    member: Arc<Mutex<Arc<Member>>>,
}

fn lock(member: &Mutex<Arc<Member>>) -> MutexGuard<'_, Arc<Member>> {
    member.lock().unwrap_or_else(|e| e.into_inner())
}

/// Checks what can be told from the options alone.
///
/// # Errors
/// A weight out of range.
pub fn check(options: &BlockdevOptionsThrottle) -> Result<(), Error> {
    match options.weight {
        Some(w) if w == 0 || w > WEIGHT_MAX => {
            Err(Error::invalid(format!("Parameter 'weight' is {w}, but must be within [1, {WEIGHT_MAX}]")))
        }
        _ => Ok(()),
    }
}

/// Joins the group that the options name.
fn join(options: &BlockdevOptionsThrottle) -> Result<Arc<Member>, Error> {
    check(options)?;
    let name = &options.throttle_group;
    let group = Core::current().throttle_groups().find(name);
    let group = group.ok_or_else(|| Error::invalid(format!("Throttle group '{name}' does not exist")))?;
    Ok(Member::join(&group, options.weight.unwrap_or(DEFAULT_WEIGHT)))
}

/// Opens a throttle node on `file`.
///
/// # Errors
/// No such group; those of opening the child.
pub async fn open(cx: OpenCx, options: BlockdevOptionsThrottle, file: ChildSpec) -> Result<Opened, Error> {
    let member = join(&options)?;
    let file = cx.open_child("file", Role::Filtered, file).await?;
    let driver = ThrottleDriver { file, member: Arc::new(Mutex::new(member)) };
    Ok(Opened { driver: Arc::new(driver), owner: None })
}

impl Driver for ThrottleDriver {
    fn name(&self) -> &'static str {
        "throttle"
    }

    fn size(&self) -> u64 {
        self.file.size().unwrap_or(0)
    }

    fn kind(&self) -> Kind<'_> {
        Kind::Full
    }

    fn is_filter(&self) -> bool {
        true
    }

    fn throttle(&self) -> Option<Arc<Member>> {
        Some(lock(&self.member).clone())
    }

    fn submit(&self, req: Request) -> LocalFuture<'_, (Result<(), Errno>, Request)> {
        Box::pin(async move {
            let write = req.op != Op::Read;
            if req.op != Op::Flush {
                loop {
                    let member = lock(&self.member).clone();
                    if !member.is_limited(write) || member.admit(write, req.len, 0).await == Outcome::Allowed
                    {
                        break;
                    }
                    yield_now().await;
                }
            }
            pass(&self.file, req).await
        })
    }

    fn status(&self, range: Range<u64>, want_zero: bool) -> LocalFuture<'_, Result<Status, Errno>> {
        Box::pin(async move { self.file.status(range, want_zero).await })
    }

    fn truncate(&self, size: u64, prealloc: Preallocation) -> LocalFuture<'_, Result<(), Error>> {
        Box::pin(async move { self.file.truncate(size, prealloc).await })
    }

    fn supports_reopen(&self) -> bool {
        true
    }

    /// The group and the weight may change.
    fn reopen_prepare<'a>(&'a self, new: &'a Reopen) -> LocalFuture<'a, Result<Prepared, Error>> {
        Box::pin(async move {
            let options = match new.config.downcast_ref::<BlockdevOptions>().map(|o| &o.driver) {
                Some(BlockdevDriver::Throttle(o)) => o,
                _ => return Err(Error::invalid("Cannot change the option 'driver'")),
            };
            check(options)?;
            let here = lock(&self.member).clone();
            if here.group().name() == options.throttle_group {
                let weight = options.weight.unwrap_or(DEFAULT_WEIGHT);
                let commit = Box::new(move || here.set_weight(weight));
                return Ok(Prepared { commit, abort: Box::new(|| {}) });
            }
            let (next, at) = (join(options)?, self.member.clone());
            let commit = Box::new(move || {
                *lock(&at) = next;
                here.retire();
            });
            Ok(Prepared { commit, abort: Box::new(|| {}) })
        })
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
