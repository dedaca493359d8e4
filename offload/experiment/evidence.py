"""offload evidence: what was run on a GPU, in one file that can be committed: the tests, the benchmark, and what they ran on.

Stands for the hardware paragraph of a patch series, made checkable: a claim about a GPU in this project quotes such a file, and
a test (tests/test_evidence.py) holds each file under docs/evidence/ against :func:`check_evidence` and the kernels' sources.
Leaves out signatures: who commits it vouches for it.

Nothing is written without a GPU. The file is written whole or not at all.
"""

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree

from offload.errors import EngineUnavailable, InvalidInput
from offload.experiment.alone import run_alone
from offload.experiment.alone_tables import missing_migrations, unverified_cells
from offload.experiment.manifest import git_commit, gpu_manifest, host_manifest
from offload.kernels import cuda
from offload.kernels.cuda import SOURCE
from offload.report import json_target, write_json

__all__ = ("require_gpu", "evidence_lines", "make_evidence", "write_evidence", "check_evidence", "stale_kernels", "run_gpu_tests", "kernel_hashes")

FORMAT = 1
KIND = "offload evidence"
PACKAGES = ("migrate-offload", "numpy", "numba", "llvmlite", "cupy-cuda12x", "cupy-cuda13x", "nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12",
            "nvtx", "pytest")
KEYS = ("format", "kind", "date", "commit", "tree_clean", "device", "host", "packages", "kernels", "tests", "bench", "verified",
        "why_not_verified")
OUTCOMES = ("passed", "failed", "skipped")
ACCEPTED_SKIPS = ("cuda-batch: the driver has CUDA ",)
"""How the reasons begin for which a test for a device may be skipped: the driver is older than the batch call. No other is known."""
ROOT = pathlib.Path(__file__).resolve().parents[2]
"""Of the checkout; the tests are not installed."""
PLACE = "docs/evidence"
"""In the checkout: made where it is not there yet."""


# 1. Making it.

def require_gpu(output):
    """Before any work: EngineUnavailable without a GPU, InvalidInput if there is no place or no checkout to make evidence of."""
    reason = cuda.probe().reason
    if reason:
        raise EngineUnavailable(f"there is no evidence without a GPU: {reason}")
    if output == "-":
        raise InvalidInput("-o '-' is no file; name one, such as docs/evidence/h100.json")
    if not (ROOT / "tests" / "gpu").is_dir():
        raise InvalidInput(f"the tests for a GPU are not beside the package in {ROOT}; run this from a checkout, installed with "
                           f"pip install -e '.[test]'")
    if importlib.util.find_spec("pytest") is None:
        raise InvalidInput("pytest is not installed, and evidence runs the tests for a GPU; pip install -e '.[test]'")
    if in_its_place(output):
        with contextlib.suppress(OSError):          # what is wrong is said next
            (ROOT / PLACE).mkdir(parents=True, exist_ok=True)
    json_target(output, "-o")


def in_its_place(output):
    """Whether a file is one of docs/evidence/ of this checkout."""
    return pathlib.Path(output).absolute().parent.resolve() == (ROOT / PLACE).resolve()


def evidence_lines(output, evidence):
    """What a person is told of a file that was written: what was found, why it is not verified, skipped tests, and what is left to do."""
    tests = evidence["tests"]
    yield (f"{output}: {evidence['device']['device']}, {tests['passed']} tests passed, {tests['failed']} failed, {tests['skipped']} skipped; "
           f"{'verified' if evidence['verified'] else 'NOT VERIFIED'}")
    yield from evidence["why_not_verified"]
    yield from (f"skipped, as may be: {case['name']}: {case['reason']}" for case in tests["cases"]
                if case["outcome"] == "skipped" and case["reason"].startswith(ACCEPTED_SKIPS))
    name = pathlib.Path(output).name
    if in_its_place(output):
        yield (f"next: say in docs/gpu.md what {name} is, in place of the words that there is no evidence file, if they stand there "
               f"(python -m pytest tests/test_evidence.py checks the file and the page); then git add docs && git commit")


