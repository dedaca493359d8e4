"""What other tasks do in the middle of a call: each action, at each step where it matters, and what the kernel's rules make of it."""

import ast
import itertools
import pathlib
import sys

import pytest

from conftest import World, on_duty
from offload import copy_offload, machine
from offload.errors import Busy, InvalidInput
from offload.migrate import pages
from offload.migrate.call import STEPS
from offload.migrate.pages import Event
from offload.migrators.mc_copy import McCopy
from offload.mm.pagetable import PTE_EXCLUSIVE, PTE_MIGRATION, PTE_PRESENT, PTE_WRITE
from offload.other_tasks import (
    CpuFault, Fork, GupFast, GupSlow, Mprotect, Mremap, Munmap, PageCacheLookup, StaleTlbWrite, entry_at,
)
from offload.units import PAGE_SIZE
from test_migrate_pages import MODES

WINDOW = ("unmapped", "flush", "flushed", "batch_copied", "move", "copied")     # its entries are migration entries


@pytest.fixture
def world():
    return World(1024, 1024)


def one(world, order=0, **options):
    address, (pfn,) = world.map(1, order, **options)
    return address, int(pfn)


class TestCpuFault:
    """A thread that meets a migration entry waits until the source is unlocked, and holds no reference meanwhile."""

    @pytest.mark.parametrize("step", WINDOW)
    @pytest.mark.parametrize("order", [0, 4, 9])
    def test_waits(self, world, step, order):
        address, pfn = one(world, order)
        fault = CpuFault(world.process, address, write=b"new")
        seen = []
        result = world.migrate([pfn], events=[*fault.at(step), Event("move", lambda step, pfn: seen.append(
            int(world.folios.refcount[pfn])))])
        assert (result.rc, seen) == (0, [1]), "waiting takes no reference"
        assert fault.outcome == "waited" and fault.waited
        assert world.process.read(address, 3) == b"new"
        world.expected[0] = (world.process, address, b"new" + world.expected[0][2][3:])
        world.check()

    def test_waits_until_the_source_is_unlocked_not_only_mapped(self, world):
        """In a batch the folios moved before are through while the others still wait."""
        address, pfns = world.map(3)
        faults = [CpuFault(world.process, address + i * PAGE_SIZE) for i in range(3)]
        through = []
        events = [event for fault in faults for event in fault.at("flush")]
        events += [Event("moved", lambda step, pfn: through.append([fault.outcome for fault in faults]))]
        world.migrate(pfns, events=events)
        assert through == [["waited", "waiting", "waiting"], ["waited", "waited", "waiting"], ["waited"] * 3]
        world.check()

    def test_of_a_folio_that_stays(self, world):
        address, pfn = one(world)
        world.surround(pfn, refs=1)
        fault = CpuFault(world.process, address)
        result = world.migrate([pfn], events=fault.at("unmapped"))
        assert result.left.tolist() == [pfn]
        assert fault.outcome == "waiting", "the last step is before the undo"
        assert fault.wake() == "waited" and fault.found == world.expected[0][2][:1]

    @pytest.mark.parametrize("step", ["unmap", "moved"])
    def test_outside_the_window(self, world, step):
        address, pfn = one(world)
        fault = CpuFault(world.process, address)
        world.migrate([pfn], events=fault.at(step))
        assert (fault.outcome, fault.waited, fault.found) == ("done", False, world.expected[0][2][:1])
        world.check()

    def test_outside_every_vma(self, world):
        address, pfn = one(world)
        fault = CpuFault(world.process, 4096)
        assert world.migrate([pfn], events=fault.at("move")).rc == 0
        assert fault.outcome is None and fault.error.errno == 14, "the thread's misfortune, not the migration's"


