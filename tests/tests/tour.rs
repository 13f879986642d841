//! The README's tour, typed line by line.
//!
//! Method: the fenced `sh` blocks of the README's section on the tour are run by one shell, in order, in an
//! empty folder with the built program in its path. A `serve` that is not put in the background by the text
//! is the reader's first terminal: it is started in the background, waited for, and interrupted at the end.

use ringblock_tests::tools::{self, Cmd};
use ringblock_tests::{TestDir, workspace_file};
use std::time::Duration;

/// The `sh` blocks below the first heading that has "tour" in it, up to the next heading of its rank.
fn blocks(readme: &str) -> Vec<String> {
    let mut blocks = Vec::new();
    let (mut rank, mut open) = (0, None::<String>);
    let mut other_fence = false;
    for line in readme.lines() {
        if let Some(block) = &mut open {
            if line.trim() == "```" {
                blocks.extend(open.take());
            } else {
                block.push_str(line.strip_prefix("$ ").unwrap_or(line));
                block.push('\n');
            }
            continue;
        }
        if line.starts_with("```") {
            if !other_fence && rank > 0 && matches!(line.trim(), "```sh" | "```console") {
                open = Some(String::new());
            } else {
                other_fence = !other_fence;
            }
            continue;
        }
        let hashes = line.chars().take_while(|&c| c == '#').count();
        if hashes > 0 && !other_fence {
            if rank == 0 && line.to_lowercase().contains("tour") {
                rank = hashes;
            } else if rank > 0 && hashes <= rank {
                break;
            }
        }
    }
    blocks
}

/// The shell script for the blocks.
fn script(blocks: &[String]) -> String {
    let mut script = String::from(
        "set -e\n\
         ready() { for i in $(seq 400); do grep -q 'nbd+unix://' serve.log && return; sleep 0.05; done; \
         echo 'the server did not come up'; cat serve.log; exit 1; }\n\
         finish() { kill -INT \"$server\" 2>/dev/null || return 0; }\n\
         trap 'code=$?; [ -z \"$server\" ] || finish; exit $code' EXIT\n",
    );
    for block in blocks {
        let mut rest = block.replace("cargo run --release -- ", "ringblock ").replace("\\\n", " ");
        rest = rest
            .replace("./target/release/ringblock", "ringblock")
            .replace("target/release/ringblock", "ringblock");
        for line in rest.lines() {
            let code = line.split(" #").next().unwrap_or("").trim();
            let foreground_server = code.starts_with("ringblock serve") && !code.ends_with('&');
            if code.starts_with("cargo build") || code.starts_with("git clone") || code.starts_with("cd ") {
                continue;
            } else if foreground_server {
                script += &format!(
                    "echo '+ {code} (first terminal)'\n{code} > serve.log 2>&1 & server=$!\nready\n"
                );
            } else {
                script += line;
                script.push('\n');
            }
            // A reader's next line comes later than the server's end; a script's would not.
            if code.contains("quit") && code.contains("qmp") {
                script += "wait \"$server\"; server=\n";
            }
        }
    }
    // A tour that ends with `quit` has ended the server itself; either way it must have ended well.
    script + "if [ -n \"$server\" ]; then finish; wait \"$server\"; server=; fi\necho tour done\n"
}

/// Goal: a reader who types the tour sees it succeed.
#[test]
fn every_line_of_the_tour_succeeds() {
    if !tools::is_product("RINGBLOCK_SERVE") {
        return;
    }
    let readme = std::fs::read_to_string(workspace_file("README.md")).expect("there is a README");
    let blocks = blocks(&readme);
    assert!(!blocks.is_empty(), "no `sh` block in the README's tour");
    let dir = TestDir::new("tour");
    let bin = tools::ringblock().parent().expect("it lies in a folder").to_string_lossy().into_owned();
    let python = tools::qmp_python_folder();
    let script = script(&blocks);
    let out = Cmd::new("bash -x -c")
        .arg(&script)
        .dir(dir.path())
        .env("HOME", &dir.file(""))
        .env("XDG_DATA_HOME", &dir.file("data"))
        .env("PATH", &format!("{bin}:{}:{python}", tools::tool_path()))
        .timeout(Duration::from_secs(120))
        .run();
    assert!(out.code == 0 && out.stdout.ends_with("tour done\n"), "{}\nscript:\n{script}", out.describe());
}

/// Goal: the extraction takes what it should. Method: a small text with both kinds of fence.
#[test]
fn blocks_are_found() {
    let text = "# A\n```sh\nno\n```\n## A tour\n```sh\n$ one\ntwo\n```\n```text\nout\n```\n### Sub\n```sh\nthree\n```\n## B\n```sh\nno\n```\n";
    assert_eq!(blocks(text), ["one\ntwo\n", "three\n"]);
}
