"""The tables of ``offload bench-engine``, from its result dict and nothing else: one for each pair of placements.

How to read them: docs/gpu.md. ``--`` is what was not measured or does not exist.
"""

import statistics

from offload.experiment.alone import LIMITS
from offload.experiment.tables import ABSENT, folio_size, gpu_text, host_text, in_columns, runs_text
from offload.report import table
from offload.units import format_bytes

__all__ = ("alone_tables", "missing_migrations", "unverified_cells")

COLUMNS = ("folio", "engine", "folios", "plan us", "submit us", "device us", "whole us", "spread", "GB/s device", "GB/s whole", "of ceiling",
           "resident", "of best", "512", "PUD", "verified")
WIDE = 0.2
"""Of a median: where samples lie further apart, a ratio of two medians says little. Chosen, not derived."""


def unverified_cells(result):
    """(from,to, folio size, engine) of the cells, of the batch or of a migration, whose bytes did not all arrive."""
    return [(f"{one['from']},{one['to']}", folio_size(one["order"]), one["engine"])
            for one in (*result["rows"], *result["migrations"]) if one["verified"] is False]


def missing_migrations(result):
    """A line for each migration beside that was asked for and not measured: where, and why."""
    return [f"the migration {one['from']},{one['to']} of {folio_size(one['order'])} with batch limit {one['batch_pages']}: {one['why_not']}"
            for one in result["migrations"] if one["why_not"]]


def alone_tables(result, width=None):
    """What is printed: lines of text and rich tables, in order; the line above a table is its title.

    A table wider than ``width`` columns goes on in another one below it.
    """
    manifest = result["manifest"]
    yield (f"one batch of {manifest['folios']} folio{'s' * (manifest['folios'] != 1)}, {format_bytes(manifest['size'])} at most, in random order at both ends; {runs_text(manifest)}, "
           f"medians, seed {manifest['seed']}; spread: of whole, the longest less the shortest over the median")
    yield host_text(manifest)
    yield gpu_text(manifest["gpu"])
    yield from manifest["notes"]
    if result["ceilings"]:
        yield "\nceilings: one large cuMemcpyAsync, GB/s of payload by events; both ways: both directions together"
        yield table(None, ("copy", "GB/s"), [(name, number(one["gbps"])) for name, one in result["ceilings"].items()], right=("GB/s",))
    for pair in manifest["nodes"]:
        rows = [row for row in result["rows"] if [row["from"], row["to"]] == pair]
        yield (f"\n{','.join(pair)}: GB/s are payload, each byte copied counted once; resident: device, with the list there already; "
               f"512 and PUD: migrations with these batch limits")
        yield from in_columns(2, COLUMNS, [cells(result, row, rows) for row in rows], set(COLUMNS) - {"engine"}, width)
    yield "\nwhat each is, and what moved the bytes"
    yield table(None, ("engine", "call", "flags", "hardware"), list(dict.fromkeys(
        (label(row), row["call"], row["flags"] or ABSENT, row["hardware"]) for row in result["rows"])), fold=("call", "flags"))
    yield from wide_spreads(result)
    yield from (f"not measured: {line}" for line in missing_migrations(result))
    failed = unverified_cells(result)
    yield ("\nNOT VERIFIED, do not use: " + "; ".join(" ".join(cell) for cell in failed) if failed else
           f"\nverified: {manifest['verified']}")


def wide_spreads(result):
    """One line about the cells whose samples lie further apart than WIDE, if there are any."""
    wide = [f"{one['from']},{one['to']} {folio_size(one['order'])} {what} ({percent(spread)})"
            for some, name in ((result["rows"], label), (result["migrations"], lambda one: f"migrated by {one['engine']}, limit {one['batch_pages']}"))
            for one in some if one["end_to_end_ns"] for what, spread in [(name(one), spread_of(one["end_to_end_ns"]))] if (spread or 0) > WIDE]
    if wide:
        yield (f"\nratios mean little where runs took so different times (spread over {percent(WIDE)}); use a quieter machine, more --repeat or "
               f"larger batches: {'; '.join(wide)}")


def spread_of(times):
    """The longest less the shortest of samples, over their median; None of a single one."""
    samples = times["samples"]
    return (max(samples) - min(samples)) / times["median"] if len(samples) > 1 and times["median"] else None


def label(row):
    """The engine, with what tells its rows apart."""
    if row["picked"]:
        return f"auto ({row['picked']})"
    return row["engine"] + ("+overlap" if "OVERLAP" in row["flags"] else "")


def cells(result, row, rows):
    best = max((other["gbps"] for other in rows if other["order"] == row["order"] and other["gbps"]), default=None)
    share = row["device_share_of_ceiling"] if row["device_share_of_ceiling"] is not None else row["share_of_ceiling"]
    return (folio_size(row["order"]), label(row), str(row["folios"]), *(micro(row[name]) for name in ("plan_ns", "submit_ns", "device_ns",
                                                                                              "end_to_end_ns")),
            percent(spread_of(row["end_to_end_ns"])), number(row["device_gbps"]), number(row["gbps"]), number(share), number(row["resident"] and row["resident"]["device_gbps"]),
            number(row["gbps"] / best if best and row["gbps"] else None), *(migrated(result, row, limit) for limit in LIMITS),
            "yes" if row["verified"] else "NO")


def migrated(result, row, limit):
    """GB/s of the migration beside a row, median; the overlap flag has none of its own."""
    found = [one for one in result["migrations"] if one["batch_pages"] == limit and "OVERLAP" not in row["flags"] and one["gbps"]
             and all(one[name] == row[name] for name in ("from", "to", "order", "engine"))]
    return number(statistics.median(found[0]["gbps"]["samples"])) if found else ABSENT


def micro(spread):
    return ABSENT if spread is None else f"{spread['median'] / 1000:.1f}"


def percent(value):
    return ABSENT if value is None else f"{100 * value:.0f}%"


def number(value):
    return ABSENT if value is None else f"{value:.2f}"
