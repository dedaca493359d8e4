"""What both levels of a scenario need of a machine: building it, its migrator, and a look at its page tables.

Stands for no kernel file. The levels are scenario_folios.py and scenario_processes.py.
"""

import numpy as np

from offload.errors import InvalidInput, NotSupported, OutOfMemory
from offload.machine import Machine, MachineConfig, NodeConfig
from offload.migrators.cpu_mt import CpuMt
from offload.migrators.dcbm import Dcbm
from offload.migrators.faulty import FaultyMigrator
from offload.migrators.mc_copy import McCopy
from offload.mm.fault import zap_range
from offload.mm.pagetable import PMD_SIZE, PTE_HUGE, PTRS
from offload.scenario_format import DEFAULT_NODES, Fault, shown
from offload.units import NR_MAX_BATCHED_MIGRATION, PAGE_SHIFT, PAGE_SIZE

__all__ = ("not_supported", "check_offload", "make_migrator", "make_machine", "page_entries", "change_entries", "zap")

MIGRATORS = {"mc_copy": (McCopy, ("kernel",)), "cpu_mt": (CpuMt, ("threads", "kernel")),
             "dcbm": (Dcbm.on_cpu, ("channels", "kernel", "completion", "iommu_merges"))}
"""Migrators that a scenario can name, with their options."""
OFFLOAD_FIELDS = ("protocol", "migrator", "reasons", "declines", "fails_after", "marks")


def not_supported(field, value, remedy="remove it, or use a version that has it"):
    raise NotSupported(f"{field}: {shown(value)} is not supported yet; {remedy}")


def check_offload(given):
    if given is None:
        return
    migrator = given.get("migrator", "mc_copy")
    if migrator not in MIGRATORS:
        raise Fault("offload.migrator", f"{shown(migrator)} is not a registered name", "use one of: " + ", ".join(MIGRATORS))
    options = MIGRATORS[migrator][1]
    for key in given:
        if key not in OFFLOAD_FIELDS and key not in options:
            raise Fault(f"offload.{key}", f"{shown(given[key])} is for no option of {migrator}",
                        "use one of: " + ", ".join((*OFFLOAD_FIELDS, *options)))
    make_migrator(given)


def make_migrator(given):
    """The migrator that ``offload`` describes; Fault for options that cannot be."""
    maker, options = MIGRATORS[given.get("migrator", "mc_copy")]
    try:
        migrator = maker(**{key: given[key] for key in options if key in given})
    except (InvalidInput, TypeError, ValueError) as error:
        raise Fault("offload", str(error), "correct the migrator's options") from None
    if "declines" in given or "fails_after" in given:
        migrator = FaultyMigrator(migrator, declines=given.get("declines", False), fails_after=given.get("fails_after"),
                                  marks=given.get("marks", "finished"))
    return migrator


def make_machine(scenario):
    """The machine of a scenario, with fresh frames poisoned."""
    given = scenario.get("machine", {})
    nodes = tuple(NodeConfig(node["pages"], node.get("cpus", True)) for node in given.get("nodes", DEFAULT_NODES))
    try:
        machine = Machine(MachineConfig(nodes=nodes, kernel=scenario.get("kernel", "7.3"),
                                        protocol=scenario.get("offload", {}).get("protocol", "v6"),
                                        batch_pages=given.get("batch_pages", NR_MAX_BATCHED_MIGRATION),
                                        thp_migration=given.get("thp_migration", True), poison=True))
    except (InvalidInput, OutOfMemory) as error:
        raise Fault("machine", str(error), "correct it") from None
    if "offload" in scenario:
        machine.register(make_migrator(scenario["offload"]), ",".join(scenario["offload"].get("reasons", ["all"])))
    return machine


def page_entries(machine, mm, address, nr_pages):
    """The page-table entries that cover ``nr_pages`` pages from ``address`` on, one per page (int64; 0 is none).

    A PMD leaf stands for each of its pages with that page's pfn.
    """
    tables = machine.mem.tables
    out = np.zeros(nr_pages, np.int64)
    done = 0
    while done < nr_pages:
        at = address + done * PAGE_SIZE
        first = at >> PAGE_SHIFT & PTRS - 1
        nr = min(PTRS - first, nr_pages - done)
        table = int(machine.mem.mms.pgd[mm])
        for shift in (39, 30, 21):
            entry = int(tables[table * PTRS + (at >> shift & PTRS - 1)])
            table = entry >> PAGE_SHIFT
            if entry == 0:
                break
        if entry & PTE_HUGE:
            out[done:done + nr] = entry + (np.arange(first, first + nr) << PAGE_SHIFT)
        elif entry:
            out[done:done + nr] = tables[table * PTRS + first:table * PTRS + first + nr]
        done += nr
    return out


def change_entries(machine, mm, address, nr_pages, clear, set_):
    """Clear and set bits in every entry, PTE or PMD leaf, that maps something in the range."""
    tables = machine.mem.tables
    at, end = address, address + nr_pages * PAGE_SIZE
    while at < end:
        table = int(machine.mem.mms.pgd[mm])
        for shift in (39, 30, 21):
            where = table * PTRS + (at >> shift & PTRS - 1)
            table = int(tables[where]) >> PAGE_SHIFT
            if tables[where] == 0:
                break
        nr = min((at | PMD_SIZE - 1) + 1, end) - at >> PAGE_SHIFT
        if tables[where] & PTE_HUGE:
            tables[where] = tables[where] & ~clear | set_
        elif tables[where]:
            ptes = tables[table * PTRS + (at >> PAGE_SHIFT & PTRS - 1):][:nr]
            ptes[ptes != 0] = ptes[ptes != 0] & ~clear | set_
        at += nr * PAGE_SIZE


def zap(machine, process, address, nr_pages):
    """Unmap pages of one vma (MADV_DONTNEED)."""
    zap_range(machine.table, process._vma_at(address), address, address + nr_pages * PAGE_SIZE)


