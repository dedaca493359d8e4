"""migrate_pages(): cut the list into batches, migrate each, give back what is left, add up.

Stands for migrate_pages() of mm/migrate.c (v7.3) and its tracepoints. The compiled part runs until it is
done or until Python must act; :func:`migrate_pages` is the Python part, which makes the batch copies and runs events.
"""

import contextlib
import dataclasses
import time

import numpy as np

from offload.copy_offload import FolioBatch
from offload.errors import DeviceLost, InvalidInput, WouldHang
from offload.intrinsics import read_clocks
from offload.jit import jit, jit_entry
from offload.migrate.batch import batch_begin, migrate_pages_batch, sync_begin, sync_next
from offload.migrate.call import (
    CALL_DTYPE, DONE, L_BATCH, L_FROM, L_RET, L_SPLIT, STEPS, STOP_CALLBACK, STOP_FRAME_COPY, STOP_FRAME_LOG, STOP_OFFLOAD_COPY,
    STOP_STEP, list_add_tail, make_call, move_list, unpack_call,
)
from offload.migrate.hugetlb import HUGETLB_FIRST, migrate_hugetlbs
from offload.mm.memmap import FRAMES_TOGETHER, PG_hugetlb, unpack
from offload.table import pack
from offload.units import EAGAIN, EIO, MIGRATE_ASYNC, NR_MAX_MIGRATE_PAGES_RETRY, PAGE_SIZE, MigrateMode, MigrateReason

__all__ = ("migrate_pages", "MigrateResult", "Event")

# Where a call stands, in ``call.state.pages_at``.
PAGES_CUT, PAGES_BATCH, PAGES_SPLIT, PAGES_END, PAGES_DONE = range(5)


@jit_entry
def migrate_pages_run(mem_table, call_table):
    """Take a call up where it stands. 0 when it is through, or a STOP_* number."""
    mem = unpack(mem_table)
    call = unpack_call(call_table)
    c = call.state[0]
    while True:
        if c.pages_at == PAGES_CUT:
            cut_batch(mem, call)
            if c.mode == MIGRATE_ASYNC:
                batch_begin(mem, call, MIGRATE_ASYNC, L_BATCH, L_RET, L_SPLIT, NR_MAX_MIGRATE_PAGES_RETRY)
            else:
                sync_begin(mem, call)
            c.pages_at = PAGES_BATCH
        elif c.pages_at == PAGES_BATCH or c.pages_at == PAGES_SPLIT:
            stop = migrate_pages_batch(mem, call)
            if stop:
                return stop
            if c.pages_at == PAGES_SPLIT:
                move_list(call, L_SPLIT, L_RET)
                c.pages_at = next_batch(call)
            elif c.mode == MIGRATE_ASYNC or sync_next(mem, call):
                batch_over(mem, call)
        elif c.pages_at == PAGES_END:
            finish(mem, call)
            c.pages_at = PAGES_DONE
        else:
            return DONE


@jit
def batch_over(mem, call):
    """Add a batch that is through to the call's total, and set up the migration of the pieces that it split off."""
    c = call.state[0]
    move_list(call, L_BATCH, L_RET)
    if c.batch_rc < 0:
        c.total = c.batch_rc
        move_list(call, L_SPLIT, L_RET)             # pieces not tried, not counted
        c.pages_at = PAGES_END
        return
    c.total += c.batch_rc
    if call.lists[L_SPLIT].nr:                      # pieces are tried once, whatever the mode
        batch_begin(mem, call, MIGRATE_ASYNC, L_SPLIT, L_RET, -1, 1)
        c.pages_at = PAGES_SPLIT
    else:
        c.pages_at = next_batch(call)


@jit
def next_batch(call):
    """Where to go after a batch: to the next one, unless nothing is left or Python wants to end the call."""
    c = call.state[0]
    return PAGES_CUT if c.from_at < call.lists[L_FROM].nr and c.interrupted == 0 else PAGES_END


