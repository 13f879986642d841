//! Reading typed options out of a value tree, with errors that name the member by its path.
//!
//! Texts are those a QMP client of QEMU knows (`reference` part 2.1 of the semantics inventory): "Parameter
//! 'file.foo' is unexpected", "Parameter 'node-name' is missing", "Invalid parameter type for 'size', expected: integer".
//!
//! Two modes: in [`Mode::Json`] a number is a number; in [`Mode::Keyval`] every scalar is a string that is
//! parsed here, because a command line has no types.
//!
//! ```text
//! Input { value, mode, path } ──► Object ── field("size") ──► Input { value["size"], mode, path + "size" }
//!                                    └── finish(): any member that nobody asked for is "unexpected"
//! ```

use super::desc::{Builtin, Type};
use super::size::{self, BadSize, Size};
use super::{Map, Value};
use ringblock_engine::error::Error;
use std::fmt;

/// How deep typed structures may nest (nodes within nodes); keeps the reader's stack bounded.
pub const MAX_DEPTH: usize = 128;

/// Where scalars come from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    /// JSON: scalars have types.
    Json,
    /// `key=value`: scalars are strings.
    Keyval,
}

/// The place of a value in the input, as a chain up the stack.
#[derive(Clone, Copy)]
pub enum Path<'a> {
    /// The input itself.
    Root,
    /// A member of an object.
    Member(&'a Path<'a>, &'a str),
    /// An element of an array.
    Index(&'a Path<'a>, usize, Mode),
}

impl Path<'_> {
    fn depth(&self) -> usize {
        let (mut n, mut at) = (0, self);
        while let Path::Member(up, _) | Path::Index(up, ..) = at {
            (n, at) = (n + 1, up);
        }
        n
    }
}

impl fmt::Display for Path<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Path::Root => Ok(()),
            Path::Member(Path::Root, name) => f.write_str(name),
            Path::Member(up, name) => write!(f, "{up}.{name}"),
            Path::Index(up, i, Mode::Json) => write!(f, "{up}[{i}]"),
            Path::Index(up, i, Mode::Keyval) => write!(f, "{up}.{i}"),
        }
    }
}

/// A value to be read, and where it stands.
#[derive(Clone, Copy)]
pub struct Input<'a> {
    /// The value.
    pub value: &'a Value,
    /// How to take scalars.
    pub mode: Mode,
    /// Its place.
    pub path: &'a Path<'a>,
}

impl<'a> Input<'a> {
    /// The whole input.
    pub fn root(value: &'a Value, mode: Mode) -> Input<'a> {
        Input { value, mode, path: &Path::Root }
    }

    /// "Invalid parameter type for 'path', expected: what".
    pub fn type_error(&self, expected: &str) -> Error {
        Error::invalid(format!("Invalid parameter type for '{}', expected: {expected}", self.path))
    }

    /// "Parameter 'path' expects what".
    pub fn expects(&self, what: &str) -> Error {
        Error::invalid(format!("Parameter '{}' expects {what}", self.path))
    }

    /// The text of a string value.
    pub fn text(&self) -> Result<&'a str, Error> {
        self.value.as_str().ok_or_else(|| self.type_error("string"))
    }

    /// The word of an enumeration: "Parameter 'driver' does not accept value 'nope'" for others.
    pub fn word<T>(&self, find: impl FnOnce(&str) -> Option<T>) -> Result<T, Error> {
        let text = self.text()?;
        find(text).ok_or_else(|| self.bad_word(text))
    }

    /// The error for a word that is none of those expected. Unlike the others it names a member without the path
    /// that leads to it, as clients know it.
    pub fn bad_word(&self, word: &str) -> Error {
        let name = match self.path {
            Path::Member(_, name) => (*name).to_owned(),
            path => path.to_string(),
        };
        Error::invalid(format!("Parameter '{name}' does not accept value '{word}'"))
    }

