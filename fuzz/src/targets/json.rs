//! A QMP stream: every message that is accepted is written in a form that reads as the same.

use super::Target;
use crate::Outcome;
use ringblock_drivers::options::{Value, json};

pub(super) const TARGET: Target = Target {
    name: "json",
    run,
    seeds,
    words: &[
        b"null",
        b"true",
        b"false",
        b"\\u20ac",
        b"\\ud83d\\ude00",
        b"\\ud83d",
        b"1e308",
        b"-0.0",
        b"[[[[",
        b"]]]]",
        b"{\"a\":",
        b"18446744073709551615",
        b"-9223372036854775808",
        b"\xff",
        b"\x03",
        b"%s",
        b"\\u0000",
    ],
    longest: 1 << 14,
    share: 250_000,
};

fn run(data: &[u8]) -> Outcome {
    let mut out = Outcome::default();
    let mut reader = json::Reader::default();
    let mut messages = 0;
    reader.feed(data, &mut |message| {
        messages += 1;
        match message {
            Ok(value) => same_again(&value, &mut out),
            Err(e) => out.text("refused", &e.to_string()),
        }
    });
    out.kind("held", u64::from(reader.held() > 0));
    reader.finish(&mut |m| out.result("at the end", &m));
    out.size("messages", messages);
    out
}

fn same_again(value: &Value, out: &mut Outcome) {
    let text = json::write(value, false);
    assert!(text.is_ascii());
    // as text: a number without a fraction comes back as an integer, and then a zero has no sign
    let again = json::write(&json::parse(&text).expect("what we wrote, we read"), false);
    if has_minus_zero(value) {
        assert_eq!(json::write(&json::parse(&again).expect("again"), false), again);
    } else {
        assert_eq!(again, text);
    }
    let nesting = shape(value, out, 0);
    out.size("nesting", nesting);
}

fn has_minus_zero(value: &Value) -> bool {
    match value {
        Value::Number(n) => n.as_f64().is_some_and(|f| f == 0.0 && f.is_sign_negative()),
        Value::Array(list) => list.iter().any(has_minus_zero),
        Value::Object(map) => map.values().any(has_minus_zero),
        _ => false,
    }
}

/// How deep it nests; notes which kinds stand in which.
fn shape(value: &Value, out: &mut Outcome, above: u64) -> u64 {
    let (kind, children): (u64, Vec<&Value>) = match value {
        Value::Null => (1, Vec::new()),
        Value::Bool(_) => (2, Vec::new()),
        Value::Number(n) if n.is_f64() => (3, Vec::new()),
        Value::Number(n) if n.is_u64() => (4, Vec::new()),
        Value::Number(_) => (5, Vec::new()),
        Value::String(s) => (if s.is_ascii() { 6 } else { 7 }, Vec::new()),
        Value::Array(list) => (8, list.iter().collect()),
        Value::Object(map) => (9, map.values().collect()),
    };
    out.kind("in", above << 4 | kind);
    1 + children.into_iter().map(|c| shape(c, out, kind)).max().unwrap_or(0)
}

fn seeds() -> Vec<Vec<u8>> {
    let seeds: [&[u8]; 5] = [
        b"{\"execute\": \"blockdev-add\", \"arguments\": {\"driver\": \"null-co\", \"size\": 1048576}, \"id\": [1, -2.5e3, null]}",
        b"{'a': 'single \\u20ac quoted', \"b\": [true, false, {}]}\n{}",
        b"garbage } ] \x03 {\"x\": 18446744073709551615}",
        b"[[[[[[[[\"\\ud83d\\ude00\"]]]]]]]]",
        b"{\"n\": [0, -1, 1e5, 0.5, 9223372036854775808, 1e400], \"\\b\\f\\n\\r\\t\\/\\\\\": \"\\\"\"}",
    ];
    seeds.map(<[u8]>::to_vec).to_vec()
}
