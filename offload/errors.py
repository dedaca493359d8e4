"""The exceptions of the Python layer. The compiled core raises none: its outcomes are numbers.

::

    OffloadError                      everything below; .errno is the kernel's number for it
      InvalidInput (ValueError)       EINVAL      a value that cannot be: says value, expected, remedy
      BadAddress (ValueError)         EFAULT      an address outside every VMA, or one not backed
      NotSupported (NotImplementedError)  EOPNOTSUPP  a kind or feature that this version leaves out
      Busy (RuntimeError)             EBUSY       a second migrator; a process used while a call runs
      OutOfMemory (MemoryError)       ENOMEM      a node, or the host, has no room
      NoSuchProcess (ProcessLookupError)  ESRCH   the pid is gone
      NotPermitted (PermissionError)  EPERM       the process or file is somebody else's
      ForeignFile (ValueError)        EINVAL      truncated, damaged or of another format
      EngineUnavailable (RuntimeError)    ENODEV  a forced engine that is not there; says why
      DeviceLost (RuntimeError)       EIO         a device is gone, and with it what lay in its memory; names the nodes
      WouldHang (TimeoutError)        ETIMEDOUT   the kernel would sleep for ever here (a lock never released)
      BrokenInvariant (AssertionError)    EIO     our own books do not add up: a bug, please report

Every message is one line: the value, what was expected, the remedy.
"""

__all__ = ("OffloadError", "InvalidInput", "BadAddress", "NotSupported", "Busy", "OutOfMemory",
           "NoSuchProcess", "NotPermitted", "ForeignFile", "EngineUnavailable", "DeviceLost", "WouldHang", "BrokenInvariant")


class OffloadError(Exception):
    """Base of all exceptions raised on purpose. ``errno`` is a positive errno value."""

    errno = 5

    def __init__(self, message):
        # Two of the standard types below (OSError's children) would take a lone argument for an errno text;
        # the message is kept whole for all of them.
        super().__init__(message)
        self.message = message

    def __str__(self):
        return self.message


class InvalidInput(OffloadError, ValueError):
    """A value that cannot be: the message says value, what was expected, and the remedy."""

    errno = 22


class BadAddress(OffloadError, ValueError):
    """An address outside every VMA, or a page with nothing behind it."""

    errno = 14


class NotSupported(OffloadError, NotImplementedError):
    """Something the kernel has and this version leaves out."""

    errno = 95


class Busy(OffloadError, RuntimeError):
    """Somebody else stands there: a second migrator, or a migration that is running."""

    errno = 16


class OutOfMemory(OffloadError, MemoryError):
    """An emulated node, or the host itself, has no room."""

    errno = 12


class NoSuchProcess(OffloadError, ProcessLookupError):
    """The process is gone."""

    errno = 3


class NotPermitted(OffloadError, PermissionError):
    """The process or file belongs to somebody else."""

    errno = 1


class ForeignFile(OffloadError, ValueError):
    """A file that is truncated, damaged or of another format."""

    errno = 22


class EngineUnavailable(OffloadError, RuntimeError):
    """A forced engine is not there; the message carries the reason."""

    errno = 19


class DeviceLost(OffloadError, RuntimeError):
    """A device does not answer any more; nodes in its memory are lost, all others are intact."""

    errno = 5


class WouldHang(OffloadError, TimeoutError):
    """The kernel would sleep here without end, for instance on a lock whose holder never lets go."""

    errno = 110


class BrokenInvariant(OffloadError, AssertionError):
    """Our own books do not add up. Always a bug of ours."""

    errno = 5
