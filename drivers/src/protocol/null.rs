//! `null-co` and `null-aio`: nothing behind them, for measuring what is above.
//!
//! Writes vanish at once or after `latency-ns`. Reads give zeroes with `read-zeroes`, otherwise whatever is in the
//! buffer, like the peer's driver; buffers are always initialised memory of this process's own I/O pools.

use crate::options::blockdev::{BlockdevDriver, BlockdevOptions, BlockdevOptionsNull};
use ringblock_engine::driver::{Driver, Kind, Leaf, LocalFuture, Op, Request, Status};
use ringblock_engine::error::{Errno, Error};
use ringblock_engine::graph::{Prepared, Reopen};
use ringblock_engine::timer::Sleep;
use std::any::Any;
use std::ops::Range;

/// Size where none is given: 1 GiB.
pub const DEFAULT_SIZE: u64 = 1 << 30;

/// What a null node is to be.
#[derive(Clone, Debug)]
pub struct NullConfig {
    /// The driver's name: `null-co` or `null-aio`. They are the same here.
    pub name: &'static str,
    /// Size in bytes.
    pub size: u64,
    /// How long every request takes.
    pub latency_ns: u64,
    /// Reads fill the buffer with zeroes.
    pub read_zeroes: bool,
}

/// A node that stores nothing.
pub struct NullDriver {
    config: NullConfig,
    leaf: Leaf,
}

impl NullDriver {
    /// Makes one. Errors: a size that does not fit a signed 64-bit number.
    pub fn new(config: NullConfig) -> Result<NullDriver, Error> {
        if i64::try_from(config.size).is_err() {
            return Err(Error::invalid("size is invalid"));
        }
        if i64::try_from(config.latency_ns).is_err() {
            return Err(Error::invalid("latency-ns is invalid"));
        }
        let leaf = Leaf::Null { read_zeroes: config.read_zeroes, latency_ns: config.latency_ns };
        Ok(NullDriver { config, leaf })
    }

    fn same(&self, o: &BlockdevOptionsNull) -> Result<(), Error> {
        let changed = |name: &str| Err(Error::invalid(format!("Cannot change the option '{name}'")));
        if o.size.map_or(DEFAULT_SIZE, |s| s.0) != self.config.size {
            return changed("size");
        }
        if o.latency_ns.unwrap_or(0) != self.config.latency_ns {
            return changed("latency-ns");
        }
        if o.read_zeroes.unwrap_or(false) != self.config.read_zeroes {
            return changed("read-zeroes");
        }
        Ok(())
    }
}

impl Driver for NullDriver {
    fn name(&self) -> &'static str {
        self.config.name
    }

    fn size(&self) -> u64 {
        self.config.size
    }

    fn kind(&self) -> Kind<'_> {
        Kind::Leaf(&self.leaf)
    }

    fn submit(&self, req: Request) -> LocalFuture<'_, (Result<(), Errno>, Request)> {
        Box::pin(async move {
            if self.config.latency_ns > 0 {
                Sleep::ns(self.config.latency_ns).await;
            }
            let done = match req.op {
                Op::WriteZeroes | Op::Discard | Op::Flush => Ok(()),
                Op::Read | Op::Write => Err(Errno::ENOTSUP),
            };
            (done, req)
        })
    }

    /// Known zeroes with `read-zeroes`; otherwise nothing is known, and no layer below decides.
    fn status(&self, range: Range<u64>, _want_zero: bool) -> LocalFuture<'_, Result<Status, Errno>> {
        let zero = self.config.read_zeroes;
        let status = Status {
            len: range.end.saturating_sub(range.start),
            data: false,
            zero,
            allocated: zero,
            encoded: false,
            offset: Some(range.start),
        };
        Box::pin(async move { Ok(status) })
    }

    fn filename(&self) -> String {
        format!("{}://", self.config.name)
    }

    fn supports_reopen(&self) -> bool {
        true
    }

    /// Only the options every node has can change.
    fn reopen_prepare<'a>(&'a self, new: &'a Reopen) -> LocalFuture<'a, Result<Prepared, Error>> {
        let same = match new.config.downcast_ref::<BlockdevOptions>().map(|o| &o.driver) {
            Some(BlockdevDriver::NullCo(o)) if self.config.name == "null-co" => self.same(o),
            Some(BlockdevDriver::NullAio(o)) if self.config.name == "null-aio" => self.same(o),
            _ => Err(Error::invalid("Cannot change the option 'driver'")),
        };
        Box::pin(async move {
            same?;
            Ok(Prepared { commit: Box::new(|| {}), abort: Box::new(|| {}) })
        })
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
