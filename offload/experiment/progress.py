"""A progress bar on standard error, only where that is a terminal."""

import contextlib
import sys

from offload.report import console

__all__ = ("progress",)


@contextlib.contextmanager
def progress(total, wanted=True):
    """A bar of ``total`` steps, if ``wanted``; the block gets ``step(what)``, to be called after each.

    What goes to standard error meanwhile appears above it; standard output is left alone, wherever it goes.
    """
    if not wanted or not sys.stderr.isatty():
        yield lambda what: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    columns = BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}")
    with Progress(*columns, console=console(sys.stderr), transient=True, redirect_stdout=False) as bar:
        task = bar.add_task("", total=total)
        yield lambda what: bar.update(task, advance=1, description=what)
