"""Who may: capabilities, the check of ptrace, and the memory nodes of a task's cpuset.

Stands for capable(), __ptrace_may_access() (kernel/ptrace.c) with cap_ptrace_access_check() (security/commoncap.c), and
cpuset_mems_allowed() (v7.3). Leaves out user namespaces, group ids, dumpability and other security modules.
"""

from offload.units import EPERM, ESRCH

ALL_CAPS = frozenset(("CAP_SYS_NICE", "CAP_SYS_PTRACE"))

__all__ = ("capable", "ptrace_may_access", "find_task", "cpuset_mems_allowed", "nodes_with_memory")


def capable(process, capability):
    return capability in caps_of(process)


def caps_of(process):
    """Its permitted capabilities; a process of uid 0 that says nothing has all, another none."""
    if process.caps is None:
        return ALL_CAPS if process.uid == 0 else frozenset()
    return frozenset(process.caps)


def ptrace_may_access(caller, target):
    """Whether PTRACE_MODE_READ_REALCREDS is granted: to oneself; to the same user whose capabilities are no more than
    the caller's; to CAP_SYS_PTRACE."""
    if caller is target or capable(caller, "CAP_SYS_PTRACE"):
        return True
    return caller.uid == target.uid and caps_of(target) <= caps_of(caller)


def find_task(caller, target):
    """0, or the -errno of a target that is not there (-ESRCH) or not accessible (-EPERM)."""
    if target.state == "dead":
        return -ESRCH
    return 0 if ptrace_may_access(caller, target) else -EPERM


def nodes_with_memory(machine):
    """N_MEMORY: the ids of all nodes that have pages."""
    return frozenset(machine.mem.nodes.nr_pages.nonzero()[0].tolist())


def cpuset_mems_allowed(process):
    """The nodes with memory that the process's cpuset allows it."""
    nids = nodes_with_memory(process.machine)
    return nids if process.mems_allowed is None else nids & frozenset(process.mems_allowed)
