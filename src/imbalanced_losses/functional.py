"""Ranking losses as pure functions of scores and labels: no state, no randomness."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from imbalanced_losses import _checks
from imbalanced_losses._engine import BACKENDS, Backend, sigmoid_sums

__all__ = ["Backend", "SmoothAP", "score_spread", "smooth_ap"]


class SmoothAP(NamedTuple):
    """What `smooth_ap` returns.

    Attributes:
        ap: [] or [C], smoothed Average Precision in [0, 1]; exactly 0 where not valid.
        valid: [] or [C] bool, False for a class without a positive or without a negative.
    """

    ap: Tensor
    valid: Tensor


def smooth_ap(
    scores: Tensor,
    is_positive: Tensor,
    temperature: float | Tensor = 0.01,
    *,
    sample_weight: Tensor | None = None,
    backend: Backend = "auto",
) -> SmoothAP:
    """Average Precision with every step function replaced by a sigmoid.

    Definition, for one class with scores s, weights ω, positives P and g(x) = σ(x / τ):
        R_i  = ½ω_i + Σ_j ω_j g(s_j − s_i)          soft rank of i among all rows
        R⁺_i = ½ω_i + Σ_{j∈P} ω_j g(s_j − s_i)      soft rank of i among the positives
        AP   = Σ_{i∈P} ω_i R⁺_i / R_i  ÷  Σ_{i∈P} ω_i

    With ω = 1 this is the published 1 + Σ_{j≠i} form. As τ → 0 it becomes scikit-learn's
    `average_precision_score(sample_weight=ω)` where no scores are tied; a tie counts half.
    Differentiable twice and more in scores and temperature.

    Args:
        scores: [M] or [C, M] floating; higher means more likely positive. float16 and bfloat16
            are computed in float32. ±inf ranks as the extreme it is, with gradient 0; NaN gives
            NaN.
        is_positive: bool, same shape as scores.
        temperature: τ > 0 in units of the scores: smaller is closer to the true AP and gives a
            sparser gradient. A float, or a tensor [] or [C] with one τ a class.
        sample_weight: [M] or the shape of scores, finite and ≥ 0: how many rows each row stands
            for. Weight 0 is the same as leaving the row out.
        backend: "auto", or "dense" for the definition in O(|P|·M) time and O(M) memory.

    Returns:
        SmoothAP(ap, valid), [] for scores [M] and [C] for [C, M]; ap is float32, float64 for
        float64 scores. A class without a positive or without a negative (of weight > 0) has
        valid = False and ap = 0 with gradient 0: zero, not NaN, so that masking it is safe.

    Raises:
        TypeError: scores not floating, is_positive not bool.
        ValueError: shapes that do not fit, τ ≤ 0.

    Example:
        >>> scores = torch.tensor([2.0, 1.0, 0.5, -1.0], requires_grad=True)
        >>> is_positive = torch.tensor([True, False, True, False])
        >>> ap, valid = smooth_ap(scores, is_positive)
        >>> round(ap.item(), 4), valid.item()  # (1/1 + 2/3) / 2
        (0.8333, True)

    Source: Brown et al., "Smooth-AP: Smoothing the Path Towards Large-Scale Image Retrieval",
    ECCV 2020, arXiv 2007.12163, eq. 5; the weights are ours.
    """
    _checks.check_smooth_ap(scores, is_positive, temperature, sample_weight)
    _checks.choice("backend", backend, BACKENDS)
    if scores.dim() == 1:
        problems = (scores[None], is_positive[None])
        weights = None if sample_weight is None else sample_weight[None]
        return SmoothAP(*(out[0] for out in _smooth_ap(*problems, temperature, weights, backend)))
    weights = None if sample_weight is None else sample_weight.expand(scores.shape)
    return _smooth_ap(scores, is_positive, temperature, weights, backend)


def score_spread(scores: Tensor, sample_weight: Tensor | None = None) -> Tensor:
    """Standard deviation of the scores of each class: the unit of a scale-free temperature.

    `smooth_ap(scores, is_positive, 0.1 * score_spread(scores))` does not change when the scores
    are multiplied by a constant. Gradient flows through the deviation.

    Args:
        scores: [M] or [C, M] floating; non-finite scores are left out.
        sample_weight: [M] or the shape of scores, ≥ 0; weight 0 is the same as leaving it out.

    Returns:
        [] or [C], > 0: the population deviation, √(Σω(s − μ)² / Σω) with μ = Σωs / Σω. Where the
        scores are constant (or there is none) they have no unit of their own: 1, gradient 0.

    Example:
        >>> score_spread(torch.tensor([1.0, 3.0]))
        tensor(1.)
    """
    # float64: squares of large float32 scores overflow, and sums over 10⁶ rows lose digits.
    usable = scores.isfinite()
    if sample_weight is not None:
        usable = usable & (sample_weight > 0)
    weights = usable.double() if sample_weight is None else sample_weight.double() * usable
    wide = torch.where(usable, scores, 0.0).double()

    total = weights.sum(-1, keepdim=True)
    share = weights / torch.where(total > 0, total, 1.0)
    mean = (share * wide).sum(-1, keepdim=True)
    variance = (share * (wide - mean).square()).sum(-1)

    limits = torch.finfo(scores.dtype if scores.dtype == torch.float64 else torch.float32)
    floor = (limits.eps * mean.detach().squeeze(-1)).square() + limits.tiny
    has_spread = variance.detach() > floor
    spread = torch.where(has_spread, torch.where(has_spread, variance, 1.0).sqrt(), 1.0)
    return spread.to(_compute_dtype(scores))


def _smooth_ap(
    scores: Tensor,
    is_positive: Tensor,
    temperature: float | Tensor,
    weights: Tensor | None,
    backend: Backend,
) -> SmoothAP:
    """The definition for [C, M] problems; weights [C, M] or None for 1 everywhere."""
    dtype = _compute_dtype(scores)
    scores = scores.to(dtype)
    if weights is None:
        weights = scores.new_ones(()).expand(scores.shape)
    else:
        weights = _unit_weights(weights.detach(), dtype)
        scores = torch.where(weights > 0, scores, 0.0)  # a row left out may hold NaN
    # Two infinities tie instead of differing by NaN, and no difference overflows.
    largest = torch.finfo(dtype).max / 2
    scores = scores.clamp(-largest, largest)
    if isinstance(temperature, Tensor):
        temperature = temperature.to(dtype).expand(len(scores))

    positive_weights = weights * is_positive  # [C, M]
    positive_mass = positive_weights.sum(1)
    valid = (positive_mass > 0) & (weights > positive_weights).any(1)  # [C]

    problem, row = ((positive_weights > 0) & valid[:, None]).nonzero(as_tuple=True)  # [Q]
    queries = scores[problem, row]
    query_weights = weights[problem, row]
    columns = torch.stack((weights, positive_weights), dim=-1)  # [C, M, 2]
    sums = sigmoid_sums(queries, problem, scores, columns, temperature, backend=backend)
    ranks = sums + 0.5 * query_weights[:, None]  # [Q, 2]: among all, among the positives
    precision = ranks[:, 1] / ranks[:, 0]

    share = query_weights / positive_mass[problem]
    ap = precision.new_zeros(len(scores)).index_add(0, problem, share * precision)
    return SmoothAP(ap, valid)


def _unit_weights(weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights [C, M] over their largest, which leaves AP alone and lets no sum overflow."""
    if weights.shape[1] == 0:
        return weights.to(dtype)
    largest = weights.amax(1, keepdim=True)
    return (weights / torch.where(largest > 0, largest, 1)).to(dtype)


def _compute_dtype(scores: Tensor) -> torch.dtype:
    return torch.float64 if scores.dtype == torch.float64 else torch.float32
