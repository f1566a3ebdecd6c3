"""Ranking losses as pure functions of scores and labels: no state, no randomness."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from imbalanced_losses import _checks
from imbalanced_losses._engine import BACKENDS, Backend, rank_plan, sigmoid_sums

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


class _Positives(NamedTuple):
    """The rows whose precision is averaged, and how."""

    problem: Tensor  # [Q] class of each positive of a valid class, ascending
    row: Tensor  # [Q]
    weight: Tensor | float  # [Q] its ω, or 1
    share: Tensor  # [Q] ω over the class's sum: precisions are averaged with these


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
    if weights is not None:
        weights = _unit_weights(weights.detach(), dtype)
        scores = torch.where(weights > 0, scores, 0.0)  # a row left out may hold NaN
    # Two infinities tie instead of differing by NaN, and no difference overflows.
    largest = torch.finfo(dtype).max / 2
    scores = scores.clamp(-largest, largest)
    # Below this a gradient, which goes with 1/τ, could overflow.
    smallest = torch.finfo(dtype).tiny ** 0.5
    if isinstance(temperature, Tensor):
        temperature = temperature.to(dtype).clamp(min=smallest).expand(len(scores))
    else:
        temperature = max(temperature, smallest)

    positive_weights = is_positive.to(dtype) if weights is None else weights * is_positive
    positives, valid = _positives(positive_weights, weights)
    if torch._C._are_functorch_transforms_active():
        problem = (positives, weights, positive_weights, backend)
        return SmoothAP(_differentiable_ap(scores, temperature, *problem), valid)
    ap: Tensor = _SmoothAP.apply(scores, temperature, positives, weights, positive_weights, backend)
    return SmoothAP(ap, valid)


def _positives(positive_weights: Tensor, weights: Tensor | None) -> tuple[_Positives, Tensor]:
    """The positives of the classes that also have a negative, and which classes those are [C]."""
    mass = positive_weights.sum(1)
    if weights is None:
        valid = (mass > 0) & (mass < positive_weights.shape[1])
    else:
        valid = (mass > 0) & (weights > positive_weights).any(1)
    problem, row = (positive_weights * valid[:, None]).nonzero(as_tuple=True)
    weight = 1.0 if weights is None else weights[problem, row]
    return _Positives(problem, row, weight, weight / mass[problem]), valid


def _differentiable_ap(
    scores: Tensor,
    temperature: float | Tensor,
    positives: _Positives,
    weights: Tensor | None,
    positive_weights: Tensor,
    backend: Backend,
) -> Tensor:
    """AP [C] by `sigmoid_sums`: slower than `_SmoothAP`, with derivatives of every order."""
    problem, row, weight, share = positives
    ones = torch.ones_like(positive_weights)
    columns = torch.stack((ones if weights is None else weights, positive_weights), dim=-1)
    sums = sigmoid_sums(
        scores[problem, row], problem, scores, columns, temperature, backend=backend
    )
    among_all, among_positives = (sums + _half(weight)).unbind(1)
    precision = among_positives / among_all
    return precision.new_zeros(len(scores)).index_add(0, problem, share * precision)


class _SmoothAP(torch.autograd.Function):
    """AP [C] of scores [C, M], its gradient taken in the forward pass, from the same sums.

    AP of a class depends on the scores of that class alone, so the gradient is a [C, M] tensor that
    backward only has to scale. Where backward itself is to be differentiated, it takes the route
    of `_differentiable_ap` instead.
    """

    @staticmethod
    def forward(
        ctx: Any,
        scores: Tensor,
        temperature: float | Tensor,
        positives: _Positives,
        weights: Tensor | None,
        positive_weights: Tensor,
        backend: Backend,
    ) -> Tensor:
        problem, row, weight, share = positives
        plan = rank_plan(
            scores, problem, row, weights, positive_weights, temperature, backend=backend
        )
        among_all, among_positives = plan.sums().add_(_half(weight)).unbind(1)  # [Q]
        precision = among_positives / among_all
        ap = scores.new_zeros(len(scores)).index_add_(0, problem, share * precision)
        if not any(ctx.needs_input_grad):
            return ap

        per_rank = share / among_all
        slopes = plan.gradient(torch.stack((-per_rank * precision, per_rank), dim=1))  # [C, M]
        ctx.inputs = (positives, weights, positive_weights, backend)
        ctx.fixed_temperature = None if isinstance(temperature, Tensor) else temperature
        ctx.save_for_backward(
            scores, slopes, *([temperature] if isinstance(temperature, Tensor) else [])
        )
        return ap

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scores, slopes, *rest = ctx.saved_tensors
        temperature = rest[0] if ctx.fixed_temperature is None else ctx.fixed_temperature
        if torch.is_grad_enabled():
            found = _twice_differentiable_gradient(ctx, scores, temperature, grads[0])
            return (*found, None, None, None, None)
        by_temperature = None
        if ctx.needs_input_grad[1]:
            # Euler: AP depends on scores and τ only through their quotient. Slopes sum to zero, so
            # any origin will do; the mean keeps the products small.
            centred = scores - scores.mean(1, keepdim=True)
            by_temperature = -grads[0] * (centred * slopes).sum(1) / temperature
        return grads[0][:, None] * slopes, by_temperature, None, None, None, None


def _twice_differentiable_gradient(
    ctx: Any, scores: Tensor, temperature: float | Tensor, grad: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """The gradient in scores and temperature as a function that autograd can go through."""
    ap = _differentiable_ap(scores, temperature, *ctx.inputs)
    by_scores = by_temperature = None
    if ctx.needs_input_grad[0]:
        (by_scores,) = torch.autograd.grad(ap, scores, grad, create_graph=True)
    if isinstance(temperature, Tensor) and ctx.needs_input_grad[1]:
        (by_temperature,) = torch.autograd.grad(ap, temperature, grad, create_graph=True)
    return by_scores, by_temperature


def _half(weight: Tensor | float) -> Tensor | float:
    """The ½ω of a rank, for sums [Q, 2]."""
    return 0.5 * weight[:, None] if isinstance(weight, Tensor) else 0.5 * weight


def _unit_weights(weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights [C, M] over their largest, which leaves AP alone and lets no sum overflow."""
    if weights.shape[1] == 0:
        return weights.to(dtype)
    largest = weights.amax(1, keepdim=True)
    return (weights / torch.where(largest > 0, largest, 1)).to(dtype)


def _compute_dtype(scores: Tensor) -> torch.dtype:
    return torch.float64 if scores.dtype == torch.float64 else torch.float32
