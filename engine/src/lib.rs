//! The Ringblock engine: cores, rings, epochs, the block graph and the request path.

pub mod error;
pub mod host;
pub mod units;

pub use error::{Errno, Error, ErrorClass};