class TestGup:
    """A reference taken before the entry is gone makes the move fail; nobody gets one afterwards."""

    @pytest.mark.parametrize("make", [GupFast, GupSlow])
    def test_before_the_unmap(self, world, make):
        address, pfn = one(world)
        gup = make(world.process, address)
        result = world.migrate([pfn], events=gup.at("unmap"))
        assert (gup.outcome, gup.page, result.left.tolist()) == ("taken", pfn, [pfn])
        gup.put()
        assert world.migrate([pfn]).rc == 0
        world.check()

    def test_dropped_before_a_later_pass(self, world):
        address, pfn = one(world)
        gup = GupFast(world.process, address)
        result = world.migrate([pfn], events=[*gup.at("unmap"), *gup.put_at("move_failed")])
        assert (result.rc, result.copies["folios"]) == (0, 1), "the check comes before the copy"
        world.check()

    @pytest.mark.parametrize("step", WINDOW)
    def test_in_the_window(self, world, step):
        """Fast: not present, so the slow way, which faults and waits. What it gets in the end is the destination."""
        address, pfn = one(world)
        fast, slow = GupFast(world.process, address), GupSlow(world.process, address)
        result = world.migrate([pfn], events=[*fast.at(step), *slow.at(step)])
        assert result.rc == 0
        assert (fast.outcome, slow.outcome) == ("slow, taken", "taken")
        assert fast.page == slow.page != pfn and world.folios.nid[fast.page] == 1
        fast.put(), slow.put()
        world.check()

    @pytest.mark.parametrize("make", [GupFast, GupSlow])
    def test_a_holder_writes_by_its_reference(self, world, make):
        """Into the source while that is unmapped: what is copied later takes the bytes along; nobody faults."""
        address, pfn = one(world)
        gup = make(world.process, address + 8, write=True)
        result = world.migrate([pfn], events=[*gup.at("unmap"), *gup.write_at("flushed", b"new"), *gup.put_at("move_failed")])
        assert (gup.outcome, gup.written, gup.page, result.rc) == ("taken", True, 0, 0)
        content = world.expected[0][2]
        world.expected[0] = (world.process, address, content[:8] + b"new" + content[11:])
        world.check()

    def test_it_writes_once_and_only_while_it_holds_the_page(self, world):
        address, pfns = world.map(3)
        gup = GupFast(world.process, address, write=True)
        with pytest.raises(InvalidInput, match="no page is held"):
            gup.write(b"x")
        events = [*gup.write_at("unmapped", b"x", pfns[2]), *gup.write_at("unmap", b"y"), *gup.at("move")]
        assert world.migrate(pfns, events=events).rc == 0
        assert gup.outcome == "slow, taken" and not gup.written, "it got the destination, after the last of these steps"
        gup.write(b"z")
        assert world.process.read(address, 1) == b"z"
        with pytest.raises(InvalidInput, match="do not lie in one page"):
            gup.write(bytes(4097))
        gup.put()

    def test_a_page_taken_for_reading_is_not_written(self, world):
        address, pfn = one(world)
        gup = GupFast(world.process, address)
        world.migrate([pfn], events=gup.at("unmap"))
        with pytest.raises(InvalidInput, match="write=True"):
            gup.write(b"x")
        gup.put()

    def test_for_writing_a_shared_page_is_broken_first(self, world):
        """After fork() no entry is writable: the fast way fails, the slow one gets a copy of the process's own."""
        address, (pfn, other) = world.map(2)
        child = world.process.fork()
        gup = GupFast(world.process, address, write=True)
        assert world.migrate([other], events=gup.at("unmap")).rc == 0
        assert gup.outcome == "slow, taken" and gup.page != pfn
        gup.write(b"new")
        assert world.process.read(address, 3) == b"new" and child.read(address, 3) == world.expected[0][2][:3]
        gup.put()

    @pytest.mark.parametrize("recheck, outcome", [("unmapped", "dropped, taken"), ("unmap", "taken")])
    def test_fast_looks_twice(self, world, recheck, outcome):
        """It took its reference before the entry was cleared, sees that it changed, and drops it: the move goes on."""
        address, pfn = one(world)
        gup = GupFast(world.process, address, recheck_at=recheck)
        result = world.migrate([pfn], events=gup.at("unmap"))
        assert gup.outcome == outcome
        assert result.rc == (outcome == "taken")
        gup.put()
        world.check()


