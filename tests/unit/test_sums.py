"""`gather="sums"`: every rank with its own rows, and the loss of one process with all of them."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from imbalanced_losses import SmoothAPLoss
from imbalanced_losses._ranking import Problems
from imbalanced_losses._ranking.average_precision import average_precision
from imbalanced_losses._ranking.layout import Layout
from imbalanced_losses._ranking.weighting import spread
from imbalanced_losses._rows.gather import Group, Shards
from imbalanced_losses._rows.subsample import quota_indices, strata_of
from imbalanced_losses.functional import score_spread, smooth_ap
from tests.helpers.cases import seeded
from tests.helpers.ranks import WORLD_SIZE, Failure, Ranks
from tests.helpers.rows import make_batch
from tests.helpers.score_families import FAMILIES, labels

# --- Queues and caps of each process --------------------------------------------------------------


def with_a_queue(rank: int | None, unit: str) -> list[tuple[float, Tensor]]:
    """Loss and gradient of steps that fill the queue; one process has the queues of both in one."""
    rows = slice(None) if rank is None else slice(6 * rank, 6 * rank + 6)
    queue_size = 24 if rank is None else 12
    options = {"gather": "sums", "temperature_unit": unit}
    loss_fn, found = SmoothAPLoss(3, queue_size, 0.3, **options), []
    loss_fn.backend = "panel"
    for step in range(4):
        batch = make_batch(12, 3, seed=step, dtype=torch.float64)
        weights = torch.arange(12).remainder(3).add(0.5)
        leaf = batch.logits[rows].clone().requires_grad_()
        loss = loss_fn(leaf, batch.targets[rows], sample_weight=weights[rows] if step % 2 else None)
        loss.backward()
        found.append((loss.item(), leaf.grad))
    return found


@pytest.mark.parametrize("unit", ["score", "spread"])
def test_each_rank_has_a_queue_of_its_own(ranks: Ranks, unit: str) -> None:
    expected = with_a_queue(None, unit)
    for first, second, (loss, gradient) in zip(
        *ranks.run(with_a_queue, unit), expected, strict=True
    ):
        assert first[0] == second[0] == pytest.approx(loss, rel=1e-12)
        whole = torch.cat((first[1], second[1])) / WORLD_SIZE
        torch.testing.assert_close(whole, gradient, rtol=1e-10, atol=1e-13)


def capped(rank: int) -> tuple[float, Tensor]:
    batch = make_batch(40, seed=rank, dtype=torch.float64)
    loss_fn = SmoothAPLoss(1, 0, 0.3, max_pool_size=16, gather="sums")
    logits = batch.logits.requires_grad_()
    loss = loss_fn(logits, batch.targets)
    loss.backward()
    return loss.item(), logits.grad


def test_each_rank_caps_its_own_rows(ranks: Ranks) -> None:
    scores, targets, weights, places = [], [], [], []
    for rank in range(WORLD_SIZE):
        batch = make_batch(40, seed=rank, dtype=torch.float64)
        sample = quota_indices(strata_of(batch.targets), 16, SmoothAPLoss.sampling_seed, 0)
        scores.append(batch.logits[sample.rows, 0])
        targets.append(batch.targets[sample.rows])
        weights.append(sample.weights.double())
        places.append(sample.rows)
    leaf = torch.cat(scores).requires_grad_()
    ap, _ = smooth_ap(leaf, torch.cat(targets) == 1, 0.3, sample_weight=torch.cat(weights))
    ap.backward()
    assert leaf.grad is not None
    for rank, (loss, gradient) in enumerate(ranks.run(capped)):
        assert loss == pytest.approx(1 - ap.item(), rel=1e-12)
        expected = torch.zeros(40, 1, dtype=torch.float64)
        expected[places[rank], 0] = -WORLD_SIZE * leaf.grad.split([len(p) for p in places])[rank]
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-13)


# --- Any scores -----------------------------------------------------------------------------------


class Pool(NamedTuple):
    scores: Tensor  # [M] or [C, M]
    is_positive: Tensor
    temperature: float | Tensor
    weights: Tensor | None
    cut: int  # the first rank has the rows before it


class Answer(NamedTuple):
    ap: Tensor
    valid: Tensor
    gradient: Tensor


def solve(pool: Pool, rank: int | None) -> Answer:
    """On a rank's rows; on all in one process for None."""
    rows = {None: slice(None), 0: slice(pool.cut), 1: slice(pool.cut, None)}[rank]
    leaf = pool.scores[..., rows].clone().requires_grad_()
    weights = None if pool.weights is None else pool.weights[..., rows]
    problems = Problems(
        leaf,
        pool.temperature,
        pool.is_positive[..., rows],
        weights,
        processes=None if rank is None else Shards(Group(), is_differentiated=True),
        backend="panel",
    )
    ap = average_precision(problems)
    (gradient,) = torch.autograd.grad(ap.sum(), leaf)
    return Answer(ap.detach(), problems.valid, gradient)


