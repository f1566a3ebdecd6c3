"""The torture suite's table: its tests exist, each is in one family; and how a run is judged."""

from __future__ import annotations

import ast
from collections import Counter as Count
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.families import FAMILIES, Family, family_of
from tests.torture import Counter, Tally, path_of, run_command

TESTS = Path(__file__).parent


def names_in(file: Path) -> set[str]:
    """Names of the tests that a file defines."""
    tree = ast.parse(file.read_text())
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    return {name for name in functions if name.startswith("test_")}


@pytest.mark.parametrize("key", FAMILIES)
def test_every_test_of_a_family_exists(key: str) -> None:
    for test in FAMILIES[key].tests:
        file, _, name = test.partition("::")
        path = TESTS / f"{file}.py"
        assert path.is_file(), test
        assert not name or name in names_in(path), test
        assert family_of(f"{path_of(test)}[anything]" if name else f"{path_of(test)}::x") == key


def test_no_test_is_in_two_families() -> None:
    named = Count(test for family in FAMILIES.values() for test in family.tests)
    assert set(named.values()) == {1}


def test_a_family_without_tests_has_a_command() -> None:
    assert all(bool(family.tests) != bool(family.command) for family in FAMILIES.values())


class Report(NamedTuple):
    """What pytest tells of one phase of a test."""

    outcome: str
    when: str = "call"
    longrepr: Any = ""
    user_properties: list[tuple[str, object]] = []  # noqa: RUF012, never changed
    nodeid: str = "tests/test_queue.py::test_reset_queue"
    duration: float = 0.5

    @property
    def failed(self) -> bool:
        return self.outcome == "failed"

    @property
    def skipped(self) -> bool:
        return self.outcome == "skipped"


def tally_of(*reports: Report) -> Tally:
    counter = Counter()
    for report in reports:
        counter.pytest_runtest_logreport(report)
    return counter.by_family["T8"]


def test_what_is_counted() -> None:
    passed = Report("passed")
    phases = [passed._replace(when=when) for when in ("setup", "call", "teardown")]
    assert tally_of(*phases) == Tally(cases=1, seconds=1.5)
    assert tally_of(passed._replace(user_properties=[("cases", 200)])).cases == 200
    assert tally_of(Report("failed")).failures == tally_of(Report("failed", "setup")).failures == 1
    assert tally_of(passed, Report("failed", "teardown")).failures == 1
    with_a_device = Report("skipped", "setup", ("file.py", 7, "Skipped: needs a CUDA device"))
    assert tally_of(with_a_device) == Tally(skipped=1, seconds=0.5)
    without_peers = Report(
        "skipped", "setup", ("file.py", 7, "Skipped: fetch it with `make peers`")
    )
    assert tally_of(without_peers) == Tally(failures=1, seconds=0.5)
    elsewhere = passed._replace(nodeid="tests/test_demo.py::test_a")
    assert tally_of(elsewhere) == Tally()


def test_what_is_not_enough() -> None:
    family = Family("", "", (), at_least=5)
    assert Tally(cases=5).problem(family, is_complete=True) is None
    assert Tally(cases=4).problem(family, is_complete=True) == "4 cases, 5 claimed"
    assert Tally(cases=4).problem(family, is_complete=False) is None
    assert Tally(cases=9, failures=1).problem(family, is_complete=False) == "1 failed"


def test_a_command_fails_by_its_exit_status() -> None:
    for command, failures in (("true", 0), ("false", 1)):
        tally = Tally()
        run_command((command,), tally)
        assert tally.failures == failures
        assert tally.seconds > 0
