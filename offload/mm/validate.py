"""Checks that a machine's books add up: what the kernel would find with VM_BUG_ON and a page_owner scan.

Expensive on purpose; everything is recounted from the page tables, the page caches and the free bitmaps and compared
with what the records say. Between calls only.
"""

import numpy as np

from offload.errors import BrokenInvariant
from offload.mm.memmap import (
    MAPPING_HUGETLB, MAPPING_SHMEM, MAPPING_SWAP, NO_PFN, PG_deferred_list, PG_dirty, PG_hugetlb, PG_hugetlb_migratable,
    PG_hugetlb_temporary, PG_hwpoison, PG_ksm, PG_locked, PG_lru, PG_mlocked, PG_movable_ops,
    PG_movable_ops_isolated, PG_private, PG_reserved, PG_swapbacked, PG_swapcache, PG_unevictable,
)
from offload.mm.node import GUP_PIN_COUNTING_BIAS, NR_ORDERS, PCP_HIGH, WORD_BITS
from offload.mm.pagetable import PTE_EXCLUSIVE, PTE_HUGE, PTE_HWPOISON, PTE_MIGRATION, PTE_PRESENT, PTE_SPECIAL, PTE_SWAP, PTE_WRITE, PTRS
from offload.units import HPAGE_PMD_NR, HPAGE_PMD_ORDER, PAGE_SHIFT

__all__ = ("validate",)


def validate(machine):
    """Raise BrokenInvariant with the pfns (or rows) that disagree, or return None."""
    mem = machine.mem
    free = free_pages_of(mem)
    heads = validate_frames(mem, free)
    entries = leaf_entries(mem)
    validate_entries(mem, entries, free)
    validate_counts(mem, heads, entries, gup_references(machine))
    validate_folios(mem, heads)
    validate_ksm(mem, heads, entries)
    validate_slots(mem, free)
    validate_swap_cache(mem, heads, entries)
    validate_nodes(mem, heads, free)
    validate_hugetlb(mem, heads, entries)


def complain(what, where, hint=""):
    shown = ", ".join(str(int(one)) for one in np.atleast_1d(where)[:8])
    raise BrokenInvariant(f"{what}: {shown}{', ...' if np.size(where) > 8 else ''}{hint}")


