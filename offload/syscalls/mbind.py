"""mbind(2): a memory policy for a range of addresses, and moving the pages that do not follow it.

Stands for kernel_mbind(), do_mbind(), mbind_range(), mpol_new() and mpol_set_nodemask() of mm/mempolicy.c (v7.3). Leaves out
shared policies of shmem files (the policy is the vma's alone) and what mm/mempolicy.py leaves out.
"""

from offload.errors import InvalidInput, NotSupported
from offload.migrate.call import TargetControl, node_mask
from offload.mm.memmap import VM_HUGETLB
from offload.mm.mempolicy import (
    MPOL_BIND, MPOL_DEFAULT, MPOL_INTERLEAVE, MPOL_LOCAL, MPOL_MAX, MPOL_NAMES, MPOL_PREFERRED, MPOL_PREFERRED_MANY,
    MPOL_WEIGHTED_INTERLEAVE,
)
from offload.syscalls.creds import capable, cpuset_mems_allowed
from offload.syscalls.migrate_pages import get_nodes
from offload.syscalls.queue_pages import MPOL_MF_DISCONTIG_OK, MPOL_MF_INVERT, isolated_pages
from offload.syscalls.result import (
    MPOL_MF_MOVE, MPOL_MF_MOVE_ALL, MPOL_MF_STRICT, UNTAG_MASK, failing_allocs, make_result,
)
from offload.units import EINVAL, EIO, EPERM, MIGRATE_SYNC, MR_MEMPOLICY_MBIND, PAGE_SIZE

__all__ = ("sys_mbind",)

MPOL_MODE_FLAGS = 1 << 15 | 1 << 14 | 1 << 13       # MPOL_F_STATIC_NODES, _RELATIVE_NODES, _NUMA_BALANCING
MPOL_MF_VALID = MPOL_MF_STRICT | MPOL_MF_MOVE | MPOL_MF_MOVE_ALL
ULONG_MAX = (1 << 64) - 1


def parse_policy(mode):
    """MPOL_* from a name or a number; numbers that the kernel does not know are left to it."""
    if isinstance(mode, str):
        if mode not in MPOL_NAMES:
            raise InvalidInput(f"policy {mode!r} is not known; use one of: {', '.join(MPOL_NAMES)}")
        return MPOL_NAMES[mode]
    if mode == MPOL_WEIGHTED_INTERLEAVE or 0 <= mode & ~MPOL_MODE_FLAGS < MPOL_MAX and mode & MPOL_MODE_FLAGS:
        raise NotSupported(f"policy {mode!r} is not supported: weighted interleaving and mode flags are left out; "
                           f"use one of: {', '.join(MPOL_NAMES)}")
    return mode


def mpol_new(mode, nodes):
    """(0 or -EINVAL, mode) of a policy for the nodes that the user named."""
    if mode == MPOL_PREFERRED and not nodes:
        mode = MPOL_LOCAL
    takes_nodes = mode not in (MPOL_DEFAULT, MPOL_LOCAL)
    return (0 if bool(nodes) == takes_nodes else -EINVAL), mode


def mpol_set_nodemask(mode, nodes, allowed):
    """(0 or -EINVAL, the policy's nodes): those that have memory and are allowed; of MPOL_PREFERRED the first."""
    if mode in (MPOL_DEFAULT, MPOL_LOCAL):
        return 0, frozenset()
    nodes = nodes & allowed
    if not nodes:
        return -EINVAL, nodes
    return 0, frozenset((min(nodes),)) if mode == MPOL_PREFERRED else nodes


def target_by_mpol(machine, process, mode, nodes, start):
    """Where pages of a policy go (alloc_migration_target_by_mpol()): its nodes, then any, but for MPOL_BIND."""
    everywhere = tuple(range(len(machine.mem.nodes)))
    nodes = tuple(sorted(nodes))
    if mode == MPOL_BIND:
        return TargetControl(nodes[0], nmask=nodes)
    if mode == MPOL_PREFERRED:
        return TargetControl(nodes[0], nmask=everywhere)
    if mode == MPOL_PREFERRED_MANY:
        return TargetControl(nodes[0], nmask=nodes, nmask_next=everywhere)
    if mode == MPOL_INTERLEAVE:
        # From the first vma that is touched; pages of others are spread by their index too, perhaps from another node on.
        vma = next(vma for low, high, vma in zip(*(one.tolist() for one in process.vma_index())) if high > start)
        return TargetControl(nodes[0], nmask=everywhere, interleave=nodes, ilx=int(machine.mem.vmas.pol_ilx[vma]))
    return TargetControl(home_node(machine), nmask=everywhere)


