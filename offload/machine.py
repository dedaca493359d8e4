"""The fuse box: builds a machine from one frozen configuration, and is what users hold.

Stands for what boot code and the system-call layer do around mm/: node set-up, process creation, isolation of the
folios that a caller names, putting back what is left. The rules of migration are in ``migrate/``.
"""

import contextlib
import dataclasses

import numpy as np

from offload.copy_offload import CopyOffload
from offload.errors import Busy, InvalidInput, NotSupported, OutOfMemory
from offload.jit import jit_entry
from offload.kernels.cpu import KERNELS
from offload.migrate.call import TargetControl
from offload.migrate.pages import check_events, finish_call, migrate_pages
from offload.mm.far_frames import NodeFrames
from offload.mm.frames import Frames
from offload.mm.memmap import (
    ANON_VMA_DTYPE, AOPS_NAMES, AVC_DTYPE, FIRST_PFN, FOLIO_DTYPE, FRAME_OP_DTYPE, FRAMES_FAR, FRAMES_NOWHERE, FRAMES_TOGETHER, LRU_BATCH_SIZE, MAPPING_DTYPE, MAPPING_FILE,
    MAPPING_HUGETLB, MAPPING_SHMEM, MAPPING_SWAP, MM_DTYPE, NO_PFN, NODE_DTYPE, OTHERS_DTYPE, PG_hugetlb, PG_ksm, PG_locked, PG_lru,
    PG_movable_ops, PG_movable_ops_isolated, PG_reserved, PLACE_DEVICE, PLACE_HOST, PLACE_NOWHERE, PLACE_PINNED, RMAP_ITEM_DTYPE,
    SYS_DTYPE, VMA_DTYPE,
    Memory, page_folio, records, unpack, zeros,
)
from offload.mm.fault import lookup_page
from offload.mm.hugetlb import HPAGE_NR, alloc_hugetlb_pool, folio_putback_hugetlb, isolate_folio
from offload.mm.ksm import ksm_add_mapping, ksm_merge_page, set_page_stable_node
from offload.mm.movable_ops import (
    TOLD_OWNER, alloc_movable_ops_pages, free_movable_ops_page, isolate_movable_ops_page, putback_movable_ops_page,
)
from offload.mm.node import (
    PCP_HIGH, build_free_areas, drain_pages, folio_putback_lru, fragment_node, free_node, free_reserved_pages, lru_add_drain,
    lru_stat_add,
)
from offload.mm.pagetable import PTRS, free_pgtables, pgd_alloc
from offload.mm.process import File, Process
from offload.mm.validate import validate
from offload.syscalls import collect_folio_addresses, do_pages_move
from offload.intrinsics import prefetch_record
from offload.table import pack
from offload.units import (
    MAX_PAGE_ORDER, MR_DEMOTION, NR_MAX_BATCHED_MIGRATION, PAGE_SIZE, PROTOCOLS, RULE_SETS, format_size, parse_mode, parse_placement,
    parse_protocol, parse_reason, parse_size,
)

__all__ = ("Machine", "MachineConfig", "NodeConfig")