def free_pages_of(mem):
    """bool per pfn: lies in a free block or on a per-CPU list. Complains if they overlap or a count is wrong."""
    free = np.zeros(len(mem.folios), np.int8)
    for nid, node in enumerate(mem.nodes):
        total = 0
        for order in range(NR_ORDERS):
            area = mem.free_areas[nid * NR_ORDERS + order]
            words = -(-(int(node.nr_pages) >> order) // WORD_BITS)
            bits = mem.free_bits[area.leaf:area.leaf + words]
            blocks = np.flatnonzero((bits[:, None] >> np.arange(WORD_BITS) & 1).ravel())
            if len(blocks) != area.nr_free:
                complain(f"node {nid}, order {order}: {len(blocks)} free blocks in the bitmap, nr_free", area.nr_free)
            for block in blocks:
                at = int(node.start_pfn) + (int(block) << order)
                free[at:at + (1 << order)] += 1
            total += len(blocks) << order
        if total != node.nr_free_pages:
            complain(f"node {nid}: {total} pages in free blocks, nr_free_pages", node.nr_free_pages)
        listed = mem.pcp[nid * PCP_HIGH:(nid + 1) * PCP_HIGH][:node.pcp_count]
        astray = (listed < node.start_pfn) | (listed >= node.start_pfn + node.nr_pages)
        if len(listed) != node.pcp_count or astray.any():
            complain(f"node {nid}: pages of its per-CPU list, pcp_count {node.pcp_count}, that are not the node's", listed[astray])
        np.add.at(free, listed, 1)
    if (free > 1).any():
        complain("pages are in two free blocks, or free twice", np.flatnonzero(free > 1))
    return free.astype(bool)


def validate_frames(mem, free):
    """Every page of a node is free, or bad, or part of one folio in use or in a hugetlb pool; returns their heads (int64)."""
    owned = np.zeros(len(mem.folios), np.int8)
    heads = np.flatnonzero((mem.folios.refcount != 0) | (mem.folios.page_flags & PG_hugetlb != 0))
    for pfn in heads:
        nr_pages = 1 << int(mem.folios.order[pfn])
        owned[pfn:pfn + nr_pages] += 1
        if (mem.orders[pfn:pfn + nr_pages] != mem.folios.order[pfn]).any():
            complain("pages whose order differs from their folio's, at folio", pfn)
    for nid, node in enumerate(mem.nodes):
        pages = slice(int(node.start_pfn), int(node.start_pfn + node.nr_pages))
        bad = (mem.folios.page_flags[pages] & (PG_hwpoison | PG_hugetlb) == PG_hwpoison) & (mem.folios.refcount[pages] == 0)
        wrong = owned[pages] + free[pages] + bad != 1
        if wrong.any():
            complain(f"pages of node {nid} that are not in exactly one place (free, bad, or one folio)",
                     pages.start + np.flatnonzero(wrong))
    if (mem.folios.refcount < 0).any():
        complain("folios with a negative refcount", np.flatnonzero(mem.folios.refcount < 0))
    return heads


def leaf_entries(mem):
    """(mm, address, entry) of every entry that is not none, over all processes; int64 arrays."""
    mms, addresses, values = [], [], []
    for mm, row in enumerate(mem.mms):
        if not row.pgd:
            continue
        level = [(0, int(row.pgd))]
        for shift in (39, 30, 21):
            below = []
            for base, table in level:
                entries = mem.tables[table * PTRS:(table + 1) * PTRS]
                for i in np.flatnonzero(entries):
                    entry, at = int(entries[i]), base + (int(i) << shift)
                    if shift == 21 and entry & PTE_HUGE:
                        mms.append(np.array([mm]))
                        addresses.append(np.array([at]))
                        values.append(np.array([entry]))
                    else:
                        below.append((at, entry >> PAGE_SHIFT))
            level = below
        for base, table in level:
            entries = mem.tables[table * PTRS:(table + 1) * PTRS]
            i = np.flatnonzero(entries)
            mms.append(np.full(len(i), mm))
            addresses.append(base + (i << PAGE_SHIFT))
            values.append(entries[i])
    join = lambda parts: np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)
    return join(mms), join(addresses), join(values)


def validate_entries(mem, entries, free):
    mms, addresses, values = entries
    migration = values & PTE_MIGRATION != 0
    if migration.any():
        complain("migration entries outside a call, at addresses", addresses[migration])
    absent = values & (PTE_PRESENT | PTE_HWPOISON | PTE_SWAP) == 0
    if absent.any():
        complain("entries that are neither none nor present, at addresses", addresses[absent])
    bad = values[values & PTE_HWPOISON != 0] >> PAGE_SHIFT
    if (mem.folios.page_flags[bad] & PG_hwpoison == 0).any():
        complain("hwpoison entries for pages that are not bad", bad[mem.folios.page_flags[bad] & PG_hwpoison == 0])
    pages = values[values & PTE_SPECIAL == 0] >> PAGE_SHIFT
    if free[pages].any():
        complain("free pages are mapped", pages[free[pages]])


def gup_references(machine):
    """Plain references that processes hold on pages, counted by folio."""
    mem = machine.mem
    refs = np.zeros(len(mem.folios), np.int64)
    for process in machine.processes:
        for pages in process.gets.values():
            for page in pages:
                order = int(mem.orders[page])
                refs[page >> order << order] += page != NO_PFN
    return refs


