"""Problems in the form that backends take: one dtype, finite scores, weights of at most 1."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from imbalanced_losses._checks.tracing import is_on_host
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
    if not is_on_host(scores) or scores.requires_grad or scores.numel() == 0:
        return True
    low, high = torch.aminmax(scores)
    return not (float(low) >= -limit and float(high) <= limit)


def unit_weights(problems: Problems) -> Tensor | None:
    """Weights [C, M] over their largest, which leaves metrics alone and lets no sum overflow.

    None where all are 1, in every process. One too small beside the largest for its rank to have a
    reciprocal counts as little as can be, rather than not at all.
    """
    weights, processes = problems.given_weights, problems.processes
    if weights is None and processes is None:
        return None
    dtype, device = compute_dtype(problems.scores), problems.scores.device
    is_weighted = weights is not None
    if weights is None:
        weights = torch.ones((), dtype=dtype, device=device)
    weights = weights.detach().expand(problems.is_positive.shape)
    largest = problems.layout.largest(weights)
    if processes is not None:
        own = torch.full_like(largest, is_weighted, dtype=torch.float64)
        found, own = processes.max(torch.stack((largest.double(), own))).unbind()
        if not bool(own.any()):
            return None
        largest = found.to(largest.dtype)
    largest = problems.layout.for_rows(torch.where(largest > 0, largest, 1))
    unit = (weights / largest).to(dtype)
    return torch.where(weights > 0, unit.clamp(min=smallest(dtype)), 0.0)


def smallest(dtype: torch.dtype) -> float:
    """Of temperatures, and of ranks beside the largest: a gradient goes with 1/τ and 1/R."""
    number: float = torch.finfo(dtype).tiny ** 0.5
    return number


def compute_dtype(scores: Tensor) -> torch.dtype:
    return torch.float64 if scores.dtype == torch.float64 else torch.float32