def make_evidence(config, *, run_tests=None, step=None):
    """Run the GPU tests and the benchmark of an AloneConfig: the evidence, a dict.

    ``run_tests()`` gives the part "tests" (:func:`run_gpu_tests` if it is None). Raises what the benchmark raises.
    """
    date = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    commit, hashes = git_commit(), kernel_hashes()          # of what is about to run, whatever is edited meanwhile
    tests = (run_tests or run_gpu_tests)()
    bench = run_alone(config, step=step)
    evidence = {
        "format": FORMAT, "kind": KIND, "date": date, "commit": commit and commit.removesuffix("-dirty"),
        "tree_clean": None if commit is None else not commit.endswith("-dirty"), "device": gpu_manifest(), "host": host_manifest(),
        "packages": installed(PACKAGES), "kernels": hashes, "tests": tests, "bench": bench}
    doubts = why_not_verified(evidence)
    return evidence | {"verified": not doubts, "why_not_verified": doubts}


def write_evidence(output, evidence):
    """Write it, whole or not at all. InvalidInput if the file cannot be written."""
    write_json(output, evidence, "-o")


def why_not_verified(evidence):
    """Why it proves less than it should: lines. None if no test failed, none was skipped for another reason than ACCEPTED_SKIPS, some
    passed, and in every cell of the benchmark, the migrations beside among them, each byte arrived."""
    tests, bench = evidence["tests"], evidence["bench"]
    lines = [] if tests["passed"] else ["no test passed"]
    for case in tests["cases"]:
        if case["outcome"] == "failed" or case["outcome"] == "skipped" and not case["reason"].startswith(ACCEPTED_SKIPS):
            lines.append(f"{case['outcome']}: {case['name']}: {case['reason']}")
    lines += [f"bytes did not arrive: {' '.join(cell)}" for cell in unverified_cells(bench)]
    lines += [f"not measured: {text}" for text in missing_migrations(bench)]
    return lines


