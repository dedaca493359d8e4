"""The main job: a rebuilt process moved from node 0 to node 1 as move_pages(2) would, verified, and told.

Stands for a careful caller of move_pages(2). A call ends at the first run of entries in which a folio fails, and writes
no status for that run; whoever wants everything moved that can be calls again for the entries after it. So does this.
migratepages(8) and numactl do not: they use migrate_pages(2), or give up.
"""

import contextlib
import dataclasses
import sys
import time

import numpy as np

from offload.errors import BrokenInvariant
from offload.jit import exit_on_interrupt
from offload.kernels.checksum import checksum_pages
from offload.mm.memmap import FIRST_PFN, FRAMES_TOGETHER, PG_locked, PG_swapcache, PG_writeback
from offload.syscalls import NOT_WRITTEN
from offload.units import EACCES, EBUSY, EFAULT, ENOENT, ENOMEM, PAGE_SIZE, format_bytes, format_size
from offload.workload import snapshot as snap
from offload.workload.rebuild import KINDS, compare_pages, locate_pages, rebuild

__all__ = ("Moved", "move_process", "result_of", "result_parts", "compile_once", "progress_bar")

MOVED, FAILED, SKIPPED = 0, 1, 2
OUTCOMES = ("moved", "failed", "skipped")

STATUS_REASONS = {
    -EACCES: "-EACCES: mapped more than once (--move-all moves those too)",
    -EBUSY: "-EBUSY: not on an LRU list",
    -ENOENT: "-ENOENT: no page there",
    -EFAULT: "-EFAULT: not migratable",
}
ZERO_REASON = "all zeros: the split of its folio put the zero page in its place"


@dataclasses.dataclass(frozen=True, eq=False)
class Moved:
    """What a move of a rebuilt process did. The arrays have one element per page of ``rebuilt.pages``."""

    rebuilt: object
    engine: object
    migrator_name: str | None
    move_all: bool
    calls: tuple
    """The MoveResults of move_pages(), in order."""
    wall_ns: int
    """Inside move_pages(), all calls together."""
    cpu_ns: int
    """CPU time of the whole process meanwhile, its copying threads included."""
    outcome: np.ndarray
    """MOVED, FAILED or SKIPPED."""
    reason: np.ndarray
    """Index into ``reasons``; 0 for a page that moved."""
    reasons: tuple[str, ...]
    bad: np.ndarray
    """True for a page whose bytes, or whose place, are not what they should be."""
    invalid: str
    """What ``validate`` found wrong with the machine's books, or ""."""
    validated: bool

    @property
    def verified(self):
        return not self.bad.any() and not self.invalid


def move_process(rebuilt, engine, *, move_all=False, migrator=None, validate=False):
    """Move every folio of ``rebuilt`` to node 1 with ``engine`` and verify every page: a `Moved`.

    ``migrator`` stands at the hatch instead of the engine's own. Verified is: each page is where its status says, and its
    bytes are those of the snapshot (a machine without bytes: only where it is). ``validate`` also checks the machine's
    books, which is slow. Raises what move_pages() raises.
    """
    machine, process = rebuilt.machine, rebuilt.process
    own = engine.make_migrator() if migrator is None else None
    migrator = own if migrator is None else migrator
    addresses = _folio_addresses(rebuilt)
    status = np.full(len(addresses), NOT_WRITTEN, np.int64)
    before = _orders_by_page(rebuilt)
    calls, wall_ns, cpu_ns = [], 0, 0
    with contextlib.ExitStack() as stack:
        if own is not None:
            stack.callback(own.close)
        if migrator is not None:
            stack.enter_context(machine.migrator(migrator))
        at = 0
        while at < len(addresses):
            wall, cpu = time.perf_counter_ns(), time.process_time_ns()
            result = machine.move_pages(process, addresses[at:], 1, move_all=move_all)
            wall_ns += time.perf_counter_ns() - wall
            cpu_ns += time.process_time_ns() - cpu
            calls.append(result)
            status[at:] = result.status
            if result.ret < 0:                      # no way to tell how far it came
                status[at:][result.status == NOT_WRITTEN] = -ENOMEM if result.ret == -ENOMEM else NOT_WRITTEN
                break
            # What the call returns is the folios of the last run that failed plus the entries after that run.
            failed = result.calls[-1].rc if result.ret else 0
            at = len(addresses) - (result.ret - failed)
    moved = Moved(rebuilt, engine, getattr(migrator, "name", None), move_all, tuple(calls), wall_ns, cpu_ns,
                  *_outcomes(rebuilt, status), _wrong_pages(rebuilt, status, before), *_validate(machine, validate))
    return moved


