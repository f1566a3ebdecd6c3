"""Per-class losses to one loss. The only place that writes NaN."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from imbalanced_losses._checks.typing import Reduction


class PerClass(NamedTuple):
    """What a ranking loss makes of C problems."""

    losses: Tensor  # [C], any finite value where not valid
    valid: Tensor  # [C] bool


def reduce_valid(losses: Tensor, valid: Tensor, reduction: Reduction) -> Tensor:
    """Reduce losses [C] over the classes where valid [C] is True.

    Returns:
        "mean", "sum": [], exactly 0 with gradient 0 where no class is valid.
        "none": [C], NaN at the classes that are not valid.
    """
    if reduction == "none":
        return mark_invalid(losses, valid)
    losses = torch.where(valid, losses, 0.0)
    if losses.shape[0] == 1:
        return losses.squeeze(0)
    total = losses.sum()
    return total / valid.sum().clamp(min=1) if reduction == "mean" else total


def mark_invalid(losses: Tensor, valid: Tensor) -> Tensor:
    """The losses [C] with NaN, and gradient 0, at the classes that are not valid."""
    return torch.where(valid, losses, torch.nan)
