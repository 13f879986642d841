//! The [`qapi!`](crate::qapi) macro: declare a structure once, get type, reader, writer and descriptor.
//!
//! ```
//! use ringblock_drivers::options::{from_json, Qapi, Size};
//! ringblock_drivers::qapi! {
//!     /// How to colour.
//!     enum Colour {
//!         /// Like blood.
//!         Red = "red",
//!         /// Like the sky.
//!         Blue = "blue",
//!     }
//!     /// What all shapes have.
//!     struct ShapeBase {
//!         /// Its colour (default: red).
//!         colour: Option<Colour> = "colour",
//!     }
//!     /// A round shape.
//!     struct Circle {
//!         /// Its radius.
//!         radius: Size = "radius",
//!     }
//!     /// A shape.
//!     union Shape {
//!         base: ShapeBase,
//!         tag kind: ShapeKind = "kind",
//!         /// Round.
//!         Circle(Circle) = "circle",
//!     }
//!     /// A shape or the name of one.
//!     alternate ShapeRef {
//!         /// In place.
//!         Inline(Box<Shape>),
//!         /// By name.
//!         Name(String),
//!     }
//! }
//! let v = serde_json::json!({"kind": "circle", "radius": 3, "colour": "blue"});
//! let shape: Shape = from_json(&v).unwrap();
//! assert_eq!(shape.base.colour, Some(Colour::Blue));
//! assert!(matches!(&shape.kind, ShapeKind::Circle(c) if c.radius == Size(3)));
//! assert_eq!(shape.write(), v);
//! ```
//!
//! A struct may begin with `..Base,`: it then has a field `base` whose members are written beside its own.
//! A member's features for introspection stand in brackets after its name: `x: bool = "x-x" ["unstable"]`.
//! `struct Name: Default { … }` derives further traits.

