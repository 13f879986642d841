"""What a server answers to one list of requests, printed line by line, so that two servers can be compared.

Usage: nbd_behaviour.py URI      (Debian's python with its libnbd bindings; libnbd 1.14 or newer)
The export is writable, 4 MiB or larger, and its contents are overwritten.
"""

import errno
import sys

import nbd


def show(what, value):
    print(f"{what}: {value}")


def attempt(what, action):
    """Prints the result of `action`, or the name of the error it fails with."""
    try:
        show(what, action())
    except nbd.Error as error:
        show(what, errno.errorcode.get(error.errnum, error.errnum))


def beyond(what, action):
    """The protocol asks for ENOSPC here, some servers say EINVAL: both are a refusal."""
    try:
        show(what, action())
    except nbd.Error as error:
        refused = error.errnum in (errno.ENOSPC, errno.EINVAL)
        show(what, "refused" if refused else errno.errorcode.get(error.errnum, error.errnum))


def extents(h, offset, length, context=nbd.CONTEXT_BASE_ALLOCATION):
    """The block status of a range, adjacent equal entries merged: a server may split where it likes."""
    merged = []
    end = offset + length

    def collect(name, start, entries, _error):
        if name != context:
            return 0
        for size, flags in zip(entries[::2], entries[1::2]):
            # The last extent of a reply may reach beyond the request.
            size = min(size, end - start)
            if merged and merged[-1][2] == flags and merged[-1][0] + merged[-1][1] == start:
                merged[-1][1] += size
            elif size:
                merged.append([start, size, flags])
            start += size
        return 0

    while offset < end:
        h.block_status(end - offset, offset, collect)
        offset = merged[-1][0] + merged[-1][1]
    return merged


def main(uri):
    h = nbd.NBD()
    h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    # Requests that the client library would refuse itself must reach the server.
    h.set_strict_mode(0)
    h.connect_uri(uri)
    size = h.get_size()
    show("size", size)
    show("protocol", h.get_protocol())
    show("structured", h.get_structured_replies_negotiated())
    for name in ("flush", "fua", "trim", "zero", "fast_zero", "df", "multi_conn", "cache"):
        show(f"can {name}", getattr(h, f"can_{name}")())
    show("read only", h.is_read_only())
    show("maximum block", h.get_block_size(nbd.SIZE_MAXIMUM))

    h.zero(size, 0)
    show("all zero", extents(h, 0, size))
    h.pwrite(b"A" * 200_000, 1_000_001)
    attempt("read back", lambda: h.pread(200_002, 1_000_000) == b"\0" + b"A" * 200_000 + b"\0")
    h.pwrite(b"B" * 512, size - 512, nbd.CMD_FLAG_FUA)
    attempt("read the end", lambda: bytes(h.pread(4, size - 4)))
    h.flush()
    show("after writes", extents(h, 0, size))
    h.zero(65536, 1_048_576)
    h.zero(65536, 1_114_112, nbd.CMD_FLAG_NO_HOLE)
    show("after zeroes", extents(h, 0, size))
    attempt("fast zero", lambda: h.zero(65536, 0, nbd.CMD_FLAG_FAST_ZERO))
    attempt("ragged zero", lambda: h.zero(3, 1_000_005))
    attempt("read ragged", lambda: bytes(h.pread(8, 1_000_003)))
    attempt("trim", lambda: h.trim(size // 2, 0))
    attempt("reads zero after trim", lambda: h.pread(65536, 983_040) == bytes(65536))
    attempt("trim ragged", lambda: h.trim(100, 7))
    attempt("cache", lambda: h.cache(65536, 0))

    attempt("read over the end", lambda: h.pread(1024, size - 512))
    attempt("read beyond the end", lambda: h.pread(512, size + 4096))
    beyond("write over the end", lambda: h.pwrite(b"x" * 1024, size - 512))
    beyond("zero over the end", lambda: h.zero(1024, size - 512))
    attempt("trim over the end", lambda: h.trim(1024, size - 512))
    attempt("still alive", lambda: bytes(h.pread(4, size - 4)))
    attempt("read with an unknown flag", lambda: len(h.pread(512, 0, 1 << 14)))
    attempt("still alive", lambda: bytes(h.pread(4, size - 4)))

    chunks = []
    buf = h.pread_structured(1 << 20, 0, lambda data, at, kind, error: chunks.append((kind, at, len(data))))
    covered = sorted((at, at + n) for kind, at, n in chunks if kind == nbd.READ_DATA)
    holes = any(kind == nbd.READ_HOLE for kind, _at, _n in chunks)
    show("structured read is complete", len(buf) == 1 << 20 and (holes or covered[-1][1] == 1 << 20))
    df = []
    h.pread_structured(65536, 0, lambda data, at, kind, error: df.append(kind), nbd.CMD_FLAG_DF)
    show("unfragmented read", len(df))

    flying = [h.aio_pread(nbd.Buffer(4096), n * 4096) for n in range(200)]
    while flying:
        h.poll(-1)
        flying = [cookie for cookie in flying if not h.aio_command_completed(cookie)]
    show("200 reads in flight", "done")
    h.shutdown()


main(sys.argv[1])
