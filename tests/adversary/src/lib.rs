//! Faults, histories, models and hostile input, thrown at the engine.
#![forbid(unsafe_code)]

pub mod args;
pub mod clients;
pub mod faults;
pub mod images;
pub mod kill9;
pub mod linear;
pub mod model;

/// What a panic said.
fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned())).unwrap_or_else(|| "?".into())
}
