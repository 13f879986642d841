//! JSON as the control pipe speaks it: a streaming reader that survives garbage, and a writer that is pure ASCII.
//!
//! Reading (QMP specification, section 2.2 and the behaviour of QEMU's reader):
//! * strings may be in single quotes;
//! * messages need no separator: one is complete when its brackets balance;
//! * a bad byte gives an error and drops what was collected; reading goes on at the next bracket, comma, colon,
//!   line end or control byte, so a client can always get back in step;
//! * a message has at most [`MAX_BYTES`] bytes and [`MAX_NESTING`] open brackets; beyond that it is dropped.
//!
//! ```text
//! bytes ─► lexer (state machine) ─► tokens ─ balanced? ─► parser ─► Value | error text
//!             └ bad byte ─► error, recovery
//! ```

use super::{Error, Map, Value};
use serde_json::Number;

/// The longest message that is read.
pub const MAX_BYTES: usize = 1 << 20;
/// The deepest nesting that is read.
pub const MAX_NESTING: usize = 1024;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Open(u8),
    Close(u8),
    Colon,
    Comma,
    Str,
    Word,
    Int,
    Float,
}

#[derive(Clone, Copy, Debug)]
struct Token {
    kind: Kind,
    start: u32,
    end: u32,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    Start,
    Str {
        quote: u8,
        escape: bool,
    },
    Word,
    Sign,
    Zero,
    Digits,
    Point,
    Fraction,
    Exp,
    ExpSign,
    ExpDigits,
    Recovery,
    /// A message over a limit: everything up to the next control byte is dropped.
    Skip,
}

/// What the lexer does with a byte.
enum Step {
    /// Take it and go to this state.
    Go(State),
    /// Take it; the token is complete.
    End(Kind),
    /// The token was complete before it; look at it again.
    EndBefore(Kind),
    /// It cannot stand here.
    Bad,
}

/// A reader that is fed bytes as they come and gives values as they are complete.
#[derive(Debug)]
pub struct Reader {
    state: State,
    start: usize,
    buf: Vec<u8>,
    tokens: Vec<Token>,
    open: Vec<u8>,
}

impl Default for Reader {
    fn default() -> Self {
        Reader { state: State::Start, start: 0, buf: Vec::new(), tokens: Vec::new(), open: Vec::new() }
    }
}

impl Reader {
    /// Takes input and calls `sink` for each complete message and each error, in order.
    pub fn feed(&mut self, input: &[u8], sink: &mut dyn FnMut(Result<Value, Error>)) {
        for &byte in input {
            self.byte(byte, sink);
        }
    }

    /// Ends the input: a token that had no end mark is complete, a message with open brackets is an error.
    pub fn finish(&mut self, sink: &mut dyn FnMut(Result<Value, Error>)) {
        self.byte(b'\n', sink);
        if !self.tokens.is_empty() {
            sink(parse_tokens(&self.buf, &self.tokens));
        }
        *self = Reader::default();
    }

    /// Bytes held for a message that is not complete.
    pub fn held(&self) -> usize {
        self.buf.len()
    }

    fn byte(&mut self, byte: u8, sink: &mut dyn FnMut(Result<Value, Error>)) {
        match self.state {
            State::Recovery => {
                if !(byte < 0x20 || b"{}[]:,".contains(&byte)) {
                    return;
                }
                self.state = State::Start;
                if byte < 0x20 {
                    return;
                }
            }
            State::Skip => {
                if byte < 0x20 {
                    self.state = State::Start;
                }
                return;
            }
            _ => {}
        }
        loop {
            if self.state == State::Start {
                if matches!(byte, b' ' | b'\t' | b'\r' | b'\n') {
                    return;
                }
                self.start = self.buf.len();
            }
            match step(self.state, byte) {
                Step::Go(next) => {
                    self.buf.push(byte);
                    self.state = next;
                    if self.buf.len() >= MAX_BYTES {
                        self.drop_message(State::Skip);
                        sink(Err(Error::invalid("JSON token size limit exceeded")));
                    }
                    return;
                }
                Step::End(kind) => {
                    self.buf.push(byte);
                    return self.token(kind, sink);
                }
                Step::EndBefore(kind) => self.token(kind, sink),
                Step::Bad => {
                    self.buf.push(byte);
                    let stray = String::from_utf8_lossy(&self.buf[self.start..]).replace('\0', "");
                    self.drop_message(State::Recovery);
                    return sink(Err(syntax(format!("stray '{stray}'"))));
                }
            }
        }
    }

