"""The independent judge: migrate_pages() once more, naive and in plain Python, written from the rules alone.

Sources are spec/migrate.md (sections 1 to 21 and 27) and spec/offload.md; section numbers below are of migrate.md unless
"offload.md" is said. Nothing here was taken from offload/migrate, nothing is imported from offload: lists are Python lists,
a folio is an object, the pseudocode of the rules is followed line by line, and functions carry the kernel's names.

Input is a folio-level scenario (the JSON object of a file), output the result object of each call. Contents are version
numbers, one per base page: a write makes new ones, a copy hands them on, and ``data_ok`` compares them with what was
last written. A node has a number of free pages and no addresses, so a target allocation fails when the node has fewer
free pages than asked for; where those pages lie is not modelled.

What the rules leave open, and how it is read here:

* The head page of a folio keeps the folio's other people (references to come, a copy error) when it is split; the target
  allocation ("fail_all") and the owner's callback are the same for every piece.
* Unmapped pages of a partially mapped folio are its last ones, pages filled with zeros its first ones.
* A per-CPU LRU batch holds 31 folios (PAGEVEC_SIZE) and is emptied at once by a large folio.
* References that go after n failed move attempts are dropped as the n-th one fails.
* Somebody who writes does it once, at the first batch copy (or flush) of a batch that has the folio unmapped.
* ``fails_after`` n is not reached by a batch of n folios or fewer.
* The owner of a movable_ops page copies its contents; ``copies`` counts the copies of the core alone.
"""

import dataclasses
import itertools

__all__ = ("Hang", "run_reference")

EIO, EAGAIN, ENOMEM, EBUSY, EINVAL, EOPNOTSUPP, EHWPOISON = 5, 11, 12, 16, 22, 95, 133
ERRNOS = {"ok": 0, "EPERM": 1, "ENOENT": 2, "EIO": 5, "EAGAIN": 11, "ENOMEM": 12, "EFAULT": 14, "EBUSY": 16, "EINVAL": 22,
          "EOPNOTSUPP": 95, "EHWPOISON": 133}
ASYNC, SYNC_LIGHT, SYNC = "MIGRATE_ASYNC", "MIGRATE_SYNC_LIGHT", "MIGRATE_SYNC"
HPAGE_PMD_ORDER = 9
PAGEVEC_SIZE = 31
GUP_PIN_COUNTING_BIAS = 1024
V5_REASONS = ("compaction", "syscall_or_cpuset", "demotion", "numa_misplaced")
HUGETLB_FALLBACK_REASONS = ("memory_hotplug", "memory_failure", "syscall_or_cpuset", "mempolicy_mbind")
ZERO = 0                            # the version of a page of zero bytes
POISON = -1                         # what lies in a fresh frame


class Hang(Exception):
    """The kernel would sleep for ever: a lock, or writeback, that nobody ends."""


@dataclasses.dataclass
class Stats:
    """The six counters of a call (section 19)."""

    nr_succeeded: int = 0
    nr_failed_pages: int = 0
    nr_thp_succeeded: int = 0
    nr_thp_failed: int = 0
    nr_thp_split: int = 0
    nr_split: int = 0


@dataclasses.dataclass(eq=False)
class Named:
    """One name of the scenario: the entry that describes it, what was last written to it, and the folios that hold it."""

    name: str
    given: dict
    order: int
    written: list                   # versions, per base page
    folios: list = dataclasses.field(default_factory=list)
    splits: int = 0                 # attempts to split it so far
    callbacks: int = 0              # calls of its owner's callback so far

    def scripted(self, key, done):
        """The outcome of attempt number ``done`` of a scripted list, or None without a list; the last repeats."""
        words = self.given.get(key)
        return None if words is None else -ERRNOS[words[min(done, len(words) - 1)]]


