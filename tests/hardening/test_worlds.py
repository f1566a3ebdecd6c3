"""One to eight real processes: the gradient and the loss of one process with all rows.

The fast suite has those of two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from imbalanced_losses import SmoothAPLoss
from tests.helpers.ranks import Failure, Ranks
from tests.helpers.rows import IGNORED, Batch, make_batch, numbers_of

WORLDS = range(1, 9)

# --- What the ranks have --------------------------------------------------------------------------


class Share(NamedTuple):
    """What a rank has of a batch."""

    rows: int
    only: int | None = None  # the target of all its rows


EMPTY = Share(0)


def equal(world: int) -> list[Share]:
    return [Share(max(4, 12 // world))] * world


def all_but_one(world: int, others: Share) -> list[Share]:
    """The rank in the middle has rows of every class."""
    return [Share(14) if rank == world // 2 else others for rank in range(world)]


def mixed(world: int) -> list[Share]:
    """Unequal, and from four ranks on with every oddity at once."""
    odd = [EMPTY, Share(4, only=0), Share(3, only=IGNORED)]
    return [Share(10), *odd, Share(5), Share(2), Share(1), Share(7)][:world]


SPLITS: dict[str, Callable[[int], list[Share]]] = {
    "equal": equal,
    "unequal": lambda world: [Share(10), *(Share(rank) for rank in range(1, world))],
    "one-row-each": lambda world: [Share(1)] * world,
    "first-empty": lambda world: [EMPTY, *equal(world)[1:]],
    "last-empty": lambda world: [*equal(world)[1:], EMPTY],
    "every-second-empty": lambda world: [
        EMPTY if rank % 2 else share for rank, share in enumerate(equal(world))
    ],
    "all-but-one-empty": lambda world: all_but_one(world, EMPTY),
    "one-ignored": lambda world: [*equal(world)[1:], Share(5, only=IGNORED)],
    "one-negative": lambda world: [Share(5, only=0), *equal(world)[1:]],
    "all-but-one-negative": lambda world: all_but_one(world, Share(3, only=0)),
    "mixed": mixed,
    # Nothing to rank: not among the cases that compare gradients.
    "no-positive": lambda world: [Share(3, only=0)] * world,
    "nothing": lambda world: [EMPTY] * world,
}
NO_GRADIENT = ("no-positive", "nothing")
FEWEST_RANKS = {"one-row-each": 4}  # 2 for the others

KINDS: dict[str, dict[str, Any]] = {
    "binary": {"num_classes": 1},
    "classes": {"num_classes": 3},
    "labels": {"num_classes": 3, "multilabel": True},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "queue": {"queue_size": 20},
    "capped": {"max_pool_size": 9},
    "capped-queue": {"queue_size": 20, "max_pool_size": 9},
    "spread": {"queue_size": 20, "temperature_unit": "spread"},
    "follows-shift": {"queue_size": 20, "queue_follows_shift": True},
    "summed-classes": {"reduction": "sum"},
    "summed-ranks": {"grad_reduce": "sum"},
    "summed-ranks-queue": {"queue_size": 20, "grad_reduce": "sum"},
    "sums": {"gather": "sums"},
    "sums-spread": {"gather": "sums", "temperature_unit": "spread"},
    "sums-summed-ranks": {"gather": "sums", "grad_reduce": "sum"},
    "prior": {"queue_size": 20, "target_prior": (0.05, 0.3, 0.8)},
    "sums-prior": {
        "gather": "sums",
        "temperature_unit": "spread",
        "target_prior": (0.05, 0.3, 0.8),
    },
}


class Case(NamedTuple):
    """A training run; from step to step every rank gets the share of the next one."""

    world: int
    kind: str
    split: str
    options: str = "plain"
    weights: str = "none"  # "none", "weighted" or "weighted-on-some"

    def name(self) -> str:
        words = (self.kind, self.split, self.options, self.weights)
        told = [word for word in words if word not in ("plain", "none")]
        return "-".join([f"{self.world}-ranks", *told])

    def steps(self) -> int:
        """More than one where a step depends on the ones before."""
        has_state = {"queue_size", "max_pool_size"} & set(OPTIONS[self.options])
        return 3 if has_state else 1

    def loss_fn(self, **options: Any) -> SmoothAPLoss:
        chosen = {"queue_size": 0, "temperature": 0.3, **OPTIONS[self.options], **options}
        kind = KINDS[self.kind]
        if "target_prior" in chosen:
            chosen["target_prior"] = chosen["target_prior"][: kind["num_classes"]]
        loss_fn = SmoothAPLoss(**kind, **chosen)
        if loss_fn.gather == "sums":
            loss_fn.backend = "panel"  # in one process as well
        return loss_fn

    def initial_weight(self) -> Tensor:
        return make_batch(KINDS[self.kind]["num_classes"], 5, seed=99, dtype=torch.float64).logits

    def batches(self, step: int) -> list[Batch]:
        """Of each rank, features in the place of logits."""
        shares = SPLITS[self.split](self.world)
        first = step % self.world
        shares = shares[first:] + shares[:first]
        sizes = [share.rows for share in shares]
        seed = 10 * self.world + step
        features = make_batch(sum(sizes), 5, seed=seed, dtype=torch.float64).logits
        targets = make_batch(sum(sizes), **KINDS[self.kind]).targets
        weights = torch.arange(sum(sizes)).remainder(4) / 2  # some are zero
        parts = (field.split(sizes) for field in (features, targets, weights))
        batches = []
        for rank, (share, own_features, own_targets, own_weights) in enumerate(
            zip(shares, *parts, strict=True)
        ):
            if share.only is not None:
                own_targets.fill_(share.only)
            is_weighted = self.weights == "weighted" or (
                self.weights == "weighted-on-some" and rank % 2 == 0
            )
            batches.append(Batch(own_features, own_targets, own_weights if is_weighted else None))
        return batches


def joined(batches: list[Batch]) -> Batch:
    features, targets, weights = zip(*batches, strict=True)
    ones = [torch.ones(len(part)) for part in features]
    is_weighted = any(part is not None for part in weights)
    all_weights = [one if part is None else part for part, one in zip(weights, ones, strict=True)]
    return Batch(
        torch.cat(features), torch.cat(targets), torch.cat(all_weights) if is_weighted else None
    )


def splits() -> list[Case]:
    return [
        Case(world, kind, split)
        for split in SPLITS
        for kind in KINDS
        for world in WORLDS
        if split not in NO_GRADIENT and world >= FEWEST_RANKS.get(split, 2)
    ]


def options() -> list[Case]:
    return [
        Case(world, kind, "mixed", option)
        for option in OPTIONS
        for kind in KINDS
        for world in (1, 2, 5, 8)
        if option != "plain"
    ]


def weights() -> list[Case]:
    return [
        Case(world, kind, "mixed", option, weights)
        for option in ("queue", "capped-queue", "spread", "sums")
        for weights in ("weighted", "weighted-on-some")
        for kind in KINDS
        for world in (2, 6)
    ]


def nothing() -> list[Case]:
    return [
        Case(world, kind, split, "queue")
        for split, kind in zip(NO_GRADIENT, ("classes", "binary"), strict=True)
        for world in WORLDS
    ]


CASES = [*splits(), *options(), *weights(), *nothing()]

# --- Training -------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    losses: list[float]  # of each step
    gradients: Tensor  # [steps, C, 5]
    state: Tensor  # its numbers


# Of the first ranks, by how many, in the eight processes; those of two have no other group.
GROUPS: dict[int, Any] = {}


def make_groups(rank: int) -> None:
    for world in WORLDS:
        GROUPS[world] = dist.new_group(range(world))


def trained(case: Case, rank: int | None) -> Outcome:
    """Steps of gradient descent on a rank's rows; on all rows and in one process for None."""
    group = None if rank is None else GROUPS.get(case.world)
    loss_fn = case.loss_fn(process_group=group)
    weight = case.initial_weight().requires_grad_()
    losses, gradients = [], []
    for step in range(case.steps()):
        batches = case.batches(step)
        batch = joined(batches) if rank is None else batches[rank]
        loss = batch._replace(logits=batch.logits @ weight.T).through(loss_fn)
        (gradient,) = torch.autograd.grad(loss, weight)
        if rank is not None:
            dist.all_reduce(gradient, group=group)
            if loss_fn.grad_reduce == "mean":
                gradient /= case.world
        losses.append(loss.item())
        gradients.append(gradient)
        with torch.no_grad():
            weight -= 0.5 * gradient
    return Outcome(losses, torch.stack(gradients), numbers_of(loss_fn.state_dict()))


