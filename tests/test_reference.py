"""The compiled path against the independent judge (tests/reference.py).

First the judge itself: it must give what every folio-level file under tests/scenarios expects. Then generated scenarios:
machines, lists and calls at random, run by both, and everything that a result holds is compared, the books of the machine
are validated after every call. What this version refuses (NotSupported) is counted as an event and not compared.

Two profiles, named by the environment variable ``OFFLOAD_REFERENCE``: "ci" (the default, a few hundred scenarios) and
"night" (more than 20000 calls). Each run draws new ones; a failure prints the scenario and how to run it again.

Not generated, because the rules leave open what would come of it (the judge's own docstring says how it reads the rest):

* Large target allocations on a node that has too few pages *in one piece*: the judge counts free pages only. A target
  node is either large enough for everything, or too small for any of the list's large folios.
* Where a hugetlb folio goes when the target node is full and the reason allows other nodes.
* A scripted split outcome together with a lock (does an attempt that did not get the lock count?); "ok" where the rules
  would refuse; who inherits a copy error, poison or references to come when a folio that has them is split.
* Poison of large folios except in mm-next, where it stops them before anything else: which of their pages is it?
* A copy error in mm-next: whether the flag it leads to is set before stage 2 is a race.
* A pinned folio with dirty entries that a PMD maps (is the dirty bit looked at before the refusal?).
* ``freed`` for movable_ops pages (the rules exclude them from the shortcut, but their owner has let go of them), partially
  mapped and mlocked at once, shared memory in the swap cache that is mapped, buffers that somebody holds.
"""

import json
import os
import pathlib

import pytest
from hypothesis import HealthCheck, event, given, note, settings
from hypothesis import strategies as st

from offload.errors import InvalidInput, NotSupported, WouldHang
from offload.scenario import check_supported, differences, run_scenario
from offload.scenario_folios import FolioLevel
from offload.scenario_format import REASON_NAMES, check
from reference import Hang, run_reference

SCENARIOS = pathlib.Path(__file__).parent / "scenarios"
PROFILES = {"ci": 300, "night": 15000}          # scenarios, of 1.6 calls each on average
PROFILE = settings(max_examples=PROFILES[os.environ.get("OFFLOAD_REFERENCE", "ci")], deadline=None, derandomize=False, print_blob=True,
                   suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much])


# --- strategies -----------------------------------------------------------------------------------------------

def seldom(value, plain=None, one_in=8):
    """``plain`` mostly, sometimes a value of the strategy."""
    return st.integers(0, one_in - 1).flatmap(lambda k: value if k == one_in - 1 else st.just(plain))


AOPS = ["migrate_folio", "filemap", "buffer", "buffer_norefs", "none", "none", "secretmem"]
ORDERS = {"anon": [0] * 8 + [1, 2, 2, 3, 4, 9], "file": [0] * 8 + [1, 2, 3, 4, 9], "shmem": [0] * 6 + [2, 4, 9],
          "ksm": [0], "movable_ops": [0], "hugetlb": [9]}
KINDS = ["anon"] * 5 + ["file"] * 4 + ["shmem"] * 2 + ["ksm", "hugetlb", "movable_ops", "movable_ops"]