@dataclasses.dataclass(frozen=True)
class NodeConfig:
    """A node: ``pages`` base pages (0: no memory) or a size ("64M"), with or without CPUs, its frames in ``placement``.

    ``placement`` is "host" (bytes in host memory), "pinned" (in host memory that a GPU reaches; needs one), "device" (in its
    own memory) or "nowhere" (metadata only: nothing can be read, written or copied, a move moves metadata). Nodes of one
    machine may differ, but "nowhere" is for all or none.
    ``hugepages``: folios of 2 MiB in its hugetlb pool to begin with; when the pools are empty, surplus ones come and go as
    they are needed.
    """

    pages: int = 4096
    cpus: bool = True
    placement: str = "host"
    hugepages: int = 0

    def __post_init__(self):
        if isinstance(self.pages, str):
            object.__setattr__(self, "pages", parse_size(self.pages, what="node") // PAGE_SIZE)
        if not isinstance(self.pages, int) or self.pages < 0:
            raise InvalidInput(f"pages {self.pages!r} of a node is not a number of base pages; write 0 or more, or a size such as \"64M\"")
        if not isinstance(self.hugepages, int) or self.hugepages < 0:
            raise InvalidInput(f"hugepages {self.hugepages!r} of a node is not a number of 2 MiB pages; write 0 or more")
        parse_placement(self.placement)


@dataclasses.dataclass(frozen=True)
class MachineConfig:
    """What a machine is made of; checked when it is made.

    ``batch_pages``: base pages at which migrate_pages() closes a batch (512 in mainline; the published results for
    2 MiB folios need 262144). ``protocol``: whose rules the batch copy follows, "v6", "v5", "flags" or "v4"
    (migrate/state.py, docs/protocols.md). ``copy_kernel``: "plain" or "stream", for the copies that the migration path
    makes itself. ``kernel``: whose rules hold, "7.3" (released), "mm-next" (the linux-mm tree ahead of it) or "6.12".
    ``thp_migration``: whether PMD entries can migrate. ``memory_tiering``: NUMA balancing between tiers is on; nodes with
    CPUs are the upper one. ``poison``: fill fresh frames with 0xAA (slow; a missing copy
    shows).
    """

    nodes: tuple = (NodeConfig(), NodeConfig())
    batch_pages: int = NR_MAX_BATCHED_MIGRATION
    protocol: str = "v6"
    copy_kernel: str = "plain"
    kernel: str = "7.3"
    thp_migration: bool = True
    memory_tiering: bool = False
    poison: bool = False

    def __post_init__(self):
        if not self.nodes:
            raise InvalidInput("a machine needs at least one node")
        if len(self.nodes) > 64:
            raise InvalidInput(f"{len(self.nodes)} nodes are more than the 64 that a machine can have")
        placements = {node.placement for node in self.nodes}
        if "nowhere" in placements and len(placements) > 1:
            raise InvalidInput("nodes of placement 'nowhere' cannot be mixed with others; give all of them bytes or none")
        if not isinstance(self.batch_pages, int) or self.batch_pages < 1:
            raise InvalidInput(f"batch_pages {self.batch_pages!r} is not a number of base pages; mainline has 512")
        if self.kernel not in RULE_SETS:
            raise InvalidInput(f"kernel {self.kernel!r} is not a rule set; use one of: {', '.join(RULE_SETS)}")
        object.__setattr__(self, "protocol", PROTOCOLS[parse_protocol(self.protocol)])      # in any case
        if self.copy_kernel not in KERNELS:
            raise InvalidInput(f"copy kernel {self.copy_kernel!r} is not known; use one of: {', '.join(KERNELS)}")
        if "device" in placements and self.copy_kernel != "plain":
            raise InvalidInput(f"copy kernel {self.copy_kernel!r} is the CPU's, which does not reach a node in device memory; use 'plain'")


class Machine:
    """An emulated machine: nodes, processes, one migration path, one place for a migrator.

    ``Machine(nodes=["1G", "1G"])`` or ``Machine(config)``; keyword arguments are the fields of MachineConfig, with
    ``nodes`` as sizes, page counts, or NodeConfigs, and ``placement`` for nodes given as sizes. Raises InvalidInput for a
    configuration that cannot be, OutOfMemory when this host cannot hold it.

    Not thread safe. ``mem`` is its whole state; arrays in it are replaced when they grow, so do not keep them.
    """

    def __init__(self, config=None, *, nodes=None, placement="host", **fields):
        if config is not None and (nodes is not None or fields):
            raise InvalidInput("pass a MachineConfig or its fields, not both")
        if config is None:
            if nodes is not None:
                if isinstance(nodes, (str, int)):
                    raise InvalidInput(f"nodes {nodes!r} is one value, not a list; write nodes=[{nodes!r}, {nodes!r}] for two such nodes")
                fields["nodes"] = tuple(node_config(node, placement) for node in nodes)
            config = MachineConfig(**fields)
        self.config = config
        self.processes = []
        self._running = False
        self.batch_mode = None                      # while a call stands at an event: the mode of its batch
        self._next_row = dict.fromkeys(("vmas", "anon_vmas", "avcs", "rmap_items", "mappings", "mms", "others"), 1)
        self.owners = [None, None]                 # of movable_ops pages, by number; TOLD_OWNER is no object
        self._next_swap_entry = 1
        self._swap_device = self._vdso = self._init = None
        self._free_rows = {"vmas": [], "avcs": [], "mms": []}
        self._held = {}
        self.tracer = None                          # told of each call: begin(started) returns events, end() gets the MigrateResult
        self._build(config)
        self.offload = CopyOffload(self.mem)

    def _build(self, config):
        nodes = records(len(config.nodes), NODE_DTYPE)
        pfn = FIRST_PFN
        block = 1 << MAX_PAGE_ORDER
        for node, given in zip(nodes, config.nodes):
            node.start_pfn, node.nr_pages, node.cpus = pfn, given.pages, given.cpus
            node.place = PLACES[given.placement]
            pfn += -(-given.pages // block) * block
        self.frames, self._far = build_frames(nodes, config, max(pfn - FIRST_PFN, 1)), False
        if self.frames is not None:
            nodes.frames[:] = self.frames.address if self.frames.kind == FRAMES_TOGETHER else self.frames.addresses
        free_areas, free_bits = build_free_areas(nodes)
        sys = records(1, SYS_DTYPE)
        sys.nr_nodes = len(nodes)
        sys.protocol = parse_protocol(config.protocol)
        sys.copy_kernel = KERNELS.index(config.copy_kernel)
        sys.poison, sys.thp_migration = config.poison, config.thp_migration
        sys.rule_set, sys.memory_tiering = RULE_SETS[config.kernel], config.memory_tiering
        sys.nr_tables = 1
        sys.frames_kind = self.frames.kind if self.frames else FRAMES_NOWHERE
        try:
            folios, orders = records(pfn, FOLIO_DTYPE), zeros(pfn, np.uint8)
        except MemoryError:
            raise OutOfMemory(f"no room for the memmap of {format_size(pfn * PAGE_SIZE)} of nodes "
                              f"({format_size(pfn * FOLIO_DTYPE.itemsize)}) on this host; make the nodes smaller") from None
        self._set_mem(Memory(
            folios, orders, nodes, free_areas, free_bits, np.zeros(len(nodes) * PCP_HIGH, np.int64),
            np.zeros(64 * PTRS, np.int64), records(8, MM_DTYPE), records(64, VMA_DTYPE), records(64, ANON_VMA_DTYPE), records(64, AVC_DTYPE),
            records(1, RMAP_ITEM_DTYPE), records(8, MAPPING_DTYPE), np.zeros(1, np.int64), np.zeros(1, np.int64),
            np.zeros(MAX_PAGE_ORDER + 1, np.int64), records(1, OTHERS_DTYPE), np.zeros(1, np.int64),
            np.zeros(LRU_BATCH_SIZE, np.int64), records(1, FRAME_OP_DTYPE), sys))
        if sys.frames_kind[0] == FRAMES_FAR:
            self._far, self.frames.state = True, sys.view(np.ndarray)
            self.reserve_frame_ops(0)
        for nid in range(len(nodes)):
            free_node(self.table, nid)
            wanted = config.nodes[nid].hugepages
            if wanted and alloc_hugetlb_pool(self.table, nid, wanted) < wanted:
                raise OutOfMemory(f"node {nid} of {config.nodes[nid].pages} pages has no room for {wanted} huge pages of "
                                  f"{HPAGE_NR} in its pool; make the node larger or the pool smaller")

    def _set_mem(self, mem):
        self.mem, self._table = mem, pack(mem)

    @property
    def table(self):
        """The table of ``mem``, to enter compiled code with: what that left to Python has been done where it is half full."""
        if self._far and self.mem.sys.frame_log_nr[0] > LOG_ROWS // 2:
            self.frames.drain()
        return self._table

    # --- processes and files ----------------------------------------------------------------------------------

    def process(self, name=None, *, uid=0, caps=None, mems_allowed=None):
        """A new process without memory.

        ``caps``: its capabilities by name; None is all for uid 0 and none for others. ``mems_allowed``: the nodes that its
        cpuset allows; None is all.
        """
        self.check_idle()
        mm = self.new_row("mms")
        self.reserve_tables(0)
        self.mem.mms[mm].pgd = pgd_alloc(self.table)
        process = Process(self, mm, name or f"p{mm}", uid, None if caps is None else frozenset(caps),
                          None if mems_allowed is None else frozenset(mems_allowed))
        self.processes.append(process)
        return process

    def file(self, size, *, kind="file", aops=None, inaccessible=False, busy_buffers=False):
        """A file of ``size`` bytes ("16M"), empty page cache. ``kind``: "file", "shmem" or "secretmem".

        ``aops``: its mapping's migrate callback: "migrate_folio" (the default of shmem), "filemap" (that of a file; private data
        goes along),
        "buffer" or "buffer_norefs" (its buffers are locked meanwhile), "none" (dirty folios stay), "secretmem" (nothing moves).
        ``inaccessible``: the mapping's contents are not for the CPU, and do not move. ``busy_buffers``: every folio has
        buffers that a journal refers to, which "buffer_norefs" cannot move.
        """
        self.check_idle()
        default = {"file": "filemap", "shmem": "migrate_folio", "secretmem": "secretmem"}
        if kind not in default:
            raise InvalidInput(f"kind {kind!r} of file is not known; use one of: {', '.join(default)}")
        aops = aops or default[kind]
        if aops not in AOPS_NAMES:
            raise InvalidInput(f"aops {aops!r} is not known; use one of: {', '.join(AOPS_NAMES)}")
        if kind == "secretmem" and aops != kind:
            raise InvalidInput(f"aops {aops!r} is not for {kind}; leave it out")
        if busy_buffers and aops not in ("buffer", "buffer_norefs"):
            raise InvalidInput(f"busy_buffers with aops {aops!r}: no buffers; use aops 'buffer' or 'buffer_norefs'")
        nr_pages = parse_size(size) // PAGE_SIZE
        mapping = self.new_row("mappings")
        row = self.mem.mappings[mapping]
        row.kind = MAPPING_SHMEM if kind == "shmem" else MAPPING_FILE
        row.aops, row.inaccessible, row.busy_buffers = AOPS_NAMES[aops], inaccessible, busy_buffers
        row.slots, row.nr_slots = len(self.mem.slots), nr_pages
        self._set_mem(self.mem._replace(slots=np.concatenate((self.mem.slots, np.zeros(nr_pages, np.int64)))))
        return File(self, mapping, kind, nr_pages)

    def hugetlb_file(self, size):
        """A hugetlbfs file of ``size`` bytes, a multiple of 2 MiB: for Process.mmap(file=..., hugetlb=True, shared=True)."""
        self.check_idle()
        nr_pages = parse_size(size) // PAGE_SIZE
        if nr_pages % HPAGE_NR:
            raise InvalidInput(f"size {size!r} of a hugetlbfs file is no multiple of 2 MiB; make it one")
        mapping = self.new_row("mappings")
        row = self.mem.mappings[mapping]
        row.kind = MAPPING_HUGETLB
        row.slots, row.nr_slots = len(self.mem.slots), nr_pages
        self._set_mem(self.mem._replace(slots=np.concatenate((self.mem.slots, np.zeros(nr_pages, np.int64)))))
        return File(self, mapping, "hugetlb", nr_pages)

    def swapon(self, size):
        """Give the machine a swap space of ``size`` bytes ("16M"), once; its slots are all free."""
        self.check_idle()
        if self.mem.sys.swap_space[0]:
            raise InvalidInput("there is a swap space already; a machine has one")
        nr_slots = parse_size(size) // PAGE_SIZE + 1            # entry 0 is never used
        if self.frames is not None:
            try:
                self._swap_device = zeros(nr_slots * PAGE_SIZE, np.uint8)
            except (OSError, MemoryError, OverflowError, ValueError) as error:
                raise OutOfMemory(f"no room for a swap space of {size} on this host ({error}); make it smaller") from None
            self.mem.sys.swap_device = self._swap_device.ctypes.data
        mapping = self.new_row("mappings")
        row = self.mem.mappings[mapping]
        row.kind, row.aops = MAPPING_SWAP, AOPS_NAMES["migrate_folio"]
        row.slots, row.nr_slots = len(self.mem.slots), nr_slots
        self._set_mem(self.mem._replace(slots=np.concatenate((self.mem.slots, np.zeros(nr_slots, np.int64))),
                                        swap_map=zeros(nr_slots, np.int64)))
        self.mem.sys.swap_space = mapping

    def alloc_swap_entries(self, nr):
        """The first of ``nr`` consecutive swap entries that were never used. OutOfMemory if the swap space has no more."""
        if not self.mem.sys.swap_space[0]:
            raise InvalidInput("this machine has no swap space; swapon() one first")
        space = self.mem.mappings[self.mem.sys.swap_space[0]]
        entry = self._next_swap_entry
        if entry + nr > space.nr_slots:
            raise OutOfMemory(f"no {nr} free entries in a swap space of {int(space.nr_slots) - 1}; swapon() a larger one")
        self._next_swap_entry += nr
        return entry

    def swapped_page(self, entry):
        """The bytes of a swap entry on the swap device: uint8, no copy."""
        self.frames.drain()
        return self._swap_device[entry * PAGE_SIZE:(entry + 1) * PAGE_SIZE]

    def ksm_merge(self, pages):
        """Have ksmd merge equal anonymous pages: ``pages`` are (Process, address); those with equal bytes become one KSM page.

        InvalidInput for a page that is not a present anonymous base page. Pages that are pinned, or KSM pages already, stay.
        """
        self.check_idle()
        self.check_frames("compare the bytes of pages")
        self.lru_add_drain()
        stable = {}                                 # contents -> (pfn, places)
        for process, address in pages:
            vma = process._vma_at(address)
            pfn = int(self.folios_of(process, address, PAGE_SIZE)[0]) if self.node_of(process, address) is not None else NO_PFN
            folio = self.mem.folios[pfn]
            if pfn == NO_PFN or folio.mapping >= 0 or folio.order:
                raise InvalidInput(f"page {address:#x} of {process!r} is not a present anonymous base page; ksmd merges no other")
            if folio.page_flags & PG_ksm or folio.refcount != folio.mapcount:
                continue
            contents = self.frames.read(pfn, 1).tobytes()
            if contents not in stable:
                stable[contents] = pfn, (vma, address), []
            elif pfn != stable[contents][0]:
                stable[contents][2].append((vma, address))
        for pfn, first, others in stable.values():
            if others:
                self.make_ksm(pfn, [first])
                for vma, address in others:
                    item = self.new_row("rmap_items")
                    ksm_merge_page(self.table, pfn, vma, address)
                    ksm_add_mapping(self.table, pfn, vma, address, item)

    def vdso(self):
        """The vdso: a page of the kernel's image that every process maps, init among them. On no LRU list."""
        if self._vdso is None:
            self._vdso = self.file(PAGE_SIZE)
            self._vdso.kind = "vdso"
            self._init = self.process("init")
            self.processes.remove(self._init)
            self._init.mmap(PAGE_SIZE, file=self._vdso, prot="rx", nid=int(self.mem.nodes.cpus.argmax()), order=0)
            reserve_page(self.table, int(self.folios_of(self._init, self._init.vma_index()[0][0], PAGE_SIZE)[0]))
        return self._vdso

    def make_ksm(self, pfn, places):
        """Make an anonymous base page a KSM page; ``places``: (vma, address) of its mappings in one process each.

        Processes forked from those are found through them. Its entries become read-only.
        """
        set_page_stable_node(self.table, pfn, self.new_row("anon_vmas"))
        for vma, address in places:
            item = self.new_row("rmap_items")
            ksm_add_mapping(self.table, pfn, vma, address, item)

    def movable_ops_pages(self, nid, owner=None, *, nr=1, order=0):
        """Allocate ``nr`` movable_ops pages on a node: their pfns, int64. OutOfMemory, and none allocated, without room.

        ``owner`` moves them: ``isolate_page(pfn)`` says whether a page may be isolated, ``migrate_page(dst, src, mode)``
        copies it and returns 0 or a negative errno, ``putback_page(pfn)`` hears that it stayed; after success the owner
        holds ``dst``. None: they can always be isolated, and moving does what ``Memory.others`` tells.
        """
        self.check_idle()
        self.check_nid(nid)
        self.reserve_frame_ops(nr)
        number = TOLD_OWNER
        if owner is not None:
            if owner not in self.owners:
                self.owners.append(owner)
            number = self.owners.index(owner)
        pfns = np.zeros(nr, np.int64)
        got = alloc_movable_ops_pages(self.table, nid, order, number, pfns)
        if got < nr:
            for pfn in pfns[:got]:
                free_movable_ops_page(self.table, pfn)
            raise OutOfMemory(f"node {nid} has no room for {nr} pages of order {order}; make it larger")
        return pfns

    def tell(self, outcomes):
        """Write a script of outcomes told beforehand (0 or negative errnos; one at least): what Memory.others calls it."""
        script = len(self.mem.scripts)
        self._set_mem(self.mem._replace(scripts=np.concatenate(
            (self.mem.scripts, np.array([len(outcomes), *reversed(outcomes)], np.int64)))))
        return script

    # --- migration --------------------------------------------------------------------------------------------

    def register(self, migrator, reasons="all"):
        """Put a migrator on duty; see :meth:`offload.copy_offload.CopyOffload.register`."""
        self.offload.register(migrator, reasons)

    def unregister(self, migrator):
        """Take it off duty; see :meth:`offload.copy_offload.CopyOffload.unregister`."""
        self.offload.unregister(migrator)

    def migrate_pages(self, folios, nid, *, mode="MIGRATE_ASYNC", reason="compaction", pf_memalloc=False, events=(),
                      time_copies=True):
        """Isolate ``folios`` (head pfns), migrate them to node ``nid``, put back what stays. The MigrateResult.

        Order is list order. A folio that is on no LRU cannot be isolated: InvalidInput, and nothing has happened.
        ``mode`` and ``reason`` by kernel name. Raises as :func:`offload.migrate.pages.migrate_pages`; what is left has
        been put back then too.
        """
        mode, reason, events = parse_mode(mode), parse_reason(reason), check_events(events)
        self.check_nid(nid)
        nodes = self.mem.nodes
        nr_isolated = nodes.nr_isolated_anon.copy(), nodes.nr_isolated_file.copy()
        isolated, calls = [], []
        try:
            return self.migrate_isolated(self.isolate(folios, isolated), nid, mode=mode, reason=reason,
                                         pf_memalloc=pf_memalloc, events=events, time_copies=time_copies, into=calls)
        finally:
            if isolated and not calls:              # Ctrl-C between the two
                self.putback(isolated[0][:isolated[1][0]])
            if reason == MR_DEMOTION:               # the path leaves it to reclaim to lower NR_ISOLATED, in bulk
                nodes.nr_isolated_anon[:], nodes.nr_isolated_file[:] = nr_isolated

    def migrate_isolated(self, folios, nid, *, mode, reason, pf_memalloc=False, events=(), time_copies=True, into=None,
                         started=None, putback=True):
        """As migrate_pages(), for folios that the caller has isolated. ``nid``: a node, or a TargetControl.

        ``into``: list that gets the result, also when it raises; if it gets none, the folios are as they were. List ``started``
        gets the Call, for events that look at it.
        ``putback`` False leaves what is left isolated (``.left``).
        """
        mode, reason, events = parse_mode(mode), parse_reason(reason), check_events(events)
        if not isinstance(nid, TargetControl):
            self.check_nid(nid)
        if self._far and self.frames.lost:
            self.check_not_lost(folios, nid)
        self.check_idle()
        if self.batch_mode is not None:
            raise Busy("another migration cannot be started between two steps of one; start it before or after")
        if self.tracer is not None:
            started = [] if started is None else started
            events = (*self.tracer.begin(started), *events)
        into, started = [] if into is None else into, [] if started is None else started
        nr = len(into)
        try:
            self._running = True
            return migrate_pages(self, folios, mode=mode, reason=reason, target=nid, pf_memalloc=pf_memalloc, events=events,
                                 time_copies=time_copies, started=started, into=into)
        finally:
            if started and len(into) == nr:         # Ctrl-C where the call could not catch it
                into.append(finish_call(self, started[0]))
            self._running = False
            if len(into) > nr and putback:
                self.putback(into[-1].left)
            if len(into) > nr and self.tracer is not None:
                self.tracer.end(into[-1])

    @contextlib.contextmanager
    def other_task(self):
        """Inside the action of an event: what another task does to its memory now; processes can be used.

        It must not wait for the migration: a fault on a migration entry is Busy. Busy outside an event.
        """
        if self.batch_mode is None:
            raise Busy("no call stands between two steps now; this is for the action of an offload.Event")
        running, self._running = self._running, False
        try:
            yield
        finally:
            self._running = running

    def move_pages(self, process, addresses, nids, *, move_all=False, events=()):
        """move_pages(2) with MPOL_MF_MOVE, or MOVE_ALL: the page at each address to its node, or all to one.

        Returns an :class:`offload.syscalls.MoveResult`. The second address of a folio gets -EBUSY, as in the kernel.
        """
        self.check_idle()
        events = check_events(events)
        addresses = np.ascontiguousarray(addresses, np.int64)
        nids = np.ascontiguousarray(np.broadcast_to(np.asarray(nids, np.int64), addresses.shape))
        return do_pages_move(self, process, addresses, nids, move_all=move_all, events=events)

    def isolate(self, folios, isolated=None):
        """Take folios off their LRU, a reference each: int64 pfns in the order given. InvalidInput if one cannot be.

        List ``isolated`` gets the pfns and an int64 of how many of them are isolated, which stays right whatever is raised.
        """
        self.check_idle()
        folios = np.ascontiguousarray(folios, np.int64)
        if folios.ndim != 1 or len(folios) and not FIRST_PFN <= folios.min() <= folios.max() < len(self.mem.folios):
            raise InvalidInput(f"folios are no list of pfns of this machine ({FIRST_PFN} to {len(self.mem.folios) - 1})")
        self.lru_add_drain()
        nr_done = np.zeros(1, np.int64)
        if isolated is not None:
            isolated += folios, nr_done
        nr = 0
        for i, owner, pfn in self._owned(folios):
            nr = isolate_folios(self.table, folios, nr, i, nr_done)
            taken = self.mem.folios.page_flags[pfn] & (PG_locked | PG_movable_ops_isolated)
            if nr < i or taken or not owner.isolate_page(pfn):
                break
            nr = isolate_folios(self.table, folios, i, i + 1, nr_done)
        else:
            nr = isolate_folios(self.table, folios, nr, len(folios), nr_done)
        if nr < len(folios):
            nr_done[0] = 0
            self.putback(folios[:nr])
            raise InvalidInput(f"folio {folios[nr]} cannot be isolated: it is on no LRU (free, named twice, or a tail page), or "
                               f"its owner does not give it")
        return folios

    def _owned(self, folios):
        """(position, owner, pfn) of those folios that a Python owner moves."""
        if len(self.owners) <= TOLD_OWNER + 1:
            return []
        row = self.mem.folios[folios]
        owned = np.flatnonzero((row.page_flags & PG_movable_ops != 0) & (row.private > TOLD_OWNER))
        return [(i, self.owners[row.private[i]], int(folios[i])) for i in owned]

    def putback(self, folios):
        """Give isolated folios back to their LRU, or to their owner (putback_movable_pages())."""
        folios = np.ascontiguousarray(folios, np.int64)
        for _, owner, pfn in self._owned(folios):
            owner.putback_page(pfn)
        putback_folios(self.table, folios)

    def lru_add_drain(self):
        """Empty the per-CPU LRU batch, so that no folio is held by it."""
        drain(self.table)

    def lru_cache_disable(self):
        """Drain the LRU batch and keep it empty until lru_cache_enable(); the two nest."""
        self.mem.sys.lru_disabled += 1
        self.lru_add_drain()

    def lru_cache_enable(self):
        self.mem.sys.lru_disabled -= 1

    # --- looking ----------------------------------------------------------------------------------------------

    def folio_addresses(self, process, ranges):
        """Address of the first mapped page of each folio in ``ranges`` of (start, end), int64, in order."""
        out = np.empty(1 << 16, np.int64)
        found = []
        for start, end in ranges:
            address = start
            while address < end:
                nr, address = collect_folio_addresses(self.table, process.mm, start, address, end, out)
                found.append(out[:nr].copy())
        return np.concatenate(found) if found else np.empty(0, np.int64)

    def folios_of(self, process, address, length):
        """Head pfns of the folios mapped in a range (``length`` in bytes or as "64K"), in address order: int64."""
        addresses = process.folio_addresses(address, parse_size(length, what="length") if isinstance(length, str) else length)
        folios = np.empty(len(addresses), np.int64)
        lookup_folios(self.table, process.mm, addresses, folios)
        return folios

    def node_of(self, process, address):
        """Node of the page at ``address``, or None if no folio is mapped there."""
        folio = np.zeros(1, np.int64)
        lookup_folios(self.table, process.mm, np.array([address], np.int64), folio)
        return int(self.mem.folios.nid[folio[0]]) if folio[0] else None

    @property
    def vmstat(self):
        """The five migration counters of /proc/vmstat since the machine was built."""
        sys = self.mem.sys[0]
        return {name: int(sys[name]) for name in ("pgmigrate_success", "pgmigrate_fail", "thp_migration_success",
                                                  "thp_migration_fail", "thp_migration_split")}

    def free_pages(self, nid):
        """Free base pages of a node, those on its per-CPU list among them."""
        self.check_nid(nid)
        node = self.mem.nodes[nid]
        return int(node.nr_free_pages + node.pcp_count)

    def free_blocks(self, nid):
        """Free blocks per order of a node, orders 0 to 10: the line of /proc/buddyinfo, after the per-CPU list has been drained."""
        self.check_nid(nid)
        drain_node(self.table, nid)
        rows = slice(nid * (MAX_PAGE_ORDER + 1), (nid + 1) * (MAX_PAGE_ORDER + 1))
        return [int(nr) for nr in self.mem.free_areas.nr_free[rows]]

    def validate(self):
        """Check that the books add up; BrokenInvariant with the pfns that disagree. Slow."""
        self.check_idle()
        validate(self)

    # --- making things difficult ------------------------------------------------------------------------------

    def fragment(self, nid, order):
        """Take one page out of every free block larger than ``order``, so that no larger block is left.

        The pages taken stand for unmovable kernel allocations; :meth:`defragment` frees them.
        """
        self.check_idle()
        self.check_nid(nid)
        if not 0 <= order < MAX_PAGE_ORDER:
            raise InvalidInput(f"order {order!r} is out of range; use 0 to {MAX_PAGE_ORDER - 1}")
        node = self.mem.nodes[nid]
        held = np.empty(int(node.nr_pages) >> order + 1, np.int64)
        self.reserve_frame_ops(len(held))
        nr = fragment_node(self.table, nid, order, held)
        self._held.setdefault(nid, []).append(held[:nr].copy())

    def defragment(self, nid):
        """Free what fragment() holds on the node."""
        self.check_idle()
        for held in self._held.pop(nid, ()):
            free_reserved_pages(self.table, held)

    # --- rows and page tables, for the modules below ----------------------------------------------------------

    def new_row(self, table):
        """A zeroed row of one of Memory's tables; the array is replaced by a larger one when it is full."""
        if self._free_rows.get(table):
            row = self._free_rows[table].pop()
        else:
            row = self._next_row[table]
            self._next_row[table] = row + 1
        array = getattr(self.mem, table)
        if row >= len(array):
            larger = records(2 * len(array), array.dtype)
            larger[:len(array)] = array
            array = larger
            self._set_mem(self.mem._replace(**{table: array}))
        array[row] = np.zeros((), array.dtype)
        return row

    def reserve_tables(self, nbytes):
        """Make sure that page tables for ``nbytes`` more of mappings can be had without growing an array."""
        leaves = nbytes // (PTRS * PAGE_SIZE) + 2
        need = int(self.mem.sys.nr_tables[0]) + leaves + leaves // PTRS + 8
        if need * PTRS > len(self.mem.tables):
            tables = zeros(max(need * PTRS, 2 * len(self.mem.tables)), np.int64)
            tables[:len(self.mem.tables)] = self.mem.tables
            self._set_mem(self.mem._replace(tables=tables))

    def reserve_frame_ops(self, nr):
        """Make sure that compiled code can leave ``nr`` operations on frames to Python, where it cannot do them itself."""
        if self._far and len(self.mem.frame_log) - int(self.mem.sys.frame_log_nr[0]) < nr + LOG_ROWS // 2:
            self.frames.drain()
            if len(self.mem.frame_log) < nr + LOG_ROWS:
                self._set_mem(self.mem._replace(frame_log=records(nr + LOG_ROWS, FRAME_OP_DTYPE)))
                self.frames.log = self.mem.frame_log.view(np.ndarray)

    def new_anon_vma(self):
        return self.new_row("anon_vmas")

    def link_anon_vma(self, vma, anon_vma, *, owner=True):
        """Make folios of ``anon_vma`` findable in ``vma`` (anon_vma_chain_link()); new ones belong to the owner's."""
        avc = self.new_row("avcs")
        link = self.mem.avcs[avc]
        link.vma, link.anon_vma = vma, anon_vma
        link.next_of_vma, self.mem.vmas[vma].first_avc = self.mem.vmas[vma].first_avc, avc
        link.next_of_anon_vma, self.mem.anon_vmas[anon_vma].first_avc = self.mem.anon_vmas[anon_vma].first_avc, avc
        if owner:
            self.mem.vmas[vma].anon_vma = anon_vma

    def anon_vmas_of(self, vma):
        """The anon_vmas that a vma is linked to."""
        found = []
        avc = int(self.mem.vmas[vma].first_avc)
        while avc:
            found.append(int(self.mem.avcs[avc].anon_vma))
            avc = int(self.mem.avcs[avc].next_of_vma)
        return found

    def unlink_vma(self, vma):
        """Take a vma out of the reverse map and free its row."""
        mem = self.mem
        row = mem.vmas[vma]
        if row.mapping:
            unchain(mem.mappings, int(row.mapping), "first_vma", mem.vmas, "next_in_mapping", vma)
        avc = int(row.first_avc)
        while avc:
            link = mem.avcs[avc]
            unchain(mem.anon_vmas, int(link.anon_vma), "first_avc", mem.avcs, "next_of_anon_vma", avc)
            self._free_rows["avcs"].append(avc)
            avc = int(link.next_of_vma)
        self._free_rows["vmas"].append(vma)

    def free_mm(self, mm):
        free_pgtables(self.table, mm)
        self.mem.mms[mm].pgd = 0
        self._free_rows["mms"].append(mm)

    # --- checks -----------------------------------------------------------------------------------------------

    def check_idle(self):
        """Busy while a migration runs: what others do then is an Event between two of its steps."""
        if self._running:
            raise Busy("a migration is running; what others do meanwhile is an offload.Event placed between its steps")

    def check_nid(self, nid):
        if isinstance(nid, bool) or not isinstance(nid, (int, np.integer)) or not 0 <= nid < len(self.mem.nodes):
            raise InvalidInput(f"node {nid!r} is not there; this machine has nodes 0 to {len(self.mem.nodes) - 1}")
        if self.mem.nodes.nr_pages[nid] == 0:
            raise InvalidInput(f"node {nid} has no memory; use another")

    def check_not_lost(self, folios, nid):
        """DeviceLost if the target or one of the folios lies on a node that is lost with its device."""
        if nid in self.frames.lost or np.isin(self.mem.folios.nid[folios], self.frames.lost).any():
            raise self.frames.loss()

    def check_frames(self, what):
        if self.frames is None:
            raise NotSupported(f"this machine is metadata only (placement 'nowhere'): it cannot {what}")

    @contextlib.contextmanager
    def migrator(self, migrator, reasons="all"):
        """Have ``migrator`` on duty inside a with block."""
        self.register(migrator, reasons)
        try:
            yield migrator
        finally:
            self.unregister(migrator)


PLACES = {"host": PLACE_HOST, "pinned": PLACE_PINNED, "device": PLACE_DEVICE, "nowhere": PLACE_NOWHERE}
LOG_ROWS = 1 << 16
"""Of the frame log of a machine that needs one, at least."""


def build_frames(nodes, config, nr_pages):
    """The memory of nodes given as NODE_DTYPE records: Frames for all where they are of one kind that the CPU reaches, else
    NodeFrames; None where there is none."""
    placements = {given.placement for given in config.nodes if given.pages} or {config.nodes[0].placement}
    if "nowhere" in placements:
        return None
    if len(placements) == 1 and "device" not in placements:
        return Frames(nr_pages, *placements)
    return NodeFrames([(int(node.start_pfn), given.pages, given.placement) for node, given in zip(nodes, config.nodes)])


def node_config(node, placement):
    """A NodeConfig from a size ("1G"), a number of pages, or itself."""
    if isinstance(node, NodeConfig):
        return node
    return NodeConfig(node if isinstance(node, int) and not isinstance(node, bool) else str(node), placement=placement)


def unchain(heads, head, first, links, following, which):
    """Take ``which`` out of the singly linked list that begins at ``heads[head][first]``."""
    at = int(heads[head][first])
    if at == which:
        heads[head][first] = links[which][following]
        return
    while int(links[at][following]) != which:
        at = int(links[at][following])
    links[at][following] = links[which][following]


# --- entries into compiled code -------------------------------------------------------------------------------

@jit_entry
def isolate_folios(mem_table, pfns, first, last, nr_done):
    """Isolate folios ``first`` .. ``last - 1`` with NR_ISOLATED, in order, up to one that cannot be: its position, else ``last``.

    ``nr_done`` gets that too, while it runs.
    """
    mem = unpack(mem_table)
    for i in range(first, last):
        nr_done[0] = i
        if i + 16 < len(pfns):
            prefetch_record(mem.folios, pfns[i + 16])
        if mem.folios[pfns[i]].refcount == 0:
            return i
        if mem.folios[pfns[i]].page_flags & PG_movable_ops:
            if not isolate_movable_ops_page(mem, pfns[i]):
                return i
            continue
        if not isolate_folio(mem, pfns[i]):
            return i
    nr_done[0] = last
    return last


@jit_entry
def putback_folios(mem_table, pfns):
    mem = unpack(mem_table)
    for i in range(len(pfns)):
        if mem.folios[pfns[i]].page_flags & PG_movable_ops:
            putback_movable_ops_page(mem, pfns[i])
        elif mem.folios[pfns[i]].page_flags & PG_hugetlb:
            folio_putback_hugetlb(mem, pfns[i])
        else:
            folio_putback_lru(mem, pfns[i])


@jit_entry
def reserve_page(mem_table, pfn):
    """Make a page-cache page one of the kernel's image: reserved, on no LRU list."""
    mem = unpack(mem_table)
    lru_add_drain(mem)
    lru_stat_add(mem, pfn, -1)
    folio = mem.folios[pfn]
    folio.page_flags = folio.page_flags & ~PG_lru | PG_reserved
    folio.refcount += 1


@jit_entry
def drain(mem_table):
    lru_add_drain(unpack(mem_table))


@jit_entry
def drain_node(mem_table, nid):
    drain_pages(unpack(mem_table), nid)


@jit_entry
def lookup_folios(mem_table, mm, addresses, out):
    """Head pfn of the folio mapped at each address, or 0."""
    mem = unpack(mem_table)
    for i in range(len(addresses)):
        entry, value, page = lookup_page(mem, mm, addresses[i])
        out[i] = page_folio(mem, page) if page else 0
