"""The command line: options in, one call, results out. What the commands do is elsewhere and imported when they run.

Errors that a user can mend are one line on standard error and exit status 2, Ctrl-C is 130; anything else is a bug
and keeps its traceback.
"""

import sys
from typing import Annotated

import typer

from offload.errors import OffloadError

__all__ = ("app", "main", "entry")

app = typer.Typer(
    name="offload", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="The Linux page-migration path with real copies: what batch-copy offload gives, measured in one process.")


def print_version(wanted: bool):
    if wanted:
        import offload
        print(offload.__version__)
        raise typer.Exit()


@app.callback()
def options(version: Annotated[bool, typer.Option("--version", callback=print_version, is_eager=True,
                                                  help="Print the version and exit.")] = False):
    pass


@app.command()
def engines():
    """List the engines: what each copies with, and for one that is not available, why."""
    from offload.engines import list_engines
    from offload.report import console, table

    rows = [(name, migrator, "yes" if reason is None else "no", does if reason is None else f"{does}: {reason}")
            for name, migrator, does, reason in list_engines()]
    console().print(table("engines", ("engine", "migrator", "available", "what it does"), rows))


def main(args=None):
    """Run the command line and return its exit status."""
    try:
        return app(args=args, standalone_mode=False) or 0
    except OffloadError as error:
        print(f"offload: {error}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, typer.Abort):
        print("offload: interrupted; nothing was written", file=sys.stderr)
        return 130
    except Exception as error:
        # Typer's own usage errors; their class moved when Typer took Click in, their interface did not.
        if not hasattr(error, "format_message"):
            raise
        if not error.format_message():              # no command: the help has been printed
            return 2
        print(f"offload: {error.format_message()} See offload {' '.join(command_path(error))}--help", file=sys.stderr)
        return 2


def command_path(error):
    """The words between ``offload`` and the options, of the command that a usage error is about."""
    context = getattr(error, "ctx", None)
    return [*context.command_path.split()[1:], ""] if context else []


def entry():
    """The ``offload`` command."""
    sys.exit(main())
