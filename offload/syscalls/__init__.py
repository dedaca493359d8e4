"""The system calls that migrate: move_pages(2), migrate_pages(2), mbind(2).

Each ``sys_*`` function takes what the system call takes, with processes in place of pids and arrays in place of pointers,
and returns a :class:`SyscallResult`. Stands for mm/migrate.c and mm/mempolicy.c (v7.3) from the system-call entry down
to migrate_pages(); one file each, and what they share (who may, which folios are taken) in files of its own.
"""

from offload.syscalls.mbind import sys_mbind
from offload.syscalls.migrate_pages import sys_migrate_pages
from offload.syscalls.move_pages import (
    NOT_WRITTEN, MoveResult, collect_folio_addresses, do_pages_move, do_pages_stat, sys_move_pages,
)
from offload.syscalls.result import MPOL_MF_MOVE, MPOL_MF_MOVE_ALL, MPOL_MF_STRICT, SyscallResult

__all__ = ("SyscallResult", "sys_move_pages", "sys_migrate_pages", "sys_mbind", "MPOL_MF_STRICT", "MPOL_MF_MOVE",
           "MPOL_MF_MOVE_ALL", "NOT_WRITTEN", "MoveResult", "do_pages_move", "do_pages_stat", "collect_folio_addresses")
