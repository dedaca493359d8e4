"""Memory policies: which nodes a vma's pages may come from, and which is tried first.

Stands for struct mempolicy and the allocation side of mm/mempolicy.c (v7.3), and for the zonelists that page_alloc.c
walks. Leaves out task policies other than the default, shared policies of shmem files (a policy is the vma's), weighted
interleaving, and MPOL_F_STATIC_NODES, _RELATIVE_NODES and _NUMA_BALANCING.

A policy stands on the vma: ``pol_mode`` (MPOL_*; 0 is none) and ``pol_nodes``, a bit for each node.
"""

import numpy as np

from offload.jit import jit, jit_inline
from offload.mm.memmap import NO_PFN
from offload.mm.node import alloc_pages_node

__all__ = ("MPOL_DEFAULT", "MPOL_PREFERRED", "MPOL_BIND", "MPOL_INTERLEAVE", "MPOL_LOCAL", "MPOL_PREFERRED_MANY",
           "MPOL_WEIGHTED_INTERLEAVE", "MPOL_MAX", "MPOL_NAMES", "ALL_NODES", "zonelist_node", "alloc_pages_nodemask", "interleave_nid",
           "alloc_pages_vma")

MPOL_DEFAULT, MPOL_PREFERRED, MPOL_BIND, MPOL_INTERLEAVE, MPOL_LOCAL, MPOL_PREFERRED_MANY, MPOL_WEIGHTED_INTERLEAVE = range(7)
MPOL_MAX = 7
MPOL_NAMES = {"default": MPOL_DEFAULT, "preferred": MPOL_PREFERRED, "bind": MPOL_BIND, "interleave": MPOL_INTERLEAVE,
              "local": MPOL_LOCAL, "preferred_many": MPOL_PREFERRED_MANY}

ALL_NODES = -1
"""A node mask without a gap."""


@jit_inline
def zonelist_node(mem, nid, i):
    """The i-th node of the zonelist of ``nid``: itself, the nodes after it, then from node 0 on.

    Kernel: find_next_best_node(), all distances alike, and no CPU up yet, as when it is called.
    """
    return (nid + i) % mem.sys[0].nr_nodes


@jit
def alloc_pages_nodemask(mem, nid, nmask, order):
    """A block from the first node of the zonelist of ``nid`` with room; only nodes of ``nmask``. NO_PFN if none has one.

    Kernel: __alloc_pages().
    """
    for i in range(mem.sys[0].nr_nodes):
        other = zonelist_node(mem, nid, i)
        if nmask >> other & 1:
            pfn = alloc_pages_node(mem, other, order)
            if pfn != NO_PFN:
                return pfn
    return np.int64(NO_PFN)


@jit
def interleave_nid(mem, nodes, index):
    """The node of page ``index`` among ``nodes``, in order (interleave_nid())."""
    weight = 0
    for nid in range(mem.sys[0].nr_nodes):
        weight += nodes >> nid & 1
    nth = index % weight
    for nid in range(mem.sys[0].nr_nodes):
        if nodes >> nid & 1:
            if nth == 0:
                return np.int64(nid)
            nth -= 1
    return np.int64(0)


@jit
def first_node(mem, nodes):
    """The lowest node of a mask that has one."""
    for nid in range(mem.sys[0].nr_nodes):
        if nodes >> nid & 1:
            return np.int64(nid)
    return np.int64(0)


@jit
def alloc_pages_vma(mem, vma, index, order):
    """A block for page ``index`` (pgoff) of a vma that has a policy; NO_PFN without room (vma_alloc_folio()).

    MPOL_BIND takes its nodes only, the others may fall back to any.
    """
    area = mem.vmas[vma]
    nodes = area.pol_nodes
    if area.pol_mode == MPOL_INTERLEAVE:
        return alloc_pages_nodemask(mem, interleave_nid(mem, nodes, index - area.pol_ilx >> order), np.int64(ALL_NODES), order)
    if area.pol_mode == MPOL_LOCAL:
        return alloc_pages_nodemask(mem, home_node(mem), np.int64(ALL_NODES), order)
    nid = first_node(mem, nodes)
    pfn = alloc_pages_nodemask(mem, nid, nodes, order)
    if pfn == NO_PFN and area.pol_mode != MPOL_BIND:
        pfn = alloc_pages_nodemask(mem, nid, np.int64(ALL_NODES), order)
    return pfn


@jit
def home_node(mem):
    """The node that processes run on: the first that has CPUs (numa_node_id())."""
    for nid in range(mem.sys[0].nr_nodes):
        if mem.nodes[nid].cpus:
            return np.int64(nid)
    return np.int64(0)
