//! Ringblock.
