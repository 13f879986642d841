//! Typed options: the one definition that parsing, validation, help text and introspection come from.
//!
//! Every structure that a user can write (a block node, an export, the arguments of a command) is declared once
//! with [`qapi!`](crate::qapi). The declaration yields the Rust type, its reader from a value tree with error
//! texts that name the dotted path of the bad member, its writer, and a static descriptor.
//!
//! Invariants:
//! * nothing is accepted that the descriptor does not list, so introspection is true by construction;
//! * a member that nobody honours is not declared, so it is refused and not silently ignored;
//! * reading never panics and never allocates more than the input is worth; nesting is bounded.
//!
//! ```text
//! "driver=raw,file.driver=…"  ─► keyval ─┐
//! {"driver": "raw", "file": …} ─► json  ─┴► Value ─► Qapi::read ─► BlockdevOptions ─► Qapi::write ─► Value
//!                                                        ▲
//!                                    qapi! { … } ────────┴─► Type ─► schema (introspection), help
//! ```

pub mod blockdev;
pub mod define;
pub mod desc;
pub mod export;
pub mod json;
pub mod keyval;
pub mod object;
pub mod schema;
pub mod size;
pub mod throttle;
pub mod types;
pub mod value;

pub use desc::{Def, Kind, Member, Type, TypeFn};
pub use serde_json::{Map, Value};
pub use size::Size;
pub use value::{Field, Input, Members, Mode, Object, Path, Qapi};

pub use ringblock_engine::error::Error;

/// Reads `T` from a JSON value tree (QMP arguments, `{…}` on a command line).
pub fn from_json<T: Qapi>(v: &Value) -> Result<T, Error> {
    T::read(Input::root(v, Mode::Json))
}

/// Reads `T` from what [`keyval::parse`] or [`keyval::parse_either`] made.
pub fn from_tree<T: Qapi>(v: &Value, mode: Mode) -> Result<T, Error> {
    T::read(Input::root(v, mode))
}

/// Reads `T` from an option argument: dotted `key=value` pairs, or JSON if it begins with `{`.
///
/// `implied` is the key that a first value without a key stands for (`driver` for `--blockdev`).
pub fn from_arg<T: Qapi>(text: &str, implied: Option<&str>) -> Result<T, Error> {
    let (tree, mode) = keyval::parse_either(text, implied)?;
    from_tree(&tree, mode)
}
