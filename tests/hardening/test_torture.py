"""The torture suite's table: its tests exist, each is in one family; and how a run is judged."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from tests.hardening.families import FAMILIES, Family, family_of, path_of
from tests.hardening.torture import ROOT, Counter, Tally


def test_every_test_of_a_family_exists_and_is_in_no_other() -> None:
    for key, family in FAMILIES.items():
        for test in family.tests.split():
            file, _, name = path_of(test).partition("::")
            assert f"\ndef {name}" in (ROOT / file).read_text(encoding="utf-8"), test
            assert family_of(f"{file}::{name or 'x'}[anything]") == key


def tally_of(*reports: dict[str, Any]) -> Tally:
    """What a test of T8 adds up to, from what pytest tells of its phases."""
    counter = Counter()
    usual = {"when": "call", "longrepr": "", "user_properties": [], "duration": 0.5}
    for report in reports:
        given = SimpleNamespace(**(usual | report), nodeid="tests/unit/test_queue.py::test_any")
        given.failed, given.skipped = (given.outcome == word for word in ("failed", "skipped"))
        counter.pytest_runtest_logreport(given)
    return counter.by_family["T8"]


def test_what_is_counted() -> None:
    passed, failed = {"outcome": "passed"}, {"outcome": "failed"}
    phases = [passed | {"when": when} for when in ("setup", "call", "teardown")]
    assert tally_of(*phases) == Tally(cases=1, seconds=1.5)
    assert tally_of(passed | {"user_properties": [("cases", 200)]}).cases == 200
    assert tally_of(failed).failures == tally_of(failed | {"when": "setup"}).failures == 1
    assert tally_of(passed, failed | {"when": "teardown"}).failures == 1
    skipped = {"outcome": "skipped", "when": "setup"}
    assert tally_of(skipped | {"longrepr": ("f", 7, "needs a CUDA device")}).skipped == 1
    assert tally_of(skipped | {"longrepr": ("f", 7, "fetch it with `make peers`")}).failures == 1


def test_what_is_not_enough() -> None:
    family = Family("", "", at_least=5)
    assert Tally(cases=5).problem(family, is_complete=True) is None
    assert Tally(cases=4).problem(family, is_complete=True) == "4 cases, 5 claimed"
    assert Tally(cases=4).problem(family, is_complete=False) is None
    assert Tally(cases=9, failures=1).problem(family, is_complete=False) == "1 failed"
