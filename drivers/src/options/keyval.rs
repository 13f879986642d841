//! `key=value` option strings: `driver=raw,file.driver=file,file.filename=a,,b.img`.
//!
//! * Pairs are separated by commas; a comma in a value is doubled.
//! * Keys are dotted: `a.b=1` is member `b` of object `a`; numbers make lists (`a.0=x,a.1=y`), without gaps.
//! * The first value may stand without its key if the option has an implied one.
//! * A later pair replaces an earlier one with the same key.
//! * An argument that begins with `{` is JSON instead.
//!
//! Every scalar is a string; the reader of the type decides what it means ([`Mode::Keyval`]).

use super::{Error, Map, Mode, Value, json};

/// The longest part of a key between dots.
const MAX_FRAGMENT: usize = 127;
/// The most parts of one key.
const MAX_FRAGMENTS: usize = 64;
/// The highest list index.
const MAX_INDEX: usize = 4095;

/// Parses either form; says how scalars are to be read.
pub fn parse_either(text: &str, implied: Option<&str>) -> Result<(Value, Mode), Error> {
    if text.starts_with('{') {
        return Ok((json::parse(text)?, Mode::Json));
    }
    Ok((parse(text, implied)?, Mode::Keyval))
}

/// Parses `key=value,…` into an object of strings, lists and objects.
pub fn parse(text: &str, implied: Option<&str>) -> Result<Value, Error> {
    let mut root = Node::Object(Vec::new());
    let mut rest = text;
    let mut first = true;
    while !rest.is_empty() {
        let (key, value, after) = next_pair(rest, if first { implied } else { None })?;
        root.put(&key, value)?;
        (rest, first) = (after, false);
    }
    root.into_value("")
}

/// Splits off the next pair: key, value, and what comes after the comma.
fn next_pair<'a>(text: &'a str, implied: Option<&str>) -> Result<(String, String, &'a str), Error> {
    let key_len = text.find(['=', ',']).unwrap_or(text.len());
    let (key, rest) = text.split_at(key_len);
    if let Some(after) = rest.strip_prefix('=') {
        let (value, after) = take_value(after);
        return Ok((key.to_owned(), value, after));
    }
    let Some(implied) = implied else {
        check_key(key)?;
        return Err(Error::invalid(format!("Expected '=' after parameter '{key}'")));
    };
    let (value, after) = take_value(text);
    Ok((implied.to_owned(), value, after))
}

/// Takes a value up to a single comma; doubled commas stand for one.
fn take_value(text: &str) -> (String, &str) {
    let mut value = String::new();
    let mut rest = text;
    loop {
        let Some(comma) = rest.find(',') else {
            value.push_str(rest);
            return (value, "");
        };
        value.push_str(&rest[..comma]);
        match rest[comma + 1..].strip_prefix(',') {
            Some(after) => {
                value.push(',');
                rest = after;
            }
            None => return (value, &rest[comma + 1..]),
        }
    }
}

fn check_key(key: &str) -> Result<Vec<&str>, Error> {
    let parts: Vec<_> = key.split('.').collect();
    let bad = parts.len() > MAX_FRAGMENTS || parts.first().is_some_and(|p| is_index(p));
    if bad || !parts.iter().all(|p| p.len() <= MAX_FRAGMENT && (is_index(p) || is_name(p))) {
        return Err(Error::invalid(format!("Invalid parameter '{key}'")));
    }
    Ok(parts)
}

fn is_index(part: &str) -> bool {
    !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit())
}

fn is_name(part: &str) -> bool {
    part.starts_with(|c: char| c.is_ascii_alphabetic())
        && part.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
}

/// The tree while it grows; lists are objects with numbers for keys until the end.
enum Node {
    Text(String),
    Object(Vec<(String, Node)>),
}

impl Node {
    fn put(&mut self, key: &str, text: String) -> Result<(), Error> {
        let parts = check_key(key)?;
        let mut at = self;
        for (i, part) in parts.iter().enumerate() {
            let Node::Object(members) = at else {
                return Err(inconsistent(&parts[..i].join(".")));
            };
            let found = members.iter().position(|(k, _)| k == part);
            let slot = found.unwrap_or_else(|| {
                members.push(((*part).to_owned(), Node::Object(Vec::new())));
                members.len() - 1
            });
            let last = i + 1 == parts.len();
            if last && found.is_some() && matches!(members[slot].1, Node::Object(_)) {
                return Err(inconsistent(key));
            }
            at = &mut members[slot].1;
            if last {
                break;
            }
        }
        *at = Node::Text(text);
        Ok(())
    }

