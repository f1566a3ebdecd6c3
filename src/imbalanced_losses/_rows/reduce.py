"""Per-class losses to one loss. The only place that writes NaN."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from imbalanced_losses._checks.typing import Reduction
from imbalanced_losses._ranking.cuda import rows as kernels


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
    if losses.shape[0] == 1:
        return torch.where(valid, losses, 0.0).squeeze(0)
    return mean_where(losses, valid, is_mean=reduction == "mean")[0]


def mean_where(values: Tensor, counts: Tensor, is_mean: bool = True) -> tuple[Tensor, Tensor]:
    """The mean or sum [...] of the values [..., K] that count, 0 of none; and whether any does."""
    if kernels.serves(values):
        return kernels.mean_where(values, counts, is_mean)
    total = torch.where(counts, values, 0.0).sum(-1)
    return total / counts.sum(-1).clamp(min=1) if is_mean else total, counts.any(-1)


def mark_invalid(losses: Tensor, valid: Tensor) -> Tensor:
    """The losses [C] with NaN, and gradient 0, at the classes that are not valid."""
    return torch.where(valid, losses, torch.nan)
