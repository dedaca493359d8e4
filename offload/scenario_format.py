"""Scenario files, format 1: what a file may say, checked before anything is built.

:func:`load` reads a file and returns its JSON object, checked; the first fault is an InvalidInput "FIELD: fault; remedy".
A file that is right but asks for something that this version leaves out is judged by scenario.py (NotSupported). Stands
for no kernel file: the format is described in docs/scenarios.md.

A check is a function ``check(value, field)`` that raises; records are made of checks, and what refers to another part
of the file is looked at last.
"""

import contextlib
import difflib
import json
import re

from offload.errors import InvalidInput
from offload.units import PROTOCOLS, parse_mode, parse_protocol

__all__ = ("load", "check", "expand", "REASON_NAMES", "STAT_NAMES", "VMSTAT_NAMES", "ADDRESS", "DEFAULT_NODES", "Fault")

MODES = ("MIGRATE_ASYNC", "MIGRATE_SYNC_LIGHT", "MIGRATE_SYNC")
REASON_NAMES = ("compaction", "memory_failure", "memory_hotplug", "syscall_or_cpuset", "mempolicy_mbind",
                "numa_misplaced", "contig_range", "longterm_pin", "demotion", "damon")
AOPS = ("migrate_folio", "filemap", "buffer", "buffer_norefs", "none", "secretmem")
STAT_NAMES = ("nr_succeeded", "nr_failed_pages", "nr_thp_succeeded", "nr_thp_failed", "nr_thp_split", "nr_split")
VMSTAT_NAMES = ("pgmigrate_success", "pgmigrate_fail", "thp_migration_success", "thp_migration_fail",
                "thp_migration_split")
POLICIES = ("default", "local", "bind", "preferred", "preferred_many", "interleave")
ADDRESS = re.compile(r"([^\s/:+]+):([^\s/:+]+)\+([0-9]{1,9})(?:\.\.([0-9]{1,9}))?(?:@[0-9]{1,9})?")
MAX_ORDER = 18                      # a hugetlb folio of 1 GiB
MAX_PAGES = 1 << 28                 # 1 TiB in a node or a vma
MAX_REFS = 1 << 20
DEFAULT_NODES = ({"pages": 4096}, {"pages": 4096})


class Fault(InvalidInput):
    """Something wrong with one field of a file: ``field: fault; remedy``, on one line whatever the file holds."""

    def __init__(self, field, fault, remedy):
        super().__init__(f"{one_line(field)}: {one_line(fault)}; {one_line(remedy)}")


def one_line(text):
    """Text that can be printed on one line anywhere: control characters and lone surrogates are escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def shown(value):
    """A value of the file as JSON, cut short."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (RecursionError, ValueError):            # nested too deeply; an integer of more digits than Python prints
        text = "the value"
    return text if len(text) <= 60 else text[:57] + "..."


def near(word, words):
    """"did you mean X? " for the word that is most like a mistyped one; "" if none is."""
    found = difflib.get_close_matches(word, words, 1) if isinstance(word, str) else []
    return f"did you mean {found[0]}? " if found else ""


def one_of(words):
    words = [str(one) for one in words]
    return "use one of: " + ", ".join(words[:30]) + (", ..." if len(words) > 30 else "")


# --- checks of single values ----------------------------------------------------------------------------------

def integer(low=-(1 << 62), high=1 << 62):
    def check(value, field):
        if type(value) is not int:
            raise Fault(field, f"{shown(value)} is not an integer", "write a whole number")
        if value < low:
            raise Fault(field, f"{shown(value)} is too small", f"write {low} or more")
        if value > high:
            raise Fault(field, f"{shown(value)} is too large", f"write {high} or less")
    return check


def boolean(value, field):
    if type(value) is not bool:
        raise Fault(field, f"{shown(value)} is not a boolean", "write true or false")


def text(pattern, what, write):
    def check(value, field):
        if not isinstance(value, str) or not re.fullmatch(pattern, value):
            raise Fault(field, f"{shown(value)} is not {what}", f"write {write}")
    return check


def word(*words):
    def check(value, field):
        if not isinstance(value, str) or value not in words:
            raise Fault(field, f"{shown(value)} is not known", near(value, words) + one_of(words))
    return check