    fn token(&mut self, kind: Kind, sink: &mut dyn FnMut(Result<Value, Error>)) {
        self.state = State::Start;
        let mut balanced = true;
        match kind {
            Kind::Open(b) => self.open.push(b),
            Kind::Close(b) => balanced = self.open.pop() == Some(if b == b'}' { b'{' } else { b'[' }),
            _ => {}
        }
        if self.open.len() > MAX_NESTING {
            self.drop_message(State::Skip);
            return sink(Err(Error::invalid("JSON nesting depth limit exceeded")));
        }
        if self.buf.len() > MAX_BYTES {
            self.drop_message(State::Skip);
            return sink(Err(Error::invalid("JSON token size limit exceeded")));
        }
        // Both fit in 32 bits because of MAX_BYTES.
        self.tokens.push(Token { kind, start: self.start as u32, end: self.buf.len() as u32 });
        if self.open.is_empty() || !balanced {
            let message = parse_tokens(&self.buf, &self.tokens);
            self.drop_message(State::Start);
            sink(message);
        }
    }

    fn drop_message(&mut self, next: State) {
        // A long message should not keep its memory for the rest of the session.
        if self.buf.capacity() > 64 << 10 {
            (self.buf, self.tokens) = (Vec::new(), Vec::new());
        }
        self.buf.clear();
        self.tokens.clear();
        self.open.clear();
        self.state = next;
    }
}

fn step(state: State, byte: u8) -> Step {
    use State::*;
    match (state, byte) {
        (Start, b'{' | b'[') => Step::End(Kind::Open(byte)),
        (Start, b'}' | b']') => Step::End(Kind::Close(byte)),
        (Start, b':') => Step::End(Kind::Colon),
        (Start, b',') => Step::End(Kind::Comma),
        (Start, b'"' | b'\'') => Step::Go(Str { quote: byte, escape: false }),
        (Start, b'-') => Step::Go(Sign),
        (Start | Sign, b'0') => Step::Go(Zero),
        (Start | Sign, b'1'..=b'9') => Step::Go(Digits),
        (Start | Word, b'a'..=b'z') => Step::Go(Word),
        (Str { .. }, 0..0x20 | 0xfe..) => Step::Bad,
        (Str { quote, escape: true }, _) => Step::Go(Str { quote, escape: false }),
        (Str { quote, .. }, b'\\') => Step::Go(Str { quote, escape: true }),
        (Str { quote, .. }, b) if b == quote => Step::End(Kind::Str),
        (Str { .. }, _) => Step::Go(state),
        (Word, _) => Step::EndBefore(Kind::Word),
        (Zero, b'0'..=b'9') => Step::Bad,
        (Digits, b'0'..=b'9') => Step::Go(Digits),
        (Zero | Digits, b'.') => Step::Go(Point),
        (Zero | Digits | Fraction, b'e' | b'E') => Step::Go(Exp),
        (Zero | Digits, _) => Step::EndBefore(Kind::Int),
        (Point | Fraction, b'0'..=b'9') => Step::Go(Fraction),
        (Exp, b'+' | b'-') => Step::Go(ExpSign),
        (Exp | ExpSign | ExpDigits, b'0'..=b'9') => Step::Go(ExpDigits),
        (Fraction | ExpDigits, _) => Step::EndBefore(Kind::Float),
        _ => Step::Bad,
    }
}

fn syntax(what: impl std::fmt::Display) -> Error {
    Error::invalid(format!("JSON parse error, {what}"))
}

/// Parses one whole JSON text, with nothing but white space around it.
pub fn parse(text: &str) -> Result<Value, Error> {
    let mut found = None;
    let mut sink = |r: Result<Value, Error>| {
        found = Some(match (found.take(), r) {
            (None, r) => r,
            (Some(Err(e)), _) | (_, Err(e)) => Err(e),
            (Some(Ok(_)), Ok(_)) => Err(Error::invalid("Expecting at most one JSON value")),
        });
    };
    let mut reader = Reader::default();
    reader.feed(text.as_bytes(), &mut sink);
    reader.finish(&mut sink);
    found.unwrap_or_else(|| Err(Error::invalid("Expecting a JSON value")))
}

struct Parser<'a> {
    buf: &'a [u8],
    tokens: &'a [Token],
    at: usize,
}

