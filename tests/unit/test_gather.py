"""Ranks: the gradient and the loss of one process with all rows, in real processes over gloo."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from imbalanced_losses import SmoothAPLoss
from tests.helpers.ranks import WORLD_SIZE, Failure, Ranks
from tests.helpers.rows import IGNORED, Batch, assert_same_state, make_batch, numbers_of, state_of

# --- Training on two ranks and on one ------------------------------------------------------------


class Case(NamedTuple):
    """A training run; the rows of each step are split over the ranks in order."""

    sizes: tuple[int, ...] = (6, 6)  # rows of each rank
    num_classes: int = 1
    steps: int = 1
    ignored: tuple[int, ...] = ()  # rows of the global batch
    negative: tuple[int, ...] = ()
    weighted: bool = False
    recomputed: bool = False
    multilabel: bool = False
    options: dict[str, Any] = {}  # noqa: RUF012, never changed

    def loss_fn(self) -> SmoothAPLoss:
        options = {"queue_size": 0, "temperature": 0.3, **self.options}
        return SmoothAPLoss(self.num_classes, multilabel=self.multilabel, **options)

    def model(self) -> nn.Linear:
        model = nn.Linear(5, self.num_classes, bias=False, dtype=torch.float64)
        with torch.no_grad():
            model.weight.copy_(make_batch(self.num_classes, 5, seed=99).logits)
        return model

    def global_batch(self, step: int) -> Batch:
        """Features in the place of logits."""
        num_rows = sum(self.sizes)
        features = make_batch(num_rows, 5, seed=step, dtype=torch.float64).logits
        targets = make_batch(num_rows, self.num_classes, multilabel=self.multilabel).targets
        targets[list(self.negative)] = 0
        targets[list(self.ignored)] = IGNORED
        weights = torch.arange(num_rows).remainder(3).add(0.5) if self.weighted else None
        return Batch(features, targets, weights)


class Outcome(NamedTuple):
    losses: list[float]
    gradients: list[Tensor]
    state: dict[str, Tensor]


def loss_of(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    loss_fn: SmoothAPLoss,
    recomputed: bool,
) -> Tensor:
    if not recomputed:
        return Batch(logits, targets, weights).through(loss_fn)
    loss: Tensor = checkpoint(
        loss_of, logits, targets, weights, loss_fn, False, use_reentrant=False
    )
    return loss


def trained(case: Case, model: nn.Module, rows: slice) -> Outcome:
    """Steps of gradient descent on these rows of each global batch."""
    loss_fn = case.loss_fn()
    losses, gradients = [], []
    for step in range(case.steps):
        features, *rest = (
            None if field is None else field[rows] for field in case.global_batch(step)
        )
        model.zero_grad()
        loss = loss_of(model(features), *rest, loss_fn, case.recomputed)
        loss.backward()
        losses.append(loss.item())
        (parameter,) = model.parameters()
        assert parameter.grad is not None
        gradients.append(parameter.grad.clone())
        with torch.no_grad():
            parameter -= 0.5 * parameter.grad
    return Outcome(losses, gradients, loss_fn.state_dict())


def train_rank(rank: int, case: Case) -> Outcome:
    start = sum(case.sizes[:rank])
    model = DistributedDataParallel(case.model())
    return trained(case, model, slice(start, start + case.sizes[rank]))


def train_alone(case: Case) -> Outcome:
    return trained(case, case.model(), slice(None))


SPLITS = {
    "equal": Case((6, 6)),
    "unequal": Case((9, 3)),
    "one-row": Case((1, 11)),
    "first-without-rows": Case((0, 12)),
    "second-without-rows": Case((12, 0)),
    "first-ignored": Case((4, 8), ignored=(0, 1, 2, 3)),
    "some-ignored": Case((6, 6), ignored=(0, 5, 6)),
    "second-without-positive": Case((6, 6), negative=(6, 7, 8, 9, 10, 11)),
    "no-positive": Case((6, 6), negative=tuple(range(12))),
    "nothing": Case((0, 0)),
    "weighted": Case((5, 7), weighted=True),
}
KINDS = {
    "binary": {"num_classes": 1},
    "classes": {"num_classes": 3},
    "labels": {"num_classes": 3, "multilabel": True},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "queue": {"queue_size": 20},
    "wide-queue": {"queue_size": 100},
    "capped": {"max_pool_size": 8},
    "capped-queue": {"queue_size": 20, "max_pool_size": 8},
    "sum": {"reduction": "sum"},
    "spread": {"queue_size": 20, "temperature_unit": "spread"},
    "follows-shift": {"queue_size": 20, "queue_follows_shift": True},
    "always": {"gather_distributed": True},
}


def cases() -> list[Any]:
    splits = [
        pytest.param(case._replace(**kind), id=f"{kind_name}-{name}")
        for kind_name, kind in KINDS.items()
        for name, case in SPLITS.items()
    ]
    options = [
        pytest.param(
            Case((9, 4), steps=3, options=option, **kind), id=f"{kind_name}-{name}-3-steps"
        )
        for kind_name, kind in KINDS.items()
        for name, option in OPTIONS.items()
    ]
    return [*splits, *options]


@pytest.mark.parametrize("case", cases())
def test_two_ranks_train_as_one_process_with_all_rows(ranks: Ranks, case: Case) -> None:
    alone = train_alone(case)
    outcomes: list[Outcome] = ranks.run(train_rank, case)
    for outcome in outcomes:
        assert outcome.losses == pytest.approx(alone.losses, rel=1e-12, abs=1e-15)
        for found, expected in zip(outcome.gradients, alone.gradients, strict=True):
            scale = float(expected.abs().max())
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-12 * scale)
        # But for the rounding of a model that saw fewer rows at once.
        numbers = numbers_of(outcome.state), numbers_of(alone.state)
        torch.testing.assert_close(*numbers, rtol=1e-12, atol=1e-12)
    first, second = outcomes
    assert first.losses == second.losses
    torch.testing.assert_close(first.state, second.state, rtol=0, atol=0)


def test_only_cases_without_a_positive_have_no_gradient() -> None:
    without = {
        parameter.id
        for parameter in cases()
        if not train_alone(*parameter.values).gradients[0].any()
    }
    assert without == {
        "binary-no-positive",
        "classes-no-positive",
        "labels-no-positive",
        *(f"{kind}-nothing" for kind in KINDS),
    }


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


def test_without_a_process_group_nothing_is_gathered() -> None:
    batch = make_batch(6)
    loss_fn = SmoothAPLoss(1, 0, 0.3, gather_distributed=True)
    assert batch.through(loss_fn) == batch.through(SmoothAPLoss(1, 0, 0.3))


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


def disagree(rank: int, what: str) -> dict[str, Tensor]:
    """A step in which the last rank does something else; the state if that goes well."""
    other = rank == WORLD_SIZE - 1
    num_classes = 4 if other and what == "classes" else 3
    multilabel = other and what == "multilabel"
    prior = [0.1, 0.2, 0.1 if other and what == "prior" else 0.3] if num_classes == 3 else None
    options = {"queue_size": 8, "multilabel": multilabel, "target_prior": prior}
    if other and what in UNUSUAL:
        options[what] = UNUSUAL[what]
    loss_fn = SmoothAPLoss(num_classes, gather_distributed=True, **options)
    batch = make_batch(4, num_classes, multilabel=multilabel)
    if other and what == "temperature":
        loss_fn.temperature *= 1 + 1e-15
    if other and what == "training":
        loss_fn.eval()
    if other and what == "steps made":
        alone = SmoothAPLoss(num_classes, gather_distributed=False, **options)
        batch.through(alone)
        loss_fn.load_state_dict(alone.state_dict())
    if other and what == "dtype":
        batch = batch._replace(logits=batch.logits.double())
    if other and what == "bad-target":
        batch = batch._replace(targets=batch.targets + 9)
    if other and what == "complex-logits":
        batch = batch._replace(logits=batch.logits.to(torch.complex64))
    if other and what == "no-tensor":
        batch = batch._replace(logits=[0.1, 0.2])
    asked = 1 if other and what == "flag" else True
    before = state_of(loss_fn)
    try:
        loss_fn(*batch[:2], asked)
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
    assert all(isinstance(state, dict) for state in ranks.run(disagree, "nothing"))


def test_bad_input_on_one_rank_is_an_error_on_every_rank() -> None:
    """In processes of its own: a rank left alone in a collective breaks it for what comes after."""
    pool = Ranks(timeout_s=5)
    try:
        first, second = pool.run(disagree, "bad-target")
    finally:
        pool.close()
    assert isinstance(first, Failure)
    assert isinstance(second, Failure)
    assert first.error == second.error == "ValueError"
    assert "targets must be integers in 0..2" in first.message


@pytest.mark.parametrize(
    ("what", "name"),
    [("complex-logits", "logits"), ("no-tensor", "logits"), ("flag", "return_per_class")],
)
def test_a_type_error_on_one_rank_is_one_on_every_rank(ranks: Ranks, what: str, name: str) -> None:
    first, second = ranks.run(disagree, what)
    assert first == second
    assert first.error == "TypeError"
    assert first.message.startswith(f"on rank {WORLD_SIZE - 1}: {name} must ")


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
