//! Descriptors: what a declared type looks like, as static data.
//!
//! A descriptor is reached through a function pointer, because types refer to each other in circles
//! (a block node's `file` is a block node).
//!
//! ```text
//! Type ─┬─ Builtin(str | bool | int… | number | any | null)
//!       ├─ Array(of)
//!       └─ Def { name, doc, kind: Enum | Struct | Union | Alternate }
//! ```

use std::fmt::Write;

/// How one type refers to another.
pub type TypeFn = fn() -> Type;

/// A type as help text and introspection see it.
#[derive(Clone, Copy, Debug)]
pub enum Type {
    /// A type that JSON has by itself.
    Builtin(Builtin),
    /// An array of another type.
    Array(TypeFn),
    /// A declared type.
    Def(&'static Def),
}

/// The types that are not declared.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Builtin {
    /// A string.
    Str,
    /// true or false.
    Bool,
    /// A whole number; the name says its range ("int", "uint32", "size", …).
    Int(&'static str),
    /// Any number.
    Number,
    /// Any value.
    Any,
    /// null.
    Null,
}

/// A declared type.
#[derive(Debug)]
pub struct Def {
    /// Its name; unique in the program.
    pub name: &'static str,
    /// What it is for.
    pub doc: &'static str,
    /// What it looks like.
    pub kind: Kind,
}

/// The four kinds of declared types.
#[derive(Debug)]
pub enum Kind {
    /// One of some words.
    Enum(&'static [EnumValue]),
    /// Named members, those of `base` (itself a struct) first.
    Struct {
        /// Members that are shared with other structs.
        base: Option<TypeFn>,
        /// Members of its own.
        members: &'static [Member],
    },
    /// A struct whose further members depend on the word in member `tag`.
    Union {
        /// Members that all branches have (a struct).
        base: TypeFn,
        /// The member that tells the branches apart.
        tag: &'static str,
        /// The enumeration of the branches' names.
        words: &'static Def,
        /// A struct for each word.
        branches: &'static [Branch],
    },
    /// One of several types, told apart by the kind of JSON value.
    Alternate(&'static [TypeFn]),
}

/// A word of an enumeration.
#[derive(Debug)]
pub struct EnumValue {
    /// As it is written.
    pub name: &'static str,
    /// What it means.
    pub doc: &'static str,
}

/// A member of a struct.
#[derive(Debug)]
pub struct Member {
    /// As it is written.
    pub name: &'static str,
    /// What it means, with the default.
    pub doc: &'static str,
    /// The type of its value.
    pub ty: TypeFn,
    /// Whether it may be left out.
    pub optional: bool,
    /// Marks for introspection: "unstable", "deprecated".
    pub features: &'static [&'static str],
}

/// A branch of a union.
#[derive(Debug)]
pub struct Branch {
    /// The word that selects it.
    pub name: &'static str,
    /// What it means.
    pub doc: &'static str,
    /// Its members (a struct).
    pub ty: TypeFn,
}

impl Type {
    /// The name for people: "string", `[BlockdevRef]`, …
    pub fn label(self) -> String {
        match self {
            Type::Builtin(Builtin::Str) => "str".into(),
            Type::Builtin(Builtin::Bool) => "bool".into(),
            Type::Builtin(Builtin::Int(name)) => name.into(),
            Type::Builtin(Builtin::Number) => "number".into(),
            Type::Builtin(Builtin::Any) => "any".into(),
            Type::Builtin(Builtin::Null) => "null".into(),
            Type::Array(of) => format!("[{}]", of().label()),
            Type::Def(def) => match def.kind {
                Kind::Enum(words) => words.iter().map(|w| w.name).collect::<Vec<_>>().join("|"),
                _ => def.name.into(),
            },
        }
    }

    /// The declared type, if it is one.
    pub fn def(self) -> Option<&'static Def> {
        match self {
            Type::Def(def) => Some(def),
            _ => None,
        }
    }
}

impl Def {
    /// All members in the order in which they are read: the base's first. Empty for enums and alternates.
    pub fn members(&self) -> Vec<&'static Member> {
        match &self.kind {
            Kind::Struct { base, members } => {
                let mut all = base.and_then(|b| b().def()).map(Def::members).unwrap_or_default();
                all.extend(members.iter());
                all
            }
            Kind::Union { base, .. } => base().def().map(Def::members).unwrap_or_default(),
            Kind::Enum(_) | Kind::Alternate(_) => Vec::new(),
        }
    }

    /// A help text: a line for each member, and under each branch of a union those of the branch.
    pub fn help(&self) -> String {
        let mut out = format!("{}: {}\n", self.name, first_line(self.doc));
        match &self.kind {
            Kind::Enum(words) => {
                for w in *words {
                    put_line(&mut out, "  ", w.name, w.doc);
                }
            }
            Kind::Alternate(types) => {
                for t in *types {
                    let _ = writeln!(out, "  {}", t().label());
                }
            }
            Kind::Struct { .. } => put_members(&mut out, "  ", &self.members()),
            Kind::Union { tag, branches, .. } => {
                let words: Vec<_> = branches.iter().map(|b| b.name).collect();
                let _ = writeln!(out, "  {tag}=<{}>", words.join("|"));
                put_members(&mut out, "  ", &self.members());
                for b in *branches {
                    let _ = writeln!(out, "  {tag}={}: {}", b.name, first_line(b.doc));
                    put_members(&mut out, "    ", &(b.ty)().def().map(Def::members).unwrap_or_default());
                }
            }
        }
        out
    }
}

fn put_members(out: &mut String, indent: &str, members: &[&Member]) {
    for m in members {
        let key = format!("{}=<{}>", m.name, (m.ty)().label());
        let key = if m.optional { format!("[{key}]") } else { key };
        put_line(out, indent, &key, m.doc);
    }
}

fn put_line(out: &mut String, indent: &str, key: &str, doc: &str) {
    let _ = writeln!(out, "{indent}{key:<36} {}", first_line(doc));
}

fn first_line(doc: &str) -> &str {
    doc.trim().lines().next().unwrap_or("").trim()
}

#[cfg(test)]
mod tests {
    use crate::options::{Qapi, blockdev::BlockdevOptions};

    /// Goal: help comes from the declarations. Method: a member of the base, a branch and one of its members.
    #[test]
    fn help_lists_members_and_branches() {
        let help = BlockdevOptions::ty().def().map(|d| d.help()).unwrap_or_default();
        assert!(help.contains("[detect-zeroes=<off|on|unmap>]"), "{help}");
        assert!(help.contains("\n  driver=qcow2: "), "{help}");
        assert!(help.contains("\n    filename=<str> "), "{help}");
    }
}
