"""Tables and files for people and programs: one look for every command's output."""

import contextlib
import json
import os
import sys
import tempfile

from offload.errors import InvalidInput

__all__ = ("console", "table", "write_json", "json_target")


def console(file=None):
    """A rich console that shows text as it is; wide enough for our tables where the output is no terminal."""
    from rich.console import Console
    file = file or sys.stdout
    return Console(file=file, width=None if file.isatty() else 160, highlight=False, markup=False, emoji=False)


def table(title, columns, rows, *, right=(), fold=None):
    """A rich table; ``right`` names the columns of numbers, ``fold`` the one, or several, that are wrapped on a narrow terminal."""
    from rich.table import Table
    fold = (fold,) if isinstance(fold, str) else fold or ()
    out = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in columns:
        out.add_column(column, justify="right" if column in right else "left", no_wrap=column not in fold,
                       overflow="fold" if column in fold else "ellipsis")
    for row in rows:
        out.add_row(*(str(cell) for cell in row))
    return out


def json_target(path, option="--json"):
    """Check before the work that ``--json PATH`` can be written ("-": standard output). InvalidInput if not."""
    if path is None or path == "-":
        return path
    folder = os.path.dirname(os.path.abspath(path))
    if os.path.isdir(path) or not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise InvalidInput(f"{option} {path!r} cannot be written; name a file in a folder that exists and is writable")
    return path


def write_json(path, result, option="--json"):
    """Write a result to a file, whole or not at all, or to standard output for "-"."""
    text = json.dumps(result, indent=1) + "\n"
    if path == "-":
        sys.stdout.write(text)
        return
    try:
        handle, temporary = tempfile.mkstemp(dir=os.path.dirname(os.path.abspath(path)), prefix=".offload-")
    except OSError as error:
        raise InvalidInput(f"{option} {path!r} cannot be written ({error.strerror}); choose another place") from None
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as out:
            out.write(text)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
