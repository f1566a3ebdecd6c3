"""What goes wrong within a step: rows that are not finite, and steps that break off."""

from __future__ import annotations

import copy
import itertools
import math
import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import imbalanced_losses
from imbalanced_losses import SmoothAPLoss
from tests.hardening.faulty import make_mix, step_of
from tests.hardening.fuzz.watch import assert_sound, state_of
from tests.helpers.ranks import WORLD_SIZE, Failure, Ranks
from tests.helpers.rows import IGNORED, Batch, make_batch, saved_by_0_9

State = list[Any]
BAD_VALUES = (math.nan, math.inf, -math.inf)

# --- Rows that are not finite --------------------------------------------------------------------

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "binary": {"num_classes": 1},
    "capped": {"num_classes": 3, "max_pool_size": 14},
    "labels": {"num_classes": 3, "multilabel": True},
    "spread": {"num_classes": 1, "temperature_unit": "spread", "queue_follows_shift": True},
}


class BadRow(NamedTuple):
    rank: int
    row: int
    value: float
    is_ignored: bool


def bad_rows(seed: int, steps: int, num_ranks: int) -> dict[int, BadRow]:
    """By step: every third or so has one."""
    generator = random.Random(seed)
    return {
        step: BadRow(
            generator.randrange(num_ranks),
            generator.randrange(8),
            generator.choice(BAD_VALUES),
            generator.random() < 0.3,
        )
        for step in range(steps)
        if generator.random() < 0.35
    }


def batch_with(bad: BadRow | None, step: int, rank: int, config: dict[str, Any]) -> Batch:
    batch = make_batch(
        8, config["num_classes"], seed=31 * step + rank, multilabel="multilabel" in config
    )
    if bad is not None and bad.rank == rank:
        batch.logits[bad.row, -1] = bad.value
        if bad.is_ignored:
            batch.targets[bad.row] = IGNORED
    return batch