class Entry:
    """One entry of ``folios`` in the making. ``put`` draws a field and enters it, or leaves it out, and returns the value."""

    def __init__(self, draw, name, kind, order, kernel):
        self.draw, self.kind, self.order, self.kernel = draw, kind, order, kernel
        self.fields = {"name": name, "kind": kind}
        if order != (9 if kind == "hugetlb" else 0):
            self.fields["order"] = order
        self.can_split = order > 0 and kind != "hugetlb"

    def put(self, key, values, one_in):
        value = self.draw(seldom(st.sampled_from(values), None, one_in))
        if value is not None:
            self.fields[key] = value
        return value

    def is_(self, key):
        return self.put(key, [True], 6)

    def put_where(self):
        """Who maps it, and what cache it is in."""
        put, kind = self.put, self.kind
        self.freed = kind != "movable_ops" and put("freed", [True], 12)
        self.truncated = kind == "file" and not self.freed and put("truncated", [True], 8)
        unmapped = self.freed or self.truncated or kind == "movable_ops"
        self.maps = 0 if unmapped else 1 if put("maps", [0, 2, 3], 4) is None else self.fields["maps"]
        if self.freed:
            return
        if self.order < 4:
            put("count", [2, 3, 4], 6)
        if kind in ("anon", "ksm") or kind == "shmem" and self.maps == 0 and self.kernel != "6.12":
            self.is_("swapcache")
        if kind in ("file", "shmem"):
            put("inaccessible", [True], 12)
        if kind == "file":
            self.put_file()

    def put_file(self):
        aops = self.put("aops", AOPS, 2) or "filemap"
        if self.truncated:
            self.put("private", ["releasable", "unreleasable"], 2)
        elif aops in ("filemap", "buffer", "none"):
            self.put("private", ["releasable", "unreleasable"], 3)
        elif aops == "buffer_norefs":
            self.put("private", ["releasable"], 3)

    def put_state(self):
        """Flags, page-table entries, blockers."""
        put = self.put
        for key in ("dirty", "referenced", "active", "workingset"):
            self.is_(key)
        put("locked", ["until_wait", "until_wait", "until_wait", "forever"], 6)
        put("writeback", ["until_wait", "until_wait", "until_wait", "forever"], 8)
        if not self.maps:
            put("uptodate", [False], 8)
            return
        pages = 1 << self.order
        pinned = self.kind in ("anon", "hugetlb") and self.maps == 1 and put("pinned", [True], 8)
        gone = self.kind == "anon" and self.order >= 2 and put("partially_mapped", [1, pages // 2, pages - 1], 3) or 0
        if self.kind == "anon" and self.order:
            put("zero_filled", sorted({1, (pages - gone + 1) // 2, pages - gone}), 4)
        if not gone and self.kind != "hugetlb":
            self.is_("mlocked")
        if not (pinned and self.order >= 9):
            self.is_("pte_dirty")

    def put_people(self):
        """References of others, and outcomes that were told beforehand."""
        put, kind = self.put, self.kind
        put("alloc", ["fail", "fail_all"], 8)
        if not self.freed and put("extra_refs", [1, 1, 2, 5, 1021, 1022, 1023], 4):
            put("extra_refs_gone_after", range(12), 2)
            if not self.can_split and kind not in ("hugetlb", "movable_ops"):
                put("extra_refs_from", ["batch_copy"], 2)
                put("extra_refs_write", [True], 2)
        if self.can_split:
            if "locked" not in self.fields:
                self.script("split", ["EAGAIN", "EBUSY", "EINVAL"], 5)
            if kind in ("file", "shmem") and self.fields.get("aops") != "none":
                self.script("callback", ["EAGAIN", "EAGAIN", "EBUSY", "EINVAL", "ok"], 3)
            return
        if self.kernel != "mm-next" and kind != "movable_ops":
            put("copy_error", [True], 10)
        if self.kernel == "mm-next" or kind != "hugetlb":
            put("hwpoison", ["before", "after_unmap"], 3 if self.kernel == "mm-next" else 10)
        if kind == "movable_ops" or kind in ("file", "shmem") and self.fields.get("aops") != "none":
            self.script("callback", ["EAGAIN", "EAGAIN", "EBUSY", "EINVAL", "ok"], 3)
        if kind == "hugetlb":
            put("migratable", [False], 8)
            if not self.freed:
                put("orphan_subpool", [True], 8)

    def script(self, key, words, one_in):
        words = self.draw(seldom(st.lists(st.sampled_from(words), min_size=1, max_size=5), None, one_in))
        if words:
            self.fields[key] = words


@st.composite
def folios(draw, i, nodes, kernel, allow_large):
    """One entry of ``folios``: a folio that can be."""
    kind = draw(st.sampled_from(KINDS if allow_large else [one for one in KINDS if one != "hugetlb"]))
    entry = Entry(draw, f"{kind[0]}{i}", kind, draw(st.sampled_from(ORDERS[kind])) if allow_large else 0, kernel)
    if nodes > 1:
        entry.put("node", range(1, nodes), 2)
    entry.put_where()
    entry.put_state()
    entry.put_people()
    return entry.fields


@st.composite
def offloads(draw):
    one = {"protocol": draw(st.sampled_from(["v6", "v6", "v5", "v4", "flags"])), "migrator": "mc_copy"}
    if draw(st.booleans()):
        fault = draw(st.sampled_from(["declines", "fails_after", "reasons"]))
        if fault == "declines":
            one["declines"] = True
        elif fault == "fails_after":
            one["fails_after"] = draw(st.integers(0, 5))
            one["marks"] = draw(st.sampled_from(["finished", "none"]))
        else:
            one["reasons"] = draw(st.lists(st.sampled_from(REASON_NAMES), min_size=1, max_size=4, unique=True))
    return one


@st.composite
def scenarios(draw):
    """A folio-level scenario, checked by the format."""
    kernel = draw(st.sampled_from(["7.3", "7.3", "mm-next", "6.12"]))
    nodes = draw(st.integers(2, 4))
    tight = draw(seldom(st.just(True), False, 3))
    list_ = [draw(folios(i, nodes - tight, kernel, not tight or draw(st.booleans())))
             for i in range(draw(st.integers(1, 12)))]
    sizes = [0] * nodes
    for one in list_:
        order = one.get("order", 9 if one["kind"] == "hugetlb" else 0)
        sizes[one.get("node", 0)] += one.get("count", 1) << order
    total = sum(sizes)
    pages = [2 * total + 512 + size for size in sizes]
    if tight:                       # the last node holds nothing and has no room for a large folio
        larges = [one.get("order", 9) for one in list_ if one.get("order") or one["kind"] == "hugetlb"]
        most = min([total, *((1 << order) - 1 for order in larges)])
        pages[-1] = draw(st.integers(1, max(most, 1)))
    calls = []
    for _ in range(draw(st.integers(1, 3))):
        call = {"op": "migrate_pages", "mode": draw(st.sampled_from(["MIGRATE_ASYNC", "MIGRATE_SYNC_LIGHT", "MIGRATE_SYNC"]))}
        reason = draw(seldom(st.sampled_from(REASON_NAMES), None, 2))
        if reason:
            call["reason"] = reason
        target = nodes - 1 if tight and draw(st.integers(0, 2)) else draw(st.integers(0, nodes - 1))
        if tight and target == nodes - 1 and any(one["kind"] == "hugetlb" for one in list_):
            call["reason"] = "compaction"           # no other node than the target's
        if target != 1:
            call["target"] = target
        if draw(seldom(st.just(True), False, 6)):
            call["pf_memalloc"] = True
        calls.append(call)
    scenario = {"format": 1, "name": "generated/one", "kernel": kernel,
                "machine": {"nodes": [{"pages": size} for size in pages]}, "folios": list_, "calls": calls}
    if draw(st.booleans()):
        scenario["machine"]["batch_pages"] = draw(st.sampled_from([1, 2, 4, 8, 16, 512]))
    if draw(seldom(st.just(True), False, 6)):
        scenario["machine"]["thp_migration"] = False
    if draw(st.booleans()):
        scenario["offload"] = draw(offloads())
    return scenario


# --- both sides -----------------------------------------------------------------------------------------------

def judged(scenario):
    """The judge's results, or "hangs"."""
    try:
        return run_reference(scenario)
    except Hang:
        return "hangs"


def run_core(scenario):
    """The results of offload, or "hangs"; the machine's books are checked after every call."""
    level = FolioLevel(scenario)
    results = []
    settled = True                  # the caller of a demotion takes what moved out of NR_ISOLATED itself; nobody does here
    for call in scenario["calls"]:
        try:
            results.append(level.call(call))
        except WouldHang:
            return "hangs"
        settled &= call.get("reason") != "demotion"
        if settled:
            level.machine.validate()
    return results


def compare(scenario):
    """Everything that the results hold, both ways."""
    expected, got = judged(scenario), run_core(scenario)
    if expected == got:
        return []
    if "hangs" in (expected, got):
        return [("", expected, got)]
    return [one for i, (e, g) in enumerate(zip(expected, got, strict=True))
            for one in differences(e, g, f"[{i}]") or (differences(g, e, f"[{i}]") if e != g else [])]


class TestReferenceOnFiles:
    """The judge, on its own, gives what every folio-level file expects."""

    @pytest.mark.parametrize("path", [pytest.param(path, id=f"{path.parent.name}/{path.stem}")
                                      for path in sorted(SCENARIOS.glob("*/*.json"))
                                      if "folios" in json.loads(path.read_text())])
    def test_file(self, path):
        scenario = json.loads(path.read_text())
        results = run_reference(scenario)
        assert [one for i, (expected, got) in enumerate(zip(scenario["expect"], results, strict=True))
                for one in differences(expected, got, f"expect[{i}]")] == []


class TestAgainstReference:
    """Whatever a scenario holds, the compiled path and the judge say the same of it."""

    @PROFILE
    @given(scenarios())
    def test_generated(self, scenario):
        check(scenario)
        try:
            check_supported(scenario)
        except NotSupported as error:
            event(f"not supported: {str(error).split(':')[0].rpartition('.')[2]}")
            return
        event("compared")
        note(json.dumps(scenario))
        assert compare(scenario) == []


SOME = st.integers(1, 5)
IMPOSSIBLE = {
    "a freed folio that is mapped": st.builds(lambda kind, maps: {"kind": kind, "freed": True, "maps": maps},
                                              st.sampled_from(["anon", "file", "shmem", "ksm", "hugetlb"]), SOME),
    "a freed folio that somebody holds": st.builds(lambda refs: {"freed": True, "extra_refs": refs}, SOME),
    "a freed folio in the swap cache": st.just({"freed": True, "swapcache": True}),
    "a freed folio that is pinned": st.just({"freed": True, "pinned": True}),
    "a truncated folio that is mapped": st.builds(lambda maps: {"kind": "file", "truncated": True, "maps": maps}, SOME),
    "a movable_ops page that is mapped": st.builds(lambda maps: {"kind": "movable_ops", "maps": maps}, SOME),
    "a pinned page with several mappings": st.builds(lambda maps: {"pinned": True, "maps": maps + 1}, SOME),
    "a pinned page that is not mapped": st.just({"pinned": True, "maps": 0}),
    "a pinned file page": st.just({"kind": "file", "pinned": True}),
    "mapped state without a mapping": st.builds(lambda key: {"order": 2, "maps": 0, key: 1 if "_f" in key or "_m" in key else True},
                                                st.sampled_from(["mlocked", "pte_dirty", "zero_filled", "partially_mapped"])),
    "more pages unmapped than there are": st.builds(lambda order, more: {"order": order, "partially_mapped": (1 << order) + more},
                                                    st.integers(2, 4), st.integers(0, 3)),
    "more zeros than mapped pages": st.builds(lambda gone: {"order": 3, "partially_mapped": gone, "zero_filled": 9 - gone},
                                              st.integers(1, 7)),
    "a partially mapped small folio": st.builds(lambda order: {"order": order, "partially_mapped": 1}, st.integers(0, 1)),
    "a folio larger than a PMD": st.builds(lambda kind, order: {"kind": kind, "order": order},
                                           st.sampled_from(["anon", "file", "shmem"]), st.integers(10, 14)),
    "more than the node holds": st.builds(lambda count: {"count": 64 + count}, SOME),
    "a folio larger than its node": st.builds(lambda order: {"order": order}, st.integers(7, 9)),
    "references that nobody holds": st.builds(lambda key, value: {key: value}, st.just("extra_refs_gone_after"), SOME),
    "private data that the callback cannot take along": st.just({"kind": "file", "aops": "migrate_folio", "private": "releasable"}),
}


class TestImpossible:
    """A machine that cannot be is refused with one line, and not built."""

    @pytest.mark.parametrize("what", list(IMPOSSIBLE))
    @settings(PROFILE, max_examples=20)
    @given(data=st.data())
    def test_refused(self, what, data):
        one = {"name": "f"} | data.draw(IMPOSSIBLE[what])
        calls = [{"op": "migrate_pages", "mode": data.draw(st.sampled_from(["MIGRATE_ASYNC", "MIGRATE_SYNC"]))}]
        list_ = data.draw(st.permutations([one, {"name": "g"}]))
        scenario = {"format": 1, "name": "generated/impossible", "machine": {"nodes": [{"pages": 64}, {"pages": 64}]},
                    "folios": list_, "calls": calls}
        with pytest.raises(InvalidInput) as refused:
            check(scenario)
            run_scenario(scenario)
        assert len(str(refused.value).splitlines()) == 1 and "folios[" in str(refused.value)