@jit
def cut_batch(mem, call):
    """Move the head of the list to L_BATCH: folios up to the one with which the pages reach the batch limit."""
    c = call.state[0]
    frm = call.lists[L_FROM]
    nr_pages = 0
    while c.from_at < frm.nr and nr_pages < c.batch_pages:
        src = call.pfns[frm.first + c.from_at]
        c.from_at += 1
        if c.hugetlb and mem.folios[src].page_flags & PG_hugetlb:   # one that migrate_hugetlbs() has given up
            list_add_tail(call, L_RET, src)
            continue
        nr_pages += np.int64(1) << np.int64(mem.orders[src])
        list_add_tail(call, L_BATCH, src)


@jit
def finish(mem, call):
    """Freeze the counters: what is left decides the return value, vmstat gets its share."""
    c = call.state[0]
    for i in range(c.from_at, call.lists[L_FROM].nr):
        list_add_tail(call, L_RET, call.pfns[call.lists[L_FROM].first + i])
    ret = call.lists[L_RET]
    for i in range(ret.nr):
        mem.folios[call.pfns[ret.first + i]].migrate_info = 0
    c.rc = c.total if ret.nr else 0
    sys = mem.sys[0]
    sys.pgmigrate_success += c.nr_succeeded
    sys.pgmigrate_fail += c.nr_failed_pages
    sys.thp_migration_success += c.nr_thp_succeeded
    sys.thp_migration_fail += c.nr_thp_failed
    sys.thp_migration_split += c.nr_thp_split


@jit_entry
def count_pages(mem_table, pfns):
    """Base pages of the folios of a list."""
    mem = unpack(mem_table)
    nr_pages = 0
    for i in range(len(pfns)):
        nr_pages += np.int64(1) << np.int64(mem.orders[pfns[i]])
    return nr_pages


@jit_entry
def blocked_to_ns(call_table, tick_ns):
    """Turn the blocked times from ticks into nanoseconds, where they stand; once, though it be called again."""
    call = unpack_call(call_table)
    c = call.state[0]
    for i in range(c.nr_in_ns, c.nr_blocked):
        call.blocked[i] = np.int64(call.blocked[i] * tick_ns)
    c.nr_in_ns = c.nr_blocked


STATS = ("nr_succeeded", "nr_failed_pages", "nr_thp_succeeded", "nr_thp_failed", "nr_thp_split", "nr_split")


# --- the Python part ------------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Event:
    """Something that others do between two steps of a call.

    ``step`` is one of :data:`STEPS` (``"unmapped"``, ``"copied"`` ...); ``action(step, pfn)`` is called each time the
    call stands at that step with folio ``pfn`` (0 where the step is the whole batch's). ``folio`` restricts it to one
    pfn. It may change the machine's memory; processes it may use inside ``with machine.other_task():``, as the ready-made
    actions of other_tasks.py do.
    """

    step: str
    action: object
    folio: int | None = None

    def __post_init__(self):
        if not callable(self.action):
            raise InvalidInput(f"action {self.action!r} cannot be called; pass a function of (step, pfn)")
        if self.step not in STEPS:
            raise InvalidInput(f"step {self.step!r} is not known; use one of: {', '.join(STEPS)}")


