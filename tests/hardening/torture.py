"""Run the families of the torture suite and tell what each has shown.

    python -m tests.hardening.torture [--family T5 T8] [--quick] [--workers 2] [-x]

A case is a test, or one of the examples that a test runs through. The outcome is 1 when anything
failed, when a family ran fewer cases than it claims, or when a test was skipped for a reason that
is not a missing device. --quick runs the fast suite with its random examples.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from tests.hardening.families import FAMILIES, Family, family_of, path_of

ROOT = Path(__file__).parents[2]
OTHERS = Family("others", "", 1)
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


def run(options: argparse.Namespace) -> int:
    """Tests, then the table."""
    started, counter = time.perf_counter(), Counter()
    words = " ".join(FAMILIES[key].tests for key in options.family).split()
    arguments = ["-q", "-p", "no:cacheprovider", *sorted(set(map(path_of, words)))]
    if not options.quick:
        arguments += ["-m", "slow or not slow", "--hypothesis-profile=thorough"]
    if options.workers > 1:  # the fixtures of a file are made once: it stays in one process
        arguments += ["-n", str(options.workers), "--dist", "loadfile", "--no-loadscope-reorder"]
    if options.x:
        arguments.append("-x")
    status = int(pytest.main(arguments, plugins=[counter]))
    tallies = {key: counter.by_family[key] for key in options.family or counter.by_family}
    is_complete = not (options.quick or (options.x and status != 0))
    problems = [
        f"{key}: {problem}"
        for key, tally in tallies.items()
        if (problem := tally.problem(FAMILIES.get(key, OTHERS), is_complete=is_complete))
    ]
    seconds = time.perf_counter() - started
    lines = [
        f"{datetime.date.today()}: {options.workers} at a time, {seconds:.0f} s in all",
        f"python {platform.python_version()}, torch {version('torch')}, "
        f"hypothesis {version('hypothesis')}",
    ]
    print("\n".join([*lines, *table(tallies), *problems]))
    return 1 if status or problems else 0


def table(tallies: dict[str, Tally]) -> list[str]:
    lines = [
        "| | family | at least | cases | failures | skipped | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for key, tally in tallies.items():
        family = FAMILIES.get(key, OTHERS)
        numbers = (f"{family.at_least:,}", f"{tally.cases:,}", tally.failures, tally.skipped)
        cells = (key, family.title, *numbers, f"{tally.seconds:.0f}")
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", nargs="+", choices=FAMILIES, default=[], help="these only")
    parser.add_argument("--quick", action="store_true", help="the fast suite alone")
    parser.add_argument("--workers", type=int, default=2, help="processes that run tests")
    parser.add_argument("-x", action="store_true", help="stop at the first failure")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the processes are what runs side by side
    os.chdir(ROOT)
    return run(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