fn parse_tokens(buf: &[u8], tokens: &[Token]) -> Result<Value, Error> {
    Parser { buf, tokens, at: 0 }.value()
}

impl Parser<'_> {
    fn peek(&self) -> Option<Kind> {
        self.tokens.get(self.at).map(|t| t.kind)
    }

    fn next(&mut self) -> Result<Token, Error> {
        let t = self.tokens.get(self.at).copied().ok_or_else(|| syntax("premature EOI"))?;
        self.at += 1;
        Ok(t)
    }

    fn bytes(&self, t: Token) -> &[u8] {
        &self.buf[t.start as usize..t.end as usize]
    }

    fn value(&mut self) -> Result<Value, Error> {
        let t = self.next()?;
        match t.kind {
            Kind::Open(b'{') => self.object(),
            Kind::Open(_) => self.array(),
            Kind::Str => string(self.bytes(t)).map(Value::String),
            Kind::Int | Kind::Float => number(self.bytes(t), t.kind == Kind::Float),
            Kind::Word => match self.bytes(t) {
                b"true" => Ok(Value::Bool(true)),
                b"false" => Ok(Value::Bool(false)),
                b"null" => Ok(Value::Null),
                other => Err(syntax(format!("invalid keyword '{}'", String::from_utf8_lossy(other)))),
            },
            Kind::Close(_) | Kind::Colon | Kind::Comma => Err(syntax("expecting value")),
        }
    }

    fn object(&mut self) -> Result<Value, Error> {
        let mut map = Map::new();
        if self.peek() == Some(Kind::Close(b'}')) {
            self.at += 1;
            return Ok(Value::Object(map));
        }
        loop {
            let Value::String(key) = self.value()? else {
                return Err(syntax("key is not a string in object"));
            };
            if self.next()?.kind != Kind::Colon {
                return Err(syntax("missing : in object pair"));
            }
            let value = self.value()?;
            if map.insert(key, value).is_some() {
                return Err(syntax("duplicate key"));
            }
            match self.next()?.kind {
                Kind::Comma => {}
                Kind::Close(b'}') => return Ok(Value::Object(map)),
                _ => return Err(syntax("expected separator in dict")),
            }
        }
    }

    fn array(&mut self) -> Result<Value, Error> {
        let mut items = Vec::new();
        if self.peek() == Some(Kind::Close(b']')) {
            self.at += 1;
            return Ok(Value::Array(items));
        }
        loop {
            items.push(self.value()?);
            match self.next()?.kind {
                Kind::Comma => {}
                Kind::Close(b']') => return Ok(Value::Array(items)),
                _ => return Err(syntax("expected separator in list")),
            }
        }
    }
}

fn number(text: &[u8], float: bool) -> Result<Value, Error> {
    let text = std::str::from_utf8(text).map_err(|_| syntax("invalid number"))?;
    if !float {
        if let Ok(n) = text.parse::<i64>() {
            return Ok(n.into());
        }
        if let Ok(n) = text.parse::<u64>() {
            return Ok(n.into());
        }
    }
    let n = text.parse::<f64>().ok().and_then(Number::from_f64);
    n.map(Value::Number).ok_or_else(|| syntax(format!("number '{text}' is out of range")))
}

/// Decodes a string token, quotes included.
fn string(token: &[u8]) -> Result<String, Error> {
    let bad_utf8 = || syntax("invalid UTF-8 sequence in string");
    let inner = token.get(1..token.len().saturating_sub(1)).unwrap_or_default();
    let text = std::str::from_utf8(inner).map_err(|_| bad_utf8())?;
    let mut out = String::with_capacity(text.len());
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        if c != '\\' {
            out.push(c);
            continue;
        }
        out.push(match chars.next() {
            Some(c @ ('"' | '\'' | '\\' | '/')) => c,
            Some('b') => '\u{8}',
            Some('f') => '\u{c}',
            Some('n') => '\n',
            Some('r') => '\r',
            Some('t') => '\t',
            Some('u') => unicode_escape(&mut chars)?,
            _ => return Err(syntax("invalid escape sequence in string")),
        });
    }
    Ok(out)
}