    fn keyval_text(&self, expected: &str) -> Result<&'a str, Error> {
        self.value.as_str().ok_or_else(|| self.type_error(expected))
    }

    fn signed(&self, bounds: (i64, i64), name: &str) -> Result<i64, Error> {
        let n = match self.mode {
            Mode::Keyval => {
                parse_signed(self.keyval_text("integer")?).ok_or_else(|| self.expects("integer"))?
            }
            Mode::Json => match self.value {
                Value::Number(n) => n.as_i64().ok_or_else(|| self.type_error("integer"))?,
                _ => return Err(self.type_error("integer")),
            },
        };
        if n < bounds.0 || n > bounds.1 {
            return Err(self.expects(name));
        }
        Ok(n)
    }

    fn unsigned(&self, max: u64, name: &str) -> Result<u64, Error> {
        let n = match self.mode {
            Mode::Keyval => parse_unsigned(self.keyval_text("integer")?).ok_or_else(|| self.expects(name))?,
            Mode::Json => match self.value {
                Value::Number(n) if n.is_i64() || n.is_u64() => {
                    n.as_u64().ok_or_else(|| self.expects(name))?
                }
                _ => return Err(self.type_error("integer")),
            },
        };
        if n > max {
            return Err(self.expects(name));
        }
        Ok(n)
    }
}

/// Digits in the bases of strtoll(3) with base 0: `0x1f`, `017`, `31`.
fn digits(text: &str) -> Option<u64> {
    let (body, radix) = match text {
        t if t.starts_with("0x") || t.starts_with("0X") => (&t[2..], 16),
        t if t.len() > 1 && t.starts_with('0') => (&t[1..], 8),
        t => (t, 10),
    };
    // from_str_radix would take a sign here.
    body.bytes().next()?.is_ascii_hexdigit().then_some(())?;
    u64::from_str_radix(body, radix).ok()
}

pub(crate) fn parse_signed(text: &str) -> Option<i64> {
    match text.strip_prefix('-') {
        Some(rest) => 0i64.checked_sub_unsigned(digits(rest)?),
        None => i64::try_from(digits(text.strip_prefix('+').unwrap_or(text))?).ok(),
    }
}

fn parse_unsigned(text: &str) -> Option<u64> {
    digits(text.strip_prefix('+').unwrap_or(text))
}

/// The kinds of JSON values, for choosing the branch of an alternate.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum JsonKind {
    /// A string.
    String,
    /// An object.
    Object,
    /// An array.
    Array,
    /// A number.
    Number,
    /// true or false.
    Bool,
    /// null.
    Null,
    /// Any of them.
    Any,
}

impl JsonKind {
    /// Whether `v` is of this kind; in keyval mode scalars are strings.
    pub fn accepts(self, v: &Value, mode: Mode) -> bool {
        match (self, v) {
            (JsonKind::Any, _)
            | (JsonKind::String, Value::String(_))
            | (JsonKind::Object, Value::Object(_))
            | (JsonKind::Array, Value::Array(_))
            | (JsonKind::Number, Value::Number(_))
            | (JsonKind::Bool, Value::Bool(_))
            | (JsonKind::Null, Value::Null) => true,
            (JsonKind::Number | JsonKind::Bool, Value::String(_)) => mode == Mode::Keyval,
            _ => false,
        }
    }
}