@dataclasses.dataclass(eq=False)
class Folio:
    """A folio (section 2): only what the rules ask for."""

    named: Named
    first: int                      # index of its first base page in the named one
    order: int
    node: int
    kind: str = "anon"
    refcount: int = 0
    pmd_maps: int = 0               # PMDs that map the whole folio, each one reference
    pte_maps: list = dataclasses.field(default_factory=list)        # PTEs, per base page, each one reference
    pmd_entries: int = 0            # migration entries that stand for it
    pte_entries: list = dataclasses.field(default_factory=list)
    poisoned_entries: int = 0       # hwpoison entries that its page tables got instead
    exclusive: bool = False         # AnonExclusive
    mapping: str | None = None      # "anon", "file" or None
    swapcache: bool = False
    private: bool = False
    uptodate: bool = True
    dirty: bool = False
    pte_dirty: bool = False
    writeback: str = "no"
    lock: str = "no"                # somebody else's hold of the folio lock
    mlocked: bool = False
    pincount: int = 0
    hwpoison: bool = False
    deferred: bool = False          # on the deferred-split list
    partially_mapped: bool = False
    contents: list = dataclasses.field(default_factory=list)
    # references of somebody else: how many are held, how many move attempts have failed, what is still to come
    refs_held: int = 0
    failed_moves: int = 0
    refs_to_come: bool = False
    will_write: bool = False
    poison_to_come: bool = False
    copy_error: bool = False
    # of a destination
    old_state: set = dataclasses.field(default_factory=set)         # migrate_info: WAS_MAPPED, WAS_MLOCKED
    content_copied: bool = False    # the mark of v6
    has_copy: bool = False          # a copy was completed into it

    @property
    def nr(self):
        return 1 << self.order

    @property
    def name(self):
        return self.named.name if self.order == self.named.order else f"{self.named.name}/{self.first}"

    @property
    def anon(self):
        return self.kind in ("anon", "ksm", "hugetlb")

    @property
    def hugetlb(self):
        return self.kind == "hugetlb"

    @property
    def movable_ops(self):
        return self.kind == "movable_ops"

    @property
    def large(self):
        return self.order > 0

    @property
    def is_thp(self):
        return self.order >= HPAGE_PMD_ORDER and not self.hugetlb

    @property
    def mapcount(self):
        return self.pmd_maps + sum(self.pte_maps)

    @property
    def mapped(self):
        return self.mapcount > 0

    @property
    def vma_mlocked(self):
        return self.named.given.get("mlocked", False)

    @property
    def aops(self):
        return self.named.given.get("aops", "migrate_folio" if self.kind == "shmem" else "filemap")


def expected(f):
    """folio_expected_ref_count() (section 3): references that caches, metadata and page tables explain."""
    n = f.nr if f.swapcache else 0
    if not f.anon:
        if f.mapping is not None:
            n += f.nr
        if f.private:
            n += 1
    return n + f.mapcount