def validate_counts(mem, heads, entries, gets):
    """mapcount and refcount of every folio equal what page tables, page caches, pins and others explain."""
    mms, addresses, values = entries
    mapped = values & PTE_SPECIAL == 0
    pages = values[mapped] >> PAGE_SHIFT
    orders = mem.orders[pages].astype(np.int64)
    folios = pages >> orders << orders
    mapcount = np.bincount(folios, minlength=len(mem.folios))
    entire = np.bincount(folios[values[mapped] & PTE_HUGE != 0], minlength=len(mem.folios))
    for what, counted in (("mapcount", mapcount), ("entire_mapcount", entire)):
        wrong = np.flatnonzero(counted != mem.folios[what])
        if len(wrong):
            complain(f"folios whose {what} is not the number of entries that map them", wrong)
    exclusive = folios[(values[mapped] & PTE_EXCLUSIVE != 0)]
    counts = np.bincount(pages[(values[mapped] & PTE_EXCLUSIVE != 0)], minlength=1)
    if (counts > 1).any() or (mem.folios.mapping[exclusive] >= 0).any():
        complain("pages marked exclusive that are mapped twice or not anonymous", np.flatnonzero(counts > 1))

    expected = mapcount[heads].copy()
    row = mem.folios[heads]
    nr_pages = np.int64(1) << row.order.astype(np.int64)
    expected += np.where(row.mapping > 0, nr_pages, 0)
    expected += np.where((row.mapping >= 0) & (row.page_flags & PG_private != 0), 1, 0)
    expected += np.where(row.page_flags & PG_swapcache != 0, nr_pages, 0)
    owned = row.page_flags & PG_movable_ops != 0
    expected += np.where(owned, row.private != 0, 0)            # its owner's
    expected += np.where(row.page_flags & PG_reserved != 0, 1, 0)
    expected += mem.others.refs_held[row.others] + gets[heads]
    expected += np.where(row.order > 0, row.pincount, row.pincount * GUP_PIN_COUNTING_BIAS)
    expected += np.bincount(mem.lru_batch[:mem.sys.lru_batch_nr[0]], minlength=len(mem.folios))[heads]
    isolated = (row.page_flags & (PG_lru | PG_reserved) == 0) & ~np.isin(heads, mem.lru_batch[:mem.sys.lru_batch_nr[0]])
    hugetlb = row.page_flags & PG_hugetlb != 0
    isolated[hugetlb] = (row.page_flags[hugetlb] & PG_hugetlb_migratable == 0) & (row.refcount[hugetlb] != 0)
    expected += np.where(owned, row.page_flags & PG_movable_ops_isolated != 0, isolated)
    wrong = heads[expected != row.refcount]
    if len(wrong):
        complain("folios whose refcount is not explained by mappings, caches, private data, pins, owners, LRU batch and "
                 "isolation", wrong)

    for mm in np.flatnonzero(mem.mms.pgd):
        sizes = np.where(values[mapped] & PTE_HUGE != 0, HPAGE_PMD_NR, 1)
        own = (mms[mapped] == mm) & (mem.folios.page_flags[folios] & PG_hugetlb == 0)
        anon = mem.folios.mapping[folios] < 0
        shmem = ~anon & (mem.folios.page_flags[folios] & PG_swapbacked != 0)
        for name, which in (("rss_anon", anon), ("rss_shmem", shmem), ("rss_file", ~anon & ~shmem)):
            if sizes[own & which].sum() != mem.mms[name][mm]:
                complain(f"{name} of mm {mm} is {mem.mms[name][mm]}, pages mapped", sizes[own & which].sum())


def validate_folios(mem, heads):
    """No lock, state word or leftover of a call outside one."""
    row = mem.folios[heads]
    for what, wrong in (("locked", (row.page_flags & PG_locked != 0) & (mem.others.lock[row.others] == 0)),
                        ("a state word", row.migrate_info != 0)):
        if wrong.any():
            complain(f"folios with {what} outside a call", heads[wrong])


