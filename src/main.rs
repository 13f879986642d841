//! The Ringblock program.
fn main() {}
