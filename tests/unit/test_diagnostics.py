"""`SmoothAPLoss.diagnose`: its numbers by their definition, and advice for runs that stall."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor

from imbalanced_losses import Diagnostics, SmoothAPLoss
from imbalanced_losses.functional import score_spread, smooth_ap
from tests.helpers.cases import seeded
from tests.helpers.ranks import WORLD_SIZE, Failure, Ranks
from tests.helpers.rows import IGNORED, assert_same_state, make_batch, state_of


def scores_of(num_rows: int, seed: int, is_tied: bool) -> tuple[Tensor, Tensor]:
    scores = torch.randn(num_rows, generator=seeded(seed), dtype=torch.float64)
    targets = (torch.rand(num_rows, generator=seeded(seed + 1)) < 0.3).long()
    targets[:2] = torch.tensor([0, 1])
    return (scores.mul(2).round() if is_tied else scores), targets


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("is_weighted", [False, True])
def test_exact_ap_is_scikit_learns(seed: int, is_tied: bool, is_weighted: bool) -> None:
    scores, targets = scores_of(50, seed, is_tied)
    weights = torch.rand(50, generator=seeded(seed), dtype=torch.float64) if is_weighted else None
    found = SmoothAPLoss(1, 0).diagnose(scores[:, None], targets, sample_weight=weights)
    expected = average_precision_score(targets, scores, sample_weight=weights)
    assert found.ap.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("tau", [0.01, 0.1, 1.0])
def test_what_carries_gradient_by_pairs(tau: float) -> None:
    scores, targets = scores_of(60, 3, False)
    found = SmoothAPLoss(1, 0, tau).diagnose(scores[:, None], targets)
    positives, negatives = scores[targets == 1], scores[targets == 0]
    near = (positives[:, None] - negatives).abs() < 6 * tau
    assert found.active_pairs.item() == pytest.approx(near.double().mean().item())
    assert found.active_positives.item() == pytest.approx(near.any(1).double().mean().item())
    assert found.smooth_ap.item() == pytest.approx(smooth_ap(scores, targets == 1, tau).ap.item())
    assert found.gap.item() == pytest.approx(found.smooth_ap.item() - found.ap.item())
    assert found.temperature.item() == tau
    assert found.spread.item() == pytest.approx(score_spread(scores).item())
    assert found.positives_in_batch.item() == found.positives_in_pool.item() == len(positives)
    assert found.pool_size.item() == 60


def test_what_is_six_temperatures_apart_is_within_reach() -> None:
    scores = torch.tensor([0.0, 6.0, -6.0, 6.25, -6.25], dtype=torch.float64)[:, None]
    targets = torch.tensor([1, 0, 0, 0, 0])
    found = SmoothAPLoss(1, 0, 1.0).diagnose(scores, targets)
    assert found.active_pairs.item() == 0.5
    assert found.active_positives.item() == 1
    one = SmoothAPLoss(1, 0, 1.0).diagnose(scores[:2], targets[:2])
    assert one.active_pairs.item() == 1


@pytest.mark.parametrize("multilabel", [False, True])
def test_each_class_by_itself(multilabel: bool) -> None:
    batch = make_batch(30, 3, multilabel=multilabel, dtype=torch.float64)
    batch.targets[4] = IGNORED
    if multilabel:
        batch.targets[5, 1] = batch.targets[7, 2] = IGNORED
    loss_fn = SmoothAPLoss(3, 0, 0.2, multilabel=multilabel, temperature_unit="spread")
    found = loss_fn.diagnose(batch.logits, batch.targets)
    for c in range(3):
        own = batch.targets[:, c] if multilabel else (batch.targets == c).long()
        rows = (torch.arange(30) != 4) & (own != IGNORED)
        alone = SmoothAPLoss(1, 0, 0.2, temperature_unit="spread").diagnose(
            batch.logits[rows, c : c + 1], own[rows]
        )
        for name, value in alone._asdict().items():
            if name not in ("queue_age", "near_budget", "valid_groups"):
                torch.testing.assert_close(getattr(found, name)[c], value[0], msg=name)


@pytest.mark.parametrize("options", [{}, {"max_pool_size": 12}])
def test_before_the_step_it_says_what_that_makes_and_changes_nothing(
    options: dict[str, Any],
) -> None:
    loss_fn = SmoothAPLoss(1, 20, 0.3, **options)
    for step in range(4):
        batch = make_batch(7, seed=step)
        state = state_of(loss_fn)
        found = loss_fn.diagnose(batch.logits, batch.targets)
        assert_same_state(loss_fn, state)
        again = loss_fn.diagnose(batch.logits, batch.targets)
        torch.testing.assert_close(tuple(again), tuple(found), rtol=0, atol=0)
        loss = loss_fn(batch.logits, batch.targets)
        assert 1 - found.smooth_ap.item() == pytest.approx(loss.item(), abs=1e-6)
    loss_fn.reset_queue()
    loss_fn.diagnose(batch.logits, batch.targets)


def test_the_age_of_the_queue() -> None:
    loss_fn = SmoothAPLoss(1, 10, 0.3)
    ages = []
    for step in range(4):
        batch = make_batch(4, seed=step)
        loss_fn(batch.logits, batch.targets)
        ages.append(loss_fn.diagnose(batch.logits, batch.targets).queue_age)
    assert ages == [0, 1, 2, 2]
    assert loss_fn._queue.ages().sort().values.tolist() == [0] * 4 + [1] * 4 + [2] * 2
    loss_fn.reset_queue()
    assert loss_fn.diagnose(batch.logits, batch.targets).queue_age == 0


def test_classes_without_a_problem_are_marked() -> None:
    batch = make_batch(9, 3)
    batch.targets[batch.targets == 1] = 0
    found = SmoothAPLoss(3, 0).diagnose(batch.logits, batch.targets)
    floats = (found.ap, found.smooth_ap, found.temperature, found.spread, found.active_pairs)
    for value in (*floats, found.active_positives):
        assert value.isnan().tolist() == [False, True, False]
    assert found.positives_in_pool.tolist() == [6, 0, 3]
    assert found.advice()[0].startswith("class 1: no positive, or no negative")


@pytest.mark.parametrize("role", [0, 1], ids=["negative", "positive"])
def test_a_score_that_is_not_a_number(role: int) -> None:
    """What a run that has just broken is asked about: the class says so, the others are as ever."""
    logits, targets = torch.randn(20, 2, generator=seeded(0)), torch.arange(20) % 2
    expected = SmoothAPLoss(2, 0).diagnose(logits, targets)
    logits[role, 1] = math.nan
    found = SmoothAPLoss(2, 0).diagnose(logits, targets)
    assert found.ap.isnan().tolist() == found.smooth_ap.isnan().tolist() == [False, True]
    assert found.ap[0] == expected.ap[0]
    assert found.positives_in_pool.tolist() == [10, 10]
    assert found.advice()[0].startswith("class 1: a score is NaN")
    assert "NaN" not in "".join(expected.advice())
    assert "nan" in str(found)


def test_rows_of_weight_zero_are_as_if_left_out() -> None:
    scores, targets = scores_of(20, 0, False)
    weights = torch.ones(20, dtype=torch.float64)
    weights[2:6] = 0
    kept = weights > 0
    found = SmoothAPLoss(1, 0).diagnose(scores[:, None], targets, sample_weight=weights)
    expected = SmoothAPLoss(1, 0).diagnose(scores[kept, None], targets[kept])
    assert found.pool_size.item() == 16
    for name in found._fields:
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), msg=name)


# --- Runs that stall ------------------------------------------------------------------------------


HEALTHY = {
    "ap": 0.9,
    "smooth_ap": 0.9,
    "metric": 0.9,
    "temperature": 1.0,
    "spread": 10.0,
    "active_pairs": 0.5,
    "active_positives": 1.0,
    "positives_in_batch": 100,
    "positives_in_pool": 100,
    "pool_size": 5000,
}


def diagnostics_of(num_classes: int = 1, queue_age: int = 0, **numbers: float) -> Diagnostics:
    """Of healthy classes but for these numbers."""
    fields = {}
    for name, value in {**HEALTHY, **numbers}.items():
        dtype = torch.float64 if isinstance(value, float) else torch.int64
        fields[name] = torch.full((num_classes,), value, dtype=dtype)
    return Diagnostics(**fields, queue_age=queue_age)


PAIRS, POSITIVES = "fewer than 1 % of the pairs", "half of the positives are out of reach"
GAP, BLUNT = "smooth and exact AP differ", "τ is larger than the spread"
SOLVED, FEW = "the pool is ranked almost perfectly", "fewer than three positives"


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ({}, []),
        ({"active_pairs": 0.0099, "spread": 51.0}, [PAIRS]),
        ({"active_pairs": 0.01, "spread": 51.0}, []),
        ({"active_pairs": 0.0099, "spread": 50.5}, [PAIRS]),
        ({"active_pairs": 0.0099, "spread": 50.0}, []),
        ({"active_pairs": 0.0, "spread": 51.0, "ap": 0.99, "smooth_ap": 0.99}, []),
        ({"active_positives": 0.49}, [POSITIVES]),
        ({"active_positives": 0.49, "spread": 50.0}, [POSITIVES]),
        ({"active_positives": 0.49, "spread": 50.5}, []),
        ({"active_positives": 0.5}, []),
        ({"active_positives": 0.4, "ap": 0.99, "smooth_ap": 0.99}, []),
        ({"ap": 0.0, "smooth_ap": 0.1}, []),
        ({"ap": 0.0, "smooth_ap": 0.11}, [GAP]),
        ({"ap": 0.11, "smooth_ap": 0.0}, [GAP]),
        ({"spread": 0.99}, [BLUNT]),
        ({"spread": 1.0}, []),
        ({"spread": 1.5}, []),
        ({"ap": 0.99, "smooth_ap": 0.99, "pool_size": 4095}, [SOLVED]),
        ({"ap": 0.99, "smooth_ap": 0.99, "pool_size": 4096}, []),
        ({"ap": 0.98, "smooth_ap": 0.98, "pool_size": 4095}, []),
        ({"positives_in_pool": 3}, []),
        ({"positives_in_pool": 2}, [FEW]),
    ],
    ids=str,
)
def test_where_each_advice_begins(numbers: dict[str, float], expected: list[str]) -> None:
    found = diagnostics_of(**numbers).advice()
    assert len(found) == len(expected)
    for text, start in zip(found, expected, strict=True):
        assert text.startswith(start)


def test_print() -> None:
    found = diagnostics_of(6, 1234, active_pairs=0.00123, spread=123456.0, pool_size=12345)
    lines = str(found).splitlines()
    for name, line in zip(HEALTHY, lines[:10], strict=True):
        assert line.split() == [name, *5 * [line.split()[1]]]
    for place, text in ((0, "0.9"), (4, "1.235e+05"), (5, "0.00123"), (9, "12,345")):
        assert lines[place].endswith(f" {text}")
    assert lines[10] == "(the first 5 of 6 classes)"
    assert lines[11].split() == ["queue_age", "1,234"]
    assert lines[12].startswith("- 6 classes (0, 1, 2, 3, 4, …): ")
    assert max(map(len, lines)) <= 80


def diagnose_on(rank: int, gather: str) -> Diagnostics:
    batch = make_batch(8, seed=rank, dtype=torch.float64)
    return SmoothAPLoss(1, 0, 0.3, gather=gather).diagnose(batch.logits, batch.targets)


def test_ranks(ranks: Ranks) -> None:
    batches = [make_batch(8, seed=rank, dtype=torch.float64) for rank in range(WORLD_SIZE)]
    logits, targets = (torch.cat([batch[k] for batch in batches]) for k in (0, 1))
    together = SmoothAPLoss(1, 0, 0.3).diagnose(logits, targets)
    for found in ranks.run(diagnose_on, "rows"):
        assert not isinstance(found, Failure), found
        assert found.ap.equal(together.ap)
        assert found.pool_size.item() == 16
    for rank, found in enumerate(ranks.run(diagnose_on, "sums")):
        own = batches[rank]
        assert found.ap.equal(SmoothAPLoss(1, 0, 0.3).diagnose(own.logits, own.targets).ap)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="targets must be"):
        SmoothAPLoss(1).diagnose(torch.zeros(2, 1), torch.tensor([0, 4]))
    found = SmoothAPLoss(1, 0).diagnose(torch.tensor([[math.inf], [0.0]]), torch.tensor([1, 0]))
    assert found.ap.item() == 1