class TestFork:
    """fork() in the window copies the migration entry: RSS, but no reference and no mapping until it is turned back."""

    @pytest.mark.parametrize("step", WINDOW)
    @pytest.mark.parametrize("order", [0, 4, 9])
    def test_anon(self, world, step, order):
        address, pfn = one(world, order)
        nr_pages = 1 << order
        fork = Fork(world.process)
        seen = []

        def look(_, __):
            entries = [entry_at(world.machine.table, p.mm, address) for p in (world.process, fork.child)]
            seen.append((fork.child.rss_pages, int(world.folios.refcount[pfn]), int(world.folios.mapcount[pfn]),
                         [bool(entry & PTE_MIGRATION) for entry in entries],
                         [entry & (PTE_WRITE | PTE_EXCLUSIVE) for entry in entries]))
        result = world.migrate([pfn], events=[*fork.at(step), Event(step, look)])
        assert result.rc == 0
        assert seen[0] == (nr_pages, 1, 0, [True, True], [0, 0]), "plain readable in both"
        dst = world.machine.folios_of(world.process, address, nr_pages * PAGE_SIZE)
        assert dst.tolist() == world.machine.folios_of(fork.child, address, nr_pages * PAGE_SIZE).tolist()
        entries_each = 1 if order == 9 else nr_pages
        assert world.folios.mapcount[dst[0]] == 2 * entries_each and world.folios.nid[dst[0]] == 1
        world.expected.append((fork.child, address, world.expected[0][2]))
        world.check()
        world.process.write(address, b"mine")       # copies on write: the child keeps its bytes
        assert fork.child.read(address, 4) == world.expected[0][2][:4]
        world.machine.validate()

    def test_shared_file(self, world):
        """A shared mapping stays writable in both."""
        address, pfn = one(world, file=world.machine.file(PAGE_SIZE), shared=True)
        fork = Fork(world.process)
        assert world.migrate([pfn], events=fork.at("unmapped")).rc == 0
        fork.child.write(address, b"both")
        assert world.process.read(address, 4) == b"both"
        world.machine.validate()

    def test_of_a_folio_that_stays(self, world):
        address, pfn = one(world)
        world.surround(pfn, refs=1)
        fork = Fork(world.process)
        assert world.migrate([pfn], events=fork.at("flush")).rc == 1
        assert fork.child.read(address, 8) == world.expected[0][2][:8]
        assert world.folios.mapcount[pfn] == 2


class TestMunmap:
    """munmap() drops the entry; the folio's move goes on and counts as a success, its destination is freed."""

    @pytest.mark.parametrize("step", WINDOW)
    @pytest.mark.parametrize("order", [0, 4, 9])
    def test_anon(self, world, step, order):
        address, pfn = one(world, order)
        nr_pages = 1 << order
        free = [world.machine.free_pages(nid) for nid in (0, 1)]
        unmap = Munmap(world.process, address, nr_pages * PAGE_SIZE)
        result = world.migrate([pfn], events=unmap.at(step))
        assert (result.rc, result.stats["nr_succeeded"], unmap.outcome) == (0, nr_pages, "unmapped")
        assert world.process.rss_pages == 0
        world.machine.lru_add_drain()
        assert [world.machine.free_pages(nid) for nid in (0, 1)] == [free[0] + nr_pages, free[1]]
        world.expected.clear()
        world.check()

    def test_one_of_two_mappings(self, world):
        address, pfn = one(world)
        child = world.process.fork()
        unmap = Munmap(world.process, address, PAGE_SIZE)
        assert world.migrate([pfn], events=unmap.at("move")).rc == 0
        assert child.read(address, 16) == world.expected[0][2][:16]
        assert world.machine.node_of(child, address) == 1
        world.expected.clear()
        world.check()

    def test_before_the_unmap_the_folio_is_freed_under_us(self, world):
        address, pfn = one(world)
        unmap = Munmap(world.process, address, PAGE_SIZE)
        result = world.migrate([pfn], events=unmap.at("unmap"))
        assert result.rc == 0 and world.process.rss_pages == 0
        world.expected.clear()
        world.check()