    fn into_value(self, path: &str) -> Result<Value, Error> {
        let members = match self {
            Node::Text(text) => return Ok(Value::String(text)),
            Node::Object(members) => members,
        };
        let indexes = members.iter().filter(|(k, _)| is_index(k)).count();
        if indexes == 0 {
            let convert = |(k, v): (String, Node)| {
                let path = if path.is_empty() { k.clone() } else { format!("{path}.{k}") };
                v.into_value(&path).map(|v| (k, v))
            };
            return members.into_iter().map(convert).collect::<Result<Map<_, _>, _>>().map(Value::Object);
        }
        if indexes != members.len() {
            return Err(inconsistent(path));
        }
        list(members, path)
    }
}

fn list(members: Vec<(String, Node)>, path: &str) -> Result<Value, Error> {
    let mut items: Vec<(usize, Node)> = Vec::with_capacity(members.len());
    for (k, v) in members {
        let index = k.parse().ok().filter(|i| *i <= MAX_INDEX);
        items.push((
            index.ok_or_else(|| Error::invalid(format!("Parameter '{path}.{k}' is out of range")))?,
            v,
        ));
    }
    // Stable: of "0" and "00" the later one is kept below, as for equal keys.
    items.sort_by_key(|(i, _)| *i);
    let mut out: Vec<Value> = Vec::with_capacity(items.len());
    for (i, v) in items {
        let v = v.into_value(&format!("{path}.{i}"))?;
        if i < out.len() {
            out[i] = v;
        } else if i == out.len() {
            out.push(v);
        } else {
            return Err(Error::invalid(format!("Parameter '{path}.{}' missing", out.len())));
        }
    }
    Ok(Value::Array(out))
}

fn inconsistent(path: &str) -> Error {
    Error::invalid(format!("Parameters '{path}.*' used inconsistently"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// Goal: the grammar. Method: one input a rule.
    #[test]
    fn good() {
        for (text, want) in [
            ("", json!({})),
            ("raw", json!({"driver": "raw"})),
            ("raw,a=1", json!({"driver": "raw", "a": "1"})),
            ("driver=raw,", json!({"driver": "raw"})),
            ("a=x,,y,,,b=", json!({"a": "x,y,", "b": ""})),
            ("a.b.c=1,a.b.d=2,a.e==", json!({"a": {"b": {"c": "1", "d": "2"}, "e": "="}})),
            ("l.1=b,l.0=a", json!({"l": ["a", "b"]})),
            ("l.0.x=1,l.0.y=2", json!({"l": [{"x": "1", "y": "2"}]})),
            ("a=1,a=2", json!({"a": "2"})),
            ("l.00=a", json!({"l": ["a"]})),
            ("raw,,b=1", json!({"driver": "raw,b=1"})),
        ] {
            assert_eq!(parse(text, Some("driver")), Ok(want), "{text}");
        }
    }

    /// Goal: error texts of the peer. Method: recorded from it.
    #[test]
    fn bad() {
        for (text, want) in [
            ("n=1,read-zeroes", "Expected '=' after parameter 'read-zeroes'"),
            ("a.0=1,a.x=2", "Parameters 'a.*' used inconsistently"),
            ("a.0=1,a.2=2", "Parameter 'a.1' missing"),
            ("a=1,a.x=2", "Parameters 'a.*' used inconsistently"),
            ("a.x=2,a=1", "Parameters 'a.*' used inconsistently"),
            ("a..b=1", "Invalid parameter 'a..b'"),
            (".b=1", "Invalid parameter '.b'"),
            ("=1", "Invalid parameter ''"),
            ("0=1", "Invalid parameter '0'"),
            ("l.99999=1", "Parameter 'l.99999' is out of range"),
        ] {
            assert_eq!(parse(text, None).unwrap_err().message, want, "{text}");
        }
        assert!(parse(&format!("{}=1", "a".repeat(128)), None).is_err());
        assert!(parse(&format!("{}a=1", "a.".repeat(64)), None).is_err());
    }
}