def train_all(rank: int, cases: list[Case]) -> list[Outcome | Failure | None]:
    """None for a case of fewer ranks than this one."""
    outcomes: list[Outcome | Failure | None] = []
    for case in cases:
        try:
            outcomes.append(trained(case, rank) if rank < case.world else None)
        except Exception as error:
            outcomes.append(Failure(type(error).__name__, str(error)))
    return outcomes


@pytest.fixture(scope="module")
def eight_ranks() -> Iterator[Ranks]:
    pool = Ranks(len(WORLDS), prepare=make_groups)
    yield pool
    pool.close()


Train = Callable[[Case], list[Any]]


@pytest.fixture(scope="module")
def train(request: pytest.FixtureRequest) -> Train:
    """The outcome of a case on each of its ranks; those of one world are trained in one go."""
    found: dict[Case, list[Any]] = {}

    def of(case: Case) -> list[Any]:
        if case not in found:
            batch = [c for c in CASES if (c.world, c.kind) == (case.world, case.kind)]
            found.update({other: [] for other in batch})  # a job that fails is not tried again
            pool = request.getfixturevalue("ranks" if case.world == 2 else "eight_ranks")
            by_rank = pool.run(train_all, batch)
            assert not isinstance(by_rank[0], Failure), by_rank[0]
            found.update(zip(batch, map(list, zip(*by_rank, strict=True)), strict=True))
        outcomes = found[case]
        assert len(outcomes) >= case.world, "the ranks failed in another case"
        assert not any(outcomes[case.world :])
        return outcomes[: case.world]

    return of


def assert_as_alone(found: list[Any], alone: Outcome) -> None:
    for outcome in found:
        assert isinstance(outcome, Outcome), outcome
        assert outcome.losses == pytest.approx(alone.losses, rel=1e-12, abs=0)
        assert outcome.losses == found[0].losses
        error = (outcome.gradients - alone.gradients).abs().amax((1, 2))
        assert (error <= 1e-12 * alone.gradients.abs().amax((1, 2))).all(), error
        torch.testing.assert_close(outcome.state, alone.state, rtol=1e-12, atol=1e-12)
        assert outcome.state.view(torch.int64).equal(found[0].state.view(torch.int64))


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=() if c.world == 2 else pytest.mark.slow, id=c.name()) for c in CASES],
)
def test_ranks_train_as_one_process_with_all_rows(train: Train, case: Case) -> None:
    """Those of two processes are fast."""
    alone = trained(case, None)
    if case.split in NO_GRADIENT:
        assert alone.losses == [0] * case.steps()
        assert not alone.gradients.any()
    else:  # else there is little to compare
        assert (alone.gradients.abs().amax((1, 2)) > 1e-4).all()
    assert_as_alone(train(case), alone)
