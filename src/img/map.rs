//! `map`: what each part of an image is made of, and where it lies.
//!
//! Invariants: entries follow each other without gaps and are as long as they can be; neighbours are one entry if all
//! their flags agree, they lie in the same layer, and their data follow each other in the file. Memory does not grow with
//! the image.
//!
//! ```text
//! status_above(offset..end) ─► Entry ─► merge with the one before ─► text line | JSON object
//! ```

use super::{Command, Common, FORMAT, IMAGE_OPTS, OBJECT, OUTPUT, Output, SHARE, one_image};
use crate::tool::getopt::{Parsed, opt};
use crate::tool::image::{Access, Image};
use crate::tool::{Fail, Outcome, Tool, on_engine, out, size_option};
use ringblock_engine::graph::{Graph, NodeId};
use ringblock_engine::path::Above;

pub(super) const COMMAND: Command = Command {
    name: "map",
    summary: "Tell where the data of an image are",
    operands: "FILENAME",
    options: &[
        FORMAT,
        IMAGE_OPTS,
        OBJECT,
        OUTPUT,
        opt('s', "start-offset", "OFFSET", "where to begin (default: 0)"),
        opt('l', "max-length", "LENGTH", "how much to look at (default: all)"),
        SHARE,
    ],
    run,
};

/// Text is written when there is this much of it.
const CHUNK: usize = 1 << 16;

/// A run of bytes that are all alike.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
struct Entry {
    start: u64,
    len: u64,
    depth: u32,
    present: bool,
    zero: bool,
    data: bool,
    compressed: bool,
    offset: Option<u64>,
    /// The layer, if there is anything.
    node: Option<NodeId>,
}

fn run(tool: &Tool, parsed: Parsed) -> Outcome {
    let mut common = Common::default();
    let (mut start, mut most) = (0, None);
    for (option, value) in &parsed.options {
        match *option {
            "start-offset" => start = size_option("start offset", value, 0, i64::MAX as u64)?,
            "max-length" => most = Some(size_option("max length", value, 0, i64::MAX as u64)?),
            other => {
                common.take(other, value)?;
            }
        }
    }
    let name = one_image(&parsed)?;
    common.check()?;
    let access = Access { force_share: common.force_share, ..Access::default() };
    let tool = tool.clone();
    on_engine(1, move || {
        Box::pin(async move {
            let image = common.source(&name).open(&tool, access).await?;
            let end = most.map_or(image.size, |n| image.size.min(start.saturating_add(n)));
            let mut printer = Printer::new(common.output);
            let result = walk(&image, start, end, &mut printer).await;
            printer.flush();
            let closed = image.close().await;
            result?;
            closed?;
            Ok(0)
        })
    })
}

/// Hands all entries of a range to the printer. An empty range is one empty entry.
async fn walk(image: &Image, start: u64, end: u64, printer: &mut Printer) -> Result<(), Fail> {
    let mut held = Entry { start, ..Entry::default() };
    printer.begin();
    let mut at = start;
    while at < end {
        let above = image.root.status_above(None, at..end, true).await;
        let above = above.map_err(|e| format!("Failed to read image metadata: {}", e.text()))?;
        let entry = Entry::of(at, &above);
        at = at.saturating_add(entry.len.max(1));
        if held.len > 0 && !held.merge(&entry) {
            printer.entry(&held)?;
            held = entry;
        } else if held.len == 0 {
            held = entry;
        }
    }
    printer.entry(&held)?;
    printer.end();
    Ok(())
}

impl Entry {
    fn of(start: u64, above: &Above) -> Entry {
        let s = &above.status;
        Entry {
            start,
            len: s.len,
            depth: above.depth,
            present: s.allocated,
            zero: s.zero,
            data: s.data,
            compressed: s.encoded,
            offset: s.offset.filter(|_| s.data || s.zero || s.allocated),
            node: Some(above.node),
        }
    }

    /// Takes in the entry that follows, if they are alike.
    fn merge(&mut self, next: &Entry) -> bool {
        let follows = self.offset.map(|off| off.saturating_add(self.len)) == next.offset;
        let alike = Entry { start: next.start, len: next.len, offset: next.offset, ..*self } == *next;
        if follows && alike {
            self.len += next.len;
        }
        follows && alike
    }

    fn json(&self) -> String {
        let offset = self.offset.map(|off| format!(", \"offset\": {off}")).unwrap_or_default();
        format!(
            "{{ \"start\": {}, \"length\": {}, \"depth\": {}, \"present\": {}, \"zero\": {}, \"data\": {}, \
             \"compressed\": {}{offset}}}",
            self.start, self.len, self.depth, self.present, self.zero, self.data, self.compressed
        )
    }
}