def spelled(parse, *words):
    """A word as the command line takes it, by the same ``parse``: in any case."""
    def check(value, field):
        with contextlib.suppress(InvalidInput):
            if isinstance(value, str):
                parse(value)
                return
        raise Fault(field, f"{shown(value)} is not known", near(value, words) + one_of(words))
    return check


def list_of(item, least=0):
    def check(value, field):
        if not isinstance(value, list):
            raise Fault(field, f"{shown(value)} is not a list", "put it in [ ], also where it is only one")
        if len(value) < least:
            raise Fault(field, "is an empty list", f"add at least {least}")
        for i, entry in enumerate(value):
            item(entry, f"{field}[{i}]")
    return check


def or_null(item):
    def check(value, field):
        if value is not None:
            item(value, field)
    return check


def list_or(items, single):
    def check(value, field):
        (items if isinstance(value, list) else single)(value, field)
    return check


def unknown_field(key, field, known):
    """The Fault for a field that an object does not have."""
    return Fault(field, "there is no such field here", near(key, known).strip() or "the fields here are: " + ", ".join(known))


def record(required, optional, others=None):
    """An object. Fields of any other name are refused, unless ``others`` checks them."""
    known = {**required, **optional}

    def check(value, field):
        if not isinstance(value, dict):
            raise Fault(field or "file", f"{shown(value)} is not an object", "write {...}")
        prefix = field + "." if field else ""
        for key, entry in value.items():
            item = known.get(key, others)
            if item is None:
                raise unknown_field(key, prefix + key, known)
            item(entry, prefix + key)
        for key in required:
            if key not in value:
                raise Fault(prefix + key, "is missing", "add it")
    return check


def by_op(kinds):
    """An object whose field ``op`` says which other fields it has."""
    checks = {op: record({"op": word(op), **required}, optional) for op, (required, optional) in kinds.items()}

    def check(value, field):
        if not isinstance(value, dict):
            raise Fault(field, f"{shown(value)} is not an object", 'write {"op": ...}')
        op = value.get("op")
        if op is None:
            raise Fault(field + ".op", "is missing", one_of(checks))
        if not isinstance(op, str) or op not in checks:
            raise Fault(field + ".op", f"{shown(op)} is not known here", near(op, checks) + one_of(checks))
        checks[op](value, field)
    return check


def anything(value, field):
    pass


# --- the parts of a file --------------------------------------------------------------------------------------

number = integer()
count = integer(0)
pages = integer(1, MAX_PAGES)
line = text(r"[^\n]+", "a line of text", "a string without line breaks")
name = text(r"[^\s/:+\[\]]+", "a name", "a string without blanks and / : + [ ]")
outcome = text(r"ok|E[A-Z0-9]+", "an outcome", '"ok" or an errno such as "EBUSY"')
errno = text(r"E[A-Z0-9]+", "the name of an errno", 'for instance "EBUSY", or null')
address = text(ADDRESS.pattern, "a page address", "PROCESS:VMA+INDEX or PROCESS:VMA+FIRST..LAST (@BYTES may follow)")
protection = text(r"r?w?x?", "a protection", 'some of r, w, x in this order, for instance "rw", or ""')
flags = list_of(text(r"[A-Z0-9_]+", "the name of a flag", 'for instance "MOVE"'))

machine = record({}, {
    "nodes": list_of(record({"pages": integer(0, MAX_PAGES)}, {"cpus": boolean}), 1), "thp_migration": boolean,
    "batch_pages": integer(1)})

offload = record({}, {
    "protocol": spelled(parse_protocol, *PROTOCOLS), "migrator": line, "reasons": list_of(word("all", *REASON_NAMES), 1),
    "declines": boolean, "fails_after": count, "marks": word("finished", "none")}, others=anything)