@dataclasses.dataclass(frozen=True)
class MigrateResult:
    """What one migrate_pages() call did.

    ``rc`` is the kernel's return value: 0, the number of folios left behind, or -ENOMEM. ``left`` are the pfns (int64)
    still on the list, in list order. ``stats`` are the six counters by kernel name: base pages for nr_succeeded and
    nr_failed_pages, folios for the others. ``targets`` counts destinations allocated (failed ones too) and returned
    unused. ``copies``: folio copies completed, those by the batch copy, and those whose bytes were thrown away.
    ``copied_bytes`` were written by copies, ``moved_bytes`` belong to folios that arrived. Times are ns of wall clock:
    ``phases_ns`` adds up over batches (``move`` without the copies made in it, if those were timed; they are in
    ``copy``), ``blocked_ns`` (int64, in the order of unblocking) is per folio from losing its first mapping to
    having the last back, successful or not at first. ``cpu_ns`` is the CPU time of all threads of
    this process; the trace lines are the kernel's.
    """

    rc: int
    mode: MigrateMode
    reason: MigrateReason
    left: np.ndarray
    stats: dict
    targets: dict
    tlb_flushes: int
    nr_batches: int
    copies: dict
    copied_bytes: int
    moved_bytes: int
    phases_ns: dict
    blocked_ns: np.ndarray
    wall_ns: int
    cpu_ns: int

    @property
    def trace(self):
        """The two lines of events/migrate.h, as the kernel prints them."""
        tail = f"mode={self.mode.name} reason={self.reason.trace_name}"
        s = self.stats
        return (f"mm_migrate_pages_start: {tail}",
                f"mm_migrate_pages: nr_succeeded={s['nr_succeeded']} nr_failed={s['nr_failed_pages']} "
                f"nr_thp_succeeded={s['nr_thp_succeeded']} nr_thp_failed={s['nr_thp_failed']} "
                f"nr_thp_split={s['nr_thp_split']} nr_split={s['nr_split']} {tail}")


def check_events(events):
    """The events as a tuple. InvalidInput for what is no Event."""
    try:
        events = tuple(events)
    except TypeError:
        raise InvalidInput(f"events {events!r} is no list of events; pass [offload.Event(step, action)]") from None
    for event in events:
        if not isinstance(event, Event):
            raise InvalidInput(f"event {event!r} is no offload.Event; make one with offload.Event(step, action)")
    return events


def migrate_pages(machine, pfns, *, mode, reason, target, pf_memalloc=False, events=(), time_copies=True, started=None,
                  into=None):
    """Migrate isolated folios to ``target``, a node or a TargetControl; the MigrateResult. Does not put back what is left.

    ``machine``: its memory is asked for anew after each event, which may have replaced arrays of it. ``pfns``: int64
    heads of isolated, distinct folios, in list order. With ``time_copies`` each copy made in the move phase is timed by two
    more clock readings. List ``started`` gets the Call before anything has happened to a folio, ``into`` the result, also
    when an exception is raised; with one and not the other, :func:`finish_call` gives the result.

    Whatever an event or a migrator raises is raised again, after the batch in hand has been finished without either
    and the rest was left untried: no folio stays unmapped and nothing is lost but what lies on a device that is lost
    (DeviceLost). WouldHang is raised likewise where the
    kernel would sleep for ever. ``.result`` of the exception then holds the MigrateResult.
    """
    mem, offload = machine.mem, machine.offload
    nr_pages = count_pages(machine.table, pfns)
    call = make_call(pfns, mode=mode, reason=reason, target=target, batch_pages=machine.config.batch_pages, nr_pages=nr_pages)
    state = plain(call.state)
    state["pf_memalloc"], state["time_copies"] = pf_memalloc, time_copies
    if plain(mem.nodes)["nr_hugepages"].any() and (plain(mem.folios)["page_flags"][pfns] & PG_hugetlb).any():
        state["hugetlb"] = HUGETLB_FIRST
    if plain(mem.sys)["alloc_fail_times"][0]:
        state["target_special"] = 1
    state["stop_mask"] = np.bitwise_or.reduce([0, *(STEPS[event.step] for event in events)])
    call_table = pack(call)
    if started is not None:
        started.append(call)
    error = None
    clocks = np.empty((2, 2), np.int64)
    read_clocks(clocks[0])
    wall, cpu = time.perf_counter_ns(), time.process_time_ns()
    stop = STOP_STEP
    while stop != DONE:
        try:
            # Ctrl-C during compiled code is raised here, before ``stop`` is set: the call is taken up once more.
            stop = take_up(state, machine.table, call_table)
            if stop == STOP_OFFLOAD_COPY:
                if error is None:
                    offload_copy(machine, call, int(state["nr_batch"][0]))
            elif stop == STOP_FRAME_COPY:
                copy_far_folio(machine, state)
            elif stop == STOP_FRAME_LOG:
                machine.frames.drain(quiet=error is not None)
            elif stop == STOP_CALLBACK:
                state["callback_rc"] = -EAGAIN      # if it raises, or the call is only being finished
                if error is None:
                    owner = machine.owners[int(state["callback_owner"][0])]
                    state["callback_rc"] = call_owner(owner, *(int(state[name][0]) for name in ("callback_dst", "callback_src",
                                                                                                "batch_mode")))
            elif stop == STOP_STEP:
                machine.batch_mode = MigrateMode(int(state["batch_mode"][0]))
                run_events(events, int(state["step"][0]), int(state["step_folio"][0]))
        except BaseException as raised:             # KeyboardInterrupt too: first finish what is unmapped
            if error is not None and not isinstance(raised, (KeyboardInterrupt, DeviceLost)):
                raise                               # a fault of ours: going on would meet it again
            error = raised
            state["stop_mask"], state["step_passed"], state["interrupted"] = 0, 0, 1
        finally:
            machine.batch_mode = None
    wall, cpu = time.perf_counter_ns() - wall, time.process_time_ns() - cpu
    read_clocks(clocks[1])
    offload.batches += int(state["cpu_batches"][0])
    ns, nr_ticks = clocks[1] - clocks[0]

    result = make_result(call, call_table, wall, cpu, ns / max(nr_ticks, 1))
    if error is None and state["hang"][0]:
        error = WouldHang(f"the kernel would sleep for ever on folio {state['hang'][0]}: its lock, its buffers' locks or "
                          f"writeback is never released; the folio was left behind")
    if into is not None:
        into.append(result)
    if error is not None:
        error.result = result
        raise error
    return result


