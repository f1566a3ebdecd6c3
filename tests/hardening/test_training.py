"""Whole trainings: many ranks as one, a bad row under a gradient scaler, AP that rises."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from sklearn.metrics import average_precision_score
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.nn.parallel import DistributedDataParallel

from imbalanced_losses import SmoothAPLoss
from tests.helpers.cases import seeded
from tests.helpers.ranks import Failure, Ranks
from tests.helpers.rows import make_batch

# --- 30 steps -------------------------------------------------------------------------------------

NUM_STEPS = 30
SIZES = {2: (9, 4), 3: (7, 0, 5)}  # rows of each rank, by the number of ranks
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"queue_size": 0},
    "queue": {"queue_size": 40},
    "capped-spread": {"queue_size": 40, "max_pool_size": 30, "temperature_unit": "spread"},
}


class Trained(NamedTuple):
    losses: list[float]
    weights: Tensor  # of the model, flat, after the last step


def train(options: dict[str, Any], world: int, rank: int | None, group: Any = None) -> Trained:
    """SGD with momentum and decay of a mix of losses; all rows in one process for rank None."""
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, generator=seeded(7))
    wrapped = model if rank is None else DistributedDataParallel(model, process_group=group)
    loss_fn = SmoothAPLoss(1, temperature=0.3, process_group=group, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, weight_decay=1e-3)
    sizes = SIZES[world]
    start = 0 if rank is None else sum(sizes[:rank])
    rows = slice(None) if rank is None else slice(start, start + sizes[rank])
    losses = []
    for step in range(NUM_STEPS):
        optimizer.zero_grad()
        features = make_batch(sum(sizes), 5, seed=step, dtype=torch.float64).logits
        targets = make_batch(sum(sizes)).targets
        logits = wrapped(features[rows])
        loss = loss_fn(logits, targets[rows])
        # A sum over rows is what the mean over ranks makes equal to that of one process.
        others = binary_cross_entropy_with_logits(
            logits, targets[rows, None].double(), reduction="sum"
        )
        scale = (1 if rank is None else world) / sum(sizes)
        (loss + 0.1 * scale * others).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return Trained(losses, torch.cat([p.detach().flatten() for p in model.parameters()]))


def train_rank(rank: int, options: dict[str, Any], world: int) -> Trained | None:
    group = dist.new_group(range(world))
    return train(options, world, rank, group) if rank < world else None


@pytest.fixture(scope="module")
def three_ranks() -> Iterator[Ranks]:
    pool = Ranks(3)
    yield pool
    pool.close()


@pytest.mark.parametrize("world", SIZES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_thirty_steps_are_those_of_one_process(
    three_ranks: Ranks, options: dict[str, Any], world: int
) -> None:
    """Momentum, decay and clipping see the size of a gradient, a mix sees its share: an error in
    either would grow from step to step.
    """
    alone = train(options, world, None)
    assert len({round(loss, 6) for loss in alone.losses}) == NUM_STEPS
    for found in three_ranks.run(train_rank, options, world)[:world]:
        assert not isinstance(found, Failure), found
        assert found.losses == pytest.approx(alone.losses, rel=1e-12, abs=1e-14)
        error = (found.weights - alone.weights).abs().max()
        assert float(error) <= 1e-12 * float(alone.weights.abs().max())


# --- A bad row ------------------------------------------------------------------------------------


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=str)
def test_a_bad_row_costs_a_scaler_one_step(autocast: torch.dtype | None) -> None:
    """60 steps with a queue 32 batches long; step 5 has a row of NaN. It is skipped, as gradient
    scalers do, and nothing of the row is left to skip another one for.
    """
    model = nn.Linear(5, 1)
    nn.init.normal_(model.weight, generator=seeded(7))
    loss_fn = SmoothAPLoss(1, 1024, 0.3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    losses, skipped = [], []
    for step in range(60):
        optimizer.zero_grad()
        features, targets = make_batch(32, 5, seed=step).logits, make_batch(32).targets
        if step == 5:
            features[3] = math.nan
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            loss = loss_fn(model(features), targets)
        before = model.weight.clone()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
        if torch.equal(model.weight, before):
            skipped.append(step)
    assert skipped == [5]
    assert [step for step, loss in enumerate(losses) if not math.isfinite(loss)] == [5]


# --- AP rises -------------------------------------------------------------------------------------


def toy(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """(features [2000, 8], targets, the direction that tells them apart), 5 % positive."""
    generator = seeded(seed)
    direction = torch.randn(8, generator=generator)
    direction /= direction.norm()
    targets = (torch.arange(2000) % 20 == 0).long()
    features = torch.randn(2000, 8, generator=generator) + 2.5 * targets[:, None] * direction
    return features, targets, direction


@pytest.mark.parametrize("start", ["random", "inverted"])
@pytest.mark.parametrize("seed", range(5))
def test_average_precision_rises(seed: int, start: str) -> None:
    """To nine tenths of that of the true direction, also from a model that ranks the wrong way."""
    features, targets, direction = toy(seed)
    model = nn.Linear(8, 1)
    with torch.no_grad():
        weight = -direction if start == "inverted" else torch.randn(8, generator=seeded(seed + 99))
        model.weight.copy_(weight)

    def exact_ap(scores: Tensor) -> float:
        found: float = average_precision_score(targets, scores.detach().flatten())
        return found

    best, before = exact_ap(features @ direction), exact_ap(model(features))
    loss_fn = SmoothAPLoss(1, 512, 0.3, temperature_unit="spread", queue_follows_shift=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    order = torch.Generator().manual_seed(seed)
    for _ in range(150):
        rows = torch.randint(2000, (256,), generator=order)
        optimizer.zero_grad()
        loss_fn(model(features[rows]), targets[rows]).backward()
        optimizer.step()
    after = exact_ap(model(features))
    assert after > before
    assert after > 0.9 * best
    assert best > 0.5
    if start == "inverted":
        assert before < 0.05  # as wrong as chance or worse