folio = record({"name": name}, {
    "count": integer(1, MAX_PAGES), "kind": word("anon", "file", "shmem", "ksm", "hugetlb", "movable_ops"),
    "order": integer(0, MAX_ORDER), "node": count, "maps": integer(0, 1000), "aops": word(*AOPS),
    "inaccessible": boolean, "swapcache": boolean, "uptodate": boolean, "dirty": boolean, "pte_dirty": boolean,
    "mlocked": boolean, "referenced": boolean, "active": boolean, "workingset": boolean,
    "hwpoison": word("no", "before", "after_unmap"), "copy_error": boolean,
    "locked": word("no", "until_wait", "forever"), "writeback": word("no", "until_wait", "forever"),
    "extra_refs": integer(0, MAX_REFS), "extra_refs_from": word("start", "batch_copy"), "extra_refs_gone_after": count,
    "extra_refs_write": boolean, "pinned": boolean, "freed": boolean,
    "private": word("no", "releasable", "unreleasable"), "truncated": boolean, "partially_mapped": count,
    "zero_filled": count, "split": list_of(outcome, 1), "callback": list_of(outcome, 1),
    "alloc": word("ok", "fail", "fail_all"), "migratable": boolean, "orphan_subpool": boolean})

KINDS_WITH = {
    "swapcache": ("anon", "ksm", "shmem"), "pinned": ("anon", "hugetlb"), "private": ("file",), "truncated": ("file",),
    "aops": ("file", "shmem"), "inaccessible": ("file", "shmem"), "callback": ("file", "shmem", "movable_ops"),
    "migratable": ("hugetlb",), "orphan_subpool": ("hugetlb",), "partially_mapped": ("anon", "ksm")}
"""Folio fields that say something about certain kinds only."""

vma = record({"name": name, "pages": pages}, {
    "kind": word("anon", "file", "shmem", "hugetlb", "pfnmap", "vdso"), "file": name, "shared": boolean,
    "prot": protection, "order": integer(0, MAX_ORDER), "node": list_or(list_of(count, 1), count),
    "populate": list_or(list_of(count), word("write", "read", "none")), "mlock": boolean})

process = record({"name": name}, {
    "uid": count, "caps": list_of(text(r"CAP_[A-Z_]+", "a capability", 'for instance "CAP_SYS_NICE"')),
    "mems_allowed": list_of(count), "vmas": list_of(vma)})

file = record({"name": name}, {
    "kind": word("file", "shmem", "secretmem"), "aops": word(*AOPS), "pages": pages, "dirty": boolean,
    "busy_buffers": boolean})

AT = {"at": address}
operation = by_op({
    "fork": ({"process": name, "child": name}, {}),
    "exit": ({"process": name}, {"reaped": boolean}),
    "mmap": ({"process": name, "vma": vma}, {}),
    "ksm_merge": ({"pages": list_of(address, 1)}, {}),
    "mprotect": ({**AT, "prot": protection}, {}),
    "write": (AT, {"data": line}),
    "madvise": ({**AT, "advice": word("free", "cold", "dontfork")}, {}),
    **{op: (AT, {}) for op in ("munmap", "dontneed", "read", "split_pmd", "pin", "get", "unpin", "put", "swapout",
                               "msync", "uffd_wp")}})

folio_call = by_op({
    "migrate_pages": ({}, {"mode": spelled(parse_mode, *MODES), "reason": word(*REASON_NAMES), "target": count,
                           "pf_memalloc": boolean})})

fault = record({}, {"pages": count, "nodes": count, "status": count})
alloc_fail = {"alloc_fail": record({}, {"order": integer(0, MAX_ORDER), "nth": integer(1), "times": integer(1)})}

process_call = by_op({
    "move_pages": ({"caller": name, "pages": list_of(or_null(address)),
                    "nodes": list_or(list_of(number), or_null(number))},
                   {"target": name, "flags": flags, "fault": fault, **alloc_fail}),
    "migrate_pages_syscall": ({"caller": name, "old": or_null(list_of(number)), "new": or_null(list_of(number))},
                              {"target": name, "maxnode": count, **alloc_fail}),
    "mbind": ({"caller": name, **AT, "policy": word(*POLICIES)}, {"nodes": list_of(number), "flags": flags, **alloc_fail}),
    "read": (AT, {"data": line}),
    "write": (AT, {"data": line})})

vmstat = record({}, {key: number for key in VMSTAT_NAMES})

copies = record({}, {"folios": count, "batched": count, "discarded": count})

folio_facts = record({}, {
    "node": count, "refcount": count, "mapcount": count, "dirty": boolean, "swapcache": boolean, "mlocked": boolean,
    "present": boolean, "data_ok": boolean, "written": boolean, "joined": boolean, "copies": copies})

SYSCALL = {"ret": number, "errno": or_null(errno), "vmstat": vmstat, "trace": list_of(line), "data_ok": boolean,
           "node_of": list_of(or_null(count))}
