//! Texts for people: tables and nested values as qemu-img lays them out.

use ringblock_drivers::options::Value;
use ringblock_drivers::options::size;

/// "10 MiB (10485760 bytes)".
pub(super) fn bytes(n: u64) -> String {
    format!("{} ({n} bytes)", size::human(n))
}

/// Nested members, one a line, four spaces a level; dashes in names become spaces.
pub(super) fn members(value: &Value, depth: usize) -> String {
    let mut text = String::new();
    let pad = "    ".repeat(depth);
    let items: Vec<(String, &Value)> = match value {
        Value::Object(map) => map.iter().map(|(k, v)| (k.replace('-', " "), v)).collect(),
        Value::Array(list) => list.iter().enumerate().map(|(i, v)| (format!("[{i}]"), v)).collect(),
        _ => return text,
    };
    for (name, v) in items {
        match v {
            Value::Object(_) | Value::Array(_) => {
                text += &format!("{pad}{name}:\n{}", members(v, depth + 1));
            }
            Value::String(s) => text += &format!("{pad}{name}: {s}\n"),
            other => text += &format!("{pad}{name}: {other}\n"),
        }
    }
    text
}

/// One line of the list of internal snapshots.
pub(super) struct SnapshotLine {
    pub(super) id: String,
    pub(super) name: String,
    pub(super) state_size: u64,
    pub(super) date: u64,
    pub(super) clock_ns: u64,
    pub(super) icount: Option<u64>,
}

/// The list of internal snapshots, with its heading.
pub(super) fn snapshots(lines: &[SnapshotLine]) -> String {
    let row = |id: &str, tag: &str, size: &str, date: &str, clock: &str, icount: &str| {
        format!("{id:<7} {tag:<16} {size:>8} {date:>19} {clock:>15} {icount:>10}\n")
    };
    let mut text = row("ID", "TAG", "VM_SIZE", "DATE", "VM_CLOCK", "ICOUNT");
    for s in lines {
        let date =
            ringblock_engine::host::linux::time::local(s.date).map_or_else(String::new, |d| d.to_string());
        let secs = s.clock_ns / 1_000_000_000;
        let clock = format!(
            "{:04}:{:02}:{:02}.{:03}",
            secs / 3600,
            secs / 60 % 60,
            secs % 60,
            s.clock_ns / 1_000_000 % 1000
        );
        let icount = s.icount.map_or_else(|| "--".to_owned(), |n| n.to_string());
        text += &row(&s.id, &s.name, &size::human(s.state_size), &date, &clock, &icount);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// Goal: the peer's layout. Method: nested lists and members.
    #[test]
    fn nested_members() {
        let v = json!({"lazy-refcounts": false, "bitmaps": [{"flags": ["auto"], "name": "b"}]});
        let want = "    lazy refcounts: false\n    bitmaps:\n        [0]:\n            flags:\n                \
                    [0]: auto\n            name: b\n";
        assert_eq!(members(&v, 1), want);
    }
}