/// The character of `\uHHHH`, or of two of them that are a surrogate pair; the first `\u` is already taken.
fn unicode_escape(chars: &mut std::str::Chars<'_>) -> Result<char, Error> {
    let unit = |chars: &mut std::str::Chars<'_>| -> (String, Option<u32>) {
        let digits: String = chars.take(4).collect();
        let ok = digits.len() == 4 && digits.bytes().all(|b| b.is_ascii_hexdigit());
        let n = if ok { u32::from_str_radix(&digits, 16).ok() } else { None };
        (digits, n)
    };
    let (digits, first) = unit(chars);
    let bad = |digits: &str| syntax(format!("\\u{digits} is not a valid Unicode character"));
    let first = first.ok_or_else(|| bad(&digits))?;
    if let Some(c) = char::from_u32(first) {
        return Ok(c);
    }
    let mut ahead = chars.clone();
    if first < 0xdc00
        && ahead.next() == Some('\\')
        && ahead.next() == Some('u')
        && let (_, Some(second @ 0xdc00..=0xdfff)) = unit(&mut ahead)
    {
        *chars = ahead;
        let code = 0x10000 + ((first - 0xd800) << 10) + (second - 0xdc00);
        return char::from_u32(code).ok_or_else(|| bad(&digits));
    }
    Err(bad(&digits))
}

/// Writes a value in pure ASCII on one line, or indented by four spaces a level.
pub fn write(value: &Value, pretty: bool) -> String {
    let mut out = String::with_capacity(128);
    put_value(&mut out, value, pretty.then_some(0));
    out
}

fn put_value(out: &mut String, value: &Value, indent: Option<usize>) {
    match value {
        Value::Null => out.push_str("null"),
        Value::Bool(b) => out.push_str(if *b { "true" } else { "false" }),
        Value::Number(n) => put_number(out, n),
        Value::String(s) => put_string(out, s),
        Value::Array(items) => {
            put_list(out, ('[', ']'), items.len(), indent, |out, i, indent| {
                put_value(out, &items[i], indent);
            });
        }
        Value::Object(map) => {
            let mut members = map.iter();
            put_list(out, ('{', '}'), map.len(), indent, |out, _, indent| {
                if let Some((k, v)) = members.next() {
                    put_string(out, k);
                    out.push_str(": ");
                    put_value(out, v, indent);
                }
            });
        }
    }
}

fn put_list(
    out: &mut String,
    (open, close): (char, char),
    len: usize,
    indent: Option<usize>,
    mut item: impl FnMut(&mut String, usize, Option<usize>),
) {
    let line = |out: &mut String, depth: Option<usize>| {
        if let Some(depth) = depth {
            out.push_str("\r\n");
            out.extend(std::iter::repeat_n("    ", depth));
        }
    };
    let inner = indent.map(|d| d + 1);
    out.push(open);
    for i in 0..len {
        if i > 0 {
            out.push_str(if indent.is_some() { "," } else { ", " });
        }
        line(out, inner);
        item(out, i, inner);
    }
    line(out, indent);
    out.push(close);
}

fn put_number(out: &mut String, n: &Number) {
    let text = n.to_string();
    // A whole float is written as an integer, as printf's %g does.
    out.push_str(text.strip_suffix(".0").unwrap_or(&text));
}

fn put_string(out: &mut String, s: &str) {
    out.push('"');
    for c in s.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            ' '..='~' => out.push(c),
            _ => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    out.push_str(&format!("\\u{unit:04X}"));
                }
            }
        }
    }
    out.push('"');
}

#[cfg(test)]
mod tests {
    use super::*;

    fn feed(reader: &mut Reader, input: &[u8]) -> Vec<String> {
        let mut got = Vec::new();
        reader.feed(input, &mut |r| {
            got.push(match r {
                Ok(v) => write(&v, false),
                Err(e) => e.message,
            });
        });
        got
    }

