//! Filter drivers: they show the content of another node and watch, delay or refuse the requests on their way there.
//!
//! A filter is [`Kind::Full`](ringblock_engine::driver::Kind): every request comes to its `submit`, which hands it on
//! with [`pass`]. Its main child is an edge of [`Role::Filtered`](ringblock_engine::driver::Role), so its users'
//! permissions go down unchanged, and [`Driver::is_filter`](ringblock_engine::driver::Driver::is_filter) says so.
//!
//! ```text
//!   parent ─► engine: aligned and split by the filter's limits ─► submit ─► pass ─► engine ─► child
//!   size, block status, truncate ──────────────────────────────────────────────────────────► child
//! ```
//!
//! Invariant: a filter holds no data back: what it has answered is in its child, and a flush goes down.

pub mod blkdebug;
pub mod blklogwrites;
pub mod blkverify;
pub mod throttle;

use ringblock_engine::driver::{Op, Request};
use ringblock_engine::error::Errno;
use ringblock_engine::path::Child;

/// Hands a request on to a child as it is.
pub async fn pass(child: &Child, mut req: Request) -> (Result<(), Errno>, Request) {
    let result = match req.op {
        Op::Read | Op::Write => {
            let Some(buf) = req.buf.take() else { return (Err(Errno::EINVAL), req) };
            let (result, buf) = match req.op {
                Op::Read => child.read(req.offset, buf).await,
                _ => child.write(req.offset, buf, req.flags).await,
            };
            req.buf = Some(buf);
            result
        }
        Op::WriteZeroes => child.write_zeroes(req.offset, req.len, req.flags).await,
        Op::Discard => child.discard(req.offset, req.len).await,
        Op::Flush => child.flush().await,
    };
    (result, req)
}
