//! The simulator: the whole engine on one thread, under a seed (DESIGN §10).
pub mod disk;
