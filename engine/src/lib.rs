//! The Ringblock engine: cores, rings, epochs, the block graph and the request path.

pub mod error;
pub mod host;

pub use error::{Errno, Error, ErrorClass};
