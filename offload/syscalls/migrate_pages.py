"""migrate_pages(2): which node's pages go where, and how many stay.

Stands for kernel_migrate_pages(), do_migrate_pages() and migrate_to_node() of mm/mempolicy.c (v7.3), and for get_nodes(),
which reads a mask of nodes from user memory. Leaves out compat system calls.
"""

from offload.migrate.call import node_mask
from offload.syscalls.creds import capable, cpuset_mems_allowed, find_task
from offload.syscalls.queue_pages import MPOL_MF_DISCONTIG_OK, isolated_pages
from offload.syscalls.result import MPOL_MF_MOVE, MPOL_MF_MOVE_ALL, failing_allocs, make_result
from offload.units import EINVAL, EPERM, MAX_NUMNODES, MIGRATE_SYNC, MR_SYSCALL, PAGE_SIZE

__all__ = ("sys_migrate_pages", "get_nodes")


def get_nodes(nids, maxnode):
    """The nodes of a user's mask of ``maxnode`` - 1 bits: (0 or -EINVAL, set). ``nids`` None: a NULL pointer, no node.

    Bits beyond the mask are not read; one beyond MAX_NUMNODES inside it is -EINVAL.
    """
    if maxnode == 1 or nids is None:
        return 0, frozenset()
    nr_bits = maxnode - 1
    if not 0 < nr_bits <= PAGE_SIZE * 8:            # 0 has become the largest unsigned number
        return -EINVAL, frozenset()
    nodes = frozenset(int(nid) for nid in nids if 0 <= nid < nr_bits)
    if nodes and max(nodes) >= MAX_NUMNODES:
        return -EINVAL, frozenset()
    return 0, nodes


def node_remap(nid, old, new):
    """The node of ``new`` that has the rank of ``nid`` in ``old``, counted round (node_remap())."""
    if nid not in old or not new:
        return nid
    return sorted(new)[sorted(old).index(nid) % len(new)]


def next_pair(left, old, new):
    """(source, destination) to be moved next, or None when no node of ``left`` has to move.

    The first source whose destination is no longer a source itself; failing that, the last that has to move.
    """
    pair = None
    for source in sorted(left):
        if len(old) != len(new) and source in new:
            continue                                # relative places cannot be kept: it stays
        dest = node_remap(source, old, new)
        if source == dest:
            continue
        pair = source, dest
        if dest not in left:
            break
    return pair


def migrate_to_node(machine, process, source, dest, flags, calls, events):
    """Move all pages of a process from one node to another: the number of folios that stay, or -errno."""
    start = process.vma_index()[0]
    if not len(start):
        return 0
    with isolated_pages(machine, process, 0, None, node_mask([source]), flags | MPOL_MF_DISCONTIG_OK, calls) as (nr_failed, folios):
        rc = 0
        if len(folios):
            rc = machine.migrate_isolated(folios, dest, mode=MIGRATE_SYNC, reason=MR_SYSCALL, events=events, into=calls).rc
    return rc if rc < 0 else rc + nr_failed


def do_migrate_pages(machine, process, old, new, flags, calls, events=()):
    """Move a process's pages from the nodes ``old`` to the nodes ``new`` in pairs; the sum of what stays, or -errno."""
    nr_failed = 0
    left = set(old)
    machine.lru_cache_disable()
    try:
        while pair := next_pair(left, old, new):
            left.remove(pair[0])
            err = migrate_to_node(machine, process, *pair, flags, calls, events)
            if err < 0:
                return err
            nr_failed += err
        return nr_failed
    finally:
        machine.lru_cache_enable()


def sys_migrate_pages(machine, caller, target, maxnode, old, new, *, alloc_fail=None, events=()):
    """migrate_pages(2): the SyscallResult.

    ``caller`` and ``target`` are processes; target None is pid 0, the caller. ``old`` and ``new``: the nodes in the masks,
    or None for a NULL pointer; the masks have ``maxnode`` - 1 bits. ``alloc_fail``: see failing_allocs().
    """
    machine.check_idle()
    err, old = get_nodes(old, maxnode)
    if err == 0:
        err, new = get_nodes(new, maxnode)
    if target is None:
        target = caller
    if err == 0:
        err = find_task(caller, target)
    privileged = capable(caller, "CAP_SYS_NICE")
    if err == 0 and not privileged and not new <= cpuset_mems_allowed(target):
        err = -EPERM
    if err == 0:
        new &= cpuset_mems_allowed(caller)
        if not new or target.mm == 0:
            err = -EINVAL
    if err:
        return make_result(err)
    calls = []
    with failing_allocs(machine, alloc_fail):
        ret = do_migrate_pages(machine, target, old, new, MPOL_MF_MOVE_ALL if privileged else MPOL_MF_MOVE, calls, events)
    return make_result(ret, calls)
