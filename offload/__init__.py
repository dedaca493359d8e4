"""offload: the Linux page-migration path with real copies, and batch-copy offload.

The front door: public names, loaded when first used. Importing the package opens no device and compiles nothing.
"""

import importlib

_HOMES = {
    "offload.machine": ("Machine", "MachineConfig", "NodeConfig"),
    "offload.migrate.pages": ("Event", "MigrateResult"),
    "offload.other_tasks": ("CpuFault", "GupFast", "GupSlow", "Fork", "Munmap", "Mprotect", "Mremap", "PageCacheLookup",
                            "StaleTlbWrite"),
    "offload.syscalls": ("MoveResult", "SyscallResult", "sys_move_pages", "sys_migrate_pages", "sys_mbind", "MPOL_MF_STRICT",
                         "MPOL_MF_MOVE", "MPOL_MF_MOVE_ALL", "NOT_WRITTEN"),
    "offload.mm.process": ("Process", "File"),
    "offload.migrators.mc_copy": ("McCopy",),
    "offload.migrators.cpu_mt": ("CpuMt",),
    "offload.migrators.dcbm": ("Dcbm", "DcbmParameters"),
    "offload.dmaengine": ("DmaDevice",),
    "offload.kernels.cuda": ("open_device",),
    "offload.kernels.cuda_engines": ("CudaProvider",),
    "offload.migrators.faulty": ("FaultyMigrator",),
    "offload.copy_offload": ("FolioBatch", "Migrator"),
    "offload.engines": ("Engine", "parse_engine"),
    "offload.units": ("MigrateMode", "MigrateReason"),
    "offload.errors": ("OffloadError", "InvalidInput", "BadAddress", "NotSupported", "Busy", "OutOfMemory",
                       "NoSuchProcess", "NotPermitted", "ForeignFile", "EngineUnavailable", "DeviceLost", "WouldHang",
                       "BrokenInvariant"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = tuple(_HOME_OF)
__version__ = "0.1.0"


def __getattr__(name):
    if name not in _HOME_OF:
        raise AttributeError(f"module 'offload' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *__all__})