class TestMprotect:
    """Taking write access away in the window holds afterwards; anonymous pages stay exclusive."""

    @pytest.mark.parametrize("step", WINDOW)
    @pytest.mark.parametrize("order", [0, 9])
    def test_read_only(self, world, step, order):
        address, pfn = one(world, order)
        protect = Mprotect(world.process, address, PAGE_SIZE << order)
        seen = []
        result = world.migrate([pfn], events=[*protect.at(step), Event(step, lambda *_: seen.append(
            entry_at(world.machine.table, world.process.mm, address) & (PTE_MIGRATION | PTE_WRITE | PTE_EXCLUSIVE)))])
        assert (result.rc, protect.outcome, seen[0]) == (0, "protected", PTE_MIGRATION | PTE_EXCLUSIVE)
        assert entry_at(world.machine.table, world.process.mm, address) & (PTE_PRESENT | PTE_WRITE | PTE_EXCLUSIVE) == \
            PTE_PRESENT | PTE_EXCLUSIVE
        with pytest.raises(Exception, match="writ"):
            world.process.write(address, b"x")
        world.check()

    def test_file(self, world):
        address, pfn = one(world, file=world.machine.file(PAGE_SIZE), shared=True)
        protect = Mprotect(world.process, address, PAGE_SIZE)
        assert world.migrate([pfn], events=protect.at("move")).rc == 0
        assert entry_at(world.machine.table, world.process.mm, address) & (PTE_PRESENT | PTE_WRITE | PTE_EXCLUSIVE) == PTE_PRESENT


class TestMremap:
    """mremap() moves the migration entry; it is found at its new address and turned back there."""

    @pytest.mark.parametrize("step", WINDOW)
    @pytest.mark.parametrize("order", [0, 4, 9])
    def test_moved(self, world, step, order):
        address, pfn = one(world, order)
        nbytes = PAGE_SIZE << order
        move = Mremap(world.process, address, nbytes, address + (64 << 20))
        assert world.migrate([pfn], events=move.at(step)).rc == 0
        assert move.outcome == "moved"
        assert world.machine.node_of(world.process, address + (64 << 20)) == 1
        world.expected[0] = (world.process, address + (64 << 20), world.expected[0][2])
        world.check()


class TestPageCacheLookup:
    """Before the replacement a lookup gets the source, after it the destination."""

    def file(self, world):
        file = world.machine.file(PAGE_SIZE)
        return file, *one(world, file=file, shared=True)

    @pytest.mark.parametrize("step", ["unmap", *WINDOW])
    def test_before_the_replacement(self, world, step):
        """Its reference makes the move fail, at "copied" in the freeze: the bytes are copied again in each pass."""
        file, address, pfn = self.file(world)
        lookup = PageCacheLookup(file, 0)
        result = world.migrate([pfn], events=lookup.at(step))
        assert (lookup.folio, result.left.tolist()) == (pfn, [pfn])
        assert lookup.outcome == ("unlocked" if step == "unmap" else "locked")
        assert result.copies == {"folios": 1, "batched": 0, "discarded": 1} if step == "copied" else \
            result.copies["folios"] == 0
        lookup.put()
        assert world.migrate([pfn]).rc == 0
        world.check()

    def test_dropped_in_time(self, world):
        file, address, pfn = self.file(world)
        lookup = PageCacheLookup(file, 0)
        result = world.migrate([pfn], events=[*lookup.at("copied"), *lookup.put_at("move_failed")])
        assert (result.rc, result.copies) == (0, {"folios": 2, "batched": 0, "discarded": 1})
        world.check()

    def test_after_it(self, world):
        file, address, pfn = self.file(world)
        lookup = PageCacheLookup(file, 0)
        assert world.migrate([pfn], events=lookup.at("moved")).rc == 0
        assert lookup.folio != pfn and world.folios.nid[lookup.folio] == 1 and lookup.outcome == "unlocked"
        lookup.put()
        world.check()

    def test_a_hole(self, world):
        file = world.machine.file(2 * PAGE_SIZE)
        address, pfn = one(world)
        lookup = PageCacheLookup(file, 1)
        world.migrate([pfn], events=lookup.at("move"))
        assert lookup.outcome == "absent"


