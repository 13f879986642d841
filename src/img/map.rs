//! `map`: which layer holds what, and where.
//!
//! ```text
//! block status through the chain ─► entries, merged where all agrees ─► table | JSON
//! ```

use super::{Command, Common, FORMAT, IMAGE_OPTS, OBJECT, OUTPUT, Output, SHARE, one_image};
use crate::tool::getopt::{Parsed, opt};
use crate::tool::image::{Access, Image};
use crate::tool::{Fail, Outcome, Tool, on_engine, out, size_option};
use ringblock_engine::graph::{Graph, NodeId};

pub(super) const COMMAND: Command = Command {
    name: "map",
    summary: "List which parts of an image hold data, and where",
    operands: "FILENAME",
    options: &[
        FORMAT,
        IMAGE_OPTS,
        opt('s', "start-offset", "OFFSET", "begin here"),
        opt('l', "max-length", "LENGTH", "at most so far"),
        OUTPUT,
        SHARE,
        OBJECT,
    ],
    run,
};

/// A range of which everything is the same (reference, part 5 item 10).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Entry {
    start: u64,
    len: u64,
    depth: u32,
    present: bool,
    zero: bool,
    data: bool,
    compressed: bool,
    offset: Option<u64>,
    node: Option<NodeId>,
}

impl Entry {
    /// Whether `next` goes on where this ends, with all the same.
    fn continues(&self, next: &Entry) -> bool {
        let moved = Entry {
            start: self.start + self.len,
            len: next.len,
            offset: self.offset.map(|o| o + self.len),
            ..*self
        };
        moved == *next
    }

    fn json(&self) -> String {
        let offset = self.offset.map_or_else(String::new, |o| format!(", \"offset\": {o}"));
        format!(
            "{{ \"start\": {}, \"length\": {}, \"depth\": {}, \"present\": {}, \"zero\": {}, \"data\": {}, \
             \"compressed\": {}{offset}}}",
            self.start, self.len, self.depth, self.present, self.zero, self.data, self.compressed
        )
    }
}

fn run(tool: &Tool, parsed: Parsed) -> Outcome {
    let mut common = Common::default();
    let (mut start, mut len) = (0, None);
    let most = i64::MAX as u64;
    for (option, value) in &parsed.options {
        if common.take(option, value)? {
            continue;
        }
        match *option {
            "start-offset" => start = size_option("start offset", value, 0, most)?,
            _ => len = Some(size_option("max length", value, 0, most)?),
        }
    }
    let name = one_image(&parsed)?;
    common.check()?;
    let tool = tool.clone();
    on_engine(1, move || {
        Box::pin(async move {
            let access = Access { force_share: common.force_share, ..Access::default() };
            let image = common.source(&name).open(&tool, access).await?;
            let end = len.map_or(image.size, |len| image.size.min(start.saturating_add(len)));
            let mut printer = Printer::new(common.output);
            let result = map(&image, start, end, &mut printer).await;
            image.close().await?;
            result?;
            Ok(0)
        })
    })
}

async fn map(image: &Image, start: u64, end: u64, printer: &mut Printer) -> Result<(), Fail> {
    let none = Entry {
        start,
        len: 0,
        depth: 0,
        present: false,
        zero: false,
        data: false,
        compressed: false,
        offset: None,
        node: None,
    };
    let (mut at, mut current) = (start, none);
    while at < end {
        let above = image.root.status_above(None, at..end, true).await;
        let above = above.map_err(|e| Fail::from(format!("Failed to read image metadata: {e}")))?;
        let s = above.status;
        let next = Entry {
            start: at,
            len: s.len.clamp(1, end - at),
            depth: above.depth,
            present: s.allocated,
            zero: s.zero,
            data: s.data,
            compressed: s.encoded,
            offset: s.offset.filter(|_| s.data || s.zero || s.allocated),
            node: s.offset.map(|_| above.node),
        };
        at += next.len;
        if current.len > 0 && current.continues(&next) {
            current.len += next.len;
            continue;
        }
        if current.len > 0 {
            printer.put(&current)?;
        }
        current = next;
    }
    printer.put(&current)?;
    printer.end();
    Ok(())
}

/// Prints entries as they come.
struct Printer {
    output: Output,
    first: bool,
}

impl Printer {
    fn new(output: Output) -> Printer {
        if output == Output::Human {
            out(&row("Offset", "Length", "Mapped to", "File"));
        }
        Printer { output, first: true }
    }

    fn put(&mut self, e: &Entry) -> Result<(), Fail> {
        if self.output == Output::Json {
            out(&format!("{}{}", if self.first { "[" } else { ",\n" }, e.json()));
            self.first = false;
            return Ok(());
        }
        if !e.data || e.zero || e.len == 0 {
            return Ok(());
        }
        let (Some(offset), Some(file)) = (e.offset, e.node.and_then(file_of)) else {
            return Err("File contains external, encrypted or compressed clusters.".into());
        };
        out(&row(&hex(e.start), &hex(e.len), &hex(offset), &file));
        Ok(())
    }

    fn end(&self) {
        if self.output == Output::Json {
            out("]\n");
        }
    }
}

fn row(a: &str, b: &str, c: &str, d: &str) -> String {
    format!("{a:<16}{b:<16}{c:<16}{d}\n")
}

/// As printf's `%#x` has it: no prefix for zero.
fn hex(n: u64) -> String {
    if n == 0 { "0".into() } else { format!("{n:#x}") }
}

/// The name of the file that holds a node's bytes.
fn file_of(node: NodeId) -> Option<String> {
    let info = Graph::current().info();
    let mut node = info.nodes.iter().find(|n| n.id == node)?;
    loop {
        let edge = node.edges.iter().find(|e| e.name == "data-file");
        let Some(edge) = edge.or_else(|| node.edges.iter().find(|e| e.name == "file")) else {
            return Some(node.driver.filename());
        };
        node = info.nodes.iter().find(|n| n.id == edge.node)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: entries merge only if all agrees and offsets are contiguous. Method: one change at a time.
    #[test]
    fn merging() {
        let a = Entry {
            start: 0,
            len: 10,
            depth: 0,
            present: true,
            zero: false,
            data: true,
            compressed: false,
            offset: Some(100),
            node: None,
        };
        let next = Entry { start: 10, len: 3, offset: Some(110), ..a };
        assert!(a.continues(&next));
        assert!(!a.continues(&Entry { offset: Some(111), ..next }));
        assert!(!a.continues(&Entry { offset: None, ..next }));
        assert!(!a.continues(&Entry { depth: 1, ..next }));
        assert!(!a.continues(&Entry { zero: true, ..next }));
        assert_eq!(hex(0), "0");
    }
}
