"""``offload run``: scenario files in, results out.

A scenario is a machine, what lies in its memory, calls, and what must come of them (format 1, docs/scenarios.md). This
file runs files and compares; beside it, scenario_format.py reads and checks them, scenario_folios.py and
scenario_processes.py build and run the two levels, scenario_trace.py tells what happened. Stands for no kernel file.
"""

import dataclasses

from offload.errors import BrokenInvariant, NotSupported, OffloadError
from offload.scenario_folios import FolioLevel, check_folio_level
from offload.scenario_format import load, one_line, shown
from offload.scenario_machine import check_offload
from offload.scenario_processes import ProcessLevel, check_process_level

__all__ = ("Outcome", "run_file", "run_scenario", "check_supported", "differences")

MAX_SHOWN = 8                       # differences of one list or object that are told one by one


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

    @property
    def exit_status(self):
        return {"passed": 0, "ran": 0, "differs": 1}.get(self.status, 2)

    def as_json(self):
        """The result object of ``--json``."""
        return {"format": 1, "file": self.file, "name": self.name, "status": self.status, "message": self.message,
                "results": self.results,
                "differences": [{"field": field, "expected": expected, "got": got}
                                for field, expected, got in self.differences]}

    def lines(self):
        """What is printed for the file: one line, the trace, and a line per difference."""
        head = f"{one_line(self.file)}: {self.status}"
        if self.message is not None:
            return [*self.trace, f"{one_line(self.file)}: {self.message}"]
        if self.differences:
            head += f", {len(self.differences)} field{'s' if len(self.differences) > 1 else ''}"
        return [*self.trace, head, *(f"  {one_line(field)}: expected {one_line(shown(expected))}, got {one_line(shown(got))}"
                                     for field, expected, got in self.differences)]


def run_file(path, *, trace=False):
    """Read, check and run one file; the Outcome. Raises only for a bug of ours."""
    lines = []
    name = None
    try:
        scenario = load(path)
        name = scenario["name"]
        results = run_scenario(scenario, lines if trace else None)
    except BrokenInvariant:
        raise
    except NotSupported as error:
        return Outcome(path, "not supported", name, message=str(error))
    except OffloadError as error:
        return Outcome(path, "wrong", name, message=str(error), trace=lines)
    if "expect" not in scenario:
        return Outcome(path, "ran", name, results, trace=lines)
    found = [difference for i, (expected, got) in enumerate(zip(scenario["expect"], results))
             for difference in differences(expected, got, f"expect[{i}]")]
    return Outcome(path, "differs" if found else "passed", name, results, found, trace=lines)


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