RESULTS = {
    "migrate_pages": record({}, {
        "rc": number, "left": list_of(line), "stats": record({}, {key: count for key in STAT_NAMES}),
        "targets": record({}, {"allocated": count, "returned": count}), "nr_isolated": number, "tlb_flushes": count,
        "vmstat": vmstat, "trace": list_of(line),
        "copies": copies,
        "folios": record({}, {}, others=folio_facts), "data_ok": boolean}),
    "move_pages": record({}, {**SYSCALL, "status": list_of(or_null(number))}),
    "migrate_pages_syscall": record({}, SYSCALL),
    "mbind": record({}, SYSCALL),
    "read": record({}, {"data_ok": boolean}),
    "write": record({}, {"data_ok": boolean})}


def version(value, field):
    if type(value) is not int or value != 1:
        raise Fault(field, f"{shown(value)} is a format that this version does not read", "it reads format 1")


REQUIRED = {"format": version,
            "name": text(r"([^\s/]+/)?[^\s/]+/[^\s/]+", "the name of a scenario", "GROUP/WHAT or SUITE/GROUP/WHAT")}
OPTIONAL = {"source": line, "kernel": word("7.3", "mm-next", "6.12"), "machine": machine, "offload": offload,
            "expect": list_of(anything)}
folio_scenario = record({**REQUIRED, "folios": list_of(folio), "calls": list_of(folio_call, 1)}, OPTIONAL)
process_scenario = record({**REQUIRED, "processes": list_of(process, 1), "calls": list_of(process_call, 1)},
                          {**OPTIONAL, "files": list_of(file), "before": list_of(operation)})


# --- references between the parts -----------------------------------------------------------------------------

def unique(names, field):
    seen = set()
    for one in names:
        if one in seen:
            raise Fault(field, f"{one} occurs twice", "rename or remove one")
        seen.add(one)


def known(value, names, field, what):
    if value not in names:
        raise Fault(field, f"there is no {what} {shown(value) if isinstance(value, int) else value}",
                    "define it or " + one_of(names) if len(names) else "define it")


def folio_order(one):
    return one.get("order", 9 if one.get("kind") == "hugetlb" else 0)


def expand(one):
    """The names that a folio entry stands for: ``name``, or ``name[0]``, ``name[1]`` ... with ``count``."""
    if one.get("count", 1) > 1:
        return [f"{one['name']}[{k}]" for k in range(one["count"])]
    return [one["name"]]


def check_folios(scenario, nodes):
    """Check the folios of a scenario; return {name: number of base pages}."""
    room = {nid: node["pages"] for nid, node in enumerate(nodes)}
    sizes = {}
    names = []
    for i, one in enumerate(scenario["folios"]):
        field = f"folios[{i}]"
        check_folio(one, field, range(len(nodes)))
        nid, size = one.get("node", 0), 1 << folio_order(one)
        room[nid] -= size * one.get("count", 1)
        if room[nid] < 0:
            raise Fault(field, f"node {nid} of {nodes[nid]['pages']} pages has no room for it",
                        "give the node more pages")
        names += expand(one)
        sizes.update(dict.fromkeys(expand(one), size))
    unique(names, "folios")
    return sizes