def solve_all(rank: int, pools: list[Pool]) -> list[Answer]:
    return [solve(pool, rank) for pool in pools]


def assert_as_one(ranks: Ranks, pools: list[Pool]) -> None:
    found = ranks.run(solve_all, pools)
    assert not isinstance(found[0], Failure), found[0]
    for pool, first, second in zip(pools, *found, strict=True):
        alone = solve(pool, None)
        gradient = torch.cat((first.gradient, second.gradient), dim=-1)
        is_wide = alone.ap.dtype == torch.float64
        for answer in (first, second):
            torch.testing.assert_close(
                answer.ap, alone.ap, rtol=0, atol=1e-12 if is_wide else 1e-6, equal_nan=True
            )
            assert answer.valid.equal(alone.valid)
        assert first.ap.nan_to_num().equal(second.ap.nan_to_num())
        assert gradient.isnan().equal(alone.gradient.isnan())
        size = float(alone.gradient.nan_to_num().norm())
        error = float((gradient - alone.gradient).nan_to_num().norm())
        largest = 1 / torch.as_tensor(pool.temperature).min().item()
        floor = 1e-15 * largest * math.sqrt(gradient.numel())
        assert error <= (1e-11 if is_wide else 1e-6) * size + floor


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_any_scores_at_any_sharpness(ranks: Ranks, family: str, dtype: torch.dtype) -> None:
    pools = []
    for seed, tau in enumerate([1e-6, 0.1, 100.0]):
        scores, is_positive = FAMILIES[family](600, seed).to(dtype), labels(600, seed)
        weights = 3 * torch.rand(600, generator=seeded(seed), dtype=torch.float64).to(dtype)
        pools.append(Pool(scores, is_positive, tau, None, cut=250))
        pools.append(Pool(scores, is_positive, tau, weights, cut=599))
        # One rank has all the low scores.
        order = scores.argsort()
        pools.append(Pool(scores[order], is_positive[order], tau, None, cut=300))
    assert_as_one(ranks, pools)


def test_ranks_without_rows_positives_or_numbers(ranks: Ranks) -> None:
    scores = torch.randn(3, 40, generator=seeded(0), dtype=torch.float64)
    is_positive = torch.arange(40).remainder(3) == torch.arange(3)[:, None]
    tau = torch.tensor([0.1, 0.01, 3.0], dtype=torch.float64)
    pools = [Pool(scores, is_positive, tau, None, cut) for cut in (0, 1, 20, 40)]
    for rows in (slice(0, 20), slice(20, 40), slice(0, 40)):
        fewer = is_positive.clone()
        fewer[1, rows] = False
        pools.append(Pool(scores, fewer, tau, None, 20))
    for value in (math.nan, math.inf, -math.inf):
        for row in (3, 30):
            other = scores.clone()
            other[1, row] = value
            pools.append(Pool(other, is_positive, tau, None, 20))
            pools.append(Pool(other, fewer, tau, None, 20))  # in a class without a positive
    pools.append(Pool(scores[:, :0], is_positive[:, :0], tau, None, 0))
    left_out = torch.ones(3, 40, dtype=torch.float64)
    left_out[0, :20], left_out[1, 25:], left_out[2] = 0, 1e-300, 0
    pools.append(Pool(scores, is_positive, tau, left_out, 20))
    assert_as_one(ranks, pools)


