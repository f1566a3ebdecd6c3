"""The cap on the pool: which rows are drawn, how often, and what that does to the loss."""

from __future__ import annotations

import pickle
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from imbalanced_losses import SmoothAPLoss
from imbalanced_losses._rows.subsample import Sample, _mixed, quota_indices, strata_of
from tests.helpers.rows import IGNORED, Batch, make_batch, queued_rows


def strata_with(*counts: int) -> Tensor:
    """Shuffled strata 0, 1, … of these sizes."""
    strata = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return strata[torch.randperm(len(strata), generator=torch.Generator().manual_seed(0))]


STRATA = {
    "one": strata_with(40),
    "balanced": strata_with(30, 30),
    "rare": strata_with(5, 300),
    "single-row": strata_with(1, 99),
    "many": strata_with(1, 2, 3, 50, 200),
    "any-values": strata_with(7, 60) * 1000 - 100,
}
LIMITS = (2, 3, 16, 33)


# --- The draw itself -----------------------------------------------------------------------------


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("strata", STRATA.values(), ids=STRATA)
def test_exactly_the_limit_is_drawn_with_a_quota_for_each_stratum(
    strata: Tensor, limit: int
) -> None:
    values, counts = strata.unique(return_counts=True)
    quotas = counts.clamp(max=limit // (2 * len(counts)))
    for step in range(20):
        rows, weights = quota_indices(strata, limit, seed=0, step=step)
        assert len(rows) == len(weights) == limit
        assert (rows.diff() > 0).all()  # ascending, none twice
        assert 0 <= int(rows[0]) <= int(rows[-1]) < len(strata)
        drawn = (strata[rows] == values[:, None]).sum(1)
        assert (drawn >= quotas).all()


def stated_probabilities(strata: Tensor, limit: int) -> Tensor:
    """[M], from the sizes alone: a quota first, then the rest of the budget from what is left."""
    counts = {int(value): int((strata == value).sum()) for value in strata.unique()}
    quotas = {value: min(count, limit // (2 * len(counts))) for value, count in counts.items()}
    rest = (limit - sum(quotas.values())) / (len(strata) - sum(quotas.values()))
    shares = [quotas[value] / counts[value] for value in strata.tolist()]
    return torch.tensor([share + (1 - share) * rest for share in shares], dtype=torch.float64)


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("strata", STRATA.values(), ids=STRATA)
def test_weights_are_one_over_the_stated_probability(strata: Tensor, limit: int) -> None:
    rows, weights = quota_indices(strata, limit, seed=3, step=1)
    probabilities = stated_probabilities(strata, limit)
    torch.testing.assert_close(weights, 1 / probabilities[rows], rtol=1e-12, atol=0)
    assert float(probabilities.sum()) == pytest.approx(limit)


@pytest.mark.parametrize("name", ["rare", "many", "balanced"])
def test_rows_are_drawn_as_often_as_stated(name: str) -> None:
    strata, limit, draws = STRATA[name], 33, 2000
    probabilities = stated_probabilities(strata, limit)
    counts = torch.zeros(len(strata), dtype=torch.float64)
    for step in range(draws):
        counts[quota_indices(strata, limit, seed=1, step=step).rows] += 1
    variance = draws * probabilities * (1 - probabilities)
    random_rows = variance > 1e-9
    assert (counts[~random_rows] == draws).all()
    z = (counts - draws * probabilities)[random_rows] / variance[random_rows].sqrt()
    assert float(z.abs().max()) < 4.5
    assert 0.8 < float(z.square().mean()) < 1.25
    for stratum in strata.unique():  # no stratum is favoured as a whole
        mean = (counts / draws)[strata == stratum].mean()
        assert float(mean) == pytest.approx(float(probabilities[strata == stratum][0]), rel=0.03)


def test_a_draw_is_a_function_of_seed_and_step() -> None:
    strata = STRATA["many"]

    def draw(seed: int, step: int) -> tuple[int, ...]:
        return tuple(quota_indices(strata, 16, seed, step).rows.tolist())

    assert draw(5, 7) == draw(5, 7)
    draws = {draw(seed, step) for seed in range(-2, 6) for step in range(8)}
    assert len(draws) == 64


# --- Strata --------------------------------------------------------------------------------------


def test_the_rarest_label_is_the_stratum_of_a_multilabel_row() -> None:
    # Labels 0, 1, 2 occur 3, 4 and 1 times.
    targets = torch.tensor(
        [[1, 1, 1], [1, 1, 0], [0, 1, 0], [0, 0, 0], [1, IGNORED, 0], [IGNORED, 1, 0], [0, 0, 0]]
    )
    strata = strata_of(targets)
    rows = [
        [i for i, value in enumerate(strata.tolist()) if value == v] for v in set(strata.tolist())
    ]
    assert sorted(rows) == [[0], [1, 4], [2, 5], [3, 6]]


@pytest.mark.parametrize("multilabel", [False, True], ids=["classes", "labels"])
def test_a_rare_class_stays_in_the_pool(multilabel: bool) -> None:
    targets = torch.arange(400) % 2 + 1
    targets[[10, 200]] = 0
    if multilabel:
        targets = torch.nn.functional.one_hot(targets)
    batch = Batch(make_batch(400, 3).logits, targets)
    loss_fn = SmoothAPLoss(3, 0, max_pool_size=12, multilabel=multilabel)
    for _ in range(30):
        _, _, valid = loss_fn(batch.logits, batch.targets, return_per_class=True)
        assert valid.all()


# --- The loss ------------------------------------------------------------------------------------


def global_random_states() -> tuple[bytes, ...]:
    of_numpy = np.random.get_state()  # noqa: NPY002, the global one is what is asked for
    return torch.get_rng_state().numpy().tobytes(), *map(
        pickle.dumps, (random.getstate(), of_numpy)
    )


def test_no_global_random_state_is_touched() -> None:
    loss_fn, batch = SmoothAPLoss(3, 8, max_pool_size=6), make_batch(20, 3).leaf()
    before = global_random_states()
    batch.through(loss_fn).backward()
    assert global_random_states() == before


def losses_of(loss_fn: SmoothAPLoss, batch: Batch, steps: int) -> list[float]:
    return [float(batch.through(loss_fn)) for _ in range(steps)]


def capped(**options: Any) -> SmoothAPLoss:
    return SmoothAPLoss(1, 0, 0.2, max_pool_size=12, **options)


def test_draws_differ_over_steps_and_repeat_in_a_new_loss() -> None:
    batch = make_batch(60)
    losses = losses_of(capped(), batch, 10)
    assert len(set(losses)) == 10
    assert losses_of(capped(), batch, 10) == losses


def test_the_sampling_seed_selects_other_draws() -> None:
    class OtherSeed(SmoothAPLoss):
        sampling_seed = 1

    batch = make_batch(60)
    other = OtherSeed(1, 0, 0.2, max_pool_size=12)
    assert not set(losses_of(other, batch, 10)) & set(losses_of(capped(), batch, 10))


@pytest.mark.parametrize("update_queue_in_eval", [False, True])
def test_eval_mode_ranks_every_row_and_leaves_the_draws_alone(update_queue_in_eval: bool) -> None:
    batch = make_batch(60)
    loss_fn = capped(update_queue_in_eval=update_queue_in_eval)
    full = batch.through(SmoothAPLoss(1, 0, 0.2))
    assert losses_of(loss_fn.eval(), batch, 2) == [full.item()] * 2
    assert losses_of(loss_fn.train(), batch, 3) == losses_of(capped(), batch, 3)


@pytest.mark.parametrize("num_rows", [5, 11, 12])
def test_a_pool_within_the_cap_is_ranked_as_it_is(num_rows: int) -> None:
    batch = make_batch(num_rows)
    assert batch.through(capped()) == batch.through(SmoothAPLoss(1, 0, 0.2))


def test_the_cap_holds_for_batch_and_queue_together() -> None:
    loss_fn = SmoothAPLoss(1, 40, 0.2, max_pool_size=12)
    make_batch(40, seed=1).through(loss_fn)
    batch = make_batch(40).leaf()
    batch.through(loss_fn).backward()
    assert batch.logits.grad is not None
    assert 0 < int(batch.logits.grad.count_nonzero()) <= 12
    assert len(queued_rows(loss_fn)) == 40  # all are stored


def imbalanced_pool() -> Batch:
    """4096 rows, 1 % positive, told apart moderately well."""
    generator = torch.Generator().manual_seed(0)
    targets = (torch.arange(4096) < 41).to(torch.int64)
    logits = torch.randn(4096, 1, generator=generator) + 1.5 * targets[:, None]
    return Batch(logits, targets)


def test_the_capped_loss_estimates_the_loss_of_the_full_pool() -> None:
    pool, limit = imbalanced_pool(), 512
    full = pool.through(SmoothAPLoss(1, 0, 0.05)).item()
    loss_fn = SmoothAPLoss(1, 0, 0.05, max_pool_size=limit)
    estimate = np.mean(losses_of(loss_fn, pool, 300))
    assert abs(estimate - full) <= 0.05

    def unweighted(sample: Sample) -> float:
        drawn = Batch(pool.logits[sample.rows], pool.targets[sample.rows])
        return drawn.through(SmoothAPLoss(1, 0, 0.05)).item()

    draws = (quota_indices(pool.targets, limit, 0, step) for step in range(50))
    assert abs(np.mean([unweighted(sample) for sample in draws]) - full) > 0.2


def test_seeds_of_steps_are_the_sequence_of_splitmix64() -> None:
    """The first three numbers of its reference implementation from seed 0."""
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [_mixed(0, step) for step in range(3)] == expected
    assert _mixed(2**64 + 5, 1) == _mixed(5, 1)
    assert _mixed(0x9E3779B97F4A7C15, 0) == expected[1]  # the seed is where the sequence starts
