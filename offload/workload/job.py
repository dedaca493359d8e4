"""The two commands on real input, `offload migrate` and `offload snapshot`: arguments checked, work done, results told.

What needs no work is checked before any is done: the words of the command line, the engine, the path of the result.
"""

import os

from offload.engines import check_device, default_engine, parse_engine
from offload.errors import InvalidInput
from offload.outfile import check_output
from offload.report import deliver, json_target, show
from offload.units import PAGE_SIZE, format_bytes, format_size, parse_nodes, parse_protocol
from offload.workload import snapshot as snap
from offload.workload.live import read_process

__all__ = ("migrate_job", "snapshot_job")


def migrate_job(*, file, pid, engine, nodes, move_all, batch_pages, protocol, layout_only, validate, json, host):
    """`offload migrate`; the exit status: 0 if every page that was moved or left verifies, else 1.

    ``host()``: what is known of this host and our version, for the manifest.
    """
    if (file is None) == (pid is None):
        raise InvalidInput("give either --pid PID or a FILE that offload snapshot wrote, and not both")
    pid = parse_pid(pid) if pid is not None else None
    nodes = parse_nodes(nodes)
    if layout_only or pid is not None:
        check_nodes_for_bytes(nodes, layout_only)
    if batch_pages < 1:
        raise InvalidInput(f"--batch-pages {batch_pages} is not a number of base pages; mainline has 512")
    parse_protocol(protocol)
    json_target(json, inputs=() if file is None else (file,))
    check_device(nodes, 0, "a node")                # its reason first
    engine = default_engine(nodes) if engine is None else parse_engine(engine, nodes)
    engine.check_nodes(nodes)
    from offload.workload.migrate_process import compile_once, move_process, result_parts, progress_bar, result_of
    from offload.workload.rebuild import rebuild

    # The process is read first: compiling can take longer than it lives.
    with progress_bar() as step:
        if pid is not None:
            snapshot = read_process(pid, layout_only=layout_only, max_bytes=_readable_bytes(),
                                    progress=step(f"reading pid {pid}"))
        else:
            snapshot = snap.load(file)
            if layout_only:
                snapshot = snapshot.without_bytes()
    check_nodes_for_bytes(nodes, snapshot.layout_only)
    compile_once(engine, nodes)
    with progress_bar() as step:
        rebuilt = rebuild(snapshot, nodes=nodes, batch_pages=batch_pages, protocol=protocol, copy_kernel=engine.path_kernel,
                          progress=step("rebuilding"))
        moved = move_process(rebuilt, engine, move_all=move_all, validate=validate)
    result = result_of(moved)
    result["manifest"]["host"] = host()
    deliver(json, result, lambda: show(result_parts(result)))
    return 0 if moved.verified else 1


def check_nodes_for_bytes(nodes, layout_only):
    """InvalidInput where memory is asked for and there are no bytes to put there, or none and there are bytes."""
    if layout_only and nodes not in (("host", "host"), ("nowhere", "nowhere")):
        raise InvalidInput(f"--nodes {','.join(nodes)} is for bytes, and a layout has none; leave it out, or take the bytes along")
    if not layout_only and "nowhere" in nodes:
        raise InvalidInput(f"--nodes {','.join(nodes)} has no place for the process's bytes; add --layout-only to leave them out, or use "
                           f"--nodes host,host")


def snapshot_job(*, pid, output, layout_only):
    """`offload snapshot`; the exit status."""
    from offload.workload.migrate_process import progress_bar
    pid = parse_pid(pid)
    if output == "-":
        raise InvalidInput("-o '-' is no file, and secrets are not for a pipe; name a file (./- for one of that name)")
    check_output(output, "-o", private=True)
    with progress_bar() as step:
        snapshot = read_process(pid, layout_only=layout_only, progress=step(f"reading pid {pid}"))
    snap.save(snapshot, output)
    show(snapshot_lines(snapshot, output))
    return 0


def snapshot_lines(snapshot, output):
    """What is told of a snapshot that was written to the file ``output``."""
    yield (f"{output}: pid {snapshot.pid} ({snapshot.comm}), {snapshot.nr_pages} pages "
           f"({format_bytes(snapshot.nr_pages * PAGE_SIZE)}{', layout only' if snapshot.layout_only else ''}) in "
           f"{len(snapshot.vmas)} mappings, {format_bytes(os.path.getsize(output))} written in mode 0600")
    yield "folios    " + (", ".join(f"{nr} x {format_size(PAGE_SIZE << order)}" for order, nr in snapshot.orders().items())
                          or "none")
    for kind, pages in snapshot.skipped.items():
        yield f"skipped   {pages} pages of {kind} mappings"
    if snapshot.nr_swapped:
        yield f"skipped   {snapshot.nr_swapped} pages in swap"
    yield (f"changed   {snapshot.nr_changed} pages while being read, {snapshot.nr_vanished} went away, "
           f"{snapshot.nr_unreadable} could not be read")
    for note in snapshot.notes:
        yield f"note      {note}"


def parse_pid(text):
    """A pid from "123", or "self" for this process. InvalidInput."""
    if text == "self":
        return os.getpid()
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 1 << 31):
        raise InvalidInput(f"--pid {text!r} is not a process id; give a positive number, or self")
    return int(text)


def _readable_bytes():
    # The bytes are held three times: as read, and on both nodes.
    available = snap.available_bytes()
    return None if available is None else available // 3