def home_node(machine):
    """The node that processes run on: the first that has CPUs (numa_node_id())."""
    return int(machine.mem.nodes.cpus.argmax())


def mbind_range(machine, process, start, end, mode, nodes):
    """Give all vmas in the range the policy; those that reach beyond it are split. 0, or -EINVAL: inside a hugetlb page."""
    for low, high, vma in zip(*(one.tolist() for one in process.vma_index())):
        row = machine.mem.vmas[vma]
        for edge in (start, end):
            if low < edge < high:
                if row.vm_flags & VM_HUGETLB and edge % (PAGE_SIZE << int(row.order)):
                    return -EINVAL
                process.split_vma(edge)
    vmas = machine.mem.vmas
    for low, high, vma in zip(*(one.tolist() for one in process.vma_index())):
        if low < end and high > start:
            vmas.pol_mode[vma], vmas.pol_nodes[vma] = mode, node_mask(nodes)
    return 0


def do_mbind(machine, process, start, length, mode, nodes, flags, calls, events=()):
    """Set the policy and move misplaced pages; 0 or -errno. ``nodes``: as the user named them."""
    if flags & ~MPOL_MF_VALID:
        return -EINVAL
    if flags & MPOL_MF_MOVE_ALL and not capable(process, "CAP_SYS_NICE"):
        return -EPERM
    if start % PAGE_SIZE:
        return -EINVAL
    if mode == MPOL_DEFAULT:
        flags &= ~MPOL_MF_STRICT
    end = start + (length + PAGE_SIZE - 1 & -PAGE_SIZE & ULONG_MAX)
    if end > ULONG_MAX:
        return -EINVAL
    if end == start:
        return 0
    err, mode = mpol_new(mode, nodes)
    if err:
        return err
    err, pol_nodes = mpol_set_nodemask(mode, nodes, cpuset_mems_allowed(process))
    if err:
        return err
    moves = flags & (MPOL_MF_MOVE | MPOL_MF_MOVE_ALL)
    walk_flags = flags | MPOL_MF_INVERT | (MPOL_MF_DISCONTIG_OK if mode == MPOL_DEFAULT else 0)
    if moves:
        machine.lru_cache_disable()
    try:
        # The misplaced pages are isolated before the policy is set, so that none can come in between.
        with isolated_pages(machine, process, start, end, node_mask(nodes), walk_flags, calls) as (nr_failed, folios):
            if nr_failed < 0:
                return nr_failed
            err = mbind_range(machine, process, start, end, mode, pol_nodes)
            if err:
                return err
            rc = 0
            if len(folios):
                target = target_by_mpol(machine, process, mode, pol_nodes, start)
                rc = machine.migrate_isolated(folios, target, mode=MIGRATE_SYNC, reason=MR_MEMPOLICY_MBIND, events=events,
                                              into=calls).rc
    finally:
        if moves:
            machine.lru_cache_enable()
    return -EIO if (nr_failed or rc) and flags & MPOL_MF_STRICT else 0


def sys_mbind(machine, caller, start, length, mode, nodes, flags, *, maxnode=64, alloc_fail=None, events=()):
    """mbind(2): the SyscallResult.

    ``start`` and ``length`` in bytes. ``mode``: "bind", "preferred" ... or an MPOL_* number; ``nodes``: the nodes in the mask
    of ``maxnode`` - 1 bits, or None for a NULL pointer; ``flags``: bits MPOL_MF_*. ``alloc_fail``: see failing_allocs().
    """
    machine.check_idle()
    mode = parse_policy(mode)
    if not 0 <= mode < MPOL_MAX:
        return make_result(-EINVAL)
    err, nodes = get_nodes(nodes, maxnode)
    if err:
        return make_result(err)
    calls = []
    with failing_allocs(machine, alloc_fail):
        err = do_mbind(machine, caller, start & UNTAG_MASK, length, mode, nodes, flags, calls, events)
    return make_result(err, calls)
