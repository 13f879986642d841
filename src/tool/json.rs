//! JSON for people and programs: indented by four spaces, empty lists and objects on two lines, as QEMU's tools print it.

use ringblock_drivers::options::Value;

/// The text of a value, with a newline at its end.
pub fn pretty(value: &Value) -> String {
    let mut text = String::new();
    put(&mut text, value, 0);
    text.push('\n');
    text
}

fn put(text: &mut String, value: &Value, depth: usize) {
    match value {
        Value::Array(items) => {
            let items = items.iter().map(|v| (None, v));
            put_all(text, '[', ']', items, depth);
        }
        Value::Object(map) => {
            let items = map.iter().map(|(k, v)| (Some(k), v));
            put_all(text, '{', '}', items, depth);
        }
        scalar => text.push_str(&ascii(&scalar.to_string())),
    }
}

fn put_all<'a>(
    text: &mut String,
    open: char,
    close: char,
    items: impl Iterator<Item = (Option<&'a String>, &'a Value)>,
    depth: usize,
) {
    text.push(open);
    let pad = "    ".repeat(depth + 1);
    for (n, (key, value)) in items.enumerate() {
        text.push_str(if n > 0 { ",\n" } else { "\n" });
        text.push_str(&pad);
        if let Some(key) = key {
            text.push_str(&ascii(&Value::from(key.as_str()).to_string()));
            text.push_str(": ");
        }
        put(text, value, depth + 1);
    }
    text.push('\n');
    text.push_str(&"    ".repeat(depth));
    text.push(close);
}

/// Characters beyond ASCII as `\u` escapes.
fn ascii(json: &str) -> String {
    let mut text = String::with_capacity(json.len());
    for c in json.chars() {
        if c.is_ascii() && c != '\x7f' {
            text.push(c);
        } else {
            for unit in c.encode_utf16(&mut [0; 2]) {
                text.push_str(&format!("\\u{unit:04X}"));
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    /// Goal: the layout of the peer. Method: nested and empty values.
    #[test]
    fn layout() {
        let got = super::pretty(&json!({"a": [], "b": {"c": 1, "d": "ä\n"}}));
        let want = "{\n    \"a\": [\n    ],\n    \"b\": {\n        \"c\": 1,\n        \"d\": \"\\u00E4\\n\"\n    }\n}\n";
        assert_eq!(got, want);
    }
}