def _folio_addresses(rebuilt):
    # One address per folio, its first: folios are numbered in that order, so this ascends.
    first = np.unique(rebuilt.pages.folio, return_index=True)[1]
    return rebuilt.pages.address[first]


def _orders_by_page(rebuilt):
    return rebuilt.folios.order[rebuilt.pages.folio] if len(rebuilt.folios) else np.zeros(0, np.int64)


def _locate(rebuilt):
    # (pfn, node) of each page now; node -1 for the zero page, -2 for none.
    machine = rebuilt.machine
    pfns = np.zeros(len(rebuilt.pages), np.int64)
    locate_pages(machine.table, rebuilt.process.mm, rebuilt.pages, pfns)
    there = pfns > 0
    orders = machine.mem.orders[pfns[there]].astype(np.int64)
    nodes = np.where(pfns < 0, -1, -2)
    nodes[there] = machine.mem.folios.nid[pfns[there] >> orders << orders]
    return pfns, nodes


def _page_status(rebuilt, status):
    # The status of each page's folio.
    return status[rebuilt.pages.folio] if len(status) else status


def _outcomes(rebuilt, status):
    # (outcome, reason, reasons) of each page.
    pfns, nodes = _locate(rebuilt)
    page_status = _page_status(rebuilt, status)
    reasons = [""]
    outcome = np.full(len(pfns), FAILED, np.int8)
    reason = np.zeros(len(pfns), np.int16)

    def give(which, result, text):
        if which.any():
            outcome[which] = result
            if text and text not in reasons:
                reasons.append(text)
            reason[which] = reasons.index(text) if text else 0

    rest = np.ones(len(pfns), bool)
    for which, result, text in (
            (nodes == 1, MOVED, ""),
            (nodes == -1, SKIPPED, ZERO_REASON),
            *((page_status == code, SKIPPED, text) for code, text in STATUS_REASONS.items()),
            (page_status == -ENOMEM, FAILED, "-ENOMEM: node 1 has no room")):
        give(rest & which, result, text)
        rest &= ~which
    mem = rebuilt.machine.mem
    left = np.flatnonzero(rest & (pfns > 0))
    orders = mem.orders[pfns[left]].astype(np.int64)
    heads = pfns[left] >> orders << orders
    row = mem.folios[heads]
    caches = (row.mapping > 0).astype(np.int64) + (row.page_flags & PG_swapcache != 0)
    expected = (caches << orders) + row.mapcount
    for which, text in ((row.page_flags & PG_locked != 0, "-EAGAIN: locked by somebody else"),
                        (row.page_flags & PG_writeback != 0, "-EBUSY: under writeback"),
                        (row.refcount > expected, "-EAGAIN: references that nothing explains"),
                        (np.ones(len(left), bool), "left behind by migrate_pages()")):
        mask = np.zeros(len(pfns), bool)
        mask[left[which]] = True
        give(rest & mask, FAILED, text)
        rest &= ~mask
    give(rest, FAILED, "not mapped any more")
    return outcome, reason, tuple(reasons)


def _wrong_pages(rebuilt, status, orders):
    # Pages whose bytes or place are wrong.
    pfns, nodes = _locate(rebuilt)
    page_status = _page_status(rebuilt, status)
    bad = nodes == -2
    bad |= (page_status == 1) & (nodes != 1) & (nodes != -1)
    bad |= (page_status < 0) & (page_status != NOT_WRITTEN) & (page_status != -ENOMEM) & (nodes != 0)
    # A zero page can have taken the place of a page only where its folio was split.
    bad |= (nodes == -1) & ((orders == 0) | (rebuilt.pages.kind != KINDS.index("anon")))
    snapshot, machine = rebuilt.snapshot, rebuilt.machine
    if not snapshot.layout_only and len(pfns):
        bad |= ~_same_bytes(machine.frames, pfns, snapshot.data, rebuilt.pages.row.copy())
    return bad


