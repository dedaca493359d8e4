"""Tables and files for people and programs: one look for every command's output."""

import json
import sys

from offload.outfile import check_output, write_output

__all__ = ("console", "show", "table", "plus_minus", "deliver", "write_json", "json_target")


NO_TERMINAL_WIDTH = 10_000
"""Columns of what is no terminal: lines are as long as they are."""
FOLDED_WIDTH = 24
"""Characters that text is not wrapped below."""


def console(file=None):
    """A rich console that shows text as it is."""
    from rich.console import Console
    file = file or sys.stdout
    return Console(file=file, width=None if file.isatty() else NO_TERMINAL_WIDTH, highlight=False, markup=False, emoji=False)


def show(parts, file=None):
    """Print lines of text and tables of :func:`table`, whole: a line too long for the terminal is broken by it, not by us.

    (rich would take the columns that do not fit away.)
    """
    from rich.measure import Measurement
    out = console(file)
    width, height = out.size
    with out.capture() as captured:
        for part in parts:
            if not isinstance(part, str):
                out.size = max(width, Measurement.get(out, out.options.update(max_width=NO_TERMINAL_WIDTH), part).minimum), height
            out.print(part, soft_wrap=isinstance(part, str), crop=False)
    lines = captured.get().splitlines(keepends=True)
    out.file.writelines(lines if out.is_terminal else (line.rstrip() + "\n" for line in lines))


def table(title, columns, rows, *, right=(), fold=None):
    """A rich table; ``right`` names the columns of numbers, ``fold`` the one of text, or several, that are wrapped on a narrow terminal.

    The others are never narrower than their cells, and those that are wrapped stay wide enough for words.
    """
    from rich.table import Table
    fold = (fold,) if isinstance(fold, str) else fold or ()
    rows = [tuple(map(str, row)) for row in rows]
    out = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for place, column in enumerate(columns):
        widest = max(len(line) for cell in (column, *(row[place] for row in rows)) for line in cell.split("\n"))
        out.add_column(column, justify="right" if column in right else "left", no_wrap=column not in fold, overflow="fold",
                       min_width=min(widest, FOLDED_WIDTH) if column in fold else widest)
    for row in rows:
        out.add_row(*row)
    return out


def plus_minus():
    """The sign as standard output can show it."""
    try:
        "±".encode(sys.stdout.encoding or "utf-8")
        return "±"
    except UnicodeEncodeError:
        return "+-"


def deliver(json, result, show):
    """Write ``result`` to ``--json``, if that is given, and ``show()`` it, unless the JSON is on standard output.

    The file comes first, so that nothing that can go wrong on a terminal costs it, and a full disk not the tables.
    """
    try:
        if json:
            write_json(json, result)
    finally:
        if json != "-":
            show()


def json_target(path, option="--json", inputs=()):
    """Check before the work that ``--json PATH`` can be written ("-": standard output) and is none of the ``inputs``."""
    if path is not None and path != "-":
        check_output(path, option, inputs=inputs)


def write_json(path, result, option="--json"):
    """Write a result to a file, whole or not at all, or to standard output for "-"."""
    text = json.dumps(result, indent=1) + "\n"
    if path == "-":
        sys.stdout.write(text)
        return
    sys.stdout.flush()                              # in order, should it be the same place
    write_output(path, lambda file: file.write(text.encode()), option)
