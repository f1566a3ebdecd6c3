"""Problems in the form that backends take: one dtype, finite scores, weights of at most 1."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from imbalanced_losses._checks import tracing
from imbalanced_losses._ranking.plan import Canonical

if TYPE_CHECKING:
    from imbalanced_losses._ranking.problems import Problems


def canonical(problems: Problems, scores: Tensor, temperature: float | Tensor) -> Canonical:
    """Problems in the form of backends, with these scores and temperature for theirs."""
    dtype = compute_dtype(scores)
    if scores.dim() == 1:
        scores = scores.unsqueeze(0)
    if scores.dtype != dtype:
        scores = scores.to(dtype)
    weights = problems.weights
    if weights is not None:
        scores = torch.where(weights > 0, scores, 0.0)  # a row left out may hold NaN
    scores = scores.contiguous()
    largest = torch.finfo(dtype).max / 2
    has_extremes = _may_exceed(scores, largest)
    if has_extremes:
        # Two infinities tie instead of differing by NaN, and no difference overflows.
        scores = scores.clamp(-largest, largest)
    if isinstance(temperature, Tensor):
        temperature = temperature.to(scores.device, dtype).clamp(min=smallest(dtype))
        temperature = temperature.expand(problems.layout.num_problems)
    else:
        temperature = max(temperature, smallest(dtype))
    return Canonical(
        scores,
        has_extremes,
        problems.is_positive,
        weights,
        temperature,
        problems.num_live,
        problems.processes,
        problems.layout,
    )


def _may_exceed(scores: Tensor, limit: float) -> bool:
    """Whether a score may be beyond ±limit, or NaN: known on the CPU, else assumed."""
    is_on_host = scores.device.type in tracing.HOSTS
    if not is_on_host or scores.requires_grad or scores.numel() == 0:
        return True
    low, high = torch.aminmax(scores)
    return not (float(low) >= -limit and float(high) <= limit)


class InUnits(NamedTuple):
    """What rows count, free of the scale of the caller's numbers."""

    weights: Tensor | None  # [C, M] in [0, 1]; None = 1 everywhere, in every process
    unit: Tensor | None  # [C], the heaviest weight, of which weights are parts; None = 1
    value: Tensor | None  # [C, M] in [0, 1], 0 of all but positives; None = 1 of all of them


def in_units(problems: Problems) -> InUnits:
    """Weights and values over their largest, which leaves metrics alone and lets no sum overflow.

    A weight too small beside the largest for its rank to have a reciprocal counts as little as can
    be, rather than not at all.
    """
    given = [problems.given_weights, problems.given_value]
    processes, layout = problems.processes, problems.layout
    if processes is None and given[0] is None and given[1] is None:
        return InUnits(None, None, None)
    shape = problems.is_positive.shape
    dtype, device = compute_dtype(problems.scores), problems.scores.device
    ones = torch.ones((), dtype=dtype, device=device)
    is_given = [own is not None for own in given]
    weights, value = (ones if own is None else own.detach() for own in given)
    weights = weights.expand(shape)
    if processes is not None or is_given[1]:
        value = torch.where(problems.is_positive & (weights > 0), value, 0.0)
    largest = [
        layout.largest(own.expand(shape)) if own_is_given or processes is not None else ones
        for own, own_is_given in zip((weights, value), is_given, strict=True)
    ]
    if processes is not None:
        told = [torch.full_like(largest[0], own, dtype=torch.float64) for own in is_given]
        found = processes.max(torch.stack([*(own.double() for own in largest), *told]))
        largest = [own.to(one.dtype) for own, one in zip(found, largest, strict=False)]
        is_given = [bool(own.any()) for own in found[2:]]
    units = [torch.where(own > 0, own, 1) for own in largest]
    unit_value = (value / layout.for_rows(units[1])).to(dtype) if is_given[1] else None
    if not is_given[0]:
        return InUnits(None, None, unit_value)
    unit_weights = (weights / layout.for_rows(units[0])).to(dtype).clamp(min=smallest(dtype))
    return InUnits(torch.where(weights > 0, unit_weights, 0.0), units[0], unit_value)


def smallest(dtype: torch.dtype) -> float:
    """Of temperatures, and of ranks beside the largest: a gradient goes with 1/τ and 1/R."""
    number: float = torch.finfo(dtype).tiny ** 0.5
    return number


def compute_dtype(scores: Tensor) -> torch.dtype:
    return torch.float64 if scores.dtype == torch.float64 else torch.float32


def least_spread(dtype: torch.dtype) -> float:
    """Of scores beside their mean: what differs by less is rounding, that of long sums too."""
    return max(torch.finfo(dtype).eps, 32 * torch.finfo(torch.float64).eps)
