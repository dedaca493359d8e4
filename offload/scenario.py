"""``offload run``: scenario files in, results out.

A scenario is a machine, what lies in its memory, calls, and what must come of them (format 1, docs/scenarios.md). This
file runs files and compares; beside it, scenario_format.py reads and checks them, scenario_folios.py and
scenario_processes.py build and run the two levels, scenario_trace.py tells what happened. Stands for no kernel file.
"""

import dataclasses
import re

from offload.errors import BrokenInvariant, NotSupported, OffloadError
from offload.scenario_folios import FolioLevel, check_folio_level
from offload.scenario_format import load, one_line, shown
from offload.scenario_machine import check_offload
from offload.scenario_processes import ProcessLevel, check_process_level
from offload.scenario_table import wrong_words
from offload.units import PROTOCOLS, parse_protocol

__all__ = ("Outcome", "parse_protocols", "run_file", "run_scenario", "check_supported", "differences")

MAX_SHOWN = 8                       # folios with wrong bytes that are named
DATA_OK = re.compile(r"expect\[([0-9]+)\]\.data_ok")


def check_supported(scenario):
    """Raise NotSupported, "FIELD: VALUE is not supported yet; remedy", for the first thing that this version lacks.

    ``scenario`` has passed :func:`offload.scenario_format.check`. Nothing is built.
    """
    check_offload(scenario.get("offload"))
    if "folios" not in scenario:
        check_process_level(scenario)
    else:
        check_folio_level(scenario)


def run_scenario(scenario, trace=None):
    """Run a checked scenario: the list of results, one dict per call. ``trace``: a list that gets the lines of --trace.

    NotSupported before anything is built; InvalidInput for a machine that cannot be; WouldHang where the kernel would.
    """
    check_supported(scenario)
    level = FolioLevel if "folios" in scenario else ProcessLevel
    return level(scenario, trace).run()


@dataclasses.dataclass
class Outcome:
    """What came of one file. ``status``: "passed", "ran" (nothing was expected), "differs", "not supported" or "wrong".

    ``message`` is the line for the last two; ``differences`` are (field, expected, got).
    """

    file: str
    status: str
    name: str | None = None
    results: list = dataclasses.field(default_factory=list)
    differences: list = dataclasses.field(default_factory=list)
    message: str | None = None
    trace: list = dataclasses.field(default_factory=list)
    protocol: str | None = None     # under which it ran; None: there is no offload in the file
    expects: str | None = None      # the file's own protocol, where that is another: then nothing is judged
    loss_expected: bool = False     # the file expects wrong bytes

    @property
    def exit_status(self):
        return {"passed": 0, "ran": 0, "differs": 1}.get(self.status, 2)

    def as_json(self):
        """The result object of ``--json``."""
        return {"format": 1, "file": self.file, "name": self.name, "protocol": self.protocol, "status": self.status,
                "message": self.message, "results": self.results,
                "differences": [{"field": field, "expected": expected, "got": got}
                                for field, expected, got in self.differences]}

    def lines(self):
        """What is printed for the file: one line, the trace, and a line per difference."""
        file = one_line(self.file)
        if self.message is not None:
            return [*self.trace, f"{file}: {self.message}"]
        head = f"{file}: {self.status}"
        if self.differences:
            head += f", {len(self.differences)} field{'s' if len(self.differences) > 1 else ''}"
        if self.expects:
            head += f" under {self.protocol}, not judged: what it expects is for {self.expects}"
        if not any(DATA_OK.fullmatch(field) for field, _, _ in self.differences):
            lost = [one_line(self.wrong_data(i)) for i in range(len(self.results)) if self.wrong_data(i)]
            head += "".join(f"; {one}" for one in lost) + (", as expected" if lost and self.loss_expected else "")
        return [*self.trace, head, *(f"  {one_line(self.told(*difference))}" for difference in self.differences)]

    def told(self, field, expected, got):
        """One difference, and of wrong data whose it is."""
        call = DATA_OK.fullmatch(field)
        whose = f" ({self.wrong_data(int(call[1]))})" if call and got is False and self.wrong_data(int(call[1])) else ""
        return f"{field}: expected {shown(expected)}, got {shown(got)}{whose}"

    def wrong_data(self, i):
        """Which folios' bytes are not the last written to them after call ``i``, in words; "" if none."""
        words = wrong_words(self.results[i])
        more = f" and {len(words) - MAX_SHOWN} more folios" if len(words) > MAX_SHOWN else ""
        return ", ".join(f"{name}: {what}" for name, what in words[:MAX_SHOWN]) + more


def parse_protocols(text):
    """The protocols of ``--protocol NAME,NAME``, each once, in the order given; [None] for None: what each file says."""
    if text is None:
        return [None]
    return list(dict.fromkeys(PROTOCOLS[parse_protocol(name.strip())] for name in text.split(",")))


def run_file(path, *, trace=False, protocol=None):
    """Read, check and run one file; the Outcome. Raises only for a bug of ours.

    ``protocol`` takes the place of the file's own, where it has an ``offload`` at all; what it expects is then judged only if
    the two are the same.
    """
    lines = []
    name = expects = None
    try:
        scenario = load(path)
        name = scenario["name"]
        if "offload" in scenario:
            own = PROTOCOLS[parse_protocol(scenario["offload"].get("protocol", "v6"))]
            protocol = protocol or own
            expects = own if protocol != own and "expect" in scenario else None
            scenario["offload"]["protocol"] = protocol
        else:
            protocol = None
        results = run_scenario(scenario, lines if trace else None)
    except BrokenInvariant:
        raise
    except NotSupported as error:
        return Outcome(path, "not supported", name, message=str(error), protocol=protocol)
    except OffloadError as error:
        return Outcome(path, "wrong", name, message=str(error), trace=lines, protocol=protocol)
    if "expect" not in scenario or expects:
        return Outcome(path, "ran", name, results, trace=lines, protocol=protocol, expects=expects)
    found = [difference for i, (expected, got) in enumerate(zip(scenario["expect"], results))
             for difference in differences(expected, got, f"expect[{i}]")]
    return Outcome(path, "differs" if found else "passed", name, results, found, trace=lines, protocol=protocol,
                   loss_expected=any(one.get("data_ok") is False for one in scenario["expect"]))


MISSING = "nothing"


def differences(expected, got, field):
    """(field, expected, got) of everything in ``expected`` that ``got`` has otherwise. Objects may hold more."""
    if isinstance(expected, dict) and isinstance(got, dict):
        return [one for key, value in expected.items()
                for one in (differences(value, got[key], f"{field}.{key}") if key in got else
                            [(f"{field}.{key}", value, MISSING)])]
    if isinstance(expected, list) and isinstance(got, list):
        if len(expected) != len(got):
            return [(field, expected, got)]
        return [one for i, (value, other) in enumerate(zip(expected, got))
                for one in differences(value, other, f"{field}[{i}]")]
    if type(expected) is type(got) and expected == got:
        return []
    return [(field, expected, got)]
