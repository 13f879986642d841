//! `check`: whether an image's tables are sound, and putting them right.
//!
//! Exit status: 0 sound, 1 the check failed, 2 damaged, 3 only leaks, 63 the format cannot be checked.

use super::{Command, Common, FORMAT, IMAGE_OPTS, OBJECT, OUTPUT, Output, QUIET, SHARE, one_image};
use crate::tool::cache::Cache;
use crate::tool::getopt::{Parsed, opt};
use crate::tool::image::{self, Access};
use crate::tool::{Fail, Outcome, Tool, err, json, on_engine, out};
use ringblock_drivers::format::qcow2::{CheckReport, Qcow2, Repair};
use ringblock_drivers::open as nodes;
use ringblock_drivers::options::{Map, Value};
use ringblock_engine::driver::Driver;
use ringblock_engine::graph::Graph;
use ringblock_engine::{Errno, Error};
use std::sync::Arc;

pub(super) const COMMAND: Command = Command {
    name: "check",
    summary: "Check an image for damage, and repair it",
    operands: "FILENAME",
    options: &[
        QUIET,
        FORMAT,
        IMAGE_OPTS,
        opt('T', "cache", "MODE", "use of the page cache (default: writeback)"),
        opt('r', "repair", "leaks|all", "put right what is wrong"),
        SHARE,
        OUTPUT,
        OBJECT,
    ],
    run,
};

/// The format cannot be checked.
const UNSUPPORTED: i32 = 63;

fn run(_tool: &Tool, parsed: Parsed) -> Outcome {
    let mut common = Common::default();
    let (mut fix, mut cache) = (Repair::None, Cache::WRITEBACK);
    for (option, value) in &parsed.options {
        if common.take(option, value)? {
            continue;
        }
        match (*option, value.as_str()) {
            ("repair", "leaks") => fix = Repair::Leaks,
            ("repair", "all") => fix = Repair::All,
            ("repair", other) => {
                let text = format!("--repair (-r) expects 'leaks' or 'all' not '{other}'");
                return Err(Fail::usage(text));
            }
            (_, mode) => {
                let bad = || Fail::from(format!("Invalid source cache option: {mode}"));
                cache = Cache::parse(mode).ok_or_else(bad)?;
            }
        }
    }
    let name = one_image(&parsed)?;
    common.check()?;
    let access = Access {
        write: fix != Repair::None,
        cache,
        force_share: common.force_share,
        no_backing: true,
        ..Access::default()
    };
    on_engine(1, move || {
        Box::pin(async move {
            let opened = open(&common, &name, access).await;
            let named = |e: Error| match e.errno {
                Errno::ENOTSUP => Fail::from(e).code(UNSUPPORTED),
                _ => image::lock_hint(e.context(format_args!("Could not open '{name}'")), &name).into(),
            };
            let (node, driver) = opened.map_err(named)?;
            let result = check(&driver, fix, &common, &name).await;
            drop(driver);
            Graph::current().del(&node).await?;
            result
        })
    })
}

/// The node's name, and its driver.
async fn open(common: &Common, name: &str, access: Access) -> Result<(String, Arc<dyn Driver>), Error> {
    let (mut options, _) = common.source(name).options().await?;
    access.apply(&mut options);
    let graph = Graph::current();
    let node = graph.add(nodes::node_for_check(options)?).await?;
    let info = graph.info().nodes.into_iter().find(|n| n.name == node);
    Ok((node, info.ok_or(Errno::ENOMEDIUM)?.driver))
}

async fn check(driver: &Arc<dyn Driver>, fix: Repair, common: &Common, name: &str) -> Outcome {
    let driver: &Qcow2 = driver.as_any().downcast_ref().ok_or("The node is not a qcow2 node")?;
    let failed = |e: Error| Fail::from(e.context("Check failed"));
    let report = driver.check(fix).await.map_err(failed)?;
    say(&report.messages);
    if report.needs_rebuild {
        return Err("Check failed: Input/output error".into());
    }
    let fixed = report.leaks_fixed + report.corruptions_fixed > 0;
    if fixed && common.output == Output::Human && !common.quiet {
        out(&format!(
            "The following inconsistencies were found and repaired:\n\n    {} leaked clusters\n    \
             {} corruptions\n\nDouble checking the fixed image now...\n",
            report.leaks_fixed, report.corruptions_fixed
        ));
    }
    match common.output {
        Output::Json => out(&json::pretty(&json_value(&report, name))),
        Output::Human if !common.quiet => out(&human_text(&report)),
        Output::Human => {}
    }
    Ok(match report {
        CheckReport { check_errors: 1.., .. } => 1,
        CheckReport { corruptions: 1.., .. } => 2,
        CheckReport { leaks: 1.., .. } => 3,
        _ => 0,
    })
}

fn say(messages: &[String]) {
    let text: String = messages.iter().map(|m| format!("{m}\n")).collect();
    err(&text);
}

fn human_text(r: &CheckReport) -> String {
    let mut text = String::new();
    if r.is_clean() {
        text += "No errors were found on the image.\n";
    }
    if r.corruptions > 0 {
        text += &format!(
            "\n{} errors were found on the image.\nData may be corrupted, or further writes to the image may corrupt it.\n",
            r.corruptions
        );
    }
    if r.leaks > 0 {
        text += &format!(
            "\n{} leaked clusters were found on the image.\nThis means waste of disk space, but no harm to data.\n",
            r.leaks
        );
    }
    if r.check_errors > 0 {
        text += &format!("\n{} internal errors have occurred during the check.\n", r.check_errors);
    }
    if r.total_clusters > 0 && r.allocated_clusters > 0 {
        let share = |n: u64, of: u64| n as f64 * 100.0 / of as f64;
        text += &format!(
            "{}/{} = {:.2}% allocated, {:.2}% fragmented, {:.2}% compressed clusters\n",
            r.allocated_clusters,
            r.total_clusters,
            share(r.allocated_clusters, r.total_clusters),
            share(r.fragmented_clusters, r.allocated_clusters),
            share(r.compressed_clusters, r.allocated_clusters)
        );
    }
    if r.image_end_offset > 0 {
        text += &format!("Image end offset: {}\n", r.image_end_offset);
    }
    text
}

/// `ImageCheck`, with members in the order in which the peer prints them; counts of zero are left out.
fn json_value(r: &CheckReport, name: &str) -> Value {
    let mut m = Map::new();
    let counts = [
        ("image-end-offset", r.image_end_offset),
        ("compressed-clusters", r.compressed_clusters),
        ("total-clusters", r.total_clusters),
        ("corruptions", r.corruptions),
        ("corruptions-fixed", r.corruptions_fixed),
        ("check-errors", r.check_errors),
        ("leaks", r.leaks),
        ("leaks-fixed", r.leaks_fixed),
        ("allocated-clusters", r.allocated_clusters),
    ];
    for (key, n) in counts {
        if n > 0 || key == "check-errors" {
            m.insert(key.into(), n.into());
        }
    }
    m.insert("filename".into(), name.into());
    m.insert("format".into(), "qcow2".into());
    if r.fragmented_clusters > 0 {
        m.insert("fragmented-clusters".into(), r.fragmented_clusters.into());
    }
    Value::Object(m)
}