def check_folio(one, field, nodes):
    """What fields of one folio say about each other: words that do not go together, machines that cannot be."""
    kind = one.get("kind", "anon")
    size = 1 << folio_order(one)
    for key, kinds in KINDS_WITH.items():
        if key in one and kind not in kinds:
            raise Fault(f"{field}.{key}", f"{shown(one[key])} is not for a folio of kind {kind}", "remove it")
    known(one.get("node", 0), nodes, field + ".node", "node")
    for key in ("extra_refs_from", "extra_refs_gone_after", "extra_refs_write"):
        if key in one and not one.get("extra_refs"):
            raise Fault(f"{field}.{key}", "there are none", "add extra_refs")

    def impossible(key, why, remedy):
        raise Fault(f"{field}.{key}", f"{shown(one[key])}: {why}", remedy)

    if kind not in ("hugetlb",) and size > 512:
        impossible("order", f"no folio of kind {kind} is larger than one PMD", "use 0 to 9")
    unmapped = one.get("freed", False) or one.get("truncated", False) or kind == "movable_ops"
    maps = one.get("maps", 0 if unmapped else 1)
    if unmapped and maps:
        why = "a movable_ops page" if kind == "movable_ops" else "a freed folio" if one.get("freed") else "a truncated folio"
        impossible("maps", f"{why} is mapped nowhere", "write 0")
    if one.get("freed"):
        for key, is_set in (("pinned", one.get("pinned")), ("truncated", one.get("truncated")),
                            ("private", one.get("private", "no") != "no"), ("swapcache", one.get("swapcache")),
                            ("extra_refs", one.get("extra_refs") and one.get("extra_refs_from", "start") == "start")):
            if is_set:
                impossible(key, "a freed folio has no reference but the list's", "remove it, or freed")
    if one.get("pinned") and maps != 1:
        impossible("pinned", f"a pinned exclusive page has one mapping, not {maps}", "write maps 1")
    for key in ("mlocked", "pte_dirty", "zero_filled", "partially_mapped"):
        if one.get(key) and not maps:
            impossible(key, "a folio that is mapped nowhere cannot be that", "remove it, or map the folio")
    if one.get("mlocked") and kind == "hugetlb":
        impossible("mlocked", "hugetlb memory is never mlocked", "remove it")
    if one.get("partially_mapped"):
        if size < 4:
            impossible("partially_mapped", "only folios of order 2 and more are queued for deferred split",
                       "use a larger order")
        if one["partially_mapped"] >= size:
            impossible("partially_mapped", f"of {size} base pages at least one must be mapped", "lower it")
    if one.get("partially_mapped", 0) + one.get("zero_filled", 0) > size:
        impossible("zero_filled" if "zero_filled" in one else "partially_mapped",
                   f"partially_mapped and zero_filled exceed {size} pages", "lower them")


def check_folio_call(call, field, nodes):
    known(call.get("target", 1), nodes, field + ".target", "node")


def check_folio_result(result, field, sizes):
    for key in ("left", "folios"):
        for each in result.get(key, ()):
            whole, _, index = each.partition("/")
            known(whole, sizes, f"{field}.{key}", "folio")
            if "/" in each and not (re.fullmatch("[0-9]{1,6}", index) and int(index) < sizes[whole] > 1):
                raise Fault(f"{field}.{key}", f"{each} is no piece of a large folio", "correct it")
    unique(result.get("left", ()), field + ".left")


