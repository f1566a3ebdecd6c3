"""What has to hold for a loss at any time, and its state for comparison."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from imbalanced_losses import SmoothAPLoss


def state_of(module: nn.Module) -> list[Any]:
    """Every bit of a module's state, and of the losses in it."""
    found: list[Any] = []
    for part in module.modules():
        for owner in (part, getattr(part, "_queue", None)):
            for name, value in vars(owner).items() if owner is not None else ():
                if isinstance(value, (bool, int, float, str)):
                    found.append((name, value))
                elif isinstance(value, Tensor):
                    found.append((name, value.dtype, value.shape, value.numpy().tobytes()))
    return found


def assert_unchanged(module: nn.Module, before: list[Any]) -> None:
    assert state_of(module) == before, "an error changed the state"


def assert_sound(loss_fn: SmoothAPLoss) -> None:
    """The queue holds rows that may be there, and nothing else."""
    queue = loss_fn._queue
    assert 0 <= int(queue.cursor) < max(1, queue.size), f"cursor {queue.cursor}"
    logits, targets, weights, *_ = queue.slots()
    assert weights is not None
    assert weights.shape == targets.shape
    assert bool(logits.isfinite().all()), "a row that is not finite is in the queue"
    assert bool((weights.isfinite() & (weights >= 0)).all()), f"weights in the queue: {weights}"
    num_labels = 2 if loss_fn.multilabel or loss_fn.num_classes == 1 else loss_fn.num_classes
    is_label = (targets >= 0) & (targets < num_labels) | (targets == loss_fn.ignore_index)
    assert bool(is_label.all()), f"targets in the queue: {targets}"
    assert queue.is_weighted or bool(((weights == 0) | (weights == 1)).all()), "weights forgotten"


def has_live_nan(loss_fn: SmoothAPLoss, logits: Tensor, targets: Tensor, weight: Any) -> bool:
    """Whether a NaN is where it counts."""
    counts = targets != loss_fn.ignore_index
    if counts.dim() == 1 or (loss_fn.num_classes == 1 and not loss_fn.multilabel):
        counts = counts.reshape(-1, 1)
    if weight is not None:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        counts = counts & (weight.to(dtype) > 0)[:, None]
    return bool((logits.isnan() & counts).any())