def finish_call(machine, call):
    """Bring a call to its end that was left between two steps, without events or migrator; its MigrateResult, without times."""
    state = plain(call.state)
    state["stop_mask"], state["step_passed"], state["interrupted"] = 0, 0, 1
    call_table = pack(call)
    while (stop := take_up(state, machine.table, call_table)) != DONE:
        if stop == STOP_FRAME_COPY:
            with contextlib.suppress(DeviceLost):   # the call's own end is told; whoever touches the node hears of it
                copy_far_folio(machine, state)
        elif stop == STOP_FRAME_LOG:
            machine.frames.drain(quiet=True)
    return make_result(call, call_table, 0, 0, 1.0)


def take_up(state, mem_table, call_table):
    """Take a call up where it stands: DONE when it is through, or a STOP_* number.

    If there are hugetlb folios, they come first; what migrates them is compiled by the first call that has any.
    """
    if state["hugetlb"][0]:
        stop = migrate_hugetlbs(mem_table, call_table)
        if stop != DONE:
            return stop
        if state["nr_batches"][0] == 0 and (state["total"][0] < 0 or state["interrupted"][0]):
            state["pages_at"] = max(PAGES_END, state["pages_at"][0])    # nothing else on the list is tried
    return migrate_pages_run(mem_table, call_table)


def run_events(events, step, pfn):
    for event in events:
        if STEPS[event.step] == step and event.folio in (None, pfn):
            event.action(event.step, pfn)


def call_owner(owner, dst, src, mode):
    """The owner's migrate_page(): 0 or -errno. Anything else is the owner's fault, and InvalidInput."""
    rc = owner.migrate_page(dst, src, MigrateMode(mode))
    if isinstance(rc, bool) or not isinstance(rc, (int, np.integer)) or rc > 0:
        raise InvalidInput(f"migrate_page() of {type(owner).__name__} returned {rc!r}; it returns 0 or a negative errno")
    return rc


