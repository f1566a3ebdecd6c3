"""Run the families of the torture suite and tell what each has shown.

    python -m tests.torture [--family T5 T8] [--quick] [--workers 2] [-x]

A case is a test, or one of the examples that a test runs through. The outcome is 1 when anything
failed, when a family ran fewer cases than it claims, or when a test was skipped for a reason that
is not a missing device. A whole run is written to benchmarks/results/.

--quick runs fewer random examples and no commands: what CI has time for.
"""

from __future__ import annotations

import argparse
import datetime
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.families import FAMILIES, Family, family_of

ROOT = Path(__file__).parent.parent
OTHERS = Family("others", "Tests that no family names.", (), 1)
MAY_BE_SKIPPED = "needs a CUDA device"


@dataclass
class Tally:
    """What became of the tests of a family."""

    cases: int = 0
    failures: int = 0
    skipped: int = 0  # for want of a device
    seconds: float = 0.0  # of all processes together

    def problem(self, family: Family, *, is_complete: bool) -> str | None:
        """Why a run that failed nothing still does not show what it should."""
        if self.failures:
            return f"{self.failures} failed"
        if is_complete and self.cases < family.at_least:
            return f"{self.cases} cases, {family.at_least} claimed"
        return None


class Counter:
    """A pytest plugin that adds up reports by family, those of other processes too."""

    def __init__(self) -> None:
        self.by_family: dict[str, Tally] = {key: Tally() for key in (*FAMILIES, "others")}

    def pytest_runtest_logreport(self, report: Any) -> None:
        tally = self.by_family[family_of(report.nodeid)]
        tally.seconds += report.duration
        if report.failed or (report.skipped and MAY_BE_SKIPPED not in str(report.longrepr)):
            tally.failures += 1
        elif report.skipped:
            tally.skipped += 1
        elif report.when == "call":
            tally.cases += dict(report.user_properties).get("cases", 1)

    def pytest_collectreport(self, report: Any) -> None:
        if not report.passed:  # a broken file, or one that skips itself
            self.by_family[family_of(report.nodeid)].failures += 1


def run_tests(families: Iterable[str], options: argparse.Namespace) -> tuple[Counter, int]:
    """Of these families, or of all."""
    paths = sorted({path_of(test) for key in families for test in FAMILIES[key].tests})
    arguments = ["-q", "-p", "no:cacheprovider", *paths]
    if not options.quick:
        arguments.append("--hypothesis-profile=thorough")
    if options.workers > 1:  # the fixtures of a file are made once: it stays in one process
        arguments += ["-n", str(options.workers), "--dist", "loadfile", "--no-loadscope-reorder"]
    if options.x:
        arguments.append("-x")
    counter = Counter()
    return counter, int(pytest.main(arguments, plugins=[counter]))


def path_of(test: str) -> str:
    """
    >>> path_of("test_queue"), path_of("test_queue::test_reset_queue")
    ('tests/test_queue.py', 'tests/test_queue.py::test_reset_queue')
    """
    file, _, name = test.partition("::")
    return f"tests/{file}.py::{name}" if name else f"tests/{file}.py"


def run_command(command: tuple[str, ...], tally: Tally) -> None:
    started = time.perf_counter()
    tally.failures += subprocess.run(command, check=False, cwd=ROOT).returncode != 0
    tally.seconds += time.perf_counter() - started


class Cost(NamedTuple):
    """Of a run, in seconds."""

    wall: float
    cpu: float  # of all processes, which other work on the machine does not change much

    def __str__(self) -> str:
        return f"{self.wall:.0f} s in all, {self.cpu:.0f} s of CPU time"

    @classmethod
    def now(cls) -> Cost:
        return cls(time.perf_counter(), sum(os.times()[:4]))

    def since(self, start: Cost) -> Cost:
        return Cost(self.wall - start.wall, self.cpu - start.cpu)


def show(tallies: dict[str, Tally], problems: dict[str, str], caption: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", "family", title="torture")
    for name in ("cases", "failures", "skipped", "seconds"):
        table.add_column(name, justify="right")
    for key, tally in tallies.items():
        family = FAMILIES.get(key, OTHERS)
        numbers = (f"{tally.cases:,}", str(tally.failures), str(tally.skipped))
        title = f"{family.title}\n[red]{problems[key]}[/]" if key in problems else family.title
        table.add_row(key, title, *numbers, f"{tally.seconds:.1f}")
    table.caption = caption
    Console().print(table)


def write(tallies: dict[str, Tally], caption: str) -> Path:
    """What a whole run leaves behind."""
    from benchmarks import _measure

    today = f"# {datetime.date.today().isoformat()}"
    lines = [today, *_measure.header(1, "cpu"), f"# {caption}"]
    rows = [
        {
            "family": key,
            "title": FAMILIES.get(key, OTHERS).title,
            "cases": tally.cases,
            "at_least": FAMILIES.get(key, OTHERS).at_least,
            "failures": tally.failures,
            "skipped": tally.skipped,
            "seconds": round(tally.seconds, 1),
        }
        for key, tally in tallies.items()
    ]
    return _measure.write_csv(rows, "torture", "cpu", lines)


def run(options: argparse.Namespace) -> int:
    """Tests, then commands, then the table."""
    start = Cost.now()
    counter, status = run_tests(options.family, options)
    tallies = {key: counter.by_family[key] for key in options.family or counter.by_family}
    stopped = options.x and status != 0
    for key, tally in tallies.items():
        command = FAMILIES.get(key, OTHERS).command
        if command and not options.quick and not stopped:
            run_command(command, tally)
    caption = f"{options.workers} at a time, {Cost.now().since(start)}"

    problems = {
        key: problem
        for key, tally in tallies.items()
        if (problem := tally.problem(FAMILIES.get(key, OTHERS), is_complete=not stopped))
    }
    show(tallies, problems, caption)
    if not options.family and not stopped and not options.quick:
        print(f"written: {write(tallies, caption).relative_to(ROOT)}")
    for key, problem in problems.items():
        print(f"{key}: {problem}")
    return 1 if status or problems else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", nargs="+", choices=FAMILIES, default=[], help="these only")
    parser.add_argument("--quick", action="store_true", help="fewer examples, no commands")
    parser.add_argument("--workers", type=int, default=2, help="processes that run tests")
    parser.add_argument("-x", action="store_true", help="stop at the first failure")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the processes are what runs side by side
    os.chdir(ROOT)
    return run(options)


if __name__ == "__main__":
    sys.exit(main())
