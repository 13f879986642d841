//! `create`: a new image.

use super::new::{self, Wanted};
use super::{Command, OBJECT, QUIET};
use crate::tool::getopt::{Parsed, opt};
use crate::tool::{Fail, Outcome, Tool, on_engine, out, size_option};
use ringblock_engine::Error;

pub(super) const COMMAND: Command = Command {
    name: "create",
    summary: "Make a new image",
    operands: "FILENAME [SIZE[bkKMGTPE]]",
    options: &[
        QUIET,
        opt('f', "format", "FMT", "format of the new image (default: raw)"),
        opt('o', "options", "OPTIONS", "options of the format, name=value,... ('-o help' lists them)"),
        opt('b', "backing", "FILENAME", "the new image shows this one until it is written"),
        opt('F', "backing-format", "FMT", "format of the backing file"),
        opt('u', "backing-unsafe", "", "do not look at the backing file"),
        OBJECT,
    ],
    run,
};

fn run(tool: &Tool, parsed: Parsed) -> Outcome {
    let mut wanted = Wanted { format: "raw".into(), ..Wanted::default() };
    let mut quiet = false;
    for (option, value) in &parsed.options {
        match *option {
            "quiet" => quiet = true,
            "format" => wanted.format = value.clone(),
            "options" => wanted.options.push(value.clone()),
            "backing" => wanted.backing = Some(value.clone()),
            "backing-format" => wanted.backing_format = Some(value.clone()),
            "backing-unsafe" => wanted.unsafe_backing = true,
            _ => crate::tool::refuse_object(value)?,
        }
    }
    if wanted.options.iter().any(|o| new::wants_help(o)) {
        out(&new::help(&wanted.format)?);
        return Ok(0);
    }
    let mut operands = parsed.operands.into_iter();
    wanted.name = operands.next().ok_or_else(|| Fail::usage("Expecting image file name"))?;
    if let Some(text) = operands.next() {
        wanted.size = Some(size_option("image size", &text, 0, i64::MAX as u64)?);
    }
    if let Some(extra) = operands.next() {
        return Err(Fail::usage(format!("Unexpected argument: {extra}")));
    }
    let tool = tool.clone();
    on_engine(1, move || {
        Box::pin(async move {
            let named = |e: Error| Fail::from(e.context(&wanted.name));
            let plan = new::plan(&tool, &wanted).await.map_err(named)?;
            if !quiet {
                out(&plan.announcement());
            }
            plan.make().await.map_err(named)?;
            Ok(0)
        })
    })
}
