"""The command line: options in, one call, results out. What the commands do is elsewhere and imported when they run.

Errors that a user can mend are one line on standard error and exit status 2, Ctrl-C is 130, an output that nobody reads any
more 141; anything else is a bug and keeps its traceback.
"""

import sys

try:
    import collections
    import contextlib
    import logging
    import os
    import signal
    from typing import Annotated

    import typer

    from offload.errors import OffloadError
    from offload.experiment.config import DEFAULTS
except KeyboardInterrupt:                           # nothing has begun, so there is nothing to say
    sys.exit(130)

__all__ = ("app", "main", "entry")

app = typer.Typer(
    name="offload", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
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
    """List the engines, and why one is not available."""
    from offload.engines import list_engines
    from offload.report import show, table

    listed = list_engines()
    rows = [(name, migrator, "yes" if reason is None else "no", does) for name, migrator, does, reason in listed]
    parts = [table("engines", ("engine", "migrator", "available", "what it does"), rows, fold="what it does")]
    for reason in dict.fromkeys(one[-1] for one in listed if one[-1] is not None):
        parts.append(f"\nnot available: {', '.join(name for name, *_, why in listed if why == reason)}: {reason}")
    show(parts)


@app.command()
def bench(
        size: Annotated[str, typer.Option(help="Bytes migrated in each run, such as 64M or 1G.")] = DEFAULTS["size"],
        orders: Annotated[str, typer.Option(help="Folio orders, 0 (4K) to 9 (2M).")] = DEFAULTS["orders"],
        engines: Annotated[str | None, typer.Option(help="Engines; see offload engines. Left out: those that copy between the nodes "
                                                         "and are here.")] = DEFAULTS["engines"],
        repeat: Annotated[int, typer.Option(help="Timed runs of each engine and folio size.")] = DEFAULTS["repeat"],
        warmup: Annotated[int, typer.Option(help="Runs before them that are not timed.")] = DEFAULTS["warmup"],
        batch_pages: Annotated[int, typer.Option(help="Base pages at which a batch closes; 512 in mainline, 262144 in "
                                                      "the published results for 2M.")] = DEFAULTS["batch_pages"],
        mode: Annotated[str, typer.Option(help="MIGRATE_ASYNC, MIGRATE_SYNC_LIGHT or MIGRATE_SYNC.")] = DEFAULTS["mode"],
        protocol: Annotated[str, typer.Option(help="Round of the series whose rules the batch copy follows: v6, v5, flags or "
                                                   "v4.")] = DEFAULTS["protocol"],
        nodes: Annotated[str, typer.Option(help="Where each node's frames lie: host, pinned (a GPU reaches it) "
                                                "or device (its own memory), such as pinned,device; nowhere,nowhere for metadata alone.")] = DEFAULTS["nodes"],
        seed: Annotated[int, typer.Option(help="Of the random bytes and the order of the folios.")] = DEFAULTS["seed"],
        json: Annotated[str | None, typer.Option(metavar="FILE|-", help="Write the result; - is standard output, then "
                                                                        "without the tables.")] = None):
    """Migrate real bytes with each engine and folio size.

    GB/s is shown beside the limit of this memory. Exit status 1 if not every byte arrived.
    """
    from offload.experiment.bench import run_bench
    from offload.experiment.config import BenchConfig
    from offload.experiment.progress import progress
    from offload.experiment.tables import bench_tables, unverified
    from offload.report import console, deliver, json_target, show

    config = BenchConfig.parse(size=size, orders=orders, engines=engines, repeat=repeat, warmup=warmup,
                               batch_pages=batch_pages, mode=mode, protocol=protocol, nodes=nodes, seed=seed)
    json_target(json)
    with progress(config.runs) as step:
        result = run_bench(config, step=step)
    deliver(json, result, lambda: show(bench_tables(result, console().width)))
    return 1 if unverified(result) else 0


@app.command("bench-engine")
def bench_engine(
        folios: Annotated[int, typer.Option(help="Folios in the batch.")] = 100_000,
        size: Annotated[str, typer.Option(help="Bytes in the batch at most, such as 1G: larger folios are fewer.")] = "1G",
        orders: Annotated[str, typer.Option(help="Folio orders, 0 (4K) to 9 (2M).")] = "0,4,9",
        engines: Annotated[str | None, typer.Option(help="Engines; see offload engines. Left out: those that are here.")] = None,
        nodes: Annotated[list[str] | None, typer.Option(metavar="FROM,TO", help="Where the frames lie: two of host, pinned, device. May "
                        "be given several times. Left out: every pair that the GPU reaches, or host,host.")] = None,
        repeat: Annotated[int, typer.Option(help="Timed runs of each cell.")] = 5,
        warmup: Annotated[int, typer.Option(help="Runs before them that are not timed.")] = 1,
        seed: Annotated[int, typer.Option(help="Of the random bytes and the order of the folios.")] = 0,
        migration: Annotated[bool, typer.Option(help="Also migrate the same folios, with both batch limits.")] = True,
        json: Annotated[str | None, typer.Option(metavar="FILE|-", help="Write the result; - is standard output, then "
                                                                        "without the tables.")] = None):
    """Copy one large batch with each engine alone.

    Its times are shown beside the ceilings of the device. Exit status 1 if not every byte arrived.
    """
    from offload.experiment.alone import AloneConfig, run_alone
    from offload.experiment.alone_tables import alone_tables, unverified_cells
    from offload.experiment.progress import progress
    from offload.report import console, deliver, json_target, show

    config = AloneConfig.parse(folios=folios, size=size, orders=orders, engines=engines, nodes=nodes or (), repeat=repeat, warmup=warmup,
                               seed=seed, migration=migration)
    json_target(json)
    with progress(config.steps) as step:
        result = run_alone(config, step=step)
    deliver(json, result, lambda: show(alone_tables(result, console().width)))
    return 1 if unverified_cells(result) else 0


@app.command()
def evidence(
        output: Annotated[str, typer.Option("--output", "-o", metavar="FILE", help="Such as docs/evidence/h100.json; written whole or "
                                                                                   "not at all.")],
        folios: Annotated[int, typer.Option(help="As for bench-engine.")] = 100_000,
        size: Annotated[str, typer.Option(help="As for bench-engine.")] = "1G",
        orders: Annotated[str, typer.Option(help="As for bench-engine.")] = "0,4,9",
        repeat: Annotated[int, typer.Option(help="As for bench-engine.")] = 5):
    """Test and measure this machine's GPU, for a file.

    Runs the GPU tests and offload bench-engine, and writes what was found and on what. Without a GPU it is refused. Exit status 1 if a test failed or not every byte arrived; the file says so as well.
    """
    from offload.experiment.alone import AloneConfig
    from offload.experiment.evidence import evidence_lines, make_evidence, require_gpu, write_evidence
    from offload.experiment.progress import progress

    require_gpu(output)
    config = AloneConfig.parse(folios=folios, size=size, orders=orders, repeat=repeat)
    with progress(config.steps) as step:
        found = make_evidence(config, step=step)
    write_evidence(output, found)
    print(*evidence_lines(output, found), sep="\n")
    return 0 if found["verified"] else 1


@app.command()
def migrate(
        file: Annotated[str | None, typer.Argument(metavar="FILE", help="What offload snapshot wrote.")] = None,
        pid: Annotated[str | None, typer.Option(metavar="PID|self", help="A running process instead.")] = None,
        engine: Annotated[str | None, typer.Option(help="Who copies; see offload engines. Left out: batch+stream, or auto with a node "
                                                        "in device memory.")] = None,
        nodes: Annotated[str, typer.Option(help="Where each node's frames lie: host, pinned or device, such as pinned,device; "
                                                 "nowhere,nowhere for metadata alone, with --layout-only.")] = "host,host",
        move_all: Annotated[bool, typer.Option("--move-all", help="Move pages that other processes map too "
                                                                  "(MPOL_MF_MOVE_ALL).")] = False,
        batch_pages: Annotated[int, typer.Option(help="Base pages at which a batch closes; 512 in mainline.")] = 512,
        protocol: Annotated[str, typer.Option(help="Round of the series whose rules the batch copy follows: v6, v5, flags or "
                                                   "v4.")] = "v6",
        layout_only: Annotated[bool, typer.Option("--layout-only", help="Without the bytes: move metadata alone.")] = False,
        validate: Annotated[bool, typer.Option("--validate", help="Also check the machine's books afterwards.")] = False,
        json: Annotated[str | None, typer.Option(metavar="FILE|-", help="Write the result; - is standard output, then "
                                                                        "without the tables.")] = None):
    """Move a process from node 0 to node 1, and verify.

    It is rebuilt on node 0 and moved as move_pages(2) would; every page is verified. Exit status 1 if a page that was moved or left does not verify.
    """
    from offload.experiment.manifest import host_manifest
    from offload.workload.job import migrate_job
    return migrate_job(file=file, pid=pid, engine=engine, nodes=nodes, move_all=move_all, batch_pages=batch_pages, protocol=protocol,
                       layout_only=layout_only, validate=validate, json=json, host=host_manifest)


@app.command()
def snapshot(
        pid: Annotated[str, typer.Option(metavar="PID|self", help="The process; it is not stopped.")],
        output: Annotated[str, typer.Option("--output", "-o", metavar="FILE", help="Written with mode 0600, whole or not "
                                                                                   "at all.")],
        layout_only: Annotated[bool, typer.Option("--layout-only", help="Leave the bytes out.")] = False):
    """Keep the memory of a running process in a file.

    For offload migrate FILE. It holds the process's secrets.
    """
    from offload.workload.job import snapshot_job
    return snapshot_job(pid=pid, output=output, layout_only=layout_only)


@app.command()
def run(files: Annotated[list[str], typer.Argument(metavar="FILE", help="Scenario files; see docs/scenarios.md.")],
        protocol: Annotated[str | None, typer.Option(metavar="NAME[,NAME...]", help="Run under v6, v5, flags or v4, or under several, "
                                                     "and show them side by side. What a file expects is judged only under "
                                                     "its own protocol.")] = None,
        trace: Annotated[bool, typer.Option("--trace", help="Tell what happened to each folio, step by step: who joins the "
                                                            "batch copy, who writes, which copies are skipped.")] = False,
        json: Annotated[str | None, typer.Option(metavar="FILE|-", help="Write the results; - is standard output, the "
                                                                        "lines then go to standard error.")] = None):
    """Run scenario files and compare with what they expect.

    Exit status 0 if all is as expected, 1 if something differs, 2 if a file is wrong or not supported. Every file is run.
    """
    from offload.experiment.progress import progress
    from offload.jit import exit_on_interrupt
    from offload.report import json_target, show, write_json
    from offload.scenario import parse_protocols, run_file
    from offload.scenario_table import protocol_tables

    json_target(json, inputs=files)
    protocols = parse_protocols(protocol)
    results_to = sys.stderr if json == "-" else sys.stdout
    outcomes = []
    bar = len(files) > 1 and not results_to.isatty()          # where the lines do not show how far it is
    with exit_on_interrupt(), progress(len(files), wanted=bar) as step:
        for file in files:
            ran = []
            for each in protocols:
                outcome = run_file(file, trace=trace, protocol=each)
                outcomes.append(outcome)
                print(*outcome.lines(), sep="\n", file=sys.stderr if outcome.message else results_to, flush=True)
                if outcome.message is None:
                    ran.append(outcome)
                if outcome.protocol is None or outcome.name is None:    # a file without offload, or none that can be read
                    break
            if protocol is not None and ran:
                show(protocol_tables(ran), results_to)
            step(file)
    if len(outcomes) > 1:
        count = collections.Counter(outcome.status for outcome in outcomes)
        print(", ".join(f"{nr} {status}" for status, nr in count.items()), file=sys.stderr if json == "-" else sys.stdout)
    if json:
        results = [outcome.as_json() for outcome in outcomes]
        write_json(json, results[0] if len(results) == 1 else results)
    return max(outcome.exit_status for outcome in outcomes)


def main(args=None):
    """Run the command line and return its exit status."""
    if sys.stderr is None:                          # closed, as by 2>&-
        sys.stderr = open(os.devnull, "w")
    if sys.stdout is None:
        print("offload: standard output is closed; direct it to a file, or to /dev/null", file=sys.stderr)
        return 2
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):          # no result is lost for a character
            stream.reconfigure(errors="backslashreplace")
    args = sys.argv[1:] if args is None else args
    try:
        with told_on_stderr():
            status = app(args=args, prog_name="offload", standalone_mode=False) or 0
        if status == 130:                           # Typer has caught Ctrl-C and says so by this number alone
            raise KeyboardInterrupt
        sys.stdout.flush()                          # now, while its errors can still be told
        return status
    except OffloadError as error:
        print(f"offload: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        return reader_gone()
    except SystemExit as leaving:                   # Rich and Typer make it of a closed pipe, with a status of their own
        if isinstance(leaving.__context__, BrokenPipeError):
            return reader_gone()
        raise
    except OSError as error:
        if error.filename is None:                  # files say their names, so this is what we print to
            error = f"standard output cannot be written: {error.strerror}; make room, or direct it elsewhere"
        print(f"offload: {error}", file=sys.stderr)
        drop_stdout()
        return 2
    except (KeyboardInterrupt, typer.Abort):
        print("offload: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        # Typer's own usage errors; their class moved when Typer took Click in, their interface did not.
        if not hasattr(error, "format_message"):
            raise
        if not error.format_message():              # no command: the help has been printed
            return 2
        print(f"offload: {complaint(error)} See offload {' '.join(command_path(error, args))}--help", file=sys.stderr)
        return 2


@contextlib.contextmanager
def told_on_stderr():
    """Log messages of the package, such as that it compiles, are lines on standard error."""
    class Handler(logging.Handler):
        def emit(self, record):
            print(f"offload: {record.getMessage()}", file=sys.stderr, flush=True)

    logger, handler = logging.getLogger("offload"), Handler()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def reader_gone():
    """What read our output has seen enough (``| head``): quietly the status of one that SIGPIPE ends, as of any tool."""
    drop_stdout()
    return 128 + signal.SIGPIPE


def drop_stdout():
    """Leave Python nothing to complain of when it flushes standard output at the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def complaint(error):
    """What a usage error says, as a sentence, and with the value that is wrong."""
    text = error.format_message().rstrip(".")
    if hasattr(error.__cause__, "errors"):          # of Pydantic, which says "Input" for it
        text = text.replace("Input should", f"{error.__cause__.errors()[0]['input']!r} should", 1).partition(", unable")[0]
    return text if text.endswith("?") else text + "."


def command_path(error, args):
    """The words between ``offload`` and the options, of the command that a usage error is about."""
    context = getattr(error, "ctx", None)
    if context:
        return [*context.command_path.split()[1:], ""]
    names = {command.name or command.callback.__name__ for command in app.registered_commands}
    return [*args[:1], ""] if args[:1] and args[0] in names else []


def entry():
    """The ``offload`` command."""
    sys.exit(main())
