//! Crash states of recorded runs, enumerated and judged.
#![forbid(unsafe_code)]
