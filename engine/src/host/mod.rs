//! Hosts: where bytes, clocks and descriptors come from.

pub mod linux;