class Reference:
    """A machine with the folios of a scenario on a list, and migrate_pages()."""

    def __init__(self, scenario):
        machine = scenario.get("machine", {})
        self.kernel = scenario.get("kernel", "7.3")
        self.thp_migration_supported = machine.get("thp_migration", True)
        self.nr_max_batched = machine.get("batch_pages", 512)
        self.free = [node["pages"] for node in machine.get("nodes", [{"pages": 4096}, {"pages": 4096}])]
        self.offload = scenario.get("offload")
        self.protocol = None if self.offload is None else self.offload.get("protocol", "v6")
        self.versions = itertools.count(1)
        self.lru_batch = []
        self.written = set()            # names of folios into which a holder of references has written
        self.named = []
        self.list = []
        for given in scenario["folios"]:
            names = [given["name"]] if given.get("count", 1) == 1 else \
                [f"{given['name']}[{k}]" for k in range(given["count"])]
            for name in names:
                self.list.append(self.isolated_folio(name, given))

    # --- the machine of the scenario (scenario-format.md) -----------------------------------------------------

    def isolated_folio(self, name, given):
        """A folio as its entry describes it, with the list's reference."""
        kind = given.get("kind", "anon")
        order = given.get("order", HPAGE_PMD_ORDER if kind == "hugetlb" else 0)
        nr = 1 << order
        freed, truncated = given.get("freed", False), given.get("truncated", False)
        maps = given.get("maps", 0 if freed or truncated or kind == "movable_ops" else 1)
        gone, zeros = given.get("partially_mapped", 0), given.get("zero_filled", 0)
        named = Named(name, given, order, [ZERO if i < zeros else next(self.versions) for i in range(nr)])
        f = Folio(named, 0, order, given.get("node", 0), kind)
        f.contents = list(named.written)
        f.pte_maps, f.pte_entries = [0] * nr, [0] * nr
        if order >= HPAGE_PMD_ORDER and kind in ("anon", "hugetlb") and not gone:
            f.pmd_maps = maps
        else:
            f.pte_maps = [maps if i < nr - gone else 0 for i in range(nr)]
        f.exclusive = kind in ("anon", "hugetlb") and maps == 1
        f.swapcache = given.get("swapcache", False)
        if f.anon:
            f.mapping = "anon"
        elif kind != "movable_ops" and not freed and not truncated and not f.swapcache:
            f.mapping = "file"
        f.private = truncated or given.get("private", "no") != "no"
        f.uptodate = given.get("uptodate", True)
        f.dirty, f.pte_dirty = given.get("dirty", False), given.get("pte_dirty", False)
        f.writeback, f.lock = given.get("writeback", "no"), given.get("locked", "no")
        f.mlocked = given.get("mlocked", False)
        f.hwpoison, f.poison_to_come = given.get("hwpoison") == "before", given.get("hwpoison") == "after_unmap"
        f.copy_error = given.get("copy_error", False)
        f.deferred = f.partially_mapped = gone > 0
        f.refcount = 1 if freed else 1 + (1 if f.movable_ops else expected(f))
        if given.get("pinned"):
            f.pincount = 1
            f.refcount += 1 if order else GUP_PIN_COUNTING_BIAS
        if given.get("extra_refs"):
            f.will_write = given.get("extra_refs_write", False)
            f.refs_to_come = given.get("extra_refs_from", "start") == "batch_copy"
            if not f.refs_to_come:
                self.take_extra_refs(f)
        self.free[f.node] -= nr
        named.folios.append(f)
        self.named.append(named)
        return f

    def put(self, f, refs=1):
        """folio_put_refs(): the last reference frees the folio."""
        f.refcount -= refs
        assert f.refcount >= 0, f.name
        if f.refcount == 0:
            self.free[f.node] += f.nr

    # --- other people -----------------------------------------------------------------------------------------

    def trylock(self, f):
        return f.lock == "no"

    def lock(self, f):
        """Sleep on the folio lock; its holder lets go then, or never."""
        if f.lock == "forever":
            raise Hang(f"{f.name} is locked for ever")
        f.lock = "no"

    def wait_writeback(self, f):
        if f.writeback == "forever":
            raise Hang(f"{f.name} is under writeback for ever")
        f.writeback = "no"

    def take_extra_refs(self, f):
        f.refs_to_come = False
        f.refs_held = f.named.given["extra_refs"]
        f.refcount += f.refs_held

    def others_at_batch_copy(self, f):
        """Right after the batch copy, or the flush where there is none: references are taken, their holders write."""
        if f.refs_to_come:
            self.take_extra_refs(f)
        if f.will_write and f.refs_held:
            f.will_write = False
            self.written.add(f.name)
            f.contents = [next(self.versions) for _ in f.contents]
            f.named.written[f.first:f.first + f.nr] = f.contents

    def drop_extra_refs(self, f):
        """They are dropped after ``extra_refs_gone_after`` failed move attempts."""
        gone_after = f.named.given.get("extra_refs_gone_after")
        if f.refs_held and gone_after is not None and f.failed_moves >= gone_after:
            f.refcount -= f.refs_held
            f.refs_held = 0

    def poison_once_unmapped(self, f):
        if f.poison_to_come:
            f.poison_to_come, f.hwpoison = False, True

    def contains_hwpoison(self, f):
        """The pre-checks of MM73 (sections 5, 8, 10); no other rule set has them."""
        return self.kernel == "mm-next" and f.hwpoison

    # --- targets (section 23) ---------------------------------------------------------------------------------

    def get_new(self, src):
        """alloc_migration_target(): a new folio of the same order on the target node, or None."""
        self.allocated += 1
        alloc = src.named.given.get("alloc", "ok")
        if alloc == "fail_all" or alloc == "fail" and src.order == src.named.order:
            return None
        nodes = [self.target]
        if src.hugetlb and self.reason in HUGETLB_FALLBACK_REASONS:
            nodes += [node for node in range(len(self.free)) if node != self.target]
        for node in nodes:
            if self.free[node] >= src.nr:
                self.free[node] -= src.nr
                return Folio(src.named, src.first, src.order, node, src.kind, refcount=1, contents=[POISON] * src.nr,
                             pte_maps=[0] * src.nr, pte_entries=[0] * src.nr)
        return None

    def put_new(self, dst):
        """A target that is not used: handed back, and the copy in it with it."""
        self.returned += 1
        if dst.has_copy:
            self.count_copy("discarded", dst)
        self.put(dst)

    # --- the reverse map (section 16) -------------------------------------------------------------------------

    def try_to_migrate(self, src):
        """Page-table entries become migration entries; a pinned exclusive page refuses and everything stays.

        On the way a folio mapped by PTEs becomes partially mapped, and is queued for deferred split (step 2).
        """
        if not src.mapped:
            return
        src.dirty |= src.pte_dirty                                                    # step 4
        maybe_pinned = src.pincount > 0 if src.large else src.refcount >= GUP_PIN_COUNTING_BIAS
        if src.exclusive and maybe_pinned:                                            # step 5
            return
        by_ptes = src.pmd_maps == 0
        entries = src.mapcount
        if src.hwpoison:                                                              # step 6
            src.poisoned_entries += entries
        else:                                                                         # step 7
            src.pmd_entries = src.pmd_maps
            src.pte_entries = src.pte_maps
        src.pmd_maps, src.pte_maps = 0, [0] * src.nr
        src.mlocked = False
        src.refcount -= entries
        if by_ptes and src.kind == "anon" and src.order > 1:
            src.deferred = src.partially_mapped = True

    def remove_migration_ptes(self, src, x):
        """Migration entries of ``src`` become entries for ``x`` (``src`` itself or its destination)."""
        entries = src.pmd_entries + sum(src.pte_entries)
        x.pmd_maps += src.pmd_entries
        x.pte_maps = [maps + one for maps, one in zip(x.pte_maps, src.pte_entries)]
        src.pmd_entries, src.pte_entries = 0, [0] * src.nr
        x.refcount += entries
        if entries and x.vma_mlocked:
            x.mlocked = True

    # --- LRU (sections 10, 20) --------------------------------------------------------------------------------

    def folio_add_lru(self, f):
        """The per-CPU batch holds a reference until it is emptied."""
        f.refcount += 1
        self.lru_batch.append(f)
        if len(self.lru_batch) == PAGEVEC_SIZE or f.large:
            self.lru_add_drain()

    def lru_add_drain(self):
        for f in self.lru_batch:
            self.put(f)
        self.lru_batch = []

    # --- splitting (section 11) -------------------------------------------------------------------------------

    def try_split_folio(self, f, split, mode):
        """try_split_folio() (section 11): 0 with the pieces on ``split``, the head page last, or a negative errno."""
        if mode == ASYNC:
            if not self.trylock(f):
                return -EAGAIN
        else:
            self.lock(f)
        rc = f.named.scripted("split", f.named.splits)
        f.named.splits += 1
        if rc is None:
            rc = self.may_split(f)
        if rc == 0:
            head, *tails = self.split_folio(f)
            split += tails if self.kernel != "6.12" else reversed(tails)
            split.append(head)
        return rc

    def may_split(self, f):
        """The result codes of a split (section 11)."""
        if f.writeback != "no":
            return -EBUSY
        if f.anon:
            if not f.mapped:
                return -EBUSY                       # the anon_vma is gone
        else:
            if f.mapping is None:
                return -EBUSY                       # truncated
            if f.private and not self.release_private(f):
                return -EBUSY
        if f.refcount != expected(f) + 1:
            return -EAGAIN
        return 0

    def split_folio(self, f):
        """The pieces, by index, each with one reference of the list's (section 11, "effects that matter later")."""
        pieces = []
        dirty = f.dirty or f.mapped and f.pte_dirty
        for i in range(f.nr):
            piece = dataclasses.replace(
                f, first=f.first + i, order=0, pmd_maps=0, pte_maps=[0], pte_entries=[0], contents=[f.contents[i]],
                dirty=dirty, pte_dirty=False, deferred=False, partially_mapped=False, old_state=set(), mlocked=False)
            if f.anon:
                maps = f.pmd_maps + f.pte_maps[i]
                if maps and f.contents[i] == ZERO and not f.vma_mlocked:
                    maps = 0                        # the shared zero page is mapped instead
                piece.pte_maps = [maps]
                piece.mlocked = maps > 0 and f.vma_mlocked
            if i > 0:
                piece.refs_held, piece.refs_to_come, piece.will_write, piece.copy_error = 0, False, False, False
            piece.refcount = 1 + expected(piece) + piece.refs_held
            pieces.append(piece)
        at = f.named.folios.index(f)
        f.named.folios[at:at + 1] = pieces
        return pieces

    def release_private(self, f):
        """filemap_release_folio(), try_to_free_buffers(): whether the private data, and its reference, are gone now."""
        if f.named.given.get("private") == "unreleasable":
            return False
        f.private = False
        f.refcount -= 1
        return True

    # --- the call (section 4) ---------------------------------------------------------------------------------

    def call(self, call):
        """The result object of one call."""
        mode, self.reason = call.get("mode", ASYNC), call.get("reason", "compaction")
        self.target, self.pf_memalloc = call.get("target", 1), call.get("pf_memalloc", False)
        self.allocated = self.returned = self.tlb_flushes = self.nr_isolated = 0
        self.copies, self.by_name = {"folios": 0, "batched": 0, "discarded": 0}, {}
        st = Stats()
        rc = self.migrate_pages(self.list, mode, st)
        words = f"mode={mode} reason={self.reason}"
        return {
            "rc": rc, "left": [f.name for f in self.list], "stats": dataclasses.asdict(st),
            "targets": {"allocated": self.allocated, "returned": self.returned}, "nr_isolated": self.nr_isolated,
            "tlb_flushes": self.tlb_flushes, "copies": self.copies,
            "vmstat": {"pgmigrate_success": st.nr_succeeded, "pgmigrate_fail": st.nr_failed_pages,
                       "thp_migration_success": st.nr_thp_succeeded, "thp_migration_fail": st.nr_thp_failed,
                       "thp_migration_split": st.nr_thp_split},
            "trace": [f"mm_migrate_pages_start: {words}",
                      f"mm_migrate_pages: nr_succeeded={st.nr_succeeded} nr_failed={st.nr_failed_pages} "
                      f"nr_thp_succeeded={st.nr_thp_succeeded} nr_thp_failed={st.nr_thp_failed} "
                      f"nr_thp_split={st.nr_thp_split} nr_split={st.nr_split} {words}"],
            "folios": {f.name: self.facts(f) for named in self.named for f in named.folios if f.refcount > 0},
            "data_ok": all(self.is_right(f) for named in self.named for f in named.folios if f.refcount > 0)}

    @staticmethod
    def is_right(f):
        return f.contents == f.named.written[f.first:f.first + f.nr]

    def facts(self, f):
        return {"node": f.node, "refcount": f.refcount, "mapcount": f.mapcount, "dirty": f.dirty,
                "swapcache": f.swapcache, "mlocked": f.mlocked,
                "present": not (f.pmd_entries or any(f.pte_entries) or f.poisoned_entries),
                "data_ok": self.is_right(f), "written": f.name in self.written, **self.of(f)}

    def migrate_pages(self, from_, mode, st):
        """migrate_pages() (section 4). What is left stays on ``from_``."""
        ret, split = [], []
        total = self.migrate_hugetlbs(from_, mode, st, ret)
        while total >= 0:
            pages, batch = 0, []
            while from_:
                f = from_.pop(0)
                if f.hugetlb:
                    ret.append(f)
                    continue
                batch.append(f)
                pages += f.nr
                if pages >= self.nr_max_batched:
                    break
            if mode == ASYNC:
                rc = self.migrate_pages_batch(batch, ASYNC, ret, split, st, passes=10)
            else:
                rc = self.migrate_pages_sync(batch, mode, ret, split, st)
            ret += batch
            if rc < 0:
                total = rc
                ret += split
                break
            if split:
                self.migrate_pages_batch(split, ASYNC, ret, None, st, passes=1)
                ret += split
                split = []
            total += rc
            if not from_:
                break
        from_[0:0] = ret
        return total if from_ else 0

    # --- hugetlb (section 5) ----------------------------------------------------------------------------------

    def migrate_hugetlbs(self, from_, mode, st, ret):
        """migrate_hugetlbs() (section 5): folios not migrated, or -ENOMEM."""
        retry, failed, retry_pages = 1, 0, 0
        for p in range(10):
            if not retry:
                break
            retry = retry_pages = 0
            for f in [f for f in from_ if f.hugetlb]:
                if not f.named.given.get("migratable", True):
                    failed += 1
                    st.nr_failed_pages += f.nr
                    from_.remove(f)
                    ret.append(f)
                    continue
                rc = self.unmap_and_move_huge_page(f, mode, force=p > 2)
                if rc == -ENOMEM:
                    st.nr_failed_pages += f.nr + retry_pages
                    return -ENOMEM
                if rc == -EAGAIN:
                    retry += 1
                    retry_pages += f.nr
                    continue
                from_.remove(f)
                if rc == 0:
                    st.nr_succeeded += f.nr
                else:
                    failed += 1
                    st.nr_failed_pages += f.nr
                    ret.append(f)
        st.nr_failed_pages += retry_pages
        return failed + retry

    def unmap_and_move_huge_page(self, src, mode, force):
        """unmap_and_move_huge_page() (section 5), never batched; the caller does the moves between lists."""
        if src.refcount == 1:
            self.put(src)
            return 0
        dst = self.get_new(src)
        if dst is None:
            return -ENOMEM
        rc = self.hugetlb_attempt(dst, src, mode, force)
        if rc == 0:
            self.put(src)
            self.put(dst)
        else:
            self.put_new(dst)
        return rc

    def hugetlb_attempt(self, dst, src, mode, force):
        """The part of it between the allocation and the lists."""
        if not self.trylock(src):
            if not force or mode != SYNC:
                return -EAGAIN
            self.lock(src)
        if src.named.given.get("orphan_subpool"):
            return -EBUSY
        if self.contains_hwpoison(src):
            return -EHWPOISON
        rc = -EAGAIN
        was_mapped = src.mapped
        if was_mapped:
            self.try_to_migrate(src)
        if not src.mapped:
            self.poison_once_unmapped(src)
            self.drop_extra_refs(src)
            rc = -EHWPOISON if self.contains_hwpoison(src) else self.move_to_new_folio(dst, src, mode, False)
            if rc:
                src.failed_moves += 1
                self.drop_extra_refs(src)
        if was_mapped and not src.mapped:
            self.remove_migration_ptes(src, dst if rc == 0 else src)
        return rc

    # --- batches (sections 6, 7; offload.md section 1) --------------------------------------------------------

    def wants(self):
        """offload.md: whether this batch is offered to the migrator, by reason."""
        if self.protocol is None:
            return False
        reasons = self.offload.get("reasons", ["all"])
        wanted = "all" in reasons or self.reason in reasons
        return wanted and (self.protocol != "v5" or self.reason in V5_REASONS)

    def eligible(self, src):
        """offload.md: movable_ops pages never join the batch list; v6 asks for explained references only."""
        if src.movable_ops:
            return False
        return self.protocol != "v6" or src.refcount == expected(src) + 1

    def migrate_pages_batch(self, from_, mode, ret, split, st, passes):
        """migrate_pages_batch() (section 6), with the batch copy of offload.md section 1."""
        offload = self.wants()
        batch_list, single_list = [], []            # pairs (src, dst)
        nosplit = self.reason == "numa_misplaced"
        retry = thp_retry = 1
        failed = retry_pages = saved = 0
        jump = None
        for _ in range(passes):                     # phase 1: unmap
            if not retry or jump:
                break
            retry = thp_retry = retry_pages = 0
            for f in list(from_):
                thp = f.is_thp
                if f.nr > 2 and f.deferred and f.partially_mapped:                    # (a)
                    if self.try_split_folio(f, split, mode) == 0:
                        from_.remove(f)
                        failed += 1
                        st.nr_thp_failed += thp
                        st.nr_thp_split += thp
                        st.nr_split += 1
                        continue
                if thp and not self.thp_migration_supported:                          # (b)
                    failed += 1
                    st.nr_thp_failed += 1
                    from_.remove(f)
                    if self.try_split_folio(f, split, mode) == 0:
                        st.nr_thp_split += 1
                        st.nr_split += 1
                        continue
                    st.nr_failed_pages += f.nr
                    ret.append(f)
                    continue
                if f.refcount == 1 and (not f.movable_ops or self.kernel == "6.12"):   # (c)
                    from_.remove(f)
                    self.folio_done(f)
                    st.nr_succeeded += f.nr
                    st.nr_thp_succeeded += thp
                    continue
                rc, dst = self.migrate_folio_unmap(f, mode)                           # (d)
                if rc == 0:
                    from_.remove(f)
                    (batch_list if offload and self.eligible(f) else single_list).append((f, dst))
                    if batch_list and batch_list[-1][0] is f:
                        self.of(f)["joined"] = True
                elif rc == -EAGAIN:
                    retry += 1
                    thp_retry += thp
                    retry_pages += f.nr
                elif rc == -ENOMEM:
                    failed += 1
                    st.nr_thp_failed += thp
                    if f.large and not nosplit:
                        s = self.try_split_folio(f, split, mode)
                        if s == 0:
                            from_.remove(f)
                            st.nr_thp_split += thp
                            st.nr_split += 1
                            continue
                        if self.reason == "longterm_pin" and s == -EAGAIN:
                            retry += 1
                            thp_retry += thp
                            retry_pages += f.nr
                            failed -= 1
                            st.nr_thp_failed -= thp
                            continue
                    st.nr_failed_pages += f.nr + retry_pages
                    st.nr_thp_failed += thp_retry
                    saved = -ENOMEM
                    jump = "move" if batch_list or single_list else "out"
                    break
                else:
                    from_.remove(f)
                    ret.append(f)
                    failed += 1
                    st.nr_thp_failed += thp
                    st.nr_failed_pages += f.nr
        if jump is None:
            failed += retry
            st.nr_thp_failed += thp_retry
            st.nr_failed_pages += retry_pages
        if jump == "out":
            return saved
        self.tlb_flushes += 1                       # phase 2: flush, copy, move
        copied = self.offload_copy(batch_list) == 0 if batch_list else False
        for f, _ in batch_list + single_list:
            self.others_at_batch_copy(f)
        retry = 1
        for _ in range(passes):
            if not retry:
                break
            retry = thp_retry = retry_pages = 0
            for pairs, all_copied in ((batch_list, copied), (single_list, False)):
                for f, dst in list(pairs):
                    rc = self.migrate_folio_move(f, dst, mode, ret, all_copied)
                    if rc == -EAGAIN:
                        retry += 1
                        thp_retry += f.is_thp
                        retry_pages += f.nr
                        continue
                    pairs.remove((f, dst))
                    if rc == 0:
                        st.nr_succeeded += f.nr
                        st.nr_thp_succeeded += f.is_thp
                    else:
                        failed += 1
                        st.nr_thp_failed += f.is_thp
                        st.nr_failed_pages += f.nr
        failed += retry
        st.nr_thp_failed += thp_retry
        st.nr_failed_pages += retry_pages
        for f, dst in batch_list + single_list:     # cleanup
            self.undo_src(f, dst.old_state)
            ret.append(f)
            self.undo_dst(dst)
        return saved or failed

    def migrate_pages_sync(self, from_, mode, ret, split, st):
        """migrate_pages_sync() (section 7)."""
        a, back = Stats(), []
        rc = self.migrate_pages_batch(from_, ASYNC, back, split, a, passes=3)
        st.nr_succeeded += a.nr_succeeded
        st.nr_thp_succeeded += a.nr_thp_succeeded
        st.nr_thp_split += a.nr_thp_split
        st.nr_split += a.nr_split
        if rc < 0:
            st.nr_failed_pages += a.nr_failed_pages
            st.nr_thp_failed += a.nr_thp_failed
            ret += back
            return rc
        st.nr_thp_failed += a.nr_thp_split
        failed = a.nr_split
        from_ += back
        while from_:
            one = [from_.pop(0)]
            rc = self.migrate_pages_batch(one, mode, ret, split, st, passes=7)
            ret += one
            if rc < 0:
                return rc
            failed += rc
        return failed

    def offload_copy(self, pairs):
        """The migrator's batch copy, with the faults of the scenario (offload.md sections 2 and 3): 0 or -errno.

        All migrators are one here, except that dcbm does not notice poison.
        """
        if self.offload.get("declines"):
            return -EOPNOTSUPP
        limit = self.offload.get("fails_after", len(pairs))
        fails = limit < len(pairs)
        rc, copied = 0, []
        for src, dst in pairs[:limit]:
            rc = self.folio_mc_copy(dst, src, detects_poison=self.offload.get("migrator") != "dcbm")
            if rc:
                break
            self.count_copy("batched", src)
            copied.append(dst)
        if fails:
            rc = -EIO
        for dst in copied:
            if self.protocol == "v6" and not (fails and self.offload.get("marks", "finished") == "none"):
                dst.content_copied = True
        return rc

    # --- one folio: unmap (section 8) -------------------------------------------------------------------------

    def migrate_folio_unmap(self, src, mode):
        """migrate_folio_unmap() (section 8): (0, dst), or (-errno, None) with ``src`` as it was."""
        if self.contains_hwpoison(src):
            return -EHWPOISON, None
        dst = self.get_new(src)
        if dst is None:
            return -ENOMEM, None
        rc = self.unmap_attempt(dst, src, mode)
        if rc == 0:
            self.poison_once_unmapped(src)
            return 0, dst
        self.undo_dst(dst)
        return rc, None

    def unmap_attempt(self, dst, src, mode):
        """The part of it after the allocation."""
        if not self.trylock(src):
            if mode == ASYNC or self.pf_memalloc or mode == SYNC_LIGHT and not src.uptodate:
                return -EAGAIN
            self.lock(src)
        dst.old_state = {"WAS_MLOCKED"} if src.mlocked else set()
        if src.writeback != "no":
            if mode != SYNC:
                return -EBUSY
            self.wait_writeback(src)
        if src.movable_ops:
            return 0
        if src.mapping is None:
            if src.private:
                self.release_private(src)           # try_to_free_buffers()
                return -EAGAIN
        elif src.mapped:
            self.try_to_migrate(src)
            dst.old_state.add("WAS_MAPPED")
        return 0 if not src.mapped else -EAGAIN     # a page that refused has kept all of its entries

    # --- one folio: undo, done (section 9) --------------------------------------------------------------------

    def undo_src(self, src, state):
        """migrate_folio_undo_src(); the caller puts ``src`` on its list."""
        if "WAS_MAPPED" in state:
            self.remove_migration_ptes(src, src)

    def undo_dst(self, dst):
        """migrate_folio_undo_dst()."""
        self.put_new(dst)

    def folio_done(self, src):
        """migrate_folio_done(): NR_ISOLATED and the isolation reference, except where the reason says otherwise."""
        if not src.movable_ops and self.reason != "demotion":
            self.nr_isolated -= src.nr
        if self.reason != "memory_failure":
            self.put(src)

    # --- one folio: move (sections 10, 12 to 15) --------------------------------------------------------------

    def migrate_folio_move(self, src, dst, mode, ret, all_copied):
        """migrate_folio_move() (section 10). ``all_copied``: the bool of v4, v5 and flags. Undone unless 0 or -EAGAIN."""
        self.drop_extra_refs(src)
        state = dst.old_state
        if self.contains_hwpoison(src):
            rc = -EHWPOISON
        elif src.movable_ops:
            rc = self.owner_migrate_page(dst, src)
        else:
            was_queued, was_partial = src.order > 1 and src.deferred, src.partially_mapped
            rc = self.move_to_new_folio(dst, src, mode, all_copied)
            if rc == 0:
                if was_queued:
                    dst.deferred, dst.partially_mapped = True, was_partial
                self.folio_add_lru(dst)
                if "WAS_MLOCKED" in state:
                    self.lru_add_drain()
                if "WAS_MAPPED" in state:
                    self.remove_migration_ptes(src, dst)
        if rc == 0:
            self.put(dst)                           # the allocation reference
            self.folio_done(src)
            return 0
        src.failed_moves += 1
        self.drop_extra_refs(src)
        dst.content_copied = False                  # v6: record() overwrites the word; undo clears it
        if rc != -EAGAIN:
            self.undo_src(src, state)
            ret.append(src)
            self.undo_dst(dst)
        return rc

    def owner_migrate_page(self, dst, src):
        """The callback of a movable_ops page's owner (section 12): its result is used literally."""
        rc = src.named.scripted("callback", src.named.callbacks) or 0
        src.named.callbacks += 1
        if rc == 0:
            dst.contents = list(src.contents)
            dst.refcount += 1                       # the owner's
            self.put(src)
            self.arrived(dst, src)
        return rc

    def move_to_new_folio(self, dst, src, mode, all_copied):
        """move_to_new_folio() (section 12)."""
        if src.swapcache or src.mapping == "anon" or src.mapping is None:
            rc = self.migrate_folio(dst, src, all_copied)
        elif src.named.given.get("inaccessible"):
            rc = -EOPNOTSUPP
        elif src.aops == "none":
            rc = self.fallback_migrate_folio(dst, src, mode, all_copied)
        else:
            rc = src.named.scripted("callback", src.named.callbacks) or 0
            src.named.callbacks += 1
            if rc == 0:
                rc = {"migrate_folio": self.migrate_folio, "filemap": self.filemap_migrate_folio,
                      "buffer": self.buffer_migrate_folio, "buffer_norefs": self.buffer_migrate_folio,
                      "secretmem": lambda *_: -EBUSY}[src.aops](dst, src, all_copied)
        if rc == 0:
            if not src.anon:
                src.mapping = None
            self.arrived(dst, src)
        return rc

    def arrived(self, dst, src):
        """``dst`` holds from now on what ``src`` held."""
        dst.has_copy = False
        dst.poisoned_entries = src.poisoned_entries
        folios = src.named.folios
        folios[folios.index(src)] = dst

    def migrate_folio(self, dst, src, all_copied):
        return self.__migrate_folio(dst, src, False, all_copied)

    def filemap_migrate_folio(self, dst, src, all_copied):
        return self.__migrate_folio(dst, src, src.private, all_copied)

    def buffer_migrate_folio(self, dst, src, all_copied):
        """buffer_migrate_folio(), also _norefs: nobody else is at the buffers."""
        if src.refcount != expected(src) + 1:
            return -EAGAIN
        return self.filemap_migrate_folio(dst, src, all_copied)

    def fallback_migrate_folio(self, dst, src, mode, all_copied):
        """fallback_migrate_folio() (section 12). Up to v6.15 a SYNC call writes a dirty folio, and succeeds no more."""
        if self.kernel == "6.12" and mode == SYNC:
            if src.dirty:
                return self.writeout(src)
            if src.mapped:
                return -EAGAIN
        if src.dirty:
            return -EBUSY
        if src.private and not self.release_private(src):
            return -EAGAIN if mode == SYNC else -EBUSY
        return self.migrate_folio(dst, src, all_copied)

    def writeout(self, src):
        """writeout() of 6.12 (section 12): clean and mapped again from now on; writing does not fail."""
        src.dirty = src.pte_dirty = False
        self.remove_migration_ptes(src, src)
        return -EAGAIN

    def __migrate_folio(self, dst, src, take_private, all_copied):
        """__migrate_folio() (section 12), which asks first whether the batch copy was made (offload.md section 1)."""
        copied = all_copied
        if self.protocol == "v6":
            copied, dst.content_copied = dst.content_copied, False
        if src.refcount != expected(src) + 1:
            return -EAGAIN
        if not copied:
            rc = self.folio_mc_copy(dst, src)
            if rc:
                return rc
        self.folio_migrate_mapping(dst, src)
        if take_private:
            src.private, dst.private = False, True
            src.refcount -= 1
            dst.refcount += 1
        self.folio_migrate_flags(dst, src)
        return 0

    def folio_mc_copy(self, dst, src, detects_poison=True):
        """folio_mc_copy() (section 15): 0, or -EHWPOISON. A copy over a completed one throws that away."""
        if src.copy_error and detects_poison:
            return -EHWPOISON
        if dst.has_copy:
            self.count_copy("discarded", src)
        dst.has_copy = True
        dst.contents = list(src.contents)
        self.count_copy("folios", src)
        return 0

    def of(self, f):
        """What the call's result says of the batch copy of one folio."""
        return self.by_name.setdefault(f.name, {"joined": False, "copies": {"folios": 0, "batched": 0, "discarded": 0}})

    def count_copy(self, what, f):
        self.copies[what] += 1
        self.of(f)["copies"][what] += 1

    def folio_migrate_mapping(self, dst, src):
        """__folio_migrate_mapping() (section 13). The freeze cannot fail: nobody else runs here."""
        src.deferred = src.partially_mapped = False
        dst.mapping = src.mapping
        if src.mapping == "file" or src.swapcache:
            dst.swapcache = src.swapcache
            dst.dirty, src.dirty = src.dirty, False
            dst.refcount += src.nr
            src.refcount -= src.nr

    def folio_migrate_flags(self, dst, src):
        """folio_migrate_flags() (section 14), as far as results tell."""
        dst.uptodate = src.uptodate
        dst.dirty = dst.dirty or src.dirty
        src.swapcache = src.private = False


def run_reference(scenario):
    """The results of all calls of a folio-level scenario, one dict each. Hang where the kernel would sleep for ever."""
    machine = Reference(scenario)
    return [machine.call(call) for call in scenario["calls"]]
