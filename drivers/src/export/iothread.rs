//! The control pipe's name for a core: what the option `iothread` of an export refers to.

/// One of the engine's cores under a name. It is in use while anybody else holds a reference to it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct IoThread {
    /// The id of the object.
    pub id: String,
    /// The core it stands for, from 0.
    pub core: usize,
}
