//! Exports: how clients reach a node.
pub mod nbd;