class Processes:
    """The processes of a scenario and their VMAs, as far as names and lengths go."""

    def __init__(self, scenario, nodes):
        self.nodes = nodes
        self.files = {one["name"]: one for one in scenario.get("files", [])}
        unique([one["name"] for one in scenario.get("files", [])], "files")
        unique([one["name"] for one in scenario["processes"]], "processes")
        self.vmas = {}
        for i, one in enumerate(scenario["processes"]):
            for node in one.get("mems_allowed", []):
                known(node, nodes, f"processes[{i}].mems_allowed", "node")
            self.vmas[one["name"]] = {}
            for k, area in enumerate(one.get("vmas", [])):
                self.map(one["name"], area, f"processes[{i}].vmas[{k}]")

    def map(self, owner, area, field):
        if area["name"] in self.vmas[owner]:
            raise Fault(field + ".name", f"{owner} has a VMA {area['name']} already", "rename it")
        node = area.get("node", 0)
        folios = -(-area["pages"] // (1 << area.get("order", 0)))
        if isinstance(node, list) and len(node) != folios:
            raise Fault(field + ".node", f"has {len(node)} entries for {folios} folios",
                        "write one per folio or one number for all")
        for one in node if isinstance(node, list) else [node]:
            known(one, self.nodes, field + ".node", "node")
        if "file" in area:
            known(area["file"], self.files, field + ".file", "file")
        elif area.get("kind") == "file":
            raise Fault(field + ".file", "is missing", "name the file that is mapped")
        populate = area.get("populate")
        for index in populate if isinstance(populate, list) else ():
            if index >= area["pages"]:
                raise Fault(field + ".populate", f"page {index} is outside the VMA", "correct it")
        self.vmas[owner][area["name"]] = area["pages"]

    def process(self, value, field):
        known(value, self.vmas, field, "process")

    def pages(self, value, field):
        """How many pages an address, or a run of them, stands for."""
        owner, area, first, last = ADDRESS.fullmatch(value).groups()
        self.process(owner, field)
        known(area, self.vmas[owner], field, f"VMA in process {owner} called")
        first, last = int(first), int(last or first)
        if last < first:
            raise Fault(field, f"{value} runs backwards", "write the lower index first")
        if last >= self.vmas[owner][area]:
            raise Fault(field, f"{value} ends outside the VMA", "use null for such an address")
        return last - first + 1

    def apply(self, step, field):
        op = step["op"]
        if "process" in step:
            self.process(step["process"], field + ".process")
        if op == "fork":
            if step["child"] in self.vmas:
                raise Fault(field + ".child", f"{step['child']} exists already", "rename it")
            self.vmas[step["child"]] = dict(self.vmas[step["process"]])
        elif op == "mmap":
            self.map(step["process"], step["vma"], field + ".vma")
        for value in step.get("pages", [step["at"]] if "at" in step else []):
            self.pages(value, field)

    def check_call(self, call, field):
        """Return the number of pages that the call names, or None if it names none."""
        for key in ("caller", "target"):
            if key in call:
                self.process(call[key], f"{field}.{key}")
        if "at" in call:
            return self.pages(call["at"], field + ".at")
        if "pages" not in call:
            return None
        total = sum(1 if value is None else self.pages(value, f"{field}.pages[{i}]")
                    for i, value in enumerate(call["pages"]))
        if isinstance(call["nodes"], list) and len(call["nodes"]) != total:
            raise Fault(field + ".nodes", f"has {len(call['nodes'])} entries for {total} pages",
                        "write one per page or one number for all")
        return total


def check(scenario):
    """Check a scenario (the JSON object of a file). Raises Fault for the first thing that is wrong."""
    folio_level = isinstance(scenario, dict) and "folios" in scenario
    if folio_level and "processes" in scenario:
        raise Fault("processes", "a file has folios or processes, not both", "remove one, or make two files")
    if isinstance(scenario, dict) and not folio_level and "processes" not in scenario:
        known = {**REQUIRED, **OPTIONAL, "folios": None, "processes": None, "calls": None, "files": None, "before": None}
        for key in scenario:
            if key not in known:
                raise unknown_field(key, key, known)
        raise Fault("file", "has neither folios nor processes", "add folios to call migrate_pages() on, or processes that make "
                                                                "system calls")
    (folio_scenario if folio_level else process_scenario)(scenario, "")
    calls = scenario["calls"]
    nodes = scenario.get("machine", {}).get("nodes", DEFAULT_NODES)
    expect = scenario.get("expect")
    if expect is not None and len(expect) != len(calls):
        raise Fault("expect", f"has {len(expect)} entries for {len(calls)} calls", "write one per call")
    for i, one in enumerate(expect or []):
        RESULTS[calls[i]["op"]](one, f"expect[{i}]")
    if folio_level:
        sizes = check_folios(scenario, nodes)
        for i, call in enumerate(calls):
            check_folio_call(call, f"calls[{i}]", range(len(nodes)))
        for i, one in enumerate(expect or []):
            check_folio_result(one, f"expect[{i}]", sizes)
        return
    processes = Processes(scenario, range(len(nodes)))
    for i, step in enumerate(scenario.get("before", [])):
        processes.apply(step, f"before[{i}]")
    for i, call in enumerate(calls):
        total = processes.check_call(call, f"calls[{i}]")
        for key in ("status", "node_of") if expect and total is not None else ():
            if key in expect[i] and len(expect[i][key]) != total:
                raise Fault(f"expect[{i}].{key}", f"has {len(expect[i][key])} entries for {total} pages",
                            "write one per page")


def no_duplicates(pairs):
    unique([key for key, _ in pairs], "file")
    return dict(pairs)


def load(path):
    """The checked JSON object of the scenario file at ``path``."""
    try:
        with open(path, encoding="utf-8") as source:
            scenario = json.load(source, object_pairs_hook=no_duplicates)
    except OSError as error:
        raise Fault("file", f"cannot be read ({error.strerror})", "check the path") from None
    except Fault:
        raise
    except RecursionError:
        raise Fault("file", "is not JSON that can be read (nested too deeply)", "correct the syntax") from None
    except ValueError as error:
        raise Fault("file", f"is not JSON ({error})", "correct the syntax") from None
    check(scenario)
    return scenario
