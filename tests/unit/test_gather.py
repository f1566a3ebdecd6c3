"""Ranks: when they gather, what they gather, and what they say where they disagree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from imbalanced_losses import SmoothAPLoss
from tests.helpers.ranks import WORLD_SIZE, Failure, Ranks
from tests.helpers.rows import Batch, assert_same_state, make_batch, state_of

# --- When not to gather --------------------------------------------------------------------------


def loss_of_rank(rank: int, options: dict[str, Any], training: bool) -> float:
    """Of a batch that every rank has one of its own."""
    loss_fn = SmoothAPLoss(1, 0, 0.3, **options).train(training)
    return make_batch(6, seed=rank).through(loss_fn).item()


@pytest.mark.parametrize(
    ("options", "training", "gathers"),
    [
        ({}, True, True),
        ({}, False, False),
        ({"gather_distributed": None}, False, False),
        ({"gather_distributed": True}, True, True),
        ({"gather_distributed": True}, False, True),
        ({"gather_distributed": False}, True, False),
        ({"gather_distributed": False}, False, False),
    ],
)
def test_when_ranks_gather(
    ranks: Ranks, options: dict[str, Any], training: bool, gathers: bool
) -> None:
    found = ranks.run(loss_of_rank, options, training)
    own = [loss_of_rank(rank, {}, True) for rank in range(WORLD_SIZE)]
    assert own[0] != own[1]
    assert (found == own) is not gathers
    assert (found[0] == found[1]) is gathers


def eval_on_first_rank(rank: int) -> bool:
    loss_fn = SmoothAPLoss(1, 4)
    if rank == 0:
        return bool(make_batch(4).through(loss_fn.eval()).isfinite())
    return True


def test_one_rank_may_evaluate_by_itself(ranks: Ranks) -> None:
    assert ranks.run(eval_on_first_rank) == [True, True]


# --- Ranks that disagree -------------------------------------------------------------------------


# What the last rank has instead of the usual.
UNUSUAL: dict[str, Any] = {
    "gather": "sums",
    "grad_reduce": "sum",
    "reduction": "sum",
    "temperature_unit": "spread",
    "queue_follows_shift": True,
    "ignore_index": -1,
    "queue_size": 9,
    "max_pool_size": 9,
}


CHANGED: dict[str, Callable[[Batch], Batch]] = {
    "dtype": lambda batch: batch._replace(logits=batch.logits.double()),
    "bad-target": lambda batch: batch._replace(targets=batch.targets + 9),
    "complex-logits": lambda batch: batch._replace(logits=batch.logits.to(torch.complex64)),
    "no-tensor": lambda batch: batch._replace(logits=[0.1, 0.2]),  # type: ignore[arg-type]
}


def disagree(rank: int, what: str) -> dict[str, Tensor]:
    """A step in which the last rank does something else; the state if that goes well."""
    what = what if rank == WORLD_SIZE - 1 else "nothing"
    num_classes, multilabel = 4 if what == "classes" else 3, what == "multilabel"
    prior = [0.1, 0.2, 0.1 if what == "prior" else 0.3] if num_classes == 3 else None
    options = {"queue_size": 8, "multilabel": multilabel, "target_prior": prior}
    options |= {what: UNUSUAL[what]} if what in UNUSUAL else {}
    loss_fn = SmoothAPLoss(num_classes, gather_distributed=True, **options)
    batch = make_batch(4, num_classes, multilabel=multilabel)
    if what == "temperature":
        loss_fn.temperature *= 1 + 1e-15
    loss_fn.train(what != "training")
    if what == "steps made":
        alone = SmoothAPLoss(num_classes, gather_distributed=False, **options)
        batch.through(alone)
        loss_fn.load_state_dict(alone.state_dict())
    batch = CHANGED.get(what, lambda batch: batch)(batch)
    before = state_of(loss_fn)
    try:
        loss_fn(*batch[:2], 1 if what == "flag" else True)
    except Exception:
        assert_same_state(loss_fn, before)
        raise
    return loss_fn.state_dict()


@pytest.mark.parametrize(
    ("what", "name"),
    [
        ("dtype", "dtype"),
        ("classes", "classes"),
        ("multilabel", "target columns"),
        ("temperature", "temperature"),
        ("prior", "target_prior"),
        ("training", "training"),
        ("steps made", "steps made"),
        *((name, name) for name in UNUSUAL),
    ],
)
def test_ranks_that_disagree_raise_the_same_error(ranks: Ranks, what: str, name: str) -> None:
    first, second = ranks.run(disagree, what)
    assert isinstance(first, Failure)
    assert first == second
    assert first.error == "RuntimeError"
    assert first.message.startswith(f"ranks disagree on {name}: ")


@pytest.mark.parametrize(
    ("what", "name", "error"),
    [
        ("complex-logits", "logits", "TypeError"),
        ("no-tensor", "logits", "TypeError"),
        ("flag", "return_per_class", "TypeError"),
        ("bad-target", "targets", "ValueError"),
    ],
)
def test_bad_input_on_one_rank_is_an_error_on_every_rank(
    ranks: Ranks, what: str, name: str, error: str
) -> None:
    first, second = ranks.run(disagree, what)
    assert first == second
    assert first.error == error
    assert first.message.startswith(f"on rank {WORLD_SIZE - 1}: {name} must ")


def test_ranks_that_agree_raise_nothing(ranks: Ranks) -> None:
    assert all(isinstance(state, dict) for state in ranks.run(disagree, "nothing"))


# --- The rows that are gathered ------------------------------------------------------------------

GATHERED = [
    pytest.param(torch.float32, False, False, id="float32"),
    pytest.param(torch.float32, True, True, id="float32, multilabel, weighted"),
    pytest.param(torch.float64, False, True, id="float64, weighted"),
]


def gathered(rank: int | None, dtype: torch.dtype, multilabel: bool, weighted: bool) -> list[Any]:
    """The fields of what is ranked: rank 0 has the first row of five, rank 1 the others."""
    rows = {None: slice(None), 0: slice(1), 1: slice(1, None)}[rank]
    batch = make_batch(5, 2, dtype=dtype, multilabel=multilabel)
    weights = torch.arange(1.0, 6)[rows] if weighted and rank != 0 else None
    loss_fn = SmoothAPLoss(2, multilabel=multilabel, gather_distributed=True)
    pool, _ = loss_fn._batch(batch.logits[rows], batch.targets[rows], sample_weight=weights)
    return list(pool)


@pytest.mark.parametrize(("dtype", "multilabel", "weighted"), GATHERED)
def test_gathered_rows_are_those_of_one_process(
    ranks: Ranks, dtype: torch.dtype, multilabel: bool, weighted: bool
) -> None:
    """In order, bit for bit, and in the same dtypes."""
    alone = gathered(None, dtype, multilabel, weighted)
    for found in ranks.run(gathered, dtype, multilabel, weighted):
        torch.testing.assert_close(found, alone, rtol=0, atol=0)
