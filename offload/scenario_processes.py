"""Process level of a scenario: processes and their memory, operations on it, then system calls.

Stands for no kernel file. What the recording programs did with mmap(), fork(), GUP and the like before the system call, the
methods of Process do here. An operation or call that the kernel would refuse (a write to read-only memory) is a fault of
the file.

The contents of memory are judged from outside: what was written is remembered here, page by page and with fork's and
private mappings' rules, and after each call compared with the frames that page tables and page caches, or the entries of the
swap device, lead to. Looking faults nothing in.
"""

import dataclasses
import errno
import re

import numpy as np

from offload.errors import BadAddress, OffloadError, OutOfMemory
from offload.migrate.call import STEPS
from offload.migrate.pages import Event
from offload.mm.memmap import FIRST_PFN, NO_PFN
from offload.mm.pagetable import PTE_MIGRATION, PTE_PRESENT, PTE_SPECIAL, PTE_SWAP
from offload.scenario_copies import Copies
from offload.scenario_format import ADDRESS, Fault
from offload.scenario_machine import make_machine, page_entries
from offload.scenario_trace import Steps
from offload.syscalls import (
    MPOL_MF_MOVE, MPOL_MF_MOVE_ALL, MPOL_MF_STRICT, NOT_WRITTEN, sys_mbind, sys_migrate_pages, sys_move_pages,
)
from offload.units import HPAGE_PMD_ORDER, PAGE_SHIFT, PAGE_SIZE

__all__ = ("ProcessLevel", "check_process_level")

SEED = 0x70726f63                   # of the bytes in memory
PAGE = re.compile(r"(?:address|page) (0x[0-9a-f]+)(?: of process '[^']*')?")
PROCESS = re.compile(r"process '([^']*)'")
CALL = re.compile(r"(?:calls|before)\[[0-9]+\]")
NOWHERE = PAGE_SIZE                 # an address that no vma of a scenario has
FLAG_BITS = {"STRICT": MPOL_MF_STRICT, "MOVE": MPOL_MF_MOVE, "MOVE_ALL": MPOL_MF_MOVE_ALL, "LAZY": 1 << 3,
             "INTERNAL": 1 << 4}