class TestStaleTlbWrite:
    """Until the one flush another CPU may write through its old translation; copying has not begun, so nothing is lost."""

    @pytest.mark.parametrize("offloaded", [False, True])
    @pytest.mark.parametrize("step", ["unmapped", "flush"])
    def test_before_the_flush(self, world, step, offloaded):
        address, pfns = world.map(3)
        write = StaleTlbWrite(world.process, address + PAGE_SIZE + 5, b"stale")
        events = write.at(step)
        if offloaded:
            with on_duty(world.machine, McCopy()):
                assert world.migrate(pfns, events=events).copies["batched"] == 3
        else:
            world.migrate(pfns, events=events)
        content = bytearray(world.expected[0][2])
        if step == "unmapped":                      # the first to be unmapped is page 0: page 1 is still mapped then
            assert write.outcome == "written"
        content[PAGE_SIZE + 5:PAGE_SIZE + 10] = b"stale"
        world.expected[0] = (world.process, address, bytes(content))
        assert write.outcome == "written"
        world.check()

    @pytest.mark.parametrize("step", ["flushed", "batch_copied", "move", "moved"])
    def test_after_it(self, world, step):
        address, pfn = one(world)
        write = StaleTlbWrite(world.process, address, b"late")
        world.migrate([pfn], events=write.at(step))
        assert write.outcome == "faults"
        world.check()

    def test_a_clean_translation_does_not_serve(self, world):
        """The CPU must set the dirty bit in the entry first, walks, and finds it gone."""
        file = world.machine.file(PAGE_SIZE)
        address = world.process.mmap(PAGE_SIZE, file=file, shared=True, populate=False)
        world.process.read(address, 1)
        pfn, = world.machine.folios_of(world.process, address, PAGE_SIZE)
        write = StaleTlbWrite(world.process, address, b"x")
        world.migrate([pfn], events=write.at("flush"))
        assert write.outcome == "faults" and world.process.read(address, 1) == b"\0"

    @pytest.mark.parametrize("mode", MODES)
    def test_in_the_second_stage_each_clear_is_flushed(self, world, mode):
        address, pfn = one(world)
        world.surround(pfn, refs=1, refs_gone_after=4)      # the asynchronous stage of three passes fails
        write = StaleTlbWrite(world.process, address, b"x")
        flushes = itertools.count(1)
        second = [Event("flush", lambda step, pfn: write._first(step, pfn) if next(flushes) == 2 else None)]
        translate = [event for event in write.at("flush") if event.action != write._first]
        result = world.migrate([pfn], mode=mode, events=[*translate, *second])
        assert result.rc == 0
        assert write.outcome == (None if mode == "MIGRATE_ASYNC" else "faults")
        world.check()

    def test_one_translation_is_one_page(self, world):
        address, pfn = one(world)
        with pytest.raises(InvalidInput, match="one page"):
            StaleTlbWrite(world.process, address + 4090, b"0123456789")


