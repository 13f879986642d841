//! Commands that are wrong whatever there is: each must be refused with its text and leave no trace.

use ringblock_tests::Rng;
use serde_json::{Value, json};

use super::step::Step;

/// One of them.
pub(super) fn draw(rng: &mut Rng) -> Step {
    let free = "zz";
    let nothing = json!({"driver": "null-co", "node-name": "w1", "read-zeroes": true, "size": 4096});
    let dup = json!({"driver": "null-co", "node-name": free});
    let all: &[(&str, Value, &str)] = &[
        ("blockdev-add", json!({"driver": "null-co"}), "'node-name' must be specified"),
        ("blockdev-add", json!({"node-name": free}), "Parameter 'driver' is missing"),
        ("blockdev-add", json!({"driver": "nope", "node-name": free}), "does not accept value 'nope'"),
        (
            "blockdev-add",
            json!({"driver": "null-co", "node-name": free, "colour": 1}),
            "'colour' is unexpected",
        ),
        ("blockdev-add", json!({"driver": "null-co", "node-name": "a/b"}), "Invalid node-name"),
        ("blockdev-add", json!({"driver": "null-co", "node-name": "x".repeat(32)}), "Node name too long"),
        ("blockdev-add", json!({"driver": "null-co", "node-name": free, "size": "1"}), "expected: integer"),
        (
            "blockdev-add",
            json!({"driver": "file", "node-name": free, "filename": "/nowhere/x"}),
            "No such file",
        ),
        ("blockdev-add", json!({"driver": "file", "node-name": free, "filename": "/"}), "Could not open"),
        ("blockdev-add", json!({"driver": "raw", "node-name": free, "file": dup}), "Duplicate nodes"),
        ("blockdev-add", json!({"driver": "raw", "node-name": free, "file": "w9"}), "Cannot find device="),
        (
            "blockdev-add",
            json!({"driver": "raw", "node-name": free, "offset": 8192, "file": nothing}),
            "cannot be greater",
        ),
        (
            "blockdev-add",
            json!({"driver": "raw", "node-name": free, "size": 8192, "file": nothing}),
            "smaller or equal",
        ),
        (
            "blockdev-add",
            json!({"driver": "raw", "node-name": free, "size": 100, "file": nothing}),
            "multiple of 512",
        ),
        (
            "blockdev-add",
            json!({"driver": "qcow2", "node-name": free, "file": nothing}),
            "not in qcow2 format",
        ),
        (
            "blockdev-add",
            json!({"driver": "null-co", "node-name": free, "force-share": true}),
            "force-share=on can only be used with read-only",
        ),
        (
            "blockdev-add",
            json!({"driver": "null-co", "node-name": free, "detect-zeroes": "unmap"}),
            "setting detect-zeroes to unmap is not allowed",
        ),
        ("blockdev-del", json!({"node-name": "w9"}), "Failed to find node"),
        ("blockdev-del", json!({}), "'node-name' is missing"),
        ("blockdev-reopen", json!({"options": [{"driver": "raw", "file": "w9"}]}), "node-name not specified"),
        (
            "blockdev-reopen",
            json!({"options": [{"driver": "null-co", "node-name": "w9"}]}),
            "Failed to find node",
        ),
        (
            "blockdev-reopen",
            json!({"options": {"driver": "null-co"}}),
            "Invalid parameter type for 'options'",
        ),
        ("block_resize", json!({"node-name": "w9", "size": 512}), "Cannot find device="),
        ("block_resize", json!({"device": "w9", "size": 512}), "Cannot find device='w9'"),
        ("block_resize", json!({"node-name": "w9"}), "Parameter 'size' is missing"),
        ("block-export-add", json!({"type": "nbd", "id": "9", "node-name": "w9"}), "Invalid block export id"),
        ("block-export-add", json!({"type": "nbd", "id": "w", "node-name": "w9"}), "Cannot find device="),
        (
            "block-export-add",
            json!({"type": "scsi", "id": "w", "node-name": "w9"}),
            "does not accept value 'scsi'",
        ),
        ("block-export-del", json!({"id": "w"}), "Export 'w' is not found"),
        ("block-export-del", json!({"id": "w", "mode": "soft"}), "does not accept value 'soft'"),
        ("nbd-server-add", json!({"device": "w9"}), "Cannot find device="),
        ("nbd-server-remove", json!({"name": "w"}), "Export 'w' is not found"),
        ("nbd-server-start", json!({"addr": {"type": "unix"}}), "Parameter 'addr.data' is missing"),
        ("object-add", json!({"qom-type": "iothread"}), "Parameter 'id' is missing"),
        ("object-add", json!({"qom-type": "iothread", "id": "9"}), "expects an identifier"),
        ("object-add", json!({"qom-type": "tree", "id": "w"}), "does not accept value 'tree'"),
        ("object-del", json!({"id": "w"}), "not found"),
        ("query-named-block-nodes", json!({"flat": 1}), "expected: boolean"),
        ("no-such-command", json!({}), "has not been found"),
    ];
    let (name, args, text) = &all[rng.below(all.len() as u64) as usize];
    Step::Wrong { name: (*name).to_owned(), args: args.clone(), text: (*text).to_owned() }
}