def validate_ksm(mem, heads, entries):
    """Every KSM page has a stable node that knows it, and is mapped read-only where its rmap_items say."""
    mms, addresses, values = entries
    ksm = heads[mem.folios.page_flags[heads] & PG_ksm != 0]
    wrong = mem.anon_vmas.kpfn[-mem.folios.mapping[ksm]] != ksm
    if wrong.any():
        complain("KSM pages whose stable node does not know them", ksm[wrong])
    for pfn in ksm:
        known = set()
        item = int(mem.anon_vmas.first_item[-mem.folios.mapping[pfn]])
        while item:
            known.add(int(mem.rmap_items.address[item]))
            item = int(mem.rmap_items.next[item])
        mapped = (values >> PAGE_SHIFT == pfn) & (values & PTE_PRESENT != 0)
        if (values[mapped] & (PTE_WRITE | PTE_EXCLUSIVE) != 0).any() or not known.issuperset(addresses[mapped].tolist()):
            complain("KSM pages mapped writable, or where their stable node does not know", pfn)


def validate_swap_cache(mem, heads, entries):
    """Every slot of the swap cache holds the folio whose swap entry it is, and every folio in it has its slots."""
    cached = heads[mem.folios.page_flags[heads] & PG_swapcache != 0]
    space = mem.mappings[mem.sys.swap_space[0]]
    slots = mem.slots[space.slots:space.slots + space.nr_slots]
    expected = np.zeros(len(slots), np.int64)
    for pfn in cached:
        entry = int(mem.folios.private[pfn])
        expected[entry:entry + (1 << int(mem.folios.order[pfn]))] = pfn
    if (slots != expected).any():
        complain("swap entries that do not hold the folio that has them", np.flatnonzero(slots != expected))
    if space.nrpages != np.count_nonzero(slots):
        complain(f"swap space: {np.count_nonzero(slots)} slots in use, nrpages", space.nrpages)
    held = np.bincount(entries[2][entries[2] & PTE_SWAP != 0] >> PAGE_SHIFT, minlength=len(mem.swap_map))
    if (held != mem.swap_map).any():
        complain("swap entries whose swap_map is not the number of page-table entries that hold them", np.flatnonzero(held != mem.swap_map))


def validate_slots(mem, free):
    """Every slot of a page cache holds the folio that knows it."""
    for mapping in np.flatnonzero((mem.mappings.kind != 0) & (mem.mappings.kind != MAPPING_SWAP)):
        space = mem.mappings[mapping]
        slots = mem.slots[space.slots:space.slots + space.nr_slots]
        at = np.flatnonzero(slots)
        folios = slots[at]
        if len(at) != space.nrpages:
            complain(f"mapping {mapping}: {len(at)} slots in use, nrpages", space.nrpages)
        wrong = (mem.folios.mapping[folios] != mapping) | (mem.folios.index[folios] > at) | (
            mem.folios.index[folios] + (1 << mem.folios.order[folios].astype(np.int64)) <= at) | free[folios]
        if wrong.any():
            complain(f"mapping {mapping}: slots that hold a folio of elsewhere", at[wrong])