def stepped(loss_fn: SmoothAPLoss, batch: Batch) -> tuple[Tensor, Tensor]:
    leaf = batch.leaf()
    loss = leaf.through(loss_fn)
    loss.backward()
    assert leaf.logits.grad is not None
    return loss.detach(), leaf.logits.grad


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("config", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_a_bad_row_costs_its_own_step_at_most(config: dict[str, Any], seed: int) -> None:
    """Steps with a live NaN are the only ones that are not finite; every step without a bad row is
    bit for bit that of a run which never got those rows.
    """
    loss_fn, other = (SmoothAPLoss(queue_size=20, temperature=0.3, **config) for _ in range(2))
    bad_at = bad_rows(seed, 30, 1)
    for step in range(30):
        bad = bad_at.get(step)
        batch = batch_with(bad, step, 0, config)
        loss, gradient = stepped(loss_fn, batch)
        is_nan = bad is not None and math.isnan(bad.value) and not bad.is_ignored
        is_finite = bool(loss.isfinite())
        assert is_finite is not is_nan or "max_pool_size" in config  # it may not have been drawn
        assert is_finite or is_nan
        assert bool(gradient.isfinite().all()) is is_finite
        kept = torch.ones(8, dtype=torch.bool)
        if bad is not None:
            kept[bad.row] = False
        clean = Batch(batch.logits[kept], batch.targets[kept])
        expected_loss, expected_gradient = stepped(other, clean)
        if bad is None:
            assert torch.equal(loss, expected_loss)
            assert torch.equal(gradient, expected_gradient)
        assert state_of(loss_fn) == state_of(other)
        assert_sound(loss_fn)
    assert 0 < len(bad_at) < 25


def outcomes_of_rank(rank: int, seed: int, num_ranks: int, config: dict[str, Any]) -> Any:
    """Of each step: whether loss and gradient are finite, and the state after it."""
    loss_fn = SmoothAPLoss(queue_size=20, temperature=0.3, **config)
    bad_at, found = bad_rows(seed, 20, num_ranks), []
    for step in range(20):
        batch = batch_with(bad_at.get(step), step, rank, config)
        loss, gradient = stepped(loss_fn, batch)
        assert_sound(loss_fn)
        found.append((bool(loss.isfinite()), bool(gradient.isfinite().all()), state_of(loss_fn)))
    return found


@pytest.mark.parametrize("config", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_a_bad_row_of_one_rank_costs_all_ranks_one_step(
    ranks: Ranks, config: dict[str, Any]
) -> None:
    bad_at = bad_rows(7, 20, WORLD_SIZE)
    by_rank = ranks.run(outcomes_of_rank, 7, WORLD_SIZE, config)
    assert not any(isinstance(found, Failure) for found in by_rank), by_rank
    for step in range(20):
        bad = bad_at.get(step)
        is_nan = bad is not None and math.isnan(bad.value) and not bad.is_ignored
        for found in by_rank:
            is_finite, has_finite_gradient, state = found[step]
            assert is_finite is not is_nan or "max_pool_size" in config
            assert is_finite or is_nan
            assert has_finite_gradient or not is_finite
            assert state == by_rank[0][step][2]
    assert len({bad.rank for bad in bad_at.values()}) == WORLD_SIZE


# --- Steps that break off ------------------------------------------------------------------------


class Interruption:
    """Ctrl-C when the package is about to execute its n-th line."""

    def __init__(self, line: int) -> None:
        self.left = line
        self.folder = str(Path(imbalanced_losses.__file__).parent)

    def __enter__(self) -> Interruption:
        self.before = sys.gettrace()
        sys.settrace(self.trace)
        return self

    def __exit__(self, *error: object) -> None:
        sys.settrace(self.before)

    def trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(self.folder):
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self.trace


INTERRUPTED: dict[str, Callable[[], nn.Module]] = {
    "queue": lambda: SmoothAPLoss(1, 10, 0.3),
    "capped": lambda: SmoothAPLoss(1, 10, 0.3, max_pool_size=12),
    "no-queue": lambda: SmoothAPLoss(1, 0, 0.3, max_pool_size=6),
    "spread": lambda: SmoothAPLoss(
        1, 10, 0.3, temperature_unit="spread", target_prior=0.1, queue_follows_shift=True
    ),
    "mix": lambda: make_mix(blend_steps=4, temperature=(1.0, 0.1, 9)),
    "mix-at-its-switch": lambda: make_mix(warmup_steps=2, refit_temperature=True),
    "mix-in-warm-up": lambda: make_mix(warmup_steps=5),
}


MIXES = [name for name in INTERRUPTED if name.startswith("mix")]
Act = Callable[[Any], Any]


@pytest.mark.parametrize("name", INTERRUPTED)
def test_interrupted_in_a_step_the_state_is_that_before_it_or_after_it(name: str) -> None:
    """At any line; of the mixes, at every fifth."""
    assert_before_or_after(INTERRUPTED[name], a_step, 5 if name in MIXES else 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", MIXES)
def test_interrupted_at_any_line_of_a_mix(name: str) -> None:
    assert_before_or_after(INTERRUPTED[name], a_step, 1)


@pytest.mark.parametrize("saved_by", [nn.Module.state_dict, saved_by_0_9], ids=["now", "0.9"])
@pytest.mark.parametrize("name", ["queue", "mix"])
def test_interrupted_in_loading_the_state_is_that_before_it_or_after_it(
    name: str, saved_by: Callable[[Any], dict[str, Any]]
) -> None:
    other = INTERRUPTED[name]()
    for seed in range(5):
        step_of(other, seed)
    state = saved_by(other)
    assert_before_or_after(INTERRUPTED[name], lambda loss_fn: loss_fn.load_state_dict(state), 3)


def a_step(loss_fn: nn.Module) -> Tensor:
    return step_of(loss_fn, 1)


def assert_before_or_after(make: Callable[[], nn.Module], act: Act, stride: int) -> None:
    loss_fn, warm_up = make(), make_batch(7)
    for _ in range(2):
        loss_fn(warm_up.logits, warm_up.targets)
    before, reference = state_of(loss_fn), copy.deepcopy(loss_fn)
    result = act(reference)
    after, outcomes = state_of(reference), []
    assert after != before
    for line in itertools.count(1, stride):
        interrupted = copy.deepcopy(loss_fn)
        try:
            with Interruption(line):
                act(interrupted)
            break
        except KeyboardInterrupt:
            pass
        found = state_of(interrupted)
        assert found in (before, after), f"at line {line}"
        outcomes.append(found == after)
        if found == before:  # it can be done again
            assert act(interrupted) == result
            assert state_of(interrupted) == after
    assert len(outcomes) * stride > 20
    assert outcomes == sorted(outcomes), "before, then after"


class Partner(nn.Module):
    """A loss that looks at no argument, and fails on request."""

    refuses = False

    def forward(
        self, logits: Tensor, targets: Tensor, sample_weight: Tensor | None = None
    ) -> Tensor:
        if self.refuses:
            raise ArithmeticError("the partner refuses")
        return logits.sum()


def test_a_partner_that_fails_leaves_the_ranking_loss_as_it_was() -> None:
    loss_fn = make_mix(Partner(), warmup_steps=1, blend_steps=2)
    for seed in range(3):
        step_of(loss_fn, seed)
    loss_fn.auxiliary_loss.refuses = True
    before = state_of(loss_fn)
    batch = make_batch(7)
    with pytest.raises(ArithmeticError, match="the partner refuses"):
        loss_fn(batch.logits, batch.targets)
    with pytest.raises(ValueError, match="targets must be"):  # what is wrong for both
        loss_fn(batch.logits, batch.targets + 9)
    with pytest.raises(ValueError, match="sample_weight must be"):
        loss_fn(batch.logits, batch.targets, sample_weight=torch.full((7,), -1.0))
    assert state_of(loss_fn) == before


@pytest.mark.parametrize("refit", [False, True], ids=["plain", "refitted"])
def test_a_bad_batch_at_the_switch_leaves_the_queue_as_it_was(refit: bool) -> None:
    loss_fn = make_mix(Partner(), warmup_steps=2, refit_temperature=refit)
    batch = make_batch(7)
    batch.through(loss_fn.main_loss)
    for seed in range(2):
        step_of(loss_fn, seed)
    before = state_of(loss_fn)
    with pytest.raises(ValueError, match="targets must be"):
        loss_fn(batch.logits, batch.targets + 9)
    assert state_of(loss_fn) == before
    assert not loss_fn._has_switched


def partner_fails_on_one_rank(rank: int) -> State:
    loss_fn = make_mix(Partner(), blend_steps=3)
    step_of(loss_fn, 0)
    loss_fn.auxiliary_loss.refuses = rank == 1
    before = state_of(loss_fn)
    batch = make_batch(7, seed=rank)
    try:
        loss_fn(batch.logits, batch.targets)
    finally:
        assert state_of(loss_fn) == before
    return before


def test_a_partner_that_fails_on_one_rank_is_an_error_on_every_rank(ranks: Ranks) -> None:
    for found in ranks.run(partner_fails_on_one_rank):
        assert found == Failure("ValueError", "on rank 1: the partner refuses")
