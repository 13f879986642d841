//! `resize`: another virtual size.

use super::{Command, Common, FORMAT, IMAGE_OPTS, OBJECT, QUIET, new};
use crate::tool::getopt::{Parsed, opt};
use crate::tool::image::Access;
use crate::tool::{Fail, Outcome, Tool, on_engine, out};
use ringblock_drivers::options::size;
use ringblock_engine::driver::Preallocation;
use ringblock_engine::graph::Graph;

pub(super) const COMMAND: Command = Command {
    name: "resize",
    summary: "Change the size of an image",
    operands: "FILENAME [+-]SIZE[bkKMGTPE]",
    options: &[
        QUIET,
        FORMAT,
        IMAGE_OPTS,
        opt('\0', "shrink", "", "allow a smaller size; what lies beyond is lost"),
        opt('\0', "preallocation", "MODE", "how to allocate what is new: off, metadata, falloc, full"),
        OBJECT,
    ],
    run,
};

/// A new size, or a difference to the old one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Change {
    To(u64),
    More(u64),
    Less(u64),
}

impl Change {
    fn parse(text: &str) -> Result<Change, Fail> {
        let (make, digits): (fn(u64) -> Change, _) = match text.as_bytes().first() {
            Some(b'+') => (Change::More, &text[1..]),
            Some(b'-') => (Change::Less, &text[1..]),
            _ => (Change::To, text),
        };
        let n = size::parse(digits, 0).map_err(|_| {
            Fail::from(
                "Parameter 'size' expects a non-negative number below 2^64\n\
                 Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\n\
                 and exabytes, respectively.",
            )
        })?;
        Ok(make(n))
    }

    /// The size after the change, if it is positive.
    fn apply(self, old: u64) -> Result<u64, Fail> {
        let new = match self {
            Change::To(n) => Some(n),
            Change::More(n) => old.checked_add(n),
            Change::Less(n) => old.checked_sub(n),
        };
        let fits = new.filter(|n| (1..=i64::MAX as u64).contains(n));
        fits.ok_or_else(|| "New image size must be positive".into())
    }
}

/// "-1M" is a size here and not three options: the last word is kept from the option parser.
fn run(tool: &Tool, parsed: Parsed) -> Outcome {
    let mut common = Common::default();
    let (mut shrink, mut mode) = (false, None);
    for (option, value) in &parsed.options {
        if common.take(option, value)? {
            continue;
        }
        match *option {
            "shrink" => shrink = true,
            _ => mode = Some(value.clone()),
        }
    }
    let mode = mode.as_deref();
    let prealloc = new::preallocation(mode);
    let prealloc =
        prealloc.map_err(|_| format!("Invalid preallocation mode '{}'", mode.unwrap_or_default()))?;
    let (name, change) = match &parsed.operands[..] {
        [name, change] => (name.clone(), change.clone()),
        [_, _, ..] => return Err(Fail::usage("Extra argument(s) in command line")),
        _ => return Err(Fail::usage("Expecting image file name and size")),
    };
    common.check()?;
    let change = Change::parse(&change)?;
    let tool = tool.clone();
    on_engine(1, move || {
        Box::pin(async move { resize(&tool, &common, &name, change, shrink, prealloc).await })
    })
}

async fn resize(
    tool: &Tool,
    common: &Common,
    name: &str,
    change: Change,
    shrink: bool,
    prealloc: Preallocation,
) -> Outcome {
    let access = Access { write: true, resize: true, ..Access::default() };
    let image = common.source(name).open(tool, access).await?;
    let old = image.size;
    let new = change.apply(old)?;
    if new <= old && prealloc != Preallocation::Off {
        return Err("Preallocation can only be used for growing images".into());
    }
    if new < old && !shrink {
        tool.error("Use the --shrink option to perform a shrink operation.");
        return Err("warning: Shrinking an image will delete all data beyond the shrunken image's end. \
                    Before performing such an operation, make sure there is no important data there."
            .into());
    }
    Graph::current().resize(&image.node, new, prealloc).await?;
    image.close().await?;
    if !common.quiet {
        out("Image resized.\n");
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: absolute and relative sizes. Method: a table.
    #[test]
    fn changes() {
        for (text, old, want) in [
            ("10M", 1, Some(10 << 20)),
            ("+1k", 1024, Some(2048)),
            ("-1k", 2048, Some(1024)),
            ("-1k", 1024, None),
            ("0", 1, None),
        ] {
            assert_eq!(Change::parse(text).and_then(|c| c.apply(old)).ok(), want, "{text}");
        }
        assert!(Change::parse("1x").is_err() && Change::parse("+").is_err());
    }
}
