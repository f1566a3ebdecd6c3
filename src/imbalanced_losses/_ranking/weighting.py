"""What rows are worth: the spread of scores, the weights at a prior, the gain of a grade."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from imbalanced_losses._ranking.canonical import compute_dtype
from imbalanced_losses._ranking.layout import Layout
from imbalanced_losses._ranking.plan import Processes


def spread(
    scores: Tensor, weights: Tensor | None, layout: Layout, processes: Processes | None = None
) -> Tensor:
    """`functional.score_spread` [C] of the rows [C, M] of all processes."""
    total = _totals(layout, processes)
    usable = scores.isfinite()
    if weights is not None:
        usable = usable & (weights > 0)
    own = usable.double() if weights is None else weights.double() * usable
    mass = total(own)
    share = own / layout.for_rows(torch.where(mass > 0, mass, 1.0))

    # In float64, for sums over 10⁶ rows, and in units whose square does not overflow.
    wide = torch.where(usable, scores, 0.0).double()
    unit = total(share * wide.detach().abs())
    scaled = wide / layout.for_rows(torch.where(unit > 0, unit, 1.0))
    mean = total(share * scaled)
    if processes is not None:
        mean = mean.detach()  # what moves with the mean is zero over all rows, not over some
    variance = total(share * (scaled - layout.for_rows(mean)).square())

    dtype = compute_dtype(scores)
    limits = torch.finfo(dtype)
    floor = torch.maximum(limits.eps * mean.detach().abs(), limits.tiny**0.5 / unit)
    has_spread = variance.detach() > floor.square()  # not where unit is 0: the floor is infinite
    deviation = torch.where(has_spread, variance, 1.0).sqrt() * unit
    return torch.where(has_spread, deviation, 1.0).to(dtype)


def weights_at_prior(
    is_positive: Tensor,
    target_prior: float | Tensor,
    weights: Tensor | None,
    layout: Layout,
    processes: Processes | None = None,
) -> Tensor:
    """`functional.prior_weights` for the rows [C, M] of all processes; the prior a float or [C]."""
    if weights is None:
        weights = torch.ones((), device=is_positive.device)
    weights = weights.expand(is_positive.shape)
    wide = weights.double()
    total = _totals(layout, processes)
    positive = total(torch.where(is_positive, wide, 0))
    negative = total(torch.where(is_positive, 0, wide))
    is_defined = (positive > 0) & (negative > 0)
    odds = positive / torch.where(is_defined, negative, 1)
    factor = odds * (1 - target_prior) / target_prior  # of negatives beside positives
    factor = layout.for_rows(torch.where(is_defined, factor, 1.0))
    scale = torch.where(is_positive, (1 / factor).clamp(max=1), factor.clamp(max=1))
    return (wide * scale).to(weights.dtype)


def gain_of(grades: Tensor, value: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What finding each row is worth: 2^grade − 1, or the value of those with a grade above 0."""
    if value is not None:
        return torch.where(grades > 0, value, 0)
    return ((1 << grades.to(torch.int64).clamp(0, 31)) - 1).to(dtype)


def _totals(layout: Layout, processes: Processes | None) -> Callable[[Tensor], Tensor]:
    if processes is None:
        return layout.total
    return lambda values: processes.sum(layout.total(values))
