"""Time, launches and memory on a CUDA device, beside other libraries and what it could do at best.

    python -m benchmarks.gpu [--quick] [--timeout 100] [--into FOLDER]
    python -m benchmarks.gpu --is-there     # says whether there is a device, and nothing else

One table: launches, and the device's time in them, are counted by the profiler; "wall" is a call
among others, "graph" a replay of the step as a CUDA graph, which is first found equal to the step.
"bytes" and "sigmoids" are what the algorithm has to move and to compute, at the rates at which
this device copies and runs a bare loop. Each library has a process of its own. Every step is in
the CSV at once; started again on the same day, the rest is done.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks import _measure, _peers
from benchmarks._measure import Row
from benchmarks.gpu import report
from benchmarks.gpu.report import COLUMNS
from benchmarks.gpu.steps import Step, all_steps


def replies(library: str, wanted: list[Step], timeout_s: float) -> Iterator[Row]:
    """What a process of `worker` prints: facts of the device, then a row a step until it ends."""
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.gpu.worker", library, json.dumps(wanted)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=_peers.ROOT,
    )
    assert process.stdout is not None
    try:
        while True:
            killer = threading.Timer(timeout_s, process.kill)
            killer.start()
            line = process.stdout.readline()
            killer.cancel()
            if not line:
                return
            if line.startswith("{"):
                yield json.loads(line)
    finally:
        process.kill()
        process.wait()


def run(wanted: list[Step], device: str, timeout_s: float, assets: Path) -> Path:
    """Measure what is not in today's file yet, write after each step, print and draw."""
    name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + "-gpu"
    path = _measure.newest(name, today=True)
    rows: list[Row] = list(_measure.read_csv(path)) if path else []
    facts: Row = {}

    def add(row: Row) -> None:
        nonlocal path
        rows.append(row)
        print(report.line(report.cells(row)), flush=True)
        lines = [*_measure.header(1), f"# device: {json.dumps(facts)}"]
        path = _measure.write_csv(rows, name, lines)

    print(report.line(report.HEADINGS), flush=True)
    for library in dict.fromkeys(step.library for step in wanted):
        if not _peers.is_there(library):
            print(f"{library}: left out, fetch it with `make peers`", flush=True)
            continue
        while left := [step for step in wanted if step.library == library and is_left(step, rows)]:
            for reply in replies(library, left, timeout_s):
                if "device" in reply:
                    facts |= reply
                else:
                    add(report.finished(reply, facts))
            if is_left(left[0], rows):  # a process that got anywhere gives way to another
                add(dict.fromkeys(COLUMNS, "") | left[0]._asdict() | {"outcome": "died"})
    print("\n".join(["", *report.summary(rows)]), flush=True)
    report.figure(rows, device, assets / "gpu.png")
    assert path is not None, "nothing was measured"
    print(f"written: {path.name}", flush=True)
    return path


def is_left(step: Step, rows: list[Row]) -> bool:
    """Whether a step has no row; `report.finished` adds to the backend what "auto" chose."""
    fields = [str(value) for value in step]
    return all(fields != [str(row[name]).split(":")[0] for name in Step._fields] for row in rows)


def is_there() -> str:
    """ "" where there is a CUDA device, else why not, and what to do."""
    if torch.cuda.is_available():
        return ""
    if torch.version.cuda is None:
        return (
            f"no CUDA device: torch {torch.__version__} is built without CUDA. Install a CUDA "
            "build of it on a machine with such a device; nothing was measured"
        )
    return "no CUDA device: torch is built for CUDA, but finds no device; nothing was measured"


def main() -> None:
    """Measure, write, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="without the sweep over backends")
    parser.add_argument("--timeout", type=float, default=100.0, help="seconds that a step may take")
    parser.add_argument("--is-there", action="store_true", help="only look for a device")
    parser.add_argument("--into", type=Path, help="instead of benchmarks/results and docs/assets")
    options = parser.parse_args()
    why_not = is_there()
    if why_not:
        parser.exit(3, f"{why_not}\n")
    if options.is_there:
        return
    if options.into is not None:
        _measure.RESULTS = options.into
    wanted = [step for step in all_steps() if not options.quick or step.backend == "auto"]
    assets = options.into or _peers.ROOT / "docs" / "assets"
    run(wanted, torch.cuda.get_device_name(), options.timeout, assets)


if __name__ == "__main__":
    main()
