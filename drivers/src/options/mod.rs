//! The typed option tree.
