"""A progress bar on standard error, only where that is a terminal."""

import contextlib
import sys

from offload.report import console

__all__ = ("progress",)


@contextlib.contextmanager
def progress(total):
    """A bar of ``total`` steps; the block gets ``step(what)``, to be called after each."""
    if not sys.stderr.isatty():
        yield lambda what: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    columns = BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}")
    with Progress(*columns, console=console(sys.stderr), transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda what: bar.update(task, advance=1, description=what)