/// Where the text goes.
struct Printer {
    output: Output,
    text: String,
    first: bool,
    /// File names of layers.
    names: Vec<(NodeId, String)>,
}

impl Printer {
    fn new(output: Output) -> Printer {
        Printer { output, text: String::new(), first: true, names: Vec::new() }
    }

    fn begin(&mut self) {
        if self.output == Output::Human {
            self.text += &row("Offset", "Length", "Mapped to", "File");
        }
    }

    fn entry(&mut self, entry: &Entry) -> Result<(), Fail> {
        match self.output {
            Output::Json => {
                self.text += if self.first { "[" } else { ",\n" };
                self.text += &entry.json();
            }
            Output::Human if entry.data && !entry.zero => {
                let (Some(off), Some(node)) = (entry.offset, entry.node) else {
                    return Err("File contains external, encrypted or compressed clusters.".into());
                };
                let line = row(&hex(entry.start), &hex(entry.len), &hex(off), self.file_name(node));
                self.text += &line;
            }
            Output::Human => {}
        }
        self.first = false;
        if self.text.len() >= CHUNK {
            self.flush();
        }
        Ok(())
    }

    fn end(&mut self) {
        if self.output == Output::Json {
            self.text += "]\n";
        }
    }

    fn flush(&mut self) {
        if !self.text.is_empty() {
            out(&self.text);
            self.text.clear();
        }
    }

    /// Name of the file that holds the data of a layer.
    fn file_name(&mut self, node: NodeId) -> &str {
        let known = self.names.iter().position(|(id, _)| *id == node);
        let at = known.unwrap_or_else(|| {
            self.names.push((node, data_file(node)));
            self.names.len() - 1
        });
        &self.names[at].1
    }
}

/// Follows the edges on which data lie, down to the file.
fn data_file(node: NodeId) -> String {
    let nodes = Graph::current().info().nodes;
    let mut at = nodes.iter().find(|n| n.id == node);
    while let Some(here) = at {
        let edge = here.edges.iter().find(|e| e.name == "data-file");
        let Some(edge) = edge.or_else(|| here.edges.iter().find(|e| e.name == "file")) else {
            return here.driver.filename();
        };
        at = nodes.iter().find(|n| n.id == edge.node);
    }
    String::new()
}

fn row(a: &str, b: &str, c: &str, d: &str) -> String {
    format!("{a:<16}{b:<16}{c:<16}{d}\n")
}

fn hex(n: u64) -> String {
    if n == 0 { "0".into() } else { format!("{n:#x}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(start: u64, len: u64, offset: Option<u64>) -> Entry {
        Entry { start, len, offset, data: true, present: true, ..Entry::default() }
    }

    /// Goal: neighbours become one entry only if nothing tells them apart. Method: pairs that differ in one thing.
    #[test]
    fn merging() {
        let a = entry(0, 100, Some(1000));
        for (next, want) in [
            (entry(100, 50, Some(1100)), true),
            (entry(100, 50, Some(1101)), false),
            (entry(100, 50, None), false),
            (Entry { depth: 1, ..entry(100, 50, Some(1100)) }, false),
            (Entry { zero: true, ..entry(100, 50, Some(1100)) }, false),
            (Entry { compressed: true, ..entry(100, 50, Some(1100)) }, false),
        ] {
            let mut merged = a;
            assert_eq!(merged.merge(&next), want, "{next:?}");
            assert_eq!(merged.len, if want { 150 } else { 100 });
        }
        let mut holes = entry(0, 100, None);
        assert!(holes.merge(&entry(100, 50, None)));
    }

    /// Goal: lines as the peer prints them. Method: recorded from it.
    #[test]
    fn lines() {
        assert_eq!(
            entry(0, 4096, Some(327680)).json(),
            "{ \"start\": 0, \"length\": 4096, \"depth\": 0, \"present\": true, \"zero\": false, \"data\": true, \
             \"compressed\": false, \"offset\": 327680}"
        );
        assert_eq!(
            row(&hex(0), &hex(0x10000), &hex(0x50000), "b.qcow2"),
            "0               0x10000         0x50000         b.qcow2\n"
        );
    }

    /// Goal: data without a place make the text form fail, after what was before them. Method: one compressed entry.
    #[test]
    fn compressed_data_have_no_place() {
        let mut printer = Printer::new(Output::Human);
        assert!(printer.entry(&Entry { zero: true, ..entry(0, 10, None) }).is_ok());
        let fail = printer.entry(&Entry { compressed: true, ..entry(0, 10, None) }).unwrap_err();
        assert_eq!(fail.message, "File contains external, encrypted or compressed clusters.");
    }
}