/// Declares option structures; see the [module](crate::options::define).
#[macro_export]
macro_rules! qapi {
    () => {};

    ( $(#[doc = $doc:literal])* enum $name:ident {
        $( $(#[doc = $vdoc:literal])* $var:ident = $wire:literal ),* $(,)?
    } $($rest:tt)* ) => {
        $(#[doc = $doc])*
        #[allow(unreachable_pub, clippy::enum_variant_names)]
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
        pub enum $name { $( $(#[doc = $vdoc])* $var, )* }

        impl $name {
            /// As it is written.
            pub fn as_str(self) -> &'static str {
                match self { $( $name::$var => $wire, )* }
            }

            /// The value that is written so.
            pub fn from_word(word: &str) -> Option<Self> {
                match word { $( $wire => Some($name::$var), )* _ => None }
            }
        }

        impl $crate::options::Qapi for $name {
            const KIND: $crate::options::value::JsonKind = $crate::options::value::JsonKind::String;
            fn ty() -> $crate::options::Type {
                static DEF: $crate::options::Def = $crate::options::Def {
                    name: stringify!($name),
                    doc: concat!($($doc, "\n",)* ""),
                    kind: $crate::options::Kind::Enum(&[ $( $crate::options::desc::EnumValue {
                        name: $wire, doc: concat!($($vdoc, "\n",)* ""),
                    }, )* ]),
                };
                $crate::options::Type::Def(&DEF)
            }
            fn read(input: $crate::options::Input<'_>) -> Result<Self, $crate::options::Error> {
                input.word(Self::from_word)
            }
            fn write(&self) -> $crate::options::Value {
                $crate::options::Value::from(self.as_str())
            }
        }
        $crate::qapi! { $($rest)* }
    };

    ( $(#[doc = $doc:literal])* struct $name:ident $(: $($derive:ident),+)? {
        $( .. $base:ident, )?
        $( $(#[doc = $mdoc:literal])* $field:ident : $ty:ty = $wire:literal $([$($feature:literal),*])? ),* $(,)?
    } $($rest:tt)* ) => {
        $(#[doc = $doc])*
        #[allow(unreachable_pub, clippy::enum_variant_names)]
        #[derive(Clone, PartialEq, Debug $($(, $derive)+)?)]
        pub struct $name {
            $( #[doc = "Members shared with others."] pub base: $base, )?
            $( $(#[doc = $mdoc])* pub $field: $ty, )*
        }

        impl $crate::options::Members for $name {
            #[allow(unused_variables)]
            fn read_members(
                from: &mut $crate::options::Object<'_>,
            ) -> Result<Self, $crate::options::Error> {
                Ok($name {
                    $( base: <$base as $crate::options::Members>::read_members(from)?, )?
                    $( $field: from.field::<$ty>($wire)?, )*
                })
            }
            #[allow(unused_variables)]
            fn write_members(&self, to: &mut $crate::options::Map<String, $crate::options::Value>) {
                $( <$base as $crate::options::Members>::write_members(&self.base, to); )?
                $( <$ty as $crate::options::Field>::put(&self.$field, $wire, to); )*
            }
        }

        impl $crate::options::Qapi for $name {
            const KIND: $crate::options::value::JsonKind = $crate::options::value::JsonKind::Object;
            fn ty() -> $crate::options::Type {
                #[allow(unused_assignments, unused_mut)]
                const BASE: Option<$crate::options::TypeFn> = {
                    let mut base: Option<$crate::options::TypeFn> = None;
                    $( base = Some(<$base as $crate::options::Qapi>::ty); )?
                    base
                };
                static DEF: $crate::options::Def = $crate::options::Def {
                    name: stringify!($name),
                    doc: concat!($($doc, "\n",)* ""),
                    kind: $crate::options::Kind::Struct { base: BASE, members: &[ $(
                        $crate::options::Member {
                            name: $wire,
                            doc: concat!($($mdoc, "\n",)* ""),
                            ty: <$ty as $crate::options::Field>::field_ty,
                            optional: <$ty as $crate::options::Field>::OPTIONAL,
                            features: &[ $($($feature,)*)? ],
                        },
                    )* ] },
                };
                $crate::options::Type::Def(&DEF)
            }
            fn read(input: $crate::options::Input<'_>) -> Result<Self, $crate::options::Error> {
                let mut object = $crate::options::Object::open(input)?;
                let read = <Self as $crate::options::Members>::read_members(&mut object)?;
                object.finish()?;
                Ok(read)
            }
            fn write(&self) -> $crate::options::Value {
                let mut map = $crate::options::Map::new();
                $crate::options::Members::write_members(self, &mut map);
                $crate::options::Value::Object(map)
            }
        }
        $crate::qapi! { $($rest)* }
    };

    ( $(#[doc = $doc:literal])* union $name:ident {
        base: $base:ident,
        tag $tag:ident : $words:ident = $tagwire:literal,
        $( $(#[doc = $vdoc:literal])* $var:ident($ty:ty) = $wire:literal ),* $(,)?
    } $($rest:tt)* ) => {
        $(#[doc = $doc])*
        #[allow(unreachable_pub, clippy::enum_variant_names)]
        #[derive(Clone, PartialEq, Debug)]
        pub struct $name {
            /// What all branches have.
            pub base: $base,
            /// The branch, with what only it has.
            pub $tag: $words,
        }

        #[doc = concat!("The branches of [`", stringify!($name), "`].")]
        #[allow(unreachable_pub, clippy::enum_variant_names)]
        #[derive(Clone, PartialEq, Debug)]
        pub enum $words { $( $(#[doc = $vdoc])* $var($ty), )* }

        impl $words {
            /// The word that selects this branch.
            pub fn as_str(&self) -> &'static str {
                match self { $( $words::$var(_) => $wire, )* }
            }
        }

        impl $crate::options::Members for $name {
            fn read_members(
                from: &mut $crate::options::Object<'_>,
            ) -> Result<Self, $crate::options::Error> {
                let known = |w: &str| [$($wire),*].into_iter().find(|k| *k == w);
                let word = match from.with($tagwire, |input| input.word(known))? {
                    Some(word) => word,
                    None => return Err(from.missing($tagwire)),
                };
                let base = <$base as $crate::options::Members>::read_members(from)?;
                let $tag = match word {
                    $( $wire => $words::$var(<$ty as $crate::options::Members>::read_members(from)?), )*
                    _ => return Err(from.missing($tagwire)),
                };
                Ok($name { base, $tag })
            }
            fn write_members(&self, to: &mut $crate::options::Map<String, $crate::options::Value>) {
                to.insert($tagwire.to_owned(), $crate::options::Value::from(self.$tag.as_str()));
                $crate::options::Members::write_members(&self.base, to);
                match &self.$tag {
                    $( $words::$var(v) => $crate::options::Members::write_members(v, to), )*
                }
            }
        }

        impl $crate::options::Qapi for $name {
            const KIND: $crate::options::value::JsonKind = $crate::options::value::JsonKind::Object;
            fn ty() -> $crate::options::Type {
                static WORDS: $crate::options::Def = $crate::options::Def {
                    name: stringify!($words),
                    doc: concat!($($doc, "\n",)* ""),
                    kind: $crate::options::Kind::Enum(&[ $( $crate::options::desc::EnumValue {
                        name: $wire, doc: concat!($($vdoc, "\n",)* ""),
                    }, )* ]),
                };
                static DEF: $crate::options::Def = $crate::options::Def {
                    name: stringify!($name),
                    doc: concat!($($doc, "\n",)* ""),
                    kind: $crate::options::Kind::Union {
                        base: <$base as $crate::options::Qapi>::ty,
                        tag: $tagwire,
                        words: &WORDS,
                        branches: &[ $( $crate::options::desc::Branch {
                            name: $wire,
                            doc: concat!($($vdoc, "\n",)* ""),
                            ty: <$ty as $crate::options::Qapi>::ty,
                        }, )* ],
                    },
                };
                $crate::options::Type::Def(&DEF)
            }
            fn read(input: $crate::options::Input<'_>) -> Result<Self, $crate::options::Error> {
                let mut object = $crate::options::Object::open(input)?;
                let read = <Self as $crate::options::Members>::read_members(&mut object)?;
                object.finish()?;
                Ok(read)
            }
            fn write(&self) -> $crate::options::Value {
                let mut map = $crate::options::Map::new();
                $crate::options::Members::write_members(self, &mut map);
                $crate::options::Value::Object(map)
            }
        }
        $crate::qapi! { $($rest)* }
    };

    ( $(#[doc = $doc:literal])* alternate $name:ident {
        $( $(#[doc = $vdoc:literal])* $var:ident($ty:ty) ),* $(,)?
    } $($rest:tt)* ) => {
        $(#[doc = $doc])*
        #[allow(unreachable_pub, clippy::enum_variant_names)]
        #[derive(Clone, PartialEq, Debug)]
        pub enum $name { $( $(#[doc = $vdoc])* $var($ty), )* }

        impl $crate::options::Qapi for $name {
            const KIND: $crate::options::value::JsonKind = $crate::options::value::JsonKind::Any;
            fn ty() -> $crate::options::Type {
                static DEF: $crate::options::Def = $crate::options::Def {
                    name: stringify!($name),
                    doc: concat!($($doc, "\n",)* ""),
                    kind: $crate::options::Kind::Alternate(&[ $( <$ty as $crate::options::Qapi>::ty, )* ]),
                };
                $crate::options::Type::Def(&DEF)
            }
            fn read(input: $crate::options::Input<'_>) -> Result<Self, $crate::options::Error> {
                $( if <$ty as $crate::options::Qapi>::KIND.accepts(input.value, input.mode) {
                    return <$ty as $crate::options::Qapi>::read(input).map($name::$var);
                } )*
                Err(input.type_error(stringify!($name)))
            }
            fn write(&self) -> $crate::options::Value {
                match self { $( $name::$var(v) => <$ty as $crate::options::Qapi>::write(v), )* }
            }
        }
        $crate::qapi! { $($rest)* }
    };
}