def copy_far_folio(machine, state):
    """The copy of the move phase where compiled code does not reach the bytes; counted as it would be there.

    -EIO in ``copy_rc`` where a device is lost; DeviceLost where that is found out here.
    """
    state["copy_rc"] = -EAGAIN                      # if Ctrl-C strikes: it is tried again
    frames = machine.frames
    dst, src = int(state["copy_dst"][0]), int(state["copy_src"][0])
    order = int(plain(machine.mem.folios)["order"][src])
    frames.drain(quiet=True)                        # what it could not do shows in the copy
    started = time.perf_counter_ns()
    try:
        rc = frames.copy_folio(dst, src, order)
    except DeviceLost:
        state["copy_rc"] = -EIO
        raise
    if rc == 0:
        if state["time_copies"][0]:
            state["move_copy_ns"] += time.perf_counter_ns() - started
        state["copied_folios"] += 1
        state["copied_bytes"] += PAGE_SIZE << order
    state["copy_rc"] = rc


def offload_copy(machine, call, nr_batch):
    """Hand the ``nr_batch`` folios of the batch list to the hatch; its completions are left in ``call.pair_done``, and whether
    it failed in ``batch_copy_failed``.

    DeviceLost where a device is found lost: completions count all the same, but for those of destinations on the device.
    """
    mem, offload, frames = machine.mem, machine.offload, machine.frames
    nr = nr_batch
    if len(mem.others) > 1 and offload.meets_poison and mem.others.copy_error.any():
        # A CPU routine meets the machine check at the first such folio and stops, with what it has copied before.
        unreadable = np.flatnonzero(mem.others.copy_error[mem.folios.others[call.pair_src[:nr]]])
        nr = int(unreadable[0]) if len(unreadable) else nr
    dst, src, order, done = (array[:nr] for array in (call.pair_dst, call.pair_src, call.pair_order, call.pair_done))
    if frames.kind == FRAMES_TOGETHER:
        rc = offload.offload_copy(FolioBatch(dst, src, order, frames.address, nr_batch - nr), done)
    else:
        frames.drain()
        try:
            if offload.migrator is None:            # it has left since the batch was chosen: the CPU routine's turn
                plain(call.state)["cpu_batches"] += 1
                rc = frames.mc_copy(int(mem.sys.copy_kernel[0]), dst, src, order, done)
            else:
                rc = offload.offload_copy(FolioBatch(dst, src, order, frames, nr_batch - nr), done)
            if rc:
                frames.check_device()
        finally:
            if frames.lost:                         # what arrived there is lost; its sources stay where they are
                done[np.isin(frames.nids(dst), frames.lost)] = 0
    plain(call.state)["batch_copy_failed"] = rc != 0 or nr < nr_batch


def plain(records):
    """Records without attribute access, which costs Python 10 us a field."""
    return records.view(np.ndarray)


def make_result(call, call_table, wall_ns, cpu_ns, tick_ns):
    c = dict(zip(CALL_DTYPE.names, plain(call.state).tolist()[0]))
    blocked_to_ns(call_table, tick_ns)              # in place, once: a result cut off by Ctrl-C is made again
    first, nr = plain(call.lists)[L_RET].tolist()
    return MigrateResult(
        rc=c["rc"], mode=MigrateMode(c["mode"]), reason=MigrateReason(c["reason"]),
        left=call.pfns[first:first + nr].copy(),
        stats={name: c[name] for name in STATS},
        targets={"allocated": c["targets_allocated"], "returned": c["targets_returned"]},
        tlb_flushes=c["tlb_flushes"], nr_batches=c["nr_batches"],
        copies={"folios": c["copied_folios"], "batched": c["batched_folios"],
                "discarded": c["copied_folios"] - c["moved_with_copy"]},
        copied_bytes=c["copied_bytes"], moved_bytes=c["moved_bytes"],
        phases_ns={"unmap": c["unmap_ns"], "flush": c["flush_ns"], "copy": c["copy_ns"] + c["move_copy_ns"],
                   "move": c["move_ns"] - c["move_copy_ns"]},
        blocked_ns=call.blocked[:c["nr_blocked"]], wall_ns=wall_ns, cpu_ns=cpu_ns)
