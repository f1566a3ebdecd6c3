"""Whole trainings: a bad row under a gradient scaler, AP that rises."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor, nn

from imbalanced_losses import SmoothAPLoss
from tests.helpers.cases import seeded
from tests.helpers.rows import make_batch

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