def validate_nodes(mem, heads, free):
    """Node counters equal a recount over folios."""
    row = mem.folios[heads]
    nr_pages = np.int64(1) << row.order.astype(np.int64)
    has = lambda bit: row.page_flags & bit != 0
    in_batch = np.isin(heads, mem.lru_batch[:mem.sys.lru_batch_nr[0]])
    in_use = ~has(PG_reserved | PG_movable_ops | PG_hugetlb)
    isolated = in_use & ~has(PG_lru) & ~in_batch
    evictable_lru = has(PG_lru) & ~has(PG_unevictable)
    cached = (row.mapping > 0) & ~has(PG_hugetlb)
    shmem = cached & (mem.mappings.kind[np.maximum(row.mapping, 0)] == MAPPING_SHMEM)
    for name, which, weight in (
            ("nr_isolated_anon", isolated & has(PG_swapbacked), nr_pages),
            ("nr_isolated_file", isolated & ~has(PG_swapbacked), nr_pages),
            ("nr_lru_anon", evictable_lru & has(PG_swapbacked), nr_pages),
            ("nr_lru_file", evictable_lru & ~has(PG_swapbacked), nr_pages),
            ("nr_unevictable", has(PG_lru) & has(PG_unevictable), nr_pages),
            ("nr_anon_mapped", ~has(PG_hugetlb) & (row.mapping < 0) & (row.mapcount > 0), nr_pages),
            ("nr_file_mapped", ~has(PG_hugetlb) & (row.mapping > 0) & (row.mapcount > 0), nr_pages),
            ("nr_file_pages", cached | has(PG_swapcache), nr_pages * (cached + has(PG_swapcache).astype(np.int64))),
            ("nr_shmem", shmem, nr_pages), ("nr_shmem_thps", shmem & (row.order >= HPAGE_PMD_ORDER), nr_pages),
            ("nr_swapcache", has(PG_swapcache), nr_pages),
            ("nr_file_dirty", cached & ~shmem & has(PG_dirty), nr_pages),
            ("nr_mlock", has(PG_mlocked), nr_pages),
            ("nr_deferred_split", has(PG_deferred_list), np.ones_like(nr_pages))):
        for nid in range(len(mem.nodes)):
            counted = weight[which & (row.nid == nid)].sum()
            if counted != mem.nodes[name][nid]:
                complain(f"{name} of node {nid} is {mem.nodes[name][nid]}, recounted", counted)
    large = np.bincount(row.order[(row.mapping < 0) & ~has(PG_hugetlb) & (row.order > 0)], minlength=len(mem.mthp_nr_anon))
    for order in np.flatnonzero(large != mem.mthp_nr_anon):
        complain(f"mthp_nr_anon of order {order} is {mem.mthp_nr_anon[order]}, recounted", large[order])


def validate_hugetlb(mem, heads, entries):
    """The pools: their lists, their counts, and that nothing of a call is left in them; hugetlb_usage of each process."""
    mms, addresses, values = entries
    hugetlb = heads[mem.folios.page_flags[heads] & PG_hugetlb != 0]
    row = mem.folios[hugetlb]
    unused = row.refcount == 0
    temporary = row.page_flags & PG_hugetlb_temporary != 0
    if temporary.any():
        complain("temporary hugetlb folios outside a call", hugetlb[temporary])
    for nid, node in enumerate(mem.nodes):
        listed, at = [], int(node.hugepage_freelist)
        while at and at not in listed:
            listed.append(at)
            at = int(mem.folios.index[at])
        wrong = np.setxor1d(listed, hugetlb[unused & (row.nid == nid)])
        if at or len(wrong):
            complain(f"folios that are free in the hugetlb pool of node {nid} or on its list, but not both", wrong if len(wrong) else at)
        for name, counted in (("free_hugepages", len(listed)), ("nr_hugepages", (row.nid == nid).sum())):
            if counted != node[name]:
                complain(f"{name} of node {nid} is {node[name]}, recounted", counted)
        if not 0 <= node.surplus_hugepages <= node.nr_hugepages:
            complain(f"of {node.nr_hugepages} hugetlb folios of node {nid} surplus are", node.surplus_hugepages)
    leaves = values & (PTE_HUGE | PTE_SPECIAL) == PTE_HUGE
    mapped = mem.folios.page_flags[values[leaves] >> PAGE_SHIFT] & PG_hugetlb != 0
    for mm in np.flatnonzero(mem.mms.pgd):
        counted = (mms[leaves][mapped] == mm).sum() * HPAGE_PMD_NR
        if counted != mem.mms.hugetlb_usage[mm]:
            complain(f"hugetlb_usage of mm {mm} is {mem.mms.hugetlb_usage[mm]}, pages mapped", counted)
    wrong = (row.mapping > 0) & (mem.mappings.kind[np.maximum(row.mapping, 0)] != MAPPING_HUGETLB)
    if wrong.any():
        complain("hugetlb folios in the page cache of another kind of file", hugetlb[wrong])