    /// Goal: the same answers to broken input as the peer gives. Method: a transcript recorded from it, in one session.
    #[test]
    fn broken_input_as_the_peer_answers() {
        let mut r = Reader::default();
        let p = "JSON parse error, ";
        for (input, want) in [
            (&b"garbage\n"[..], vec!["invalid keyword 'garbage'"]),
            (b"}\n", vec!["expecting value"]),
            (b"\xff{'a':1}\n", vec!["stray '\u{fffd}'", "{\"a\": 1}"]),
            (b"\"unterminated\n", vec!["stray '\"unterminated\n'"]),
            (b"\"\n", vec![]),
            (b"{\"a\":true,}\n", vec!["expecting value"]),
            (b"{\"a\":1 \"b\":2}\n", vec!["expected separator in dict"]),
            (b"{\"a\" 1}\n", vec!["missing : in object pair"]),
            (b"{1:2}\n", vec!["key is not a string in object"]),
            (b"{\"a\":1,\"a\":2}\n", vec!["duplicate key"]),
            (b"[1 2]\n", vec!["expected separator in list"]),
            (b"01\n", vec!["stray '01'"]),
            (b"1.\n", vec!["stray '1.\n'"]),
            (b"-\n", vec![]),
            (b"tRue\n", vec!["invalid keyword 't'", "stray 'R'"]),
            (b"\"\\u00zz\"\n", vec!["\\u00zz is not a valid Unicode character"]),
            (b"\"\\ud800\"\n", vec!["\\ud800 is not a valid Unicode character"]),
            (b"\"\\q\"\n", vec!["invalid escape sequence in string"]),
            (b"@\"a\" 5\n", vec!["stray '@'"]),
            (b"{\"a\":\n", vec![]),
            (b"\x01", vec!["stray '\u{1}'"]),
            (b"{\"b\":2}", vec!["{\"b\": 2}"]),
        ] {
            let want: Vec<_> = want
                .into_iter()
                .map(|w| if w.starts_with('{') { w.into() } else { format!("{p}{w}") })
                .collect();
            assert_eq!(feed(&mut r, input), want, "{:?}", String::from_utf8_lossy(input));
        }
    }

    /// Goal: the split of the input into pieces does not matter. Method: feed byte by byte.
    #[test]
    fn byte_by_byte() {
        let mut r = Reader::default();
        let got: Vec<_> = b"{'a':[1,-2.5e1,'x\\u00e9']}{}".iter().flat_map(|b| feed(&mut r, &[*b])).collect();
        assert_eq!(got, ["{\"a\": [1, -25, \"x\\u00E9\"]}", "{}"]);
        assert_eq!(r.held(), 0);
    }

    /// Goal: limits hold and the session goes on. Method: too deep, too long, then a good message.
    #[test]
    fn limits() {
        let mut r = Reader::default();
        let deep = [vec![b'['; MAX_NESTING + 6], vec![b'\n']].concat();
        assert_eq!(feed(&mut r, &deep), ["JSON nesting depth limit exceeded"]);
        assert_eq!(feed(&mut r, b"{}"), ["{}"]);
        let long = [b"\"".to_vec(), vec![b'a'; 2 * MAX_BYTES], b"\"\n".to_vec()].concat();
        assert_eq!(feed(&mut r, &long), ["JSON token size limit exceeded"]);
        assert!(r.held() == 0 && r.buf.capacity() <= 64 << 10);
        let many = [b"[".to_vec(), b"1,".repeat(MAX_BYTES)].concat();
        assert_eq!(feed(&mut r, &many), ["JSON token size limit exceeded"]);
        assert_eq!(feed(&mut r, b"\n[]"), ["[]"]);
        let full = [vec![b'['; MAX_NESTING], vec![b']'; MAX_NESTING]].concat();
        assert_eq!(feed(&mut r, &full).len(), 1);
    }

    /// Goal: numbers keep their value and strings come out in ASCII. Method: round trips.
    #[test]
    fn numbers_and_strings() {
        for (input, want) in [
            ("12345678901234567890", "12345678901234567890"),
            ("-9223372036854775808", "-9223372036854775808"),
            ("1.50", "1.5"),
            ("1e3", "1000"),
            ("'\\u007f\\b\"\\/\\ud834\\udd1e'", "\"\\u007F\\b\\\"/\\uD834\\uDD1E\""),
            ("[null,true,{},[]]", "[null, true, {}, []]"),
        ] {
            assert_eq!(parse(input).map(|v| write(&v, false)), Ok(want.to_owned()));
        }
        assert!(parse("1e999").is_err());
        assert_eq!(parse("{} {}").unwrap_err().message, "Expecting at most one JSON value");
        assert_eq!(parse("{\"a\":1").unwrap_err().message, "JSON parse error, premature EOI");
    }

    /// Goal: the indented form of the peer. Method: its empty object and a nested value.
    #[test]
    fn pretty() {
        let v = parse("{'a':[1,[]],'b':{}}").unwrap();
        assert_eq!(
            write(&v, true),
            "{\r\n    \"a\": [\r\n        1,\r\n        [\r\n        ]\r\n    ],\r\n    \"b\": {\r\n    }\r\n}"
        );
    }
}