def _same_bytes(frames, pfns, data, rows):
    # Whether each frame (-1: the zero page) holds its row of data. Where the nodes lie apart that is told by checksums, which
    # are made where the frames lie.
    if frames.kind == FRAMES_TOGETHER:
        words = frames.view(FIRST_PFN, frames.nbytes // PAGE_SIZE).view(np.uint64)
        expected = data.view(np.uint64)
        expected.setflags(write=False)
        same = np.zeros(len(pfns), np.uint8)
        compare_pages(words, pfns, expected, rows, same)
        return same != 0
    same, here, zero = np.zeros(len(pfns), bool), pfns > 0, pfns < 0
    same[here] = frames.checksums(pfns[here]) == checksum_pages(data, rows[here])
    same[zero] = ~data[rows[zero]].any(axis=1)
    return same


def _validate(machine, wanted):
    if not wanted:
        return "", False
    try:
        machine.validate()
    except BrokenInvariant as error:
        return str(error), True
    return "", True


# --- what came out -------------------------------------------------------------------------------------------

def kinds_of(moved):
    """{kind of memory: counts of pages and {reason: pages}}, in the order of a table."""
    rebuilt = moved.rebuilt
    kinds = {}

    def line(kind):
        return kinds.setdefault(kind, {"pages_seen": 0, "pages_moved": 0, "pages_failed": 0, "pages_skipped": 0,
                                       "reasons": {}})

    for number, kind in enumerate(KINDS):
        here = rebuilt.pages.kind == number
        if here.any():
            counts = line(kind)
            counts["pages_seen"] += int(here.sum())
            for outcome, name in enumerate(OUTCOMES):
                counts[f"pages_{name}"] += int((moved.outcome[here] == outcome).sum())
            for why, pages in zip(*np.unique(moved.reason[here & (moved.outcome != MOVED)], return_counts=True)):
                counts["reasons"][moved.reasons[why]] = int(pages)
    for one in rebuilt.skipped:
        counts = line(one.kind)
        counts["pages_seen"] += one.pages
        counts["pages_skipped"] += one.pages
        counts["reasons"][one.reason] = counts["reasons"].get(one.reason, 0) + one.pages
    return kinds


def orders_of(moved):
    """{order: folios rebuilt, moved whole or in pieces, failed, skipped}, ascending."""
    rebuilt = moved.rebuilt
    folios = rebuilt.folios
    state = np.zeros((len(OUTCOMES), len(folios)), bool)
    for outcome in range(len(OUTCOMES)):
        state[outcome, rebuilt.pages.folio[moved.outcome == outcome]] = True
    failed = state[FAILED]
    went = state[MOVED] & ~failed
    skipped = ~failed & ~went
    return {int(order): {"rebuilt": int((folios.order == order).sum()), "moved": int((went & (folios.order == order)).sum()),
                         "failed": int((failed & (folios.order == order)).sum()),
                         "skipped": int((skipped & (folios.order == order)).sum())}
            for order in np.unique(folios.order)}


def result_of(moved):
    """The result as plain data, for --json. Times are ns, rates decimal GB/s of bytes that arrived on node 1."""
    rebuilt, snapshot, engine = moved.rebuilt, moved.rebuilt.snapshot, moved.engine
    migrations = [call for result in moved.calls for call in result.calls]
    total = lambda name: sum(result.total(name) for result in moved.calls)
    phases = {phase: sum(result.phases_ns()[phase] for result in moved.calls) for phase in ("unmap", "flush", "copy", "move")}
    blocked = np.concatenate([call.blocked_ns for call in migrations] or [np.zeros(0, np.int64)])
    kinds = kinds_of(moved)
    pages = {name: sum(counts[name] for counts in kinds.values())
             for name in ("pages_seen", "pages_moved", "pages_failed", "pages_skipped")}
    bytes_moved = 0 if snapshot.layout_only else total("moved_bytes")
    rate = lambda ns: bytes_moved / ns if ns and not snapshot.layout_only else None
    bad = np.flatnonzero(moved.bad)
    return {
        "format": 1,
        "manifest": {
            "pid": snapshot.pid, "comm": snapshot.comm, "taken": snapshot.taken, "kernel": snapshot.kernel,
            "layout_only": snapshot.layout_only, "folio_sizes_known": snapshot.folio_sizes_known,
            "engine": engine.name, "notes": [engine.note] if engine.note else [], "migrator": moved.migrator_name, "copy_kernel": engine.copy_kernel,
            "threads": engine.threads, "batch_pages": rebuilt.machine.config.batch_pages, "mode": "MIGRATE_SYNC",
            "protocol": rebuilt.machine.config.protocol, "reason": "syscall_or_cpuset", "move_all": moved.move_all,
            "read_ns": snapshot.read_ns,
            "nodes": [node.placement for node in rebuilt.machine.config.nodes],
        },
        **pages,
        "verified": moved.verified,
        "verified_what": ("placement" if snapshot.layout_only else
                          "bytes and placement" if rebuilt.machine.frames.kind == FRAMES_TOGETHER else "checksums and placement") + (
            ", books" if moved.validated else ""),
        "bad_addresses": [hex(address) for address in rebuilt.pages.address[bad[:64]].tolist()],
        "bad_pages": len(bad),
        "invalid": moved.invalid,
        "kinds": kinds,
        "orders": {str(order): {"seen": snapshot.orders().get(order, 0),
                                **orders_of(moved).get(order, dict.fromkeys(("rebuilt", "moved", "failed", "skipped"), 0))}
                   for order in sorted({*snapshot.orders(), *orders_of(moved)})},
        "gbps": rate(moved.wall_ns),
        "copy_gbps": rate(phases["copy"]),
        "moved_bytes": bytes_moved,
        "copied_bytes": total("copied_bytes"),
        "wall_ns": moved.wall_ns,
        "phases_ns": phases,
        "blocked_ns": {"first": int(blocked[0]), **{f"p{q}": int(np.percentile(blocked, q)) for q in (50, 99)},
                       "max": int(blocked.max())} if len(blocked) else dict.fromkeys(("first", "p50", "p99", "max"), 0),
        "cpu_s": moved.cpu_ns / 1e9,
        "calls": {"move_pages": len(moved.calls), "migrate_pages": len(migrations)},
        "stats": {name: total(name) for name in ("nr_succeeded", "nr_failed_pages", "nr_thp_succeeded", "nr_thp_failed",
                                                 "nr_thp_split", "nr_split")},
        "vm_pin_kib": snapshot.vm_pin_kib, "vm_lck_kib": snapshot.vm_lck_kib,
        "pages_changed": snapshot.nr_changed, "pages_vanished": snapshot.nr_vanished,
        "pages_unreadable": snapshot.nr_unreadable,
        "notes": [*snapshot.notes, *rebuilt.notes],
    }


def result_parts(result):
    """What is told a person, for `report.show`: lines of text and tables."""
    from offload.report import table

    manifest = result["manifest"]
    yield (f"pid {manifest['pid']} ({manifest['comm']}), read {manifest['taken']} on Linux {manifest['kernel']}"
           f"{': layout only' if manifest['layout_only'] else ''}")
    yield (f"engine {manifest['engine']}: migrator {manifest['migrator'] or 'none'}, copy kernel {manifest['copy_kernel']}, "
           f"{manifest['threads']} thread{'s' * (manifest['threads'] > 1)}, batch limit {manifest['batch_pages']} pages; "
           f"protocol {manifest['protocol']}, MIGRATE_SYNC, {manifest['reason']}, "
           f"{'MPOL_MF_MOVE_ALL' if manifest['move_all'] else 'MPOL_MF_MOVE'}")
    if manifest["nodes"][0] != manifest["nodes"][1] or manifest["nodes"][0] not in ("host", "nowhere"):
        yield f"nodes {','.join(manifest['nodes'])}"
    yield from manifest["notes"]
    yield ""
    names = ("pages_seen", "pages_moved", "pages_failed", "pages_skipped")
    rows = [(kind, *(counts[name] for name in names)) for kind, counts in result["kinds"].items()]
    rows.append(("all", *(result[name] for name in names)))
    yield table("pages of 4K", ("memory", "seen", "moved", "failed", "skipped"), rows,
                right=("seen", "moved", "failed", "skipped"))
    reasons = [(kind, pages, why) for kind, counts in result["kinds"].items() for why, pages in counts["reasons"].items()]
    if reasons:
        yield ""
        yield table("why not", ("memory", "pages", "reason"), reasons, right=("pages",))
    yield ""
    yield table("folios", ("size", "seen", "rebuilt", "moved", "failed", "skipped"),
                [(format_size(PAGE_SIZE << int(order)), *counts.values()) for order, counts in result["orders"].items()],
                right=("size", "seen", "rebuilt", "moved", "failed", "skipped"))
    yield ""
    stats = result["stats"]
    yield (f"calls     {result['calls']['move_pages']} of move_pages(2), {result['calls']['migrate_pages']} of "
           f"migrate_pages(): nr_succeeded={stats['nr_succeeded']} nr_failed={stats['nr_failed_pages']} "
           f"nr_thp_succeeded={stats['nr_thp_succeeded']} nr_thp_failed={stats['nr_thp_failed']} "
           f"nr_thp_split={stats['nr_thp_split']} nr_split={stats['nr_split']}")
    phases = result["phases_ns"]
    rest = max(result["wall_ns"] - sum(phases.values()), 0)
    yield (f"time      {_ms(result['wall_ns'])} = " + " + ".join(f"{name} {_ms(ns)}" for name, ns in phases.items())
           + f" + looking up, isolating and the rest {_ms(rest)}; CPU {_ms(result['cpu_s'] * 1e9)}")
    if result["cpu_s"] * 1e9 < 0.8 * result["wall_ns"]:
        yield "          the mover waited for a CPU: other work was running, and the times contain it"
    blocked = result["blocked_ns"]
    yield "blocked   a folio, " + ", ".join(f"{name} {blocked[name] / 1e3:.1f} us" for name in blocked)
    if result["gbps"] is None:
        yield "rate      none: " + ("metadata only, no byte is there" if manifest["layout_only"] else "nothing moved")
    else:
        yield (f"rate      {result['gbps']:.2f} GB/s over the whole call, "
               + (f"{result['copy_gbps']:.2f} GB/s over the copy alone" if result["copy_gbps"] else "no copy")
               + f" ({format_bytes(result['moved_bytes'])} arrived)")
    yield (f"process   VmPin {result['vm_pin_kib']} KiB, VmLck {result['vm_lck_kib']} KiB; {result['pages_changed']} pages "
           f"changed while being read")
    for note in result["notes"]:
        yield f"note      {note}"
    if result["verified"]:
        what, _, books = result["verified_what"].partition(", ")
        yield (f"verified  {what} of every page that was moved or left"
               + ("; no bytes, as the snapshot has none" if manifest["layout_only"] else "")
               + ("; the machine's books add up" if books else ""))
    else:
        shown = result["bad_addresses"]
        if result["bad_pages"]:
            yield (f"WRONG     {result['bad_pages']} pages do not verify ({result['verified_what']}): {', '.join(shown)}"
                   f"{', ...' if result['bad_pages'] > len(shown) else ''}")
        if result["invalid"]:
            yield f"WRONG     the machine's books: {result['invalid']}"


def _ms(ns):
    return f"{ns / 1e6:.2f} ms"


# --- waiting -------------------------------------------------------------------------------------------------

def compile_once(engine, nodes=("host", "host")):
    """Compile what the job needs, or load it from the cache: a tiny process goes all the way."""
    with exit_on_interrupt():
        for nr_pages in (1, 65):                    # fewer folios than threads, and more
            tiny = _tiny_snapshot(nr_pages)
            tiny = tiny.without_bytes() if "nowhere" in nodes else tiny
            move_process(rebuild(tiny, nodes=nodes), engine, move_all=True)


def _tiny_snapshot(nr_pages):
    # Anonymous pages that are shared, and for more than one, the last is of a file.
    vmas = (snap.SnapshotVma(start=1 << 21, end=2 << 21, prot="rw", shared=False, offset=0, path="", inode=0, device="00:00",
                             flags=(), kind="anon"),
            snap.SnapshotVma(start=2 << 21, end=3 << 21, prot="rw", shared=True, offset=0, path="/tiny", inode=1,
                             device="00:01", flags=(), kind="file", fs="ext4"))
    at = np.arange(nr_pages)
    folios = np.zeros(nr_pages, snap.FOLIO_DTYPE)
    folios["va"], folios["page"], folios["folio"] = (1 << 21) + at * PAGE_SIZE, at, at
    folios["nr_mapped"], folios["mapcount"], folios["bits"] = 1, 2, snap.FOLIO_ANON
    if nr_pages > 1:
        folios[-1] = (2 << 21, nr_pages - 1, 1, nr_pages - 1, 0, 1, 1, snap.FOLIO_DIRTY, 0)
    return snap.Snapshot(pid=1, comm="tiny", taken="", kernel="", vmas=vmas, folios=folios,
                         data=np.ones((nr_pages, PAGE_SIZE), np.uint8), nr_pages=nr_pages, vm_pin_kib=0,
                         folio_sizes_known=True)


@contextlib.contextmanager
def progress_bar():
    """``step(what)`` gives a function ``(done, total)`` that draws a bar on standard error, if that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda what: None
        return
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    from offload.report import console
    with Progress(TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), console=console(sys.stderr),
                  transient=True) as bar:
        def step(what):
            task = bar.add_task(what, total=None)
            return lambda done, total: bar.update(task, completed=done, total=total)
        yield step