UNKNOWN_FLAG = 1 << 30
CHUNK = 1024                        # pages whose contents are made at a time
WORDS = np.arange(PAGE_SIZE // 8, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)


def check_process_level(scenario):
    """Fault for the first thing in a checked scenario that cannot be."""
    vmas = [(area, f"processes[{i}].vmas[{k}]") for i, one in enumerate(scenario["processes"])
            for k, area in enumerate(one.get("vmas", ()))]
    vmas += [(operation["vma"], f"before[{i}].vma") for i, operation in enumerate(scenario.get("before", ()))
             if operation["op"] == "mmap"]
    for area, field in vmas:
        if area.get("order", 0) > HPAGE_PMD_ORDER:
            raise Fault(f"{field}.order", f"{area['order']} is larger than one PMD", f"use 0 to {HPAGE_PMD_ORDER}")


@dataclasses.dataclass
class Area:
    """A vma of the file.

    Contents are kept as numbers (see Contents): ``backing`` by page of what several mappings share, a file or shared memory;
    ``own`` of this process's own pages, 0 where it has none. ``nodes`` has one node for each folio of ``order``, or one for
    all.
    """

    address: int
    nr_pages: int
    shared: bool
    backing: np.ndarray | None
    own: np.ndarray
    order: int
    nodes: list
    holds_data: bool = True         # False: device memory, the vdso

    def page_at(self, index):
        return self.address + index * PAGE_SIZE

    def node_of(self, index):
        return self.nodes[index >> self.order] if len(self.nodes) > 1 else self.nodes[0]

    def numbers(self):
        """The number of each page's contents."""
        if self.backing is None:
            return self.own
        backing = self.backing[:self.nr_pages]
        return backing if self.shared else np.where(self.own != 0, self.own, backing)

    def store(self, first, numbers):
        (self.backing if self.shared and self.backing is not None else self.own)[first:first + len(numbers)] = numbers

    def copy_for_child(self, child):
        """The same vma of a forked process; what is not mapped there (MADV_DONTFORK) holds nothing."""
        starts, ends, _ = child.vma_index()
        pages = self.address + np.arange(self.nr_pages) * PAGE_SIZE
        mapped = ((starts <= pages[:, None]) & (pages[:, None] < ends)).any(axis=1)
        return dataclasses.replace(self, own=np.where(mapped, self.own, 0))


class Contents:
    """Contents of pages by number: 0 is zeros, a positive one a pattern made from it, a negative one bytes kept here."""

    def __init__(self):
        self.next, self.kept = SEED, []

    def fresh(self, nr):
        """Numbers of ``nr`` new patterns."""
        self.next += nr
        return np.arange(self.next - nr, self.next)

    def keep(self, content):
        self.kept.append(content)
        return -len(self.kept)

    def bytes_of(self, numbers):
        """uint8 (pages, PAGE_SIZE)."""
        words = (np.maximum(numbers, 0).astype(np.uint64) * np.uint64(0xD1342543DE82EF95))[:, None] + WORDS | np.uint64(1)
        pages = words.view(np.uint8).reshape(len(numbers), PAGE_SIZE)
        pages[numbers == 0] = 0
        for i in np.flatnonzero(numbers < 0):
            pages[i] = self.kept[-numbers[i] - 1]
        return pages


class ProcessLevel:
    """A process-level scenario: its machine, processes by name, and the contents of their memory."""

    def __init__(self, scenario, trace=None):
        self.scenario = scenario
        self.trace = trace
        self.machine = make_machine(scenario)
        if trace is not None:
            self.machine.tracer = Tracer(self)
        self.contents = Contents()
        self.files = {}                             # name -> (File, number of each page's contents)
        self.to_dirty = set()                       # names of files whose pages are dirty before anything maps them
        self.processes = {}
        self.areas = {}                             # process name -> {vma name: Area}
        self.wrong_read = False                     # an operation has read other bytes than were last written
        for i, given in enumerate(scenario.get("files", ())):
            self.make_file(given, f"files[{i}]")
        for i, given in enumerate(scenario["processes"]):
            self.make_process(given, f"processes[{i}]")
        swapped = sum(self.run_length(operation["at"]) for operation in scenario.get("before", ())
                      if operation["op"] == "swapout")
        if swapped:
            self.machine.swapon(swapped * PAGE_SIZE)
        for i, operation in enumerate(scenario.get("before", ())):
            self.operate(operation, f"before[{i}]")

    # --- building ---------------------------------------------------------------------------------------------

    def make_file(self, given, field):
        kind = given.get("kind", "file")
        options = {key: given[key] for key in ("aops", "busy_buffers") if key in given}
        file = self.refusing(field, self.machine.file, given["pages"] * PAGE_SIZE, kind=kind, **options)
        self.files[given["name"]] = file, np.zeros(given["pages"], np.int64)
        if given.get("dirty"):
            self.to_dirty.add(given["name"])

    def make_process(self, given, field):
        name = given["name"]
        options = {key: given[key] for key in ("uid", "caps", "mems_allowed") if key in given}
        self.processes[name] = self.refusing(field, self.machine.process, name, **options)
        self.areas[name] = {}
        for i, area in enumerate(given.get("vmas", ())):
            self.map(name, area, f"{field}.vmas[{i}]")

    def map(self, owner, given, field):
        """mmap() one vma of the file and fault in what it says."""
        process = self.processes[owner]
        kind, nr_pages = given.get("kind", "anon"), given["pages"]
        order = HPAGE_PMD_ORDER if kind == "hugetlb" else given.get("order", 0)
        nodes = given.get("node", 0)
        nodes = nodes if isinstance(nodes, list) else [nodes]
        shared = given.get("shared", kind == "shmem")
        options = {"order": order, "prot": given.get("prot", "rw"), "mlock": given.get("mlock", False), "populate": False,
                   "shared": shared}
        backing = None
        if kind == "pfnmap":
            options["pfnmap"] = True
        elif kind == "vdso":
            options.update(file=self.machine.vdso(), prot="rx", shared=False)
            if nr_pages > 1:
                raise Fault(f"{field}.pages", f"the vdso has one page, not {nr_pages}", "write 1")
        elif kind == "hugetlb":
            options["hugetlb"] = True
            backing = np.zeros(nr_pages, np.int64) if shared else None
        elif "file" in given:
            options["file"], backing = self.files[given["file"]]
            if nr_pages > len(backing):
                raise Fault(f"{field}.pages", f"{nr_pages} are more than the {len(backing)} of the file", "map fewer")
        elif kind == "shmem" or kind == "anon" and shared:
            options["file"] = self.refusing(field, self.machine.file, nr_pages * PAGE_SIZE, kind="shmem")
            backing = np.zeros(nr_pages, np.int64)
        address = self.refusing(field, process.mmap, nr_pages * PAGE_SIZE, **options)
        area = Area(address, nr_pages, shared, backing, np.zeros(nr_pages, np.int64), order, nodes, kind not in ("pfnmap", "vdso"))
        self.areas[owner][given["name"]] = area
        if given.get("file") in self.to_dirty:
            self.to_dirty.remove(given["file"])
            self.at_node(process, area, 0, field)
            self.refusing(field, options["file"].read_ahead, process._vma_at(address), dirty=True)
        if kind == "vdso":
            self.refusing(field, process.read, address, 1)
        elif kind != "pfnmap":
            self.populate(process, area, given.get("populate", "write"), options["prot"], field)

    def populate(self, process, area, populate, prot, field):
        """Touch pages, each with its folio coming from the node named for it. What ``prot`` forbids is not touched."""
        if populate == "none" or not prot or "w" not in prot and "r" not in prot:
            return
        pages = sorted(set(populate)) if isinstance(populate, list) else range(area.nr_pages)
        if populate == "read" or "w" not in prot:
            for first, nr in runs(pages, area):
                self.at_node(process, area, first, field)
                self.refusing(field, process.read, area.page_at(first), nr * PAGE_SIZE)
            return
        for first, nr in runs(pages, area):
            self.write_pages(process, area, first, nr, field)

    def at_node(self, process, area, index, field):
        """Have folios that the page's vma gets come from the node named for the page."""
        vma = self.refusing(field, process._vma_at, area.page_at(index))
        self.machine.mem.vmas.nid[vma] = area.node_of(index)

    def write_pages(self, process, area, first, nr, field):
        """Write new contents to pages whose folios come from one node."""
        self.at_node(process, area, first, field)
        for at in range(first, first + nr, CHUNK):
            numbers = self.contents.fresh(min(CHUNK, first + nr - at))
            self.refusing(field, process.write, area.page_at(at), self.contents.bytes_of(numbers))
            area.store(at, numbers)

    def refusing(self, field, function, *args, **options):
        """Call it; what this machine cannot do is a fault of the file."""
        try:
            return function(*args, **options)
        except OutOfMemory as error:
            raise Fault(field, str(error), "give the nodes more pages") from None
        except OffloadError as error:
            owner = PROCESS.search(str(error))
            text = PAGE.sub(lambda found: self.page_name(found, owner[1]), str(error)) if owner else str(error)
            if text != str(error) and CALL.fullmatch(field):
                field += ".at"
            fault, _, remedy = text.partition("; ")
            forbidden = "leave it out, or give the VMA another prot" if isinstance(error, BadAddress) else "correct it"
            raise Fault(field, fault, remedy or forbidden) from None

    def page_name(self, found, owner):
        """How the file names the page of an address in a message; the words found if it has no name for it."""
        address = int(found[1], 16)
        for name, area in self.areas.get(owner, {}).items():
            if 0 <= address - area.address < area.nr_pages * PAGE_SIZE:
                return f"{owner}:{name}+{(address - area.address) // PAGE_SIZE}"
        return found[0]

    # --- operations -------------------------------------------------------------------------------------------

    def operate(self, given, field):
        """One operation of ``before``."""
        op = given["op"]
        if op == "fork":
            child = given["child"]
            self.processes[child] = self.refusing(field, self.processes[given["process"]].fork, child)
            self.areas[child] = {name: area.copy_for_child(self.processes[child])
                                 for name, area in self.areas[given["process"]].items()}
        elif op == "exit":
            self.refusing(field, self.processes[given["process"]].exit, reaped=given.get("reaped", True))
            for area in self.areas[given["process"]].values():
                area.own[:] = 0
        elif op == "mmap":
            self.map(given["process"], given["vma"], field + ".vma")
        elif op == "ksm_merge":
            self.merge([page for at in given["pages"] for page in self.pages(at)], field + ".pages")
        else:
            process, area, first, nr = self.pages_of(given["at"])
            self.operate_on(op, given, process, area, first, nr, field)

    def operate_on(self, op, given, process, area, first, nr, field):
        """An operation on a run of pages of one vma."""
        address, length = area.page_at(first), nr * PAGE_SIZE
        if op == "write":
            for index in range(first, first + nr):
                self.write_data(process, area, index, given.get("data"), field)
        elif op == "read":
            for index in range(first, first + nr):
                self.read_page(process, area, index, field)
        elif op == "mprotect":
            self.refusing(field, process.mprotect, address, length, given["prot"])
        elif op in ("pin", "get"):
            for index in range(first, first + nr):
                self.at_node(process, area, index, field)
                self.refusing(field, getattr(process, op), area.page_at(index))
        else:
            self.refusing(field, getattr(process, given.get("advice", op)), address, length)
        if op in ("dontneed", "munmap"):
            area.own[first:first + nr] = 0

    def merge(self, pages, field):
        """Have ksmd merge pages: it merges equal ones only, so all get the contents of the first before."""
        content = self.contents.bytes_of(pages[0][1].numbers()[pages[0][2]:][:1])[0]
        number = self.contents.keep(content)
        for process, area, index in pages:
            self.at_node(process, area, index, field)
            self.refusing(field, process.write, area.page_at(index), content)
            area.store(index, np.array([number]))
        self.refusing(field, self.machine.ksm_merge, [(process, area.page_at(index)) for process, area, index in pages])

    def write_data(self, process, area, index, data, field):
        """Write a string to the start of a page; without one, fresh bytes to all of it."""
        if data is None:
            self.write_pages(process, area, index, 1, field)
            return
        data = data.encode()
        if len(data) > PAGE_SIZE:
            raise Fault(f"{field}.data", f"{len(data)} bytes do not fit a page of {PAGE_SIZE}", "shorten it")
        self.at_node(process, area, index, field)
        self.refusing(field, process.write, area.page_at(index), data)
        content = self.contents.bytes_of(area.numbers()[index:index + 1])[0]
        content[:len(data)] = np.frombuffer(data, np.uint8)
        area.store(index, np.array([self.contents.keep(content)]))

    def read_page(self, process, area, index, field):
        self.at_node(process, area, index, field)
        found = self.refusing(field, process.read, area.page_at(index), PAGE_SIZE)
        if area.holds_data:
            self.wrong_read |= found != self.contents.bytes_of(area.numbers()[index:index + 1]).tobytes()
        return found

    def pages_of(self, at):
        """(process, area, first page, number of pages) of an address or run of them."""
        owner, name, first, _ = ADDRESS.fullmatch(at).groups()
        return self.processes[owner], self.areas[owner][name], int(first), self.run_length(at)

    @staticmethod
    def run_length(at):
        """How many pages an address or run of them names."""
        first, last = ADDRESS.fullmatch(at).groups()[2:]
        return int(last or first) - int(first) + 1

    def pages(self, at):
        """(process, area, index) of each page of a run."""
        process, area, first, nr = self.pages_of(at)
        return [(process, area, index) for index in range(first, first + nr)]

    def addresses(self, pages):
        """Addresses of the pages of a call, int64; None is one outside every vma."""
        found = []
        for at in pages:
            if at is None:
                found.append(NOWHERE)
                continue
            inside = int(at.partition("@")[2] or 0)
            found += [area.page_at(index) + inside for _, area, index in self.pages(at)]
        return np.array(found, np.int64)

    # --- calls ------------------------------------------------------------------------------------------------

    def run(self):
        """The results of the calls, one dict each. The machine is whole afterwards."""
        results = [getattr(self, "call_" + call["op"])(call, f"calls[{i}]") for i, call in enumerate(self.scenario["calls"])]
        self.machine.validate()
        return results

    def call_move_pages(self, call, field):
        caller, target = self.processes[call["caller"]], call.get("target", call["caller"])
        owner = self.processes[target]
        addresses = self.addresses(call["pages"])
        nodes = call["nodes"]
        if nodes is not None:
            nodes = np.array(nodes if isinstance(nodes, list) else [nodes] * len(addresses), np.int64)
        return self.system_call(sys_move_pages, caller, None if owner is caller else owner, addresses, nodes,
                                flag_bits(call.get("flags", ())), fault=call.get("fault"),
                                call=call, named=(owner, addresses))

    def call_migrate_pages_syscall(self, call, field):
        caller, target = self.processes[call["caller"]], self.processes[call.get("target", call["caller"])]
        return self.system_call(sys_migrate_pages, caller, None if target is caller else target, call.get("maxnode", 64),
                                call["old"], call["new"], call=call, named=(target, ()))

    def call_mbind(self, call, field):
        caller = self.processes[call["caller"]]
        process, area, first, nr = self.pages_of(call["at"])
        addresses = self.addresses([call["at"]])
        return self.system_call(sys_mbind, caller, int(addresses[0]), nr * PAGE_SIZE, call["policy"], call.get("nodes"),
                                flag_bits(call.get("flags", ())), call=call, named=(process, addresses))

    def call_read(self, call, field):
        right = True
        for process, area, index in self.pages(call["at"]):
            found = self.read_page(process, area, index, field)
            right &= "data" not in call or found.startswith(call["data"].encode())
        return {"data_ok": right and self.data_ok()}

    def call_write(self, call, field):
        for process, area, index in self.pages(call["at"]):
            self.write_data(process, area, index, call.get("data"), field)
        return {"data_ok": self.data_ok()}

    def system_call(self, function, *args, call, named, **options):
        """Make it; the result object of the format."""
        machine = self.machine
        vmstat = machine.vmstat
        fail = call.get("alloc_fail")
        if fail is not None:
            options["alloc_fail"] = fail.get("order", 0), fail.get("nth", 1), fail.get("times")
        result = function(machine, *args, **options)
        found = {"ret": result.ret, "errno": errno.errorcode[result.errno] if result.errno else None,
                 "vmstat": {key: value - vmstat[key] for key, value in machine.vmstat.items()},
                 "trace": list(result.trace), "data_ok": self.data_ok(), "node_of": self.node_of(*named)}
        if result.status is not None:
            found["status"] = [None if one == NOT_WRITTEN else one for one in result.status.tolist()]
        return found

    # --- looking ----------------------------------------------------------------------------------------------

    def node_of(self, process, addresses):
        """The node of each page, None where nothing, or only the zero page, is mapped."""
        if not process.mm:
            return [None] * len(addresses)
        return [self.machine.node_of(process, int(address)) for address in addresses]

    def data_ok(self):
        """Whether every page holds the bytes last written to it, and no operation has read others."""
        if self.wrong_read:
            return False
        mapped = [(self.processes[owner], area) for owner, areas in self.areas.items() for area in areas.values()
                  if self.processes[owner].mm]
        return (all(self.area_is_right(process, area) for process, area in mapped if area.holds_data)
                and all(self.file_is_right(file, backing) for file, backing in self.files.values()))

    def area_is_right(self, process, area):
        """Whether what the area maps holds its contents, and none of its own pages has gone."""
        entries = page_entries(self.machine, process.mm, area.address, area.nr_pages)
        numbers = area.numbers()
        present = (entries & PTE_PRESENT != 0) & (entries & PTE_SPECIAL == 0)
        swapped = np.flatnonzero(entries & PTE_SWAP)
        zero = (entries & PTE_PRESENT != 0) & (entries & PTE_SPECIAL != 0)
        return (not (entries & PTE_MIGRATION).any() and not area.own[entries == 0].any() and not numbers[zero].any()
                and self.frames_hold(entries[present] >> PAGE_SHIFT, numbers[present])
                and self.swap_holds(entries[swapped] >> PAGE_SHIFT, numbers[swapped]))

    def file_is_right(self, file, backing):
        """Whether the file's page cache holds its contents, all that was written among them."""
        mem = self.machine.mem
        first = int(mem.mappings.slots[file.mapping])
        heads = mem.slots[first:first + file.nr_pages]
        cached = heads != NO_PFN
        pfns = heads + np.arange(file.nr_pages) - mem.folios.index[heads]
        return not backing[~cached].any() and self.frames_hold(pfns[cached], backing[cached])

    def frames_hold(self, pfns, numbers):
        """Whether each frame holds the contents with its number."""
        frames = self.machine.frames.view(FIRST_PFN, len(self.machine.mem.folios) - FIRST_PFN)
        return all(np.array_equal(frames[pfns[at:at + CHUNK] - FIRST_PFN], self.contents.bytes_of(numbers[at:at + CHUNK]))
                   for at in range(0, len(pfns), CHUNK))

    def swap_holds(self, entries, numbers):
        """Whether what each swap entry stands for, in the swap cache or on the device, has the contents with its number."""
        mem = self.machine.mem
        for entry, number in zip(entries.tolist(), numbers):
            pfn = int(mem.slots[mem.mappings.slots[mem.sys.swap_space[0]] + entry])
            if pfn != NO_PFN:
                if not self.frames_hold(np.array([pfn + entry - int(mem.folios.private[pfn])]), np.array([number])):
                    return False
            elif not np.array_equal(self.machine.swapped_page(entry), self.contents.bytes_of(np.array([number]))[0]):
                return False
        return True


class Tracer:
    """Tells the migrate_pages() calls of a scenario, folios by the name of the first page that the file has for them."""

    def __init__(self, level):
        self.level = level

    def begin(self, started):
        """A call begins, and list ``started`` will have it: the events that tell it."""
        self.names = {}
        for owner, areas in self.level.areas.items():
            mm = self.level.processes[owner].mm
            for name, area in areas.items() if mm else ():
                entries = page_entries(self.level.machine, mm, area.address, area.nr_pages)
                for index in np.flatnonzero((entries & PTE_PRESENT != 0) & (entries & PTE_SPECIAL == 0))[::-1]:
                    self.names[int(entries[index]) >> PAGE_SHIFT] = f"{owner}:{name}+{index}"
        self.copies = Copies(self.level.machine, started, self.name_of)
        self.steps = Steps(self.level.machine, self.copies, self.level.trace)
        return [Event(step, self.tell) for step in STEPS]

    def tell(self, step, pfn):
        if step == "move":
            self.moving = pfn
        elif step == "moved":                       # ``pfn`` is the destination
            for page in range(1 << int(self.level.machine.mem.folios.order[pfn])):
                name = self.names.pop(self.moving + page, None)
                if name is not None:
                    self.names[pfn + page] = name
        self.copies.tell(step, pfn)
        self.steps.tell(step, pfn)

    def end(self, result):
        self.steps.end(result, [self.name_of(int(pfn)) for pfn in result.left])

    def name_of(self, pfn):
        pages = range(pfn, pfn + (1 << int(self.level.machine.mem.folios.order[pfn])))
        return next((self.names[page] for page in pages if page in self.names), f"pfn {pfn}")


def runs(pages, area):
    """(first, length) of the runs of consecutive pages whose folios come from one node."""
    first = previous = None
    for index in pages:
        if first is not None and (index != previous + 1 or len(area.nodes) > 1 and area.node_of(index) != area.node_of(first)):
            yield first, previous + 1 - first
            first = None
        first, previous = index if first is None else first, index
    if first is not None:
        yield first, previous + 1 - first


def flag_bits(names):
    """MPOL_MF_* bits; names that the kernel does not know become a bit that it does not know either."""
    bits = 0
    for name in names:
        bits |= FLAG_BITS.get(name, UNKNOWN_FLAG)
    return bits
