"""Files that a command writes: looked at before the work, written whole or not at all.

Behind a name may be a *file*, or nothing yet: the bytes go to a temporary file beside it, which takes the name when all of them are
on disk; a symbolic link stays, what it points to is replaced. Or something that takes bytes and is no file (a FIFO, a terminal,
/dev/null), or a descriptor of this process (/dev/stdout, /dev/fd/N): they are written into, as they stand. Stands for no kernel
file. Leaves out block devices and sockets, which are refused.
"""

import contextlib
import errno
import fcntl
import os
import secrets
import stat

from offload.errors import InvalidInput, NotPermitted, OffloadError

__all__ = ("check_output", "write_output", "write_own", "read_own")

MAX_LINKS = 40
"""As many as the kernel follows."""


def check_output(path, option, *, inputs=(), private=False):
    """Before the work: raise unless ``path`` can be written, and is none of the files ``inputs``.

    ``option`` is what the messages call it. ``private``: it holds secrets, so only a regular file or a new name will do, and no
    link. InvalidInput, NotPermitted or OffloadError. A file is made beside it and removed again; nothing else is touched.
    """
    path = os.fspath(path)
    if not path:
        raise InvalidInput(f"{option} {path!r} names no file; give it a name")
    with told(path, option):
        fd, into = what_is_there(path, option, private)
        refuse_inputs(path, option, inputs)
        if fd is not None:
            if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
                raise OSError(errno.EBADF, "the descriptor is open for reading alone")
        elif into:
            if not os.access(path, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        else:
            handle, temporary = make_beside(os.path.realpath(path), 0o600)
            os.close(handle)
            os.unlink(temporary)


def write_output(path, write, option, *, private=False):
    """Have ``write(file)`` write all bytes of ``path`` to a binary file that need not be seekable.

    What was a file is the old one or the new one, whatever happens, and keeps its mode; a new one has what the umask leaves,
    a ``private`` one 0600. Errors as for :func:`check_output`, OffloadError for a full disk above all; BrokenPipeError if the
    reader of a FIFO is gone.
    """
    path = os.fspath(path)
    with told(path, option):
        fd, into = what_is_there(path, option, private)
        if fd is not None or into:
            with open(os.dup(fd) if fd is not None else os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOCTTY), "wb") as file:
                write(file)
        else:
            replace(os.path.realpath(path), write, private)


def write_own(path, content, option):
    """Give a file of ours, in a folder of ours, its bytes, whole or not at all: whatever had the name, a link too, is replaced.

    Mode 0600. OffloadError and its kind.
    """
    path = os.path.abspath(path)
    with told(path, option):
        replace(path, lambda file: file.write(content), True)


def read_own(path):
    """The bytes of a regular file, and of nothing else by that name. FileNotFoundError; OSError for a link, a FIFO and the like."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    with open(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "it is no regular file")
        return file.read()


def what_is_there(path, option, private):
    """(descriptor, into) behind a name: the number if it is an open descriptor, True if written into; (None, False) for a file."""
    try:
        mode = os.lstat(path).st_mode if private else os.stat(path).st_mode
    except FileNotFoundError:
        return None, False
    if private:
        if not stat.S_ISREG(mode):
            raise InvalidInput(f"{option} {path!r} cannot be written: it is not a regular file; give another name")
        return None, False
    fd = descriptor(path)
    if fd is not None:
        return fd, False
    for is_kind, kind in ((stat.S_ISDIR, "directory"), (stat.S_ISBLK, "block device"), (stat.S_ISSOCK, "socket")):
        if is_kind(mode):
            raise InvalidInput(f"{option} {path!r} cannot be written: it is a {kind}; name a file")
    return None, not stat.S_ISREG(mode)


def descriptor(path):
    """The number of the descriptor of this process that a path leads to, such as /dev/stdout, or None."""
    own = f"/proc/{os.getpid()}/fd"
    for _ in range(MAX_LINKS):
        folder, name = os.path.split(os.path.abspath(path))
        if name.isdecimal() and os.path.realpath(folder) == own:
            return int(name)
        if not os.path.islink(path):
            return None
        path = os.path.join(folder, os.readlink(path))
    return None


def refuse_inputs(path, option, inputs):
    """InvalidInput if ``path`` is one of these files by any name; devices (a terminal) may be both."""
    with contextlib.suppress(FileNotFoundError):
        there = os.stat(path)
        for name in inputs:
            with contextlib.suppress(OSError):
                if os.path.samestat(there, os.stat(name)) and not stat.S_ISCHR(there.st_mode):
                    raise InvalidInput(f"{option} {path!r} is the input {os.fspath(name)!r}, which would be lost; give another name")


def make_beside(target, mode):
    """(descriptor, path) of a new empty file in the folder of ``target``; the umask takes from ``mode``."""
    temporary = os.path.join(os.path.dirname(target), f".offload-{secrets.token_hex(8)}.tmp")
    return os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW, mode), temporary


def replace(target, write, private):
    """Write a file beside ``target`` and give it that name when it is on disk."""
    handle, temporary = make_beside(target, 0o600 if private else 0o666)
    try:
        with open(handle, "wb") as file:
            if private:
                os.fchmod(handle, 0o600)            # whatever the umask took away
            else:
                with contextlib.suppress(FileNotFoundError):
                    os.fchmod(handle, stat.S_IMODE(os.stat(target).st_mode))
            write(file)
            file.flush()
            os.fsync(handle)
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise
    folder = os.open(os.path.dirname(target), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextlib.contextmanager
def told(path, option):
    """Errors of the host become one of ours, with the file's name and a remedy; a reader that has gone stays one."""
    try:
        yield
    except (OffloadError, BrokenPipeError):
        raise
    except OSError as error:
        text = f"{option} {path!r} cannot be written: {error.strerror or error}"
        if isinstance(error, PermissionError):
            raise NotPermitted(f"{text}; name a file in a folder of your own") from error
        folder = os.path.dirname(path)
        if isinstance(error, FileNotFoundError) and folder and not os.path.lexists(folder):
            raise InvalidInput(f"{text}: there is no folder {folder!r}; make it (mkdir -p), or name a file in one that is there") from error
        if isinstance(error, (FileNotFoundError, NotADirectoryError)):
            raise InvalidInput(f"{text}; name a file in a folder that exists and is writable") from error
        remedy = "make room, or name a file on another disk" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "choose another place"
        other = OffloadError(f"{text}; nothing was left there; {remedy}")
        other.errno = error.errno or other.errno
        raise other from error
