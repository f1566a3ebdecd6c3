"""A pytest plugin of `make mutation`: the same tests, made cheap enough to run for every mutant.

Fewer examples of each property and fewer runs of each state machine; and ranks that are forked
rather than started anew, and that tell mutmut what they reached.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import settings

from tests.helpers import ranks

EXAMPLES = 15

settings.register_profile(
    "mutation", max_examples=EXAMPLES, derandomize=True, database=None, deadline=None
)


def pytest_configure() -> None:
    from mutmut.state import state

    settings.load_profile("mutation")
    ranks.START_METHOD = "fork"
    run_job = ranks.Ranks.run

    def run(self: ranks.Ranks, job: Callable[..., Any], *arguments: Any) -> list[Any]:
        outcomes = run_job(self, recorded, job, *arguments)
        state()._stats.update(*(reached for reached, _ in outcomes))
        return [result for _, result in outcomes]

    ranks.Ranks.run = run  # type: ignore[method-assign]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        machine = getattr(item, "cls", None)
        if hasattr(machine, "settings"):
            machine.settings = settings(machine.settings, max_examples=EXAMPLES)


def recorded(rank: int, job: Callable[..., Any], *arguments: Any) -> tuple[set[str], Any]:
    """What a rank returns, and the functions that it reached on the way."""
    from mutmut.state import state

    state()._stats.clear()
    try:
        result = job(rank, *arguments)
    except Exception as error:
        result = ranks.Failure(type(error).__name__, str(error))
    return set(state()._stats), result