/// A type that options can have.
pub trait Qapi: Sized {
    /// The kind of JSON value that it is written as.
    const KIND: JsonKind;
    /// Its descriptor.
    fn ty() -> Type;
    /// Reads it; errors name the path.
    fn read(input: Input<'_>) -> Result<Self, Error>;
    /// Writes it as JSON; reading the result gives the same value.
    fn write(&self) -> Value;
}

/// A type that is a set of named members: a struct or a union.
pub trait Members: Sized {
    /// Takes its members out of an object, which may have others.
    fn read_members(from: &mut Object<'_>) -> Result<Self, Error>;
    /// Adds its members to an object.
    fn write_members(&self, to: &mut Map<String, Value>);
}

/// A member of a struct: a type, or an optional one.
pub trait Field: Sized {
    /// Whether it may be missing.
    const OPTIONAL: bool;
    /// The type of its value.
    fn field_ty() -> Type;
    /// Reads it from an object.
    fn get(from: &mut Object<'_>, name: &'static str) -> Result<Self, Error>;
    /// Adds it to an object.
    fn put(&self, name: &str, to: &mut Map<String, Value>);
}

impl<T: Qapi> Field for T {
    const OPTIONAL: bool = false;
    fn field_ty() -> Type {
        T::ty()
    }
    fn get(from: &mut Object<'_>, name: &'static str) -> Result<Self, Error> {
        match from.with(name, T::read)? {
            Some(v) => Ok(v),
            None => Err(from.missing(name)),
        }
    }
    fn put(&self, name: &str, to: &mut Map<String, Value>) {
        to.insert(name.to_owned(), self.write());
    }
}

impl<T: Qapi> Field for Option<T> {
    const OPTIONAL: bool = true;
    fn field_ty() -> Type {
        T::ty()
    }
    fn get(from: &mut Object<'_>, name: &'static str) -> Result<Self, Error> {
        from.with(name, T::read)
    }
    fn put(&self, name: &str, to: &mut Map<String, Value>) {
        if let Some(v) = self {
            to.insert(name.to_owned(), v.write());
        }
    }
}

/// An object that is being read; remembers which members were asked for.
pub struct Object<'a> {
    map: &'a Map<String, Value>,
    mode: Mode,
    path: &'a Path<'a>,
    known: Vec<&'static str>,
}

impl<'a> Object<'a> {
    /// Opens an object value.
    pub fn open(input: Input<'a>) -> Result<Object<'a>, Error> {
        if input.path.depth() > MAX_DEPTH {
            return Err(Error::invalid("Options are nested too deeply"));
        }
        match input.value {
            Value::Object(map) => {
                Ok(Object { map, mode: input.mode, path: input.path, known: Vec::with_capacity(16) })
            }
            _ => Err(input.type_error("object")),
        }
    }

    /// Reads a member of a struct.
    pub fn field<T: Field>(&mut self, name: &'static str) -> Result<T, Error> {
        T::get(self, name)
    }

    /// Reads member `name`, if there, with `read`.
    pub fn with<T>(
        &mut self,
        name: &'static str,
        read: impl FnOnce(Input<'_>) -> Result<T, Error>,
    ) -> Result<Option<T>, Error> {
        self.known.push(name);
        let Some(value) = self.map.get(name) else {
            return Ok(None);
        };
        let path = Path::Member(self.path, name);
        read(Input { value, mode: self.mode, path: &path }).map(Some)
    }

    /// "Parameter 'path.name' is missing".
    pub fn missing(&self, name: &str) -> Error {
        Error::invalid(format!("Parameter '{}' is missing", Path::Member(self.path, name)))
    }

    /// Refuses members that nobody asked for.
    pub fn finish(self) -> Result<(), Error> {
        match self.map.keys().find(|k| !self.known.contains(&k.as_str())) {
            Some(k) => {
                Err(Error::invalid(format!("Parameter '{}' is unexpected", Path::Member(self.path, k))))
            }
            None => Ok(()),
        }
    }
}

impl Qapi for String {
    const KIND: JsonKind = JsonKind::String;
    fn ty() -> Type {
        Type::Builtin(Builtin::Str)
    }
    fn read(input: Input<'_>) -> Result<Self, Error> {
        input.text().map(str::to_owned)
    }
    fn write(&self) -> Value {
        Value::String(self.clone())
    }
}

impl Qapi for bool {
    const KIND: JsonKind = JsonKind::Bool;
    fn ty() -> Type {
        Type::Builtin(Builtin::Bool)
    }
    fn read(input: Input<'_>) -> Result<Self, Error> {
        match input.mode {
            Mode::Json => input.value.as_bool().ok_or_else(|| input.type_error("boolean")),
            Mode::Keyval => match input.keyval_text("boolean")? {
                "on" | "yes" | "true" | "y" => Ok(true),
                "off" | "no" | "false" | "n" => Ok(false),
                _ => Err(input.expects("'on' or 'off'")),
            },
        }
    }
    fn write(&self) -> Value {
        Value::Bool(*self)
    }
}

macro_rules! whole_numbers {
    ($($ty:ident $how:ident ($($bounds:tt)*) $name:literal $text:literal;)*) => { $(
        impl Qapi for $ty {
            const KIND: JsonKind = JsonKind::Number;
            fn ty() -> Type {
                Type::Builtin(Builtin::Int($name))
            }
            fn read(input: Input<'_>) -> Result<Self, Error> {
                let n = input.$how($($bounds)*, $text)?;
                $ty::try_from(n).map_err(|_| input.expects($text))
            }
            fn write(&self) -> Value {
                Value::from(*self)
            }
        }
    )* };
}
whole_numbers! {
    i8 signed((i8::MIN.into(), i8::MAX.into())) "int8" "int8_t";
    i16 signed((i16::MIN.into(), i16::MAX.into())) "int16" "int16_t";
    i32 signed((i32::MIN.into(), i32::MAX.into())) "int32" "int32_t";
    i64 signed((i64::MIN, i64::MAX)) "int" "integer";
    u8 unsigned(u8::MAX.into()) "uint8" "uint8_t";
    u16 unsigned(u16::MAX.into()) "uint16" "uint16_t";
    u32 unsigned(u32::MAX.into()) "uint32" "uint32_t";
    u64 unsigned(u64::MAX) "uint64" "uint64_t";
}

impl Qapi for Size {
    const KIND: JsonKind = JsonKind::Number;
    fn ty() -> Type {
        Type::Builtin(Builtin::Int("size"))
    }
    fn read(input: Input<'_>) -> Result<Self, Error> {
        if input.mode == Mode::Json {
            return input.unsigned(u64::MAX, "a size value (bytes, not negative)").map(Size);
        }
        size::parse(input.keyval_text("size")?, 0).map(Size).map_err(|e| match e {
            BadSize::Syntax => input.expects("a size value representible as a 64-bit integer"),
            BadSize::Range => input.expects("a size value below 16 EiB"),
        })
    }
    fn write(&self) -> Value {
        Value::from(self.0)
    }
}

impl Qapi for f64 {
    const KIND: JsonKind = JsonKind::Number;
    fn ty() -> Type {
        Type::Builtin(Builtin::Number)
    }
    fn read(input: Input<'_>) -> Result<Self, Error> {
        match input.mode {
            Mode::Json => match input.value {
                Value::Number(n) => n.as_f64().ok_or_else(|| input.type_error("number")),
                _ => Err(input.type_error("number")),
            },
            Mode::Keyval => match input.keyval_text("number")?.parse::<f64>() {
                Ok(n) if n.is_finite() => Ok(n),
                _ => Err(input.expects("a number")),
            },
        }
    }
    fn write(&self) -> Value {
        Value::from(*self)
    }
}

impl Qapi for () {
    const KIND: JsonKind = JsonKind::Null;
    fn ty() -> Type {
        Type::Builtin(Builtin::Null)
    }
    fn read(input: Input<'_>) -> Result<Self, Error> {
        input.value.as_null().ok_or_else(|| input.type_error("null"))
    }
    fn write(&self) -> Value {
        Value::Null
    }
}

impl Qapi for Value {
    const KIND: JsonKind = JsonKind::Any;
    fn ty() -> Type {
        Type::Builtin(Builtin::Any)
    }
    fn read(input: Input<'_>) -> Result<Self, Error> {
        Ok(input.value.clone())
    }
    fn write(&self) -> Value {
        self.clone()
    }
}

impl<T: Qapi> Qapi for Vec<T> {
    const KIND: JsonKind = JsonKind::Array;
    fn ty() -> Type {
        Type::Array(T::ty)
    }
    fn read(input: Input<'_>) -> Result<Self, Error> {
        let Value::Array(items) = input.value else {
            return Err(input.type_error("array"));
        };
        let read = |(i, value)| {
            let path = Path::Index(input.path, i, input.mode);
            T::read(Input { value, mode: input.mode, path: &path })
        };
        items.iter().enumerate().map(read).collect()
    }
    fn write(&self) -> Value {
        Value::Array(self.iter().map(T::write).collect())
    }
}

impl<T: Qapi> Qapi for Box<T> {
    const KIND: JsonKind = T::KIND;
    fn ty() -> Type {
        T::ty()
    }
    fn read(input: Input<'_>) -> Result<Self, Error> {
        T::read(input).map(Box::new)
    }
    fn write(&self) -> Value {
        T::write(self)
    }
}

impl<T: Members> Members for Box<T> {
    fn read_members(from: &mut Object<'_>) -> Result<Self, Error> {
        T::read_members(from).map(Box::new)
    }
    fn write_members(&self, to: &mut Map<String, Value>) {
        T::write_members(self, to);
    }
}

#[cfg(test)]
mod tests {
    use super::super::{from_arg, from_json};
    use super::*;
    use serde_json::json;

    fn json_err<T: Qapi + fmt::Debug>(v: Value) -> String {
        from_json::<T>(&v).map(|t| format!("read {t:?}")).unwrap_or_else(|e| e.message)
    }

    /// Goal: numbers keep to their ranges and signs in both modes. Method: edges of each.
    #[test]
    fn ranges() {
        assert_eq!(from_json::<u64>(&json!(u64::MAX)), Ok(u64::MAX));
        assert_eq!(from_json::<i64>(&json!(i64::MIN)), Ok(i64::MIN));
        assert!(from_json::<i64>(&json!(u64::MAX)).is_err());
        assert!(from_json::<u8>(&json!(256)).is_err());
        assert!(from_json::<u32>(&json!(-1)).is_err());
        assert!(from_json::<u32>(&json!(1.0)).is_err());
        assert_eq!(json_err::<Vec<u32>>(json!([1, 4294967296u64])), "Parameter '[1]' expects uint32_t");
        assert_eq!(parse_signed("-0x10"), Some(-16));
        assert_eq!(parse_signed("-9223372036854775808"), Some(i64::MIN));
        assert_eq!(parse_signed("017"), Some(15));
        for bad in ["", "-", "+-1", "0x", "0x-1", "08", "1 ", "9223372036854775808"] {
            assert_eq!(parse_signed(bad), None, "{bad}");
        }
    }

    crate::qapi! {
        /// A test struct.
        struct Probe {
            /// a
            a: Option<bool> = "a-a",
            /// s
            s: Option<Size> = "s",
            /// n
            n: Option<Vec<i64>> = "n",
            /// inner
            inner: Option<Box<Probe>> = "inner",
        }
    }

    /// Goal: keyval scalars are typed by the reader. Method: each kind of scalar, good and bad.
    #[test]
    fn keyval_scalars() {
        let p: Probe = from_arg("a-a=yes,s=2k,n.0=-1,n.1=0x10", None).unwrap();
        assert_eq!(p, Probe { a: Some(true), s: Some(Size(2048)), n: Some(vec![-1, 16]), inner: None });
        assert_eq!(
            p.write(),
            json!({"a-a": true, "s": 2048, "n": [-1, 16]}),
            "the written form is JSON with JSON's types"
        );
        let err = |t: &str| from_arg::<Probe>(t, None).unwrap_err().message;
        assert_eq!(err("a-a=maybe"), "Parameter 'a-a' expects 'on' or 'off'");
        assert_eq!(err("n.0=x"), "Parameter 'n.0' expects integer");
        assert_eq!(err("n=x"), "Invalid parameter type for 'n', expected: array");
        assert_eq!(err("inner.b=1"), "Parameter 'inner.b' is unexpected");
    }

    /// Goal: depth is bounded. Method: nest a structure beyond the bound.
    #[test]
    fn nesting_is_bounded() {
        let mut v = json!({});
        for _ in 0..=MAX_DEPTH {
            v = json!({ "inner": v });
        }
        assert_eq!(json_err::<Probe>(v), "Options are nested too deeply");
    }
}
