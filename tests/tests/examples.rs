//! The library's examples: each runs as it is in the documentation.

use ringblock_tests::tools::{self, Cmd};
use ringblock_tests::{TestDir, workspace_file};

/// Goal: every example of the library runs, says something and ends well. Method: all files of the folder
/// are built and run in an empty directory.
#[test]
fn every_example_runs() {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_string());
    let target = tools::target_dir();
    let build = Cmd::exact(&cargo).line("build --quiet --package ringblock --examples --target-dir");
    let build = build.arg(target.to_string_lossy()).dir(tools::workspace());
    build.timeout(std::time::Duration::from_secs(600)).ok();
    let mut names: Vec<String> = std::fs::read_dir(workspace_file("examples"))
        .expect("the folder of examples")
        .flatten()
        .filter_map(|e| e.file_name().to_string_lossy().strip_suffix(".rs").map(String::from))
        .collect();
    names.sort();
    assert!(names.len() >= 3, "an example for each way of I/O: {names:?}");
    for name in names {
        let dir = TestDir::new("example");
        let program = target.join("debug/examples").join(&name);
        let out = Cmd::exact(&program.to_string_lossy()).dir(dir.path()).ok();
        assert!(!out.stdout.is_empty(), "{}", out.describe());
        println!("{name}: {}", out.stdout.trim_end());
    }
}