class TestOtherTask:
    """Processes are busy during a call, but for what other tasks do at an event."""

    def test_only_at_an_event(self, world):
        with pytest.raises(Busy):
            with world.machine.other_task():
                pass

    def test_a_process_is_busy_without_it(self, world):
        address, pfn = one(world)
        with pytest.raises(Busy):
            world.migrate([pfn], events=[Event("move", lambda *_: world.process.read(address, 1))])
        world.check()

    def test_it_cannot_wait(self, world):
        """What would sleep until the migration is through is Busy; CpuFault waits."""
        address, pfn = one(world)

        def read(step, pfn):
            with world.machine.other_task():
                world.process.read(address, 1)
        with pytest.raises(Busy, match="is being migrated"):
            world.migrate([pfn], events=[Event("move", read)])
        world.check()

    def test_memory_may_grow_meanwhile(self, world):
        """Arrays of the machine are replaced under the call, which must go on with the new ones."""
        address, pfns = world.map(4)

        def grow(step, pfn):
            with world.machine.other_task():
                for _ in range(70):                 # more vmas, anon_vmas and mms than there are rows
                    world.machine.process().mmap(PAGE_SIZE)
        tables = len(world.machine.mem.tables), len(world.machine.mem.vmas), len(world.machine.mem.mms)
        result = world.migrate(pfns, events=[Event("unmapped", grow, pfns[1]), Event("move", grow, pfns[2])])
        assert result.rc == 0 and len(world.machine.mem.mms) > tables[2] and len(world.machine.mem.vmas) > tables[1]
        world.check()

    def test_no_second_call_inside_one(self, world):
        address, pfns = world.map(2)

        def again(step, pfn):
            with world.machine.other_task():
                world.machine.migrate_pages([], 1)
        with pytest.raises(Busy, match="another migration"):
            world.migrate(pfns[:1], events=[Event("move", again)])
        world.check()

    def test_it_may_still_use_processes_afterwards(self, world):
        address, pfn = one(world)
        world.migrate([pfn], events=CpuFault(world.process, address).at("move"))
        assert world.machine.batch_mode is None
        world.check()


class TestEventsAreCheckedFirst:
    """What is no event is refused before a folio is touched."""

    @pytest.mark.parametrize("events", [[3], [None], 3, ["move"], [("move", print)]])
    def test_refused(self, world, events):
        address, pfn = one(world)
        for call in (lambda: world.migrate([pfn], events=events), lambda: world.process.move(address, PAGE_SIZE, 1, events=events)):
            with pytest.raises(InvalidInput, match="offload.Event"):
                call()
            world.check()

    def test_an_action_that_cannot_be_called(self):
        with pytest.raises(InvalidInput, match="cannot be called"):
            Event("move", 3)

    def test_a_generator_of_events(self, world):
        address, pfn = one(world)
        seen = []
        world.migrate([pfn], events=(Event(step, lambda step, pfn: seen.append(step)) for step in STEPS))
        assert seen == ["unmap", "unmapped", "flush", "flushed", "batch_copied", "move", "copied", "moved"]


def cleaning_lines(path):
    """Lines of a file that are in a finally or except block, in what these call, or compiled."""
    blocks = []
    for node in ast.walk(ast.parse(pathlib.Path(path).read_text())):
        if isinstance(node, ast.Try):
            blocks += [node.finalbody, *(handler.body for handler in node.handlers)]
        if isinstance(node, ast.FunctionDef):
            compiled = any(isinstance(one, ast.Name) and one.id.startswith("jit") for one in node.decorator_list)
            if compiled or node.name in ("putback", "_owned", "finish_call"):
                blocks.append(node.body)
    return {line for block in blocks if block for line in range(block[0].lineno, block[-1].end_lineno + 1)}


class TestInterrupted:
    """Ctrl-C between any two lines of the Python around a call leaves no folio isolated, locked or unmapped; but those lines
    that are the cleaning up, where a second Ctrl-C would have to come."""

    def test_anywhere(self):
        cleaning = {path: cleaning_lines(path) for path in (machine.__file__, pages.__file__, copy_offload.__file__)}
        done = False
        for nr in itertools.count():
            world = World(64, 64)
            address, pfns = world.map(3)
            world.machine.register(McCopy())
            lines = itertools.count()

            def trace(frame, event, arg):
                path = frame.f_code.co_filename
                if path not in cleaning:
                    return None
                if event == "line" and frame.f_lineno not in cleaning[path] and next(lines) == nr:
                    sys.settrace(None)
                    raise KeyboardInterrupt
                return trace
            sys.settrace(trace)
            try:
                world.machine.migrate_pages(pfns, 1, events=[])
                done = True
            except KeyboardInterrupt:
                pass
            finally:
                sys.settrace(None)
            world.check(f"interrupted at line {nr}")
            if done:
                break
        assert nr > 20
