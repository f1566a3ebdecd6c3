"""Proof that SmoothAPLoss is a drop-in for the one of imbalanced-losses 0.6.0.

Random single-process histories are recorded once, run by the predecessor in a process of its own
and by this library here; loss, gradient, per-class losses and validity must agree in every step,
and a checkpoint saved there must continue here. What differs on purpose is in
`test_predecessor_differences.py`.

`make peers` fetches the predecessor; without it these tests are skipped.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch

from imbalanced_losses import SmoothAPLoss
from tests.hardening.predecessor_cases import (
    IS_THERE,
    WHY_SKIPPED,
    in_float64,
    random_case,
    run_predecessor,
)
from tests.hardening.predecessor_worker import Case, Outcome, run_case, run_step

NUM_CASES = 300

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not IS_THERE, reason=WHY_SKIPPED),
    pytest.mark.usefixtures("one_thread"),
]


class Step(NamedTuple):
    """One step of one random case, run by both."""

    name: str
    case: Case
    mine: Outcome
    theirs: Outcome
    reference: Outcome  # theirs, in float64

    @property
    def is_float64(self) -> bool:
        return bool(self.theirs["gradient"].dtype == torch.float64)


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> list[Step]:
    """Every step of every random case."""
    cases = [random_case(seed) for seed in range(NUM_CASES)]
    wide = [in_float64(case) for case in cases]
    theirs = run_predecessor([*cases, *wide], tmp_path_factory.mktemp("random"))
    mine = [run_case(SmoothAPLoss, case) for case in cases]
    return [
        Step(f"case {seed}, step {number}", case, *outcomes)
        for seed, case in enumerate(cases)
        for number, outcomes in enumerate(
            zip(mine[seed], theirs[seed], theirs[NUM_CASES + seed], strict=True)
        )
    ]


def test_the_cases_are_varied(steps: list[Step]) -> None:
    assert len(steps) > 2 * NUM_CASES
    assert sum(step.is_float64 for step in steps) > NUM_CASES
    assert sum(bool(step.theirs["valid"].any()) for step in steps) > 0.85 * len(steps)
    assert sum(bool(step.theirs["gradient"].any()) for step in steps) > 0.8 * len(steps)
    for name in ("num_classes", "temperature", "reduction", "queue_size"):
        assert len({step.case["arguments"][name] for step in steps}) > 2
    assert all(not step.theirs["warnings"] and not step.mine["warnings"] for step in steps)


def test_same_losses(steps: list[Step], record_property: Callable[[str, object], None]) -> None:
    record_property("cases", NUM_CASES)
    for step in steps:
        tolerance = 1e-12 if step.is_float64 else 1e-6
        mine, theirs = step.mine, step.theirs
        assert torch.equal(mine["valid"], theirs["valid"]), step.name
        for name in ("per_class", "loss"):
            torch.testing.assert_close(
                mine[name],
                theirs[name],
                atol=tolerance,
                rtol=tolerance,  # matters for `sum` alone: everything else is at most 1
                equal_nan=True,
                msg=lambda message, at=step.name: f"{at}: {message}",
            )


def test_same_gradients(steps: list[Step]) -> None:
    """Within 1e-5 of the norm (and 1e-8), or nearer than theirs to what they compute in float64.

    There σ′ is taken as σ(1 − σ), which loses its digits where σ is near one: where such pairs are
    all there is, the predecessor's float32 gradient is the one that is off.
    """
    exceptions = []
    for step in steps:
        mine, theirs = step.mine["gradient"], step.theirs["gradient"]
        difference = (mine - theirs).norm()
        if step.is_float64:
            assert difference <= 1e-10 * theirs.norm() + 1e-15, step.name
        elif difference > 1e-5 * theirs.norm() + 1e-8:
            exact = step.reference["gradient"]
            assert (mine - exact).norm() <= (theirs - exact).norm(), step.name
            exceptions.append(step.name)
    assert len(exceptions) <= 0.02 * len(steps), exceptions


def test_checkpoint_of_the_predecessor_continues_here(steps: list[Step]) -> None:
    """Its state before a step, loaded here, gives the same step."""
    compared = 0
    for before, step in pairwise(steps):
        if before.case is not step.case or "_queue._q_logits" not in before.theirs["state_dict"]:
            continue
        loss_fn = SmoothAPLoss(**step.case["arguments"])
        loss_fn.load_state_dict(before.theirs["state_dict"])
        number = int(step.name.rsplit(maxsplit=1)[1])
        mine = run_step(loss_fn, step.case["steps"][number])
        torch.testing.assert_close(
            mine["loss"], step.mine["loss"], atol=1e-6, rtol=1e-6, equal_nan=True
        )
        compared += 1
    assert compared > NUM_CASES
