"""The tables of a benchmark, from its result dict and nothing else: engines as rows, folio sizes as columns.

The layout is that of the patch series' mails, so that a run can be laid beside a posting; ``--`` is a cell that was not
measured. How to read them: docs/benchmarks.md.
"""

import statistics

from offload.report import NO_TERMINAL_WIDTH, plus_minus, table
from offload.units import PAGE_SIZE, format_bytes, format_size

__all__ = ("bench_tables", "speedup", "share_of_limit", "share_of_copy", "unverified")

ABSENT = "--"
FIRST_WIDTH, COLUMN_WIDTH, GAP = 14, 10, 1
"""Of the engines, of GB/s, and between columns: six folio sizes fit into a terminal of 80."""


# 1. Derived numbers. Ratios are of medians: one run that was disturbed moves a mean, not them.

def median_speed(row):
    """Median of the timed runs, GB/s or (metadata only) folios per ns; None where there is none."""
    if row and row["gbps"]:
        return statistics.median(row["gbps"]["samples"])
    return 1 / statistics.median(row["ns_per_folio"]["samples"]) if row and row.get("ns_per_folio") else None


def speedup(result, row):
    """Median speed over that of vanilla with the same copy kernel (plain, for a GPU engine) at the same order, or None."""
    base = next((other for other in result["rows"] if other["engine"] == base_of(row) and other["order"] == row["order"]), None)
    speed, base_speed = median_speed(row), median_speed(base)
    return speed / base_speed if speed and base_speed else None


def base_of(row):
    """The engine that a row is held against; the GPU's stand beside the kernel's own."""
    return "vanilla+stream" if row["copy_kernel"] == "stream" else "vanilla"


def share_of_limit(row):
    """Median throughput over the scattered copy with the same kernel and threads, without migration; or None."""
    return median_speed(row) / row["limit_gbps"] if row["gbps"] and row["limit_gbps"] else None


def share_of_copy(row):
    """The part of the four phases' time that is the copy, or None."""
    total = sum(row["phases_ns"].values())
    return row["phases_ns"]["copy"] / total if total else None


def unverified(result):
    """(engine, folio size) of the cells whose bytes or folios did not all arrive."""
    return [(row["engine"], folio_size(row["order"])) for row in result["rows"] if not row["verified"]]


# 2. Cells as text.

def folio_size(order):
    return format_size(PAGE_SIZE << order)


def spread_text(spread, digits):
    """Mean±SD; of a single run the mean."""
    if spread is None:
        return ABSENT
    mean = f"{spread['mean']:.{digits}f}"
    return mean if len(spread["samples"]) < 2 else f"{mean}{plus_minus()}{spread['sd']:.{digits}f}"


def number_text(value, unit=""):
    return ABSENT if value is None else f"{value:.2f}{unit}"


def us_text(ns):
    return f"{ns / 1000:.1f}"


def runs_text(manifest):
    nr, warmup = manifest["repeat"], manifest["warmup"]
    return f"{nr} run{'s' * (nr != 1)}" + (f" after {warmup} to warm up" if warmup else "")


def host_text(manifest, **settings):
    """What it ran on, without what the host does not tell; ``settings`` by their names."""
    settings |= {"commit": manifest["git_commit"]}
    return ", ".join([*filter(None, (manifest["cpu"],)), f"{manifest['cores']} cores", f"Linux {manifest['kernel']}",
                      *(f"{name} {value}" for name, value in settings.items() if value)])


def gpu_text(gpu):
    """What gpu_manifest() tells, in one line."""
    return (f"no GPU: {gpu['reason']}" if gpu["reason"] else
            f"{gpu['device']}, CUDA {gpu['cuda']}, driver {gpu['driver'] or 'unknown'}, CuPy {gpu['cupy']}, NVRTC {gpu['nvrtc']}")


# 3. Tables.

def bench_tables(result, width=None):
    """What ``offload bench`` prints: lines of text and rich tables, in order; the line above a table is its title.

    A table of folio sizes wider than ``width`` columns goes on in another one below it.
    """
    manifest = result["manifest"]
    host = manifest["nodes"][0] != "nowhere"
    spread = f"mean{plus_minus()}SD" if manifest["repeat"] > 1 else "one run"
    batch = f"batch limit {manifest['batch_pages']} base pages"
    yield (f"{format_bytes(manifest['size'])} a run, node 0 to node 1 ({','.join(manifest['nodes'])}), {manifest['mode']}, "
           f"protocol {manifest['protocol']}, {batch}; {runs_text(manifest)}, seed {manifest['seed']}")
    yield host_text(manifest, thp=manifest["thp"])
    if "gpu" in manifest:
        yield gpu_text(manifest["gpu"])
    yield from manifest.get("notes", ())          # older results have none
    if host:
        yield f"\nGB/s of the whole call (payload, each byte counted once), {spread}; {batch}"
        yield from by_size(result, lambda row: spread_text(row["gbps"], 2), width)
    else:
        yield f"\nns per folio of the whole call, {spread}; metadata only; {batch}"
        yield from by_size(result, lambda row: spread_text(row["ns_per_folio"], 0), width)
    by_gpu = any(row["copy_kernel"] not in ("plain", "stream") for row in result["rows"])
    yield f"\nspeed-up over vanilla with the same copy kernel{', that of GPU engines over vanilla between the same nodes' if by_gpu else ''} (medians)"
    yield from by_size(result, lambda row: number_text(speedup(result, row), "x"), width)
    yield from without_base(result)
    yield from handed_lines(result)
    if host:
        yield "\nshare of the limit: GB/s over the scattered copy with the same kernel and threads (medians)"
        yield from by_size(result, lambda row: number_text(share_of_limit(row)), width)
        yield "\nlimits: scattered copy of the same frames without migration, GB/s, median"
        yield from limits_tables(result, width)
        yield f"{'copy' if 'device' in manifest['nodes'] else 'np.copyto'} of one contiguous block: {number_text(result['limits']['contiguous_copy_gbps'])} GB/s"
    yield "\nphases, ns per folio (one extra run of each, with its copies timed)"
    yield phases_table(result)
    yield f"\nblocked time of a folio, us; CPU time{' and bytes' if host else ''} of one run"
    yield blocked_table(result)
    failed = unverified(result)
    if failed:
        yield "\nNOT VERIFIED, do not use: " + ", ".join(f"{engine} {size}" for engine, size in failed)
    else:
        yield f"\nverified: {manifest['verified']}"


