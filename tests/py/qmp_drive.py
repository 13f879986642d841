"""Drives a storage daemon through its control pipe with the `qemu.qmp` client: add, export, query, delete,
and errors that leave nothing behind.

Usage: qmp_drive.py CONTROL-SOCKET NBD-SOCKET IMAGE      (the image: qcow2, 8 MiB)
"""

import asyncio
import subprocess
import sys

from qemu.qmp import QMPClient
from qemu.qmp.qmp_client import ExecuteError


def check(condition, *what):
    if not condition:
        raise AssertionError(what)


async def refused(qmp, text, command, **arguments):
    """The command fails with GenericError, and its text contains `text`."""
    arguments = {key.replace("_", "-"): value for key, value in arguments.items()}
    try:
        result = await qmp.execute(command, arguments)
    except ExecuteError as error:
        check(error.error_class == "GenericError", command, error.error_class)
        check(text in str(error), command, str(error), text)
        return
    raise AssertionError(f"{command} {arguments} should fail but returned {result}")


async def nodes(qmp):
    return {node["node-name"]: node for node in await qmp.execute("query-named-block-nodes")}


async def main(control, nbd, image):
    qmp = QMPClient("drive")
    await qmp.connect(control)
    check("oob" in qmp.greeting.QMP.capabilities, qmp.greeting)
    version = await qmp.execute("query-version")
    check(version["qemu"]["major"] >= 1, version)

    commands = {c["name"] for c in await qmp.execute("query-commands")}
    wanted = {
        "qmp_capabilities", "query-version", "query-commands", "query-qmp-schema", "quit", "blockdev-add",
        "blockdev-del", "blockdev-reopen", "query-named-block-nodes", "query-block", "query-blockstats",
        "block_resize", "block-export-add", "block-export-del", "query-block-exports", "nbd-server-start",
        "nbd-server-stop", "nbd-server-add", "nbd-server-remove", "x-debug-query-block-graph",
    }
    check(wanted <= commands, "missing", wanted - commands)
    schema = await qmp.execute("query-qmp-schema")
    in_schema = {e["name"] for e in schema if e["meta-type"] == "command"}
    check(commands <= in_schema, "commands without a schema", commands - in_schema)

    # Errors first, all-or-nothing: after each, the same name can be used.
    before = await nodes(qmp)
    file_node = {"driver": "file", "filename": image, "node-name": "f"}
    await refused(qmp, "No such file or directory", "blockdev-add", driver="qcow2", node_name="n",
                  file={"driver": "file", "filename": image + ".nosuch", "node-name": "f"})
    await refused(qmp, "Image is not in qcow2 format", "blockdev-add", driver="qcow2", node_name="n",
                  file={"driver": "null-co", "node-name": "f"})
    await refused(qmp, "Cannot find device='nosuch' nor node-name='nosuch'", "blockdev-add", driver="qcow2",
                  node_name="n", file="nosuch")
    await refused(qmp, "Parameter 'file.nope' is unexpected", "blockdev-add", driver="qcow2", node_name="n",
                  file={**file_node, "nope": 1})
    await refused(qmp, "Parameter 'driver' does not accept value 'nosuch'", "blockdev-add", driver="nosuch",
                  node_name="n")
    await refused(qmp, "Invalid parameter type for 'node-name', expected: string", "blockdev-add",
                  driver="null-co", node_name=5)
    await refused(qmp, "Invalid node-name: '1 2'", "blockdev-add", driver="null-co", node_name="1 2")
    await refused(qmp, "'node-name' must be specified for the root node", "blockdev-add", driver="null-co")
    check(await nodes(qmp) == before, "a failed add left a node")

    # Add, with the very names that failed before.
    await qmp.execute("blockdev-add", {"driver": "qcow2", "node-name": "n", "file": file_node})
    known = await nodes(qmp)
    check(set(known) == set(before) | {"n", "f"}, set(known))
    check(known["n"]["drv"] == "qcow2" and known["n"]["file"] == image, known["n"])
    check(known["n"]["image"]["virtual-size"] == 8 << 20, known["n"]["image"])
    check(known["n"]["ro"] is False, known["n"])
    await refused(qmp, "Duplicate nodes with node-name='n'", "blockdev-add", driver="null-co", node_name="n")
    graph = await qmp.execute("x-debug-query-block-graph")
    check({"n", "f"} <= {n["name"] for n in graph["nodes"]}, graph)
    check(await qmp.execute("query-block") == [], "no devices in a storage daemon")
    stats = await qmp.execute("query-blockstats", {"query-nodes": True})
    check({"n", "f"} <= {s["node-name"] for s in stats}, stats)

    # Export.
    await refused(qmp, "Cannot find device='' nor node-name='zz'", "block-export-add", type="nbd", id="e",
                  node_name="zz")
    await refused(qmp, "Invalid block export id", "block-export-add", type="nbd", id="0 e", node_name="n")
    export = {"type": "nbd", "id": "e", "node-name": "n", "name": "disk", "writable": True,
              "description": "by script"}
    await qmp.execute("block-export-add", export)
    await refused(qmp, "Block export id 'e' is already in use", "block-export-add", type="nbd", id="e",
                  node_name="n", name="other")
    await refused(qmp, "NBD server already has export named 'disk'", "block-export-add", type="nbd", id="e2",
                  node_name="n", name="disk")
    exports = await qmp.execute("query-block-exports")
    check(exports == [{"id": "e", "node-name": "n", "shutting-down": False, "type": "nbd"}], exports)
    uri = f"nbd+unix:///disk?socket={nbd}"
    info = subprocess.run(["nbdinfo", "--size", uri], check=True, capture_output=True, text=True)
    check(int(info.stdout) == 8 << 20, info.stdout)
    subprocess.run(["qemu-io", "-f", "raw", "-c", "write -P 4 0 1M", uri], check=True, capture_output=True)

    # In use: not deletable, not resizable; nothing changes by trying.
    await refused(qmp, "Node n is in use", "blockdev-del", node_name="n")
    await refused(qmp, "Permission conflict on node 'n'", "block_resize", node_name="n", size=16 << 20)
    await refused(qmp, "Failed to find node with node-name='zz'", "blockdev-del", node_name="zz")

    # Delete the export; its id is free once the event has come.
    with qmp.listener("BLOCK_EXPORT_DELETED") as deleted:
        await qmp.execute("block-export-del", {"id": "e"})
        event = await asyncio.wait_for(deleted.get(), 10)
        check(event["data"] == {"id": "e"}, event)
    await refused(qmp, "Export 'e' is not found", "block-export-del", id="e")
    check(await qmp.execute("query-block-exports") == [], "no exports")
    check(subprocess.run(["nbdinfo", uri], capture_output=True, check=False).returncode != 0, "still exported")

    # Now it can grow; the next client sees the new size.
    await refused(qmp, "The new size must be a multiple of 512", "block_resize", node_name="n", size=1000)
    await qmp.execute("block_resize", {"node-name": "n", "size": 16 << 20})
    await qmp.execute("block-export-add", export)
    info = subprocess.run(["nbdinfo", "--size", uri], check=True, capture_output=True, text=True)
    check(int(info.stdout) == 16 << 20, info.stdout)
    subprocess.run(["qemu-io", "-f", "raw", "-c", "read -P 4 0 1M", "-c", "read -P 0 8M 8M", uri], check=True,
                   capture_output=True)

    # The legacy commands, a second server, and a stop that takes all exports along.
    await refused(qmp, "NBD server already running", "nbd-server-start",
                  addr={"type": "unix", "data": {"path": nbd + "2"}})
    with qmp.listener("BLOCK_EXPORT_DELETED") as deleted:
        await qmp.execute("nbd-server-stop")
        event = await asyncio.wait_for(deleted.get(), 10)
        check(event["data"] == {"id": "e"}, event)
    await refused(qmp, "NBD server not running", "block-export-add", **{k.replace("-", "_"): v
                                                                       for k, v in export.items()})
    await qmp.execute("nbd-server-start", {"addr": {"type": "unix", "data": {"path": nbd + "2"}}})
    await qmp.execute("nbd-server-add", {"device": "n", "name": "legacy", "writable": True})
    with qmp.listener("BLOCK_EXPORT_DELETED") as deleted:
        await qmp.execute("nbd-server-remove", {"name": "legacy"})
        await asyncio.wait_for(deleted.get(), 10)
    await refused(qmp, "Export 'legacy' is not found", "nbd-server-remove", name="legacy")

    # Reopen read-only and back; then a writable export is refused meanwhile.
    base = {"driver": "qcow2", "node-name": "n", "file": "f"}
    await qmp.execute("blockdev-reopen", {"options": [{**base, "read-only": True}]})
    check((await nodes(qmp))["n"]["ro"] is True, "read-only now")
    await refused(qmp, "Cannot export read-only node as writable", "block-export-add", type="nbd", id="e",
                  node_name="n", name="disk", writable=True)
    await qmp.execute("blockdev-reopen", {"options": [{**base, "read-only": False}]})
    check((await nodes(qmp))["n"]["ro"] is False, "writable again")

    # Delete: the node and its inline child go; the names are free for another node.
    await qmp.execute("blockdev-del", {"node-name": "n"})
    check(await nodes(qmp) == before, "all gone")
    await qmp.execute("blockdev-add", {"driver": "null-co", "node-name": "n", "size": 1 << 20})
    await qmp.execute("blockdev-del", {"node-name": "n"})
    await qmp.disconnect()
    print("driven")


asyncio.run(main(*sys.argv[1:]))
