"""``offload run --protocol v4,v6``: what came of one file under several protocols, side by side.

Stands for no kernel file. A column per protocol, a row per group of folios that fared alike under each, then the counters.
"""

from offload.report import table

__all__ = ("protocol_tables", "wrong_words")

NAMES_SHOWN = 6                     # folios of one row that are named; of the rest the number is told
ALWAYS = ("nr_succeeded", "nr_failed_pages")


def wrong_words(result):
    """(name, "WRITE LOST" or "WRONG BYTES") of each folio of a result whose bytes are not the last written to it."""
    return [(name, "WRITE LOST" if facts["written"] else "WRONG BYTES") for name, facts in result.get("folios", {}).items()
            if not facts["data_ok"]]


def protocol_tables(outcomes):
    """A table per call of outcomes of one file, each with results, under different protocols."""
    calls = range(len(outcomes[0].results))
    tables = []
    for i in calls:
        results = [outcome.results[i] for outcome in outcomes]
        on_list = None if i == 0 else [set(outcome.results[i - 1].get("left", ())) for outcome in outcomes]
        offload = outcomes[0].protocol is not None
        rows = (folio_rows(results, on_list, offload) if "folios" in results[0] else []) + counter_rows(results)
        title = outcomes[0].name if len(calls) == 1 else f"{outcomes[0].name}, calls[{i}]"
        columns = ["", *(outcome.protocol or "no offload" for outcome in outcomes)]
        tables.append(table(title, columns, rows, fold=columns[1:]))
    return tables


def folio_rows(results, on_list, offload):
    """Folios that fared alike under each protocol share a row. ``on_list``: per result the names on the list; None: all."""
    groups = {}
    for name in dict.fromkeys(name for result in results for name in result["folios"]):
        cells = tuple(folio_cell(result, name, offload) if on_list is None or name in on_list[i] else "not on the list"
                      for i, result in enumerate(results))
        if set(cells) != {"not on the list"}:
            groups.setdefault(cells, []).append(name)
    return [(names_cell(names), *cells) for cells, names in groups.items()]


def names_cell(names):
    if len(names) <= NAMES_SHOWN:
        return " ".join(names)
    return f"{' '.join(names[:NAMES_SHOWN])} and {len(names) - NAMES_SHOWN} more"


def folio_cell(result, name, offload):
    """What one call did with one folio: a line on each of its place, its copies and its bytes. ``offload``: there is batch copy."""
    facts = result["folios"].get(name)
    if facts is None:
        return "split or freed"
    copies = facts["copies"]
    made = copies["folios"] - copies["batched"]
    lines = ["left" if name in result["left"] else "moved"]
    if copies["batched"]:
        lines.append("copied in the batch" + times(copies["batched"]))
    elif facts["joined"]:
        lines.append("in the batch, not copied")
    elif offload:
        lines.append("not in the batch")
    if made:
        lines.append("copied in the move" + times(made))
    elif name not in result["left"] and facts["joined"]:
        lines.append("copy skipped in the move")
    if copies["discarded"]:
        lines.append(f"{copies['discarded']} thrown away")
    lines.append("bytes kept" if facts["data_ok"] else dict(wrong_words(result))[name])
    return "\n".join(lines)


def times(nr):
    return f" {nr} times" if nr > 1 else ""


def counter_rows(results):
    """The numbers of the calls; of the counters of the kernel those that are not 0 somewhere, or say what moved."""
    rows = [(key, *(shown(result[key]) for result in results)) for key in ("rc", "ret", "errno", "status", "left")
            if key in results[0]]
    if "copies" in results[0]:
        rows += [(f"copies.{key}", *(result["copies"][key] for result in results)) for key in results[0]["copies"]]
    counters = "stats" if "stats" in results[0] else "vmstat"
    rows += [(key, *(result[counters][key] for result in results)) for key in results[0].get(counters, ())
             if key in ALWAYS or any(result[counters][key] for result in results)]
    return rows + [("data_ok", *(shown(result["data_ok"]) for result in results))]


def shown(value):
    """A value of a result in a cell."""
    if isinstance(value, bool):
        return "true" if value else "FALSE"
    if isinstance(value, list):
        return names_cell([str(one) for one in value]) or "-"
    return "-" if value is None else str(value)