def orders_of(result):
    return sorted({row["order"] for row in result["rows"]})


def engines_of(result):
    return list(dict.fromkeys(row["engine"] for row in result["rows"]))


def without_base(result):
    """A line for each engine that others would be held against and that was not measured."""
    measured, lacking = engines_of(result), {}
    for row in result["rows"]:
        if base_of(row) not in measured:
            lacking.setdefault(base_of(row), {})[row["engine"]] = True
    for base, engines in lacking.items():
        yield f"no speed-up for {', '.join(engines)}: {base} was not measured"


def handed_lines(result):
    """A line for each folio size about whom ``auto`` gave its batches to; those of older results have none."""
    for row in result["rows"]:
        if row.get("handed"):
            yield (f"{row['engine']} gave its batches of {folio_size(row['order'])} to "
                   + ", ".join(f"{name} ({nr})" for name, nr in sorted(row["handed"].items())))


def compact(columns, rows, right):
    out = table(None, columns, rows, right=right)
    out.padding = (0, GAP, 0, 0)
    return out


def aligned(first, sizes, rows, width):
    """Tables whose columns stand above those of the next ones, as few as fit into ``width``, and blank lines between them."""
    column_width = max(COLUMN_WIDTH, *(len(cell) for row in rows for cell in row[1:]))
    first_width = max(FIRST_WIDTH, *(len(row[0]) for row in rows))
    nr = len(sizes) if width is None else max((width - first_width) // (column_width + GAP), 1)
    nr = -(-len(sizes) // -(-len(sizes) // nr))     # as many in each
    for at in range(0, len(sizes), nr):
        if at:
            yield ""
        shown = slice(at, at + nr)
        out = compact((first, *sizes[shown]), [(row[0], *row[1:][shown]) for row in rows], sizes)
        out.columns[0].min_width = first_width
        for column in out.columns[1:]:
            column.min_width = column_width
        yield out


def in_columns(first, columns, rows, right, width):
    """Tables of ``columns``, as few as fit into ``width``, and blank lines between them; each begins with the ``first`` so many columns."""
    widths = [GAP + max(len(str(cell)) for cell in cells) for cells in zip(columns, *rows)]
    room, at = (width or NO_TERMINAL_WIDTH) - sum(widths[:first]), first
    while at < len(columns):
        end, taken = at + 1, widths[at]
        while end < len(columns) and taken + widths[end] - GAP <= room:
            taken, end = taken + widths[end], end + 1
        if at > first:
            yield ""
        shown = [*range(first), *range(at, end)]
        names = [columns[i] for i in shown]
        yield compact(names, [[row[i] for i in shown] for row in rows], [name for name in names if name in right])
        at = end


def by_size(result, text, width):
    """Engines as rows, folio sizes as columns, ``text(row)`` in the cells."""
    cells = {(row["engine"], row["order"]): row for row in result["rows"]}
    orders = orders_of(result)
    rows = [(engine, *(text(cells[engine, order]) if (engine, order) in cells else ABSENT for order in orders))
            for engine in engines_of(result)]
    yield from aligned("engine", [*map(folio_size, orders)], rows, width)


def limits_tables(result, width):
    orders = orders_of(result)
    rows = [(key, *(number_text(by_order.get(str(order))) for order in orders))
            for key, by_order in result["limits"]["scattered_copy_gbps"].items()]
    yield from aligned("kernel:threads", [*map(folio_size, orders)], rows, width)


def details(result, columns, text):
    """Folio size and engine as rows, ``text(row)`` (a tuple) beside them."""
    rows = [(folio_size(row["order"]), row["engine"], *text(row)) for row in result["rows"]]
    return compact(("folio", "engine", *columns), rows, ("folio", *columns))


def phases_table(result):
    phases = ("unmap", "flush", "copy", "move")

    def text(row):
        share = share_of_copy(row)
        return (*(f"{row['phases_ns'][phase] / row['folios']:.0f}" for phase in phases),
                ABSENT if share is None else f"{100 * share:.1f}%")
    return details(result, (*phases, "share of copy"), text)


def blocked_table(result):
    def text(row):
        blocked = row["blocked_ns"]
        return (*(us_text(blocked[name]) for name in ("first", "p50", "p99", "max")), f"{row['cpu_s']:.4f}",
                row["moved_bytes"] if row["gbps"] else ABSENT, ("yes" if row["gbps"] else "places") if row["verified"] else "NO")
    return details(result, ("first", "p50", "p99", "max", "CPU s", "bytes", "verified"), text)