def kernel_hashes():
    """sha256 of each kernel source, by file name."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(SOURCE.parent.glob("*.cu"))}


def installed(names):
    versions = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def run_gpu_tests():
    """Run tests/gpu in a process of its own: {command, passed, failed, skipped, cases}. InvalidInput if pytest does not run."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests/gpu"]
    print("offload: running the GPU tests (tests/gpu)", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        report = os.path.join(folder, "report.xml")
        done = subprocess.run([*command, f"--junitxml={report}"], cwd=ROOT, capture_output=True, text=True)
        if not os.path.exists(report):
            raise InvalidInput(f"pytest did not run ({last_line(done.stderr or done.stdout)}); pip install -e '.[test]'")
        cases = read_report(report)
    return {"command": " ".join(["python", *command[1:]]), **{outcome: sum(case["outcome"] == outcome for case in cases)
                                                            for outcome in OUTCOMES}, "cases": cases}


def read_report(path):
    """(name, outcome, reason) of each case in a JUnit file."""
    cases = []
    for case in xml.etree.ElementTree.parse(path).iter("testcase"):
        outcome, reason = "passed", None
        for child in case:
            if child.tag in ("failure", "error", "skipped"):
                outcome, reason = ("skipped" if child.tag == "skipped" else "failed"), " ".join((child.get("message") or child.tag).split())[:300]
        cases.append({"name": f"{case.get('classname')}::{case.get('name')}", "outcome": outcome, "reason": reason})
    return cases


def last_line(text):
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else "no word of it"


# 2. Judging it.

def check_evidence(evidence):
    """What is wrong with the form of a piece of evidence, or in it with itself: lines, none if nothing is."""
    if not isinstance(evidence, dict) or evidence.get("kind") != KIND or evidence.get("format") != FORMAT:
        return [f"it is not {KIND} of format {FORMAT}"]
    missing = [key for key in KEYS if key not in evidence]
    if missing:
        return [f"it has no {', '.join(missing)}"]
    try:
        return [line for part in (check_head, check_device, check_kernels, check_tests, check_bench) for line in part(evidence)] + (
            [] if evidence["why_not_verified"] == (doubts := why_not_verified(evidence)) and evidence["verified"] is (not doubts) else
            [f"verified is {evidence['verified']}, and its tests and rows say otherwise"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        return [f"parts of it are missing or of another type ({type(error).__name__}: {error})"]


def check_head(evidence):
    if not re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", evidence["date"]):
        yield f"date {evidence['date']!r} is none"
    if not re.fullmatch("[0-9a-f]{40}", evidence["commit"] or ""):
        yield f"commit {evidence['commit']!r} is none"
    if not isinstance(evidence["tree_clean"], bool):
        yield f"tree_clean is {evidence['tree_clean']!r}"
    if not evidence["packages"].get("numpy") or not any(name.startswith("cupy") for name in evidence["packages"]):
        yield "packages has no version of NumPy or CuPy"


def check_device(evidence):
    device = evidence["device"]
    if device["reason"] is not None:
        yield f"there was no GPU: {device['reason']}"
    elif not device["device"] or "stub" in device["device"].lower():
        yield f"device {device['device']!r} is no GPU"
    if not re.fullmatch(r"\d+\.\d+", device["cuda"] or ""):
        yield f"CUDA version {device['cuda']!r} is none"


def check_kernels(evidence):
    if SOURCE.name not in evidence["kernels"]:
        yield f"kernels has no {SOURCE.name}"
    for name, value in evidence["kernels"].items():
        if not re.fullmatch("[0-9a-f]{64}", value):
            yield f"the sha256 of {name} is none"


def check_tests(evidence):
    tests = evidence["tests"]
    for outcome in OUTCOMES:
        found = sum(case["outcome"] == outcome for case in tests["cases"])
        if tests[outcome] != found:
            yield f"{tests[outcome]} tests {outcome}, and {found} are listed"
    for case in tests["cases"]:
        if case["outcome"] not in OUTCOMES or (case["outcome"] != "passed") != bool(case["reason"]):
            yield f"test {case['name']} is {case['outcome']!r} for {case['reason']!r}"


def check_bench(evidence):
    bench = evidence["bench"]
    if bench["kind"] != "engine alone" or not any(row["device"] for row in bench["rows"]):
        yield "its benchmark has no row of a GPU"
    if bench["manifest"]["gpu"]["kernel_sha256"] != evidence["kernels"][SOURCE.name]:
        yield f"its benchmark was of another {SOURCE.name} than it names"
    for name, ceiling in (bench["ceilings"] or {}).items():
        if not is_speed(ceiling["gbps"], ceiling["bytes"], ceiling["device_ns"]):
            yield f"ceiling {name}: {ceiling['gbps']} GB/s is not its bytes over the median of its times"
    for one in bench["migrations"]:
        if one["gbps"] and not is_close(one["gbps"]["mean"], statistics.mean(one["gbps"]["samples"])):
            yield f"migration {one['from']},{one['to']} order {one['order']} {one['engine']}: its mean is not that of its samples"
    for row in bench["rows"]:
        cell = f"{row['from']},{row['to']} order {row['order']} {row['engine']}"
        samples = row["end_to_end_ns"]["samples"]
        if not samples or min(samples) <= 0 or row["folios"] << 12 << row["order"] != row["bytes"]:
            yield f"{cell}: its samples or sizes cannot be"
            continue
        yield from (f"{cell}: {what}" for what in check_speeds(row, bench["ceilings"] or {}))
        if row["device"] and (row["device"] != evidence["device"]["device"] or not row["call"] or not row["hardware"]):
            yield f"{cell}: it does not say what ran it"


def check_speeds(row, ceilings):
    """What is wrong with the times of a row, each against its samples, and with its speeds and shares, each against its times."""
    resident = row["resident"] or {}
    for part, times in ((row, "plan_ns"), (row, "submit_ns"), (row, "device_ns"), (row, "end_to_end_ns"), *((resident, key) for key in resident)):
        if times.endswith("_ns") and part[times] and part[times]["median"] != statistics.median(part[times]["samples"]):
            yield f"{times} {part[times]['median']} is not the median of its samples"
    for part, speed, times in ((row, "gbps", "end_to_end_ns"), (row, "device_gbps", "device_ns"), (resident, "device_gbps", "device_ns")):
        if part.get(speed) and not is_speed(part[speed], row["bytes"], part[times]["samples"]):
            yield f"{speed} {part[speed]} is not its bytes over its time"
    ceiling = ceilings.get(f"{row['from']},{row['to']}")
    for share, speed in (("share_of_ceiling", "gbps"), ("device_share_of_ceiling", "device_gbps")):
        if row[share] is not None and not is_close(row[share] * ceiling["gbps"], row[speed]):
            yield f"{share} {row[share]} is not its speed over its ceiling"


def is_close(one, other):
    return abs(one - other) <= 1e-6 * abs(other)


def is_speed(gbps, nbytes, samples):
    """Whether GB/s are these bytes over the median of these ns; None, where the median is 0."""
    median = statistics.median(samples)
    return is_close(gbps, nbytes / median) if gbps and median else gbps is None and median == 0


def stale_kernels(evidence):
    """Names of the kernel sources that are not, or no longer, those of the evidence."""
    here = kernel_hashes()
    return sorted(name for name in here.keys() | evidence["kernels"].keys() if here.get(name) != evidence["kernels"].get(name))
