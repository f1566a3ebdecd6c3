"""Ranking losses as pure functions of scores and labels: no state, no randomness."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from imbalanced_losses._checks import arguments as _checks
from imbalanced_losses._ranking import BACKENDS, Backend, Problems
from imbalanced_losses._ranking.average_precision import average_precision
from imbalanced_losses._ranking.layout import Layout
from imbalanced_losses._ranking.weighting import spread, weights_at_prior

__all__ = ["Backend", "SmoothAP", "prior_weights", "score_spread", "smooth_ap"]


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
        backend: "dense" is the definition, O(|P|·M) time; "panel" is exact to rounding in O(M)
            time; "auto" takes the faster one. All need O(M) memory.

    Returns:
        SmoothAP(ap, valid), [] for scores [M] and [C] for [C, M]; ap is float32, float64 for
        float64 scores. A class without a positive or without a negative (of weight > 0) has
        valid = False and ap = 0 with gradient 0: zero, not NaN, so that masking it is safe.

    Raises:
        TypeError: scores not floating, is_positive not bool.
        ValueError: shapes or devices that do not fit, a float τ ≤ 0. The values of tensors are
            trusted: reading them would wait for the device.

    Example:
        >>> import torch
        >>> scores = torch.tensor([2.0, 1.0, 0.5, -1.0], requires_grad=True)
        >>> is_positive = torch.tensor([True, False, True, False])
        >>> ap, valid = smooth_ap(scores, is_positive)
        >>> round(ap.item(), 4), valid.item()  # (1/1 + 2/3) / 2
        (0.8333, True)

    Source: Brown et al., "Smooth-AP: Smoothing the Path Towards Large-Scale Image Retrieval",
    ECCV 2020, arXiv 2007.12163, eq. 5; the weights are ours.
    """
    arguments = _checks.smooth_ap(scores, is_positive, temperature, sample_weight)
    scores, is_positive, temperature, sample_weight = arguments
    _checks.choice("backend", backend, BACKENDS)
    problems = Problems(scores, temperature, is_positive, sample_weight, backend=backend)
    ap, valid = average_precision(problems), problems.valid
    if scores.dim() == 1:
        ap, valid = ap if ap.dim() == 0 else ap.squeeze(0), valid.squeeze(0)
    return SmoothAP(ap, valid)


def score_spread(scores: Tensor, sample_weight: Tensor | None = None) -> Tensor:
    """Standard deviation of the scores of each class: the unit of a scale-free temperature.

    `smooth_ap(scores, is_positive, 0.1 * score_spread(scores))` does not change when the scores
    are multiplied by a constant. Gradient flows through the deviation.

    Args:
        scores: [M] or [C, M] floating; non-finite scores are left out.
        sample_weight: [M] or the shape of scores, ≥ 0; weight 0 is the same as leaving it out.

    Returns:
        [] or [C], > 0: the population deviation, √(Σω(s − μ)² / Σω) with μ = Σωs / Σω. Where the
        scores are constant (or there is none) they have no unit of their own: 1, gradient 0. So
        too where they differ by no more than rounding, or by less than 1e-19 (float64: 1e-154).

    Example:
        >>> import torch
        >>> score_spread(torch.tensor([1.0, 3.0]))
        tensor(1.)
    """
    scores = _checks.scores(scores)
    weights = _checks.weights_of_scores(sample_weight, scores)
    rows = scores if scores.dim() == 2 else scores.unsqueeze(0)
    return spread(rows, weights, Layout(rows.shape)).view(scores.shape[:-1])


def prior_weights(
    is_positive: Tensor,
    target_prior: float | Tensor,
    sample_weight: Tensor | None = None,
) -> Tensor:
    """Weights that give positives the share that they will have in deployment.

    Precision, and with it AP, depends on how common positives are: scores that reach an AP of 0.98
    among as many positives as negatives may reach 0.5 at one positive in a hundred. With these
    weights a re-balanced sample tells, and `smooth_ap` optimises, the AP at `target_prior`; so
    does `sklearn.metrics.average_precision_score(sample_weight=…)`. It takes for granted that
    positives and negatives each look as they will in deployment, and only their numbers differ.

    Args:
        is_positive: [M] or [C, M] bool.
        target_prior: π, share of positives in deployment, 0 < π < 1; a float, or a tensor [C] with
            one a class, whose values are trusted.
        sample_weight: [M] or the shape of is_positive, finite and ≥ 0: weights to start from.

    Returns:
        The shape of is_positive, float32, or the dtype of sample_weight. Of positives and
        negatives the one side keeps the weights that it had, and those of the other shrink. A
        class without a positive or without a negative keeps all.

    Raises:
        TypeError, ValueError: an argument that does not fit.

    Example:
        >>> import torch
        >>> prior_weights(torch.tensor([True, True, False, False]), 0.2)
        tensor([0.2500, 0.2500, 1.0000, 1.0000])

    Source: Saerens et al., "Adjusting the Outputs of a Classifier to New a Priori Probabilities",
    Neural Computation 2002, eq. 2.4: what shifts is the ratio of the priors alone.
    """
    arguments = _checks.prior_weights(is_positive, target_prior, sample_weight)
    is_positive, target_prior, sample_weight = arguments
    rows = is_positive if is_positive.dim() == 2 else is_positive.unsqueeze(0)
    weights = weights_at_prior(rows, target_prior, sample_weight, Layout(rows.shape))
    return weights.view(is_positive.shape)
