"""What rows are worth: the spread of scores, the weights at a prior, the gain of a grade."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from imbalanced_losses._ranking.canonical import compute_dtype
from imbalanced_losses._ranking.plan import Processes


def spread(
    scores: Tensor, sample_weight: Tensor | None, processes: Processes | None = None
) -> Tensor:
    """`functional.score_spread` of the rows of all processes."""
    summed = _summed_by(processes)
    usable = scores.isfinite()
    if sample_weight is not None:
        usable = usable & (sample_weight > 0)
    weights = usable.double() if sample_weight is None else sample_weight.double() * usable
    total = summed(weights.sum(-1, keepdim=True))
    share = weights / torch.where(total > 0, total, 1.0)

    # In float64, for sums over 10⁶ rows, and in units whose square does not overflow.
    wide = torch.where(usable, scores, 0.0).double()
    unit = summed((share * wide.detach().abs()).sum(-1, keepdim=True))
    scaled = wide / torch.where(unit > 0, unit, 1.0)
    mean = summed((share * scaled).sum(-1, keepdim=True))
    if processes is not None:
        mean = mean.detach()  # what moves with the mean is zero over all rows, not over some
    variance = summed((share * (scaled - mean).square()).sum(-1))

    dtype = compute_dtype(scores)
    limits, unit = torch.finfo(dtype), unit.squeeze(-1)
    floor = torch.maximum(limits.eps * mean.detach().squeeze(-1).abs(), limits.tiny**0.5 / unit)
    has_spread = variance.detach() > floor.square()  # not where unit is 0: the floor is infinite
    deviation = torch.where(has_spread, variance, 1.0).sqrt() * unit
    return torch.where(has_spread, deviation, 1.0).to(dtype)


def weights_at_prior(
    is_positive: Tensor,
    target_prior: float | Tensor,
    sample_weight: Tensor | None,
    processes: Processes | None = None,
) -> Tensor:
    """`functional.prior_weights` for the rows of all processes."""
    if sample_weight is None:
        sample_weight = torch.ones(is_positive.shape, device=is_positive.device)
    weights = sample_weight.expand(is_positive.shape)
    wide = weights.double()
    own = torch.stack([torch.where(side, wide, 0).sum(-1) for side in (is_positive, ~is_positive)])
    positive, negative = _summed_by(processes)(own).unbind()
    is_defined = (positive > 0) & (negative > 0)
    odds = positive / torch.where(is_defined, negative, 1)
    factor = odds * (1 - target_prior) / target_prior  # of negatives beside positives
    factor = torch.where(is_defined, factor, 1.0)[..., None]
    scale = torch.where(is_positive, (1 / factor).clamp(max=1), factor.clamp(max=1))
    return (wide * scale).to(weights.dtype)


def gain_of(grades: Tensor, value: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What finding each row is worth: 2^grade − 1, or the value of those with a grade above 0."""
    if value is not None:
        return torch.where(grades > 0, value, 0)
    return ((1 << grades.to(torch.int64).clamp(0, 31)) - 1).to(dtype)


def _summed_by(processes: Processes | None) -> Callable[[Tensor], Tensor]:
    return (lambda tensor: tensor) if processes is None else processes.sum