def spread_on(rank: int) -> tuple[Tensor, Tensor]:
    leaf = make_batch(12, 3, dtype=torch.float64).logits.T.contiguous()
    leaf = leaf[:, :5] if rank == 0 else leaf[:, 5:]
    leaf = leaf.clone().requires_grad_()
    found = spread(leaf, None, Layout(leaf.shape), Shards(Group(), is_differentiated=True))
    return found.detach(), torch.autograd.grad(found.sum(), leaf)[0]


def test_the_spread_is_that_of_all_rows(ranks: Ranks) -> None:
    (one, first), (other, second) = ranks.run(spread_on)
    leaf = make_batch(12, 3, dtype=torch.float64).logits.T.contiguous().requires_grad_()
    expected = score_spread(leaf)
    (gradient,) = torch.autograd.grad(expected.sum(), leaf)
    assert one.equal(other)
    torch.testing.assert_close(one, expected.detach(), rtol=1e-14, atol=0)
    torch.testing.assert_close(torch.cat((first, second), 1), gradient, rtol=1e-12, atol=1e-15)


# --- What is the same, what is refused ------------------------------------------------------------


def only_second_is_differentiated(rank: int) -> tuple[float, Tensor | None]:
    batch = make_batch(8, seed=rank, dtype=torch.float64)
    logits = batch.logits.requires_grad_(rank == 1)
    loss = SmoothAPLoss(1, 0, 0.3, gather="sums", temperature_unit="spread")(logits, batch.targets)
    if rank == 1:
        loss.backward()
    return loss.item(), logits.grad


def test_a_rank_without_gradient_takes_part(ranks: Ranks) -> None:
    batches = [make_batch(8, seed=rank, dtype=torch.float64) for rank in range(WORLD_SIZE)]
    leaf = torch.cat([batch.logits for batch in batches]).requires_grad_()
    alone = SmoothAPLoss(1, 0, 0.3, temperature_unit="spread")
    alone.backend = "panel"
    loss = alone(leaf, torch.cat([batch.targets for batch in batches]))
    loss.backward()
    (first, no_gradient), (second, gradient) = ranks.run(only_second_is_differentiated)
    assert first == second == pytest.approx(loss.item(), rel=1e-12)
    assert no_gradient is None
    assert leaf.grad is not None
    torch.testing.assert_close(gradient, WORLD_SIZE * leaf.grad[8:], rtol=1e-10, atol=1e-13)


def refused(rank: int, what: str) -> float:
    batch = make_batch(6, seed=rank)
    loss_fn = SmoothAPLoss(
        1,
        4,
        0.3,
        reduction="none" if what == "per class" and rank else "mean",
        gather="sums" if what != "gather" or rank else "rows",
    )
    if what == "dense":
        loss_fn.backend = "dense"
    if what == "weights":
        batch = batch._replace(weights=-torch.ones(6) if rank else None)
    logits = batch.logits.requires_grad_()
    loss = loss_fn(logits, batch.targets, sample_weight=batch.weights)
    if what == "twice":
        torch.autograd.grad(loss, logits, create_graph=True)
    return loss.item()


@pytest.mark.parametrize(
    ("what", "error", "message"),
    [
        ("dense", "ValueError", 'backend must be "auto" or "panel" with gather="sums"'),
        ("twice", "RuntimeError", 'gather="sums" has first derivatives only'),
        ("gather", "RuntimeError", "ranks disagree on gather: rank 0, 1, … have rows, sums"),
        ("per class", "RuntimeError", "ranks disagree on reduction: rank 0, 1, … have mean, none"),
        ("weights", "ValueError", "on rank 1: sample_weight must be"),
    ],
)
def test_what_is_refused_is_refused_on_every_rank(
    ranks: Ranks, what: str, error: str, message: str
) -> None:
    for found in ranks.run(refused, what):
        assert isinstance(found, Failure)
        assert found.error == error
        assert message in found.message
    assert not isinstance(ranks.run(refused, "nothing")[0], Failure)
