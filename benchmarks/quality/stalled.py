"""Three real training runs that stall, what `diagnose` says of them, and what mends them.

    python -m benchmarks.quality.stalled

Protein homology (0.9 % positive), the network and the optimiser of `benchmarks.quality`, one split.
Each run and its remedy start from the same weights and take as many steps.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from demo.model import make_model
from rich.console import Console
from torch import Tensor, nn

from benchmarks.quality import numbers
from benchmarks.quality.tasks import load
from benchmarks.quality.training import Parts, parts_of
from imbalanced_losses import CrossEntropy, Diagnostics, SmoothAPLoss

STEPS, LEARNING_RATE = 500, 1e-2
SPLIT = 100  # of those for development


class Setting(NamedTuple):
    """How one run trains."""

    loss_fn: nn.Module
    batch_size: int = 1024
    seen: Callable[[Tensor], Tensor] = nn.Identity()  # what the loss gets of the logits


class Outcome(NamedTuple):
    found: Diagnostics | None  # of the last batch
    validation_ap: float
    shares_without: float  # share of steps whose loss is below 1e-3: nothing left, or nothing there


def fit(model: nn.Module, parts: Parts, setting: Setting) -> Outcome:
    """Train in place; the diagnosis of the last batch before its step."""
    features, labels = parts.train.features, parts.train.labels
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS)
    generator = torch.Generator().manual_seed(0)
    found, num_without = None, 0
    for step in range(STEPS):
        rows = torch.randint(len(labels), (setting.batch_size,), generator=generator)
        logits, targets = setting.seen(model(features[rows])[:, None]), labels[rows]
        if step == STEPS - 1 and isinstance(setting.loss_fn, SmoothAPLoss):
            found = setting.loss_fn.diagnose(logits, targets)
        loss = setting.loss_fn(logits, targets)
        num_without += loss.item() < 1e-3
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        ap = numbers.ap(model(parts.validation.features), parts.validation)
    return Outcome(found, ap, num_without / STEPS)


def spread_loss() -> SmoothAPLoss:
    return SmoothAPLoss(1, queue_size=0, temperature=0.1, temperature_unit="spread")


def main() -> None:
    """Run all three and print them."""
    torch.set_num_threads(1)
    console = Console(width=110)
    parts = parts_of(load("protein"), SPLIT)
    fresh = make_model(parts.train.features.shape[1], SPLIT)
    trained = copy.deepcopy(fresh)
    by_entropy = fit(trained, parts, Setting(CrossEntropy(1)))
    console.print(f"BCE for {STEPS} steps: validation AP {by_entropy.validation_ap:.3f}")
    ranked = copy.deepcopy(fresh)
    by_ranking = fit(ranked, parts, Setting(spread_loss()))
    console.print(f"Smooth-AP for {STEPS} steps: validation AP {by_ranking.validation_ap:.3f}")

    runs: dict[str, tuple[nn.Module, Setting, Setting]] = {
        "1. τ = 0.01 on logits that cross-entropy has spread out": (
            trained,
            Setting(SmoothAPLoss(1, queue_size=0, temperature=0.01)),
            Setting(spread_loss()),
        ),
        "2. batches of 32 rows": (fresh, Setting(spread_loss(), 32), Setting(spread_loss())),
        "3. probabilities instead of logits, after training with Smooth-AP": (
            ranked,
            Setting(SmoothAPLoss(1, queue_size=0, temperature=0.1), seen=torch.sigmoid),
            Setting(spread_loss()),
        ),
    }
    for name, (start, stalled, mended) in runs.items():
        first = fit(copy.deepcopy(start), parts, stalled)
        second = fit(copy.deepcopy(start), parts, mended)
        console.rule(name)
        console.print(str(first.found), highlight=False)
        console.print(
            f"validation AP {first.validation_ap:.3f}, loss < 0.001 in {first.shares_without:.0%} "
            f"of the steps; mended {second.validation_ap:.3f}, {second.shares_without:.0%}"
        )


if __name__ == "__main__":
    main()
