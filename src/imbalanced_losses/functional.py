"""Ranking losses as pure functions of scores and labels: no state, no randomness."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from imbalanced_losses._checks import arguments as _checks
from imbalanced_losses._ranking import BACKENDS, Backend, Problems
from imbalanced_losses._ranking import budget as _budget
from imbalanced_losses._ranking import ndcg as _ndcg
from imbalanced_losses._ranking import partial_auc as _partial_auc
from imbalanced_losses._ranking.average_precision import average_precision
from imbalanced_losses._ranking.canonical import compute_dtype
from imbalanced_losses._ranking.weighting import gain_of, prior_weights, score_spread
from imbalanced_losses._rows.groups import Groups

__all__ = [
    "Backend",
    "RankingMetric",
    "SmoothAP",
    "ndcg",
    "partial_auc",
    "prior_weights",
    "recall_at_fpr",
    "recall_at_k",
    "score_spread",
    "smooth_ap",
]


class SmoothAP(NamedTuple):
    """What `smooth_ap` returns.

    Attributes:
        ap: [] or [C], smoothed Average Precision in [0, 1]; exactly 0 where not valid.
        valid: [] or [C] bool, False for a class without a positive or without a negative.
    """

    ap: Tensor
    valid: Tensor


class RankingMetric(NamedTuple):
    """What the other metrics return.

    Attributes:
        metric: [] or [C], exactly 0 where not valid.
        valid: [] or [C] bool, False for a class in which there is nothing to rank.
    """

    metric: Tensor
    valid: Tensor


def smooth_ap(
    scores: Tensor,
    is_positive: Tensor,
    temperature: float | Tensor = 0.01,
    *,
    sample_weight: Tensor | None = None,
    value: Tensor | None = None,
    group: Tensor | None = None,
    backend: Backend = "auto",
) -> SmoothAP:
    """Average Precision with every step function replaced by a sigmoid.

    Definition, for one class with scores s, weights ω, values v, positives P and g(x) = σ(x / τ):
        R_i  = ½ω_i + Σ_j ω_j g(s_j − s_i)          soft rank of i among all rows
        R⁺_i = ½ω_i + Σ_{j∈P} ω_j g(s_j − s_i)      soft rank of i among the positives
        AP   = Σ_{i∈P} ω_i v_i R⁺_i / R_i  ÷  Σ_{i∈P} ω_i v_i

    With ω = v = 1 this is the published 1 + Σ_{j≠i} form. As τ → 0 it becomes scikit-learn's
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
        value: [M] or the shape of scores, finite and ≥ 0: what finding each positive is worth,
            such as money. It weights the mean over positives and leaves ranks alone. Of negatives
            it is not looked at. None = 1.
        group: [M] integers of any dtype and value: each group of rows is ranked by itself, at no
            extra cost. How many there are is read, which waits for a device.
        backend: "dense" is the definition, O(|P|·M) time; "panel" is exact to rounding in O(M)
            time; "auto" takes the faster one. All need O(M) memory.

    Returns:
        SmoothAP(ap, valid), [] for scores [M] and [C] for [C, M], with group [G] and [C, G], one
        for each id in ascending order; ap is float32, float64 for float64 scores. A class without
        a positive or without a negative (of weight > 0), or whose positives are all worth 0, has
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
    problems = _problems(scores, is_positive, temperature, sample_weight, value, group, backend)
    return SmoothAP(*_of(average_precision(problems), problems, scores))


def recall_at_k(
    scores: Tensor,
    is_positive: Tensor,
    temperature: float | Tensor = 0.01,
    *,
    k: int | float,
    softness: float = 0.25,
    sample_weight: Tensor | None = None,
    value: Tensor | None = None,
    group: Tensor | None = None,
    backend: Backend = "auto",
) -> RankingMetric:
    """The share of positives among the k highest scores, with sigmoids for steps.

    Definition, in the terms of `smooth_ap`:
        recall = Σ_{i∈P} ω_i v_i σ((k + ½ω_i − R_i) / (softness · k))  ÷  Σ_{i∈P} ω_i v_i

    As τ → 0 and then softness → 0 it is the share itself, of distinct scores and whole rows.
    Precision among the k highest is the same up to the constant factor Σ_{i∈P} ω_i / k.

    Args:
        scores: as for `smooth_ap`.
        is_positive: as for `smooth_ap`.
        temperature: as for `smooth_ap`.
        k: an int ≥ 1 is a number of rows, counted by weight; a float in (0, 1) the share of the
            rows (of their summed weight), no fewer than one row of mean weight. Where k is all the
            rows, all is found, and recall is 1 up to softness.
        softness: width of the step at k, as a share of k; finite and > 0. A row at rank k counts
            for somewhat more than one half: σ(½ / (softness · k)) at ω = 1.
        sample_weight: as for `smooth_ap`.
        value: as for `smooth_ap`.
        group: as for `smooth_ap`.
        backend: as for `smooth_ap`.

    Returns:
        RankingMetric(metric, valid), recall in [0, 1], of shapes and degenerate cases as
        `smooth_ap`.

    Raises:
        TypeError, ValueError: an argument that does not fit; k=1.0 is one.

    Example:
        >>> import torch
        >>> scores, is_positive = torch.tensor([3.0, 2.0, 1.0, 0.0]), torch.tensor([1, 0, 0, 1]) > 0
        >>> recall_at_k(scores, is_positive, k=2, softness=0.01).metric
        tensor(0.5000)

    Source: Patel et al., "Recall@k Surrogate Loss with Large Batches and Similarity Mixup",
    CVPR 2022, arXiv 2108.11179; the share, weights and values are ours.
    """
    k, softness = _checks.budget("k", k), _checks.number_above_zero("softness", softness)
    problems = _problems(scores, is_positive, temperature, sample_weight, value, group, backend)
    found = _budget.recall(problems, _budget.of_all(problems, k, softness))
    return RankingMetric(*_of(found, problems, scores))


def recall_at_fpr(
    scores: Tensor,
    is_positive: Tensor,
    temperature: float | Tensor = 0.01,
    *,
    max_fpr: float,
    softness: float = 0.25,
    sample_weight: Tensor | None = None,
    value: Tensor | None = None,
    group: Tensor | None = None,
    backend: Backend = "auto",
) -> RankingMetric:
    """The share of positives found before a share of the negatives, with sigmoids for steps.

    A point of the ROC curve, the true positive rate at a false one: sensitivity at a specificity.

    Definition, in the terms of `smooth_ap`, with N the negatives, ω̄⁻ their mean weight (of those
    above 0) and R⁻_i = Σ_{j∈N} ω_j g(s_j − s_i), the negatives above positive i:
        k      = max_fpr · Σ_{j∈N} ω_j
        recall = Σ_{i∈P} ω_i v_i σ((k + ½ω̄⁻ − R⁻_i) / (softness · max(k, ω̄⁻)))  ÷  Σ_{i∈P} ω_i v_i

    Args:
        scores: as for `smooth_ap`.
        is_positive: as for `smooth_ap`.
        temperature: as for `smooth_ap`.
        max_fpr: share of the negatives, in (0, 1). Below one negative it asks for positives above
            all of them.
        softness: width of the step at k, as a share of k; finite and > 0.
        sample_weight: as for `smooth_ap`.
        value: as for `smooth_ap`.
        group: as for `smooth_ap`.
        backend: as for `smooth_ap`.

    Returns:
        RankingMetric(metric, valid), recall in [0, 1], of shapes and degenerate cases as
        `smooth_ap`.

    Raises:
        TypeError, ValueError: an argument that does not fit.

    Example:
        >>> import torch
        >>> scores = torch.tensor([3.0, 2.0, 1.0, 0.0, -1.0])
        >>> is_positive = torch.tensor([False, True, False, True, False])
        >>> recall_at_fpr(scores, is_positive, max_fpr=0.34, softness=0.01).metric
        tensor(0.5000)
    """
    max_fpr = _checks.between_0_and_1("max_fpr", max_fpr)
    softness = _checks.number_above_zero("softness", softness)
    problems = _problems(scores, is_positive, temperature, sample_weight, value, group, backend)
    found = _budget.recall(problems, _budget.of_negatives(problems, max_fpr, softness))
    return RankingMetric(*_of(found, problems, scores))


def partial_auc(
    scores: Tensor,
    is_positive: Tensor,
    temperature: float | Tensor = 0.01,
    *,
    max_fpr: float,
    min_fpr: float = 0.0,
    softness: float = 0.25,
    sample_weight: Tensor | None = None,
    value: Tensor | None = None,
    group: Tensor | None = None,
    backend: Backend = "auto",
) -> RankingMetric:
    """The mean share of positives above a negative, over negatives of a range of ranks.

    The area under the ROC curve between two false positive rates over its width, with sigmoids for
    steps: over all of them the AUC.

    Definition, in the terms of `smooth_ap`, with N the negatives, ω̄⁻ their mean weight (of those
    above 0), R⁻_j the soft rank of negative j among them and R⁺_j = Σ_{i∈P} ω_i v_i g(s_i − s_j):
        k₁  = max(max_fpr · Σ_{j∈N} ω_j, ω̄⁻),   k₀ = min_fpr · Σ_{j∈N} ω_j
        h_j = σ((k₁ + ½ω_j − R⁻_j) / (softness · k₁)) − σ((k₀ + ½ω_j − R⁻_j) / (softness · k₀))
        AUC = Σ_{j∈N} ω_j h_j R⁺_j  ÷  (Σ_{i∈P} ω_i v_i · max(Σ_{j∈N} ω_j h_j, k₁ − k₀))

    The first term of h is exactly 1 for max_fpr = 1 and the second 0 for min_fpr = 0. As τ → 0 and
    then softness → 0 it is `roc_auc_score(max_fpr=…)` of scikit-learn before McClish's
    standardisation, over max_fpr, of distinct scores and whole negatives.

    Args:
        scores: as for `smooth_ap`.
        is_positive: as for `smooth_ap`.
        temperature: as for `smooth_ap`.
        max_fpr: where the range ends, min_fpr < max_fpr ≤ 1.
        min_fpr: where it begins, from 0 on.
        softness: width of the steps at k₁ and k₀, as a share of each; finite and > 0.
        value: as for `smooth_ap`; the weight of positives in R⁺ is ω v.
        sample_weight: as for `smooth_ap`.
        group: as for `smooth_ap`.
        backend: as for `smooth_ap`.

    Returns:
        RankingMetric(metric, valid), the area in [0, 1], of shapes and degenerate cases as
        `smooth_ap`.

    Raises:
        TypeError, ValueError: an argument that does not fit.

    Example:
        >>> import torch
        >>> scores = torch.tensor([3.0, 2.0, 1.0, 0.0])
        >>> is_positive = torch.tensor([False, True, False, True])
        >>> partial_auc(scores, is_positive, max_fpr=1.0).metric  # of 4 pairs 1 is in order
        tensor(0.2500)

    Source: McClish, "Analyzing a Portion of the ROC Curve", Medical Decision Making 1989; as an
    objective Narasimhan and Agarwal, "A Structural SVM Based Approach for Optimizing Partial AUC",
    ICML 2013. The steps are ours.
    """
    min_fpr, max_fpr = _checks.fpr_range(min_fpr, max_fpr)
    softness = _checks.number_above_zero("softness", softness)
    problems = _problems(scores, is_positive, temperature, sample_weight, value, group, backend)
    found = _partial_auc.partial_auc(problems, max_fpr, min_fpr, softness)
    return RankingMetric(*_of(found, problems, scores))


def ndcg(
    scores: Tensor,
    grades: Tensor,
    temperature: float | Tensor = 0.01,
    *,
    k: int | float | None = None,
    softness: float = 0.25,
    sample_weight: Tensor | None = None,
    value: Tensor | None = None,
    group: Tensor | None = None,
    backend: Backend = "auto",
) -> RankingMetric:
    """Normalised discounted cumulative gain, with sigmoids for steps.

    Definition, in the terms of `smooth_ap`, with grades y and gains g_i = 2^{y_i} − 1:
        NDCG = Σ_i ω_i g_i / log₂(1 + R_i)  ÷  Σ_i ω_i g_i / log₂(1 + place_i)

    with places in descending order of gain, the lighter row first among equals: place_i is the
    summed weight down to row i and including it. With k each term above is multiplied by
    σ((k + ½ω_i − R_i) / (softness · k)), and below are the first row and those of
    place_i ≤ k + ½ω_i.

    Args:
        scores: as for `smooth_ap`.
        temperature: as for `smooth_ap`.
        grades: integers 0 to 31 of any dtype, same shape as scores.
        k: as for `recall_at_k`: only the k highest scores count. None = all.
        softness: width of the step at k, as a share of k; finite and > 0.
        value: [M] or the shape of scores, finite and ≥ 0: the gain, in the place of 2^y − 1, of
            rows with a grade above 0.
        sample_weight: as for `smooth_ap`; log₂(1 + R) takes weights in the caller's units.
        group: as for `smooth_ap`.
        backend: as for `smooth_ap`.

    Returns:
        RankingMetric(metric, valid). NDCG is in [0, 1], but that with unequal weights or a wide
        softness it may exceed 1 a little. valid = False where no gain is above 0 or all are equal:
        metric = 0 with gradient 0.

    Raises:
        TypeError, ValueError: an argument that does not fit. The values of tensors are trusted.

    Example:
        >>> import torch
        >>> scores, grades = torch.tensor([3.0, 2.0, 1.0]), torch.tensor([0, 2, 1])
        >>> ndcg(scores, grades).metric  # (3/log₂3 + 1/log₂4) / (3/log₂2 + 1/log₂3)
        tensor(0.6590)

    Source: Järvelin and Kekäläinen, "Cumulated Gain-based Evaluation of IR Techniques", ACM
    Transactions on Information Systems 2002; gains 2^y − 1 as in Burges et al., "Learning to Rank
    using Gradient Descent", ICML 2005.
    """
    k = None if k is None else _checks.budget("k", k)
    softness = _checks.number_above_zero("softness", softness)
    problems = _problems(scores, grades, temperature, sample_weight, value, group, backend, True)
    budget = None if k is None else _budget.of_all(problems, k, softness)
    return RankingMetric(*_of(_ndcg.ndcg(problems, budget), problems, scores))


def _problems(
    scores: Tensor,
    labels: Tensor,
    temperature: float | Tensor,
    sample_weight: Tensor | None,
    value: Tensor | None,
    group: Tensor | None,
    backend: Backend,
    is_graded: bool = False,
) -> Problems:
    """The arguments that all metrics share, checked."""
    arguments = _checks.ranked(scores, labels, temperature, sample_weight, value, is_graded)
    scores, labels, temperature, sample_weight, value = arguments
    _checks.choice("backend", backend, BACKENDS)
    if is_graded:
        value = gain_of(labels, value, compute_dtype(scores))
        labels = value > 0
    fields, layout = [scores, labels, sample_weight, value], None
    if group is not None:
        ids = _checks.group_ids(group, ("scores", scores), scores.shape[-1:])
        if group.dtype == torch.uint64:  # in ascending order, though they may have wrapped
            ids = ids ^ torch.iinfo(torch.int64).min
        groups = Groups.of(ids, read=True)
        shape = (scores.shape[0] if scores.dim() == 2 else 1, scores.shape[-1])
        fields = [None if own is None else groups.side_by_side(own.expand(shape)) for own in fields]
        layout = groups.layout(*shape)
        if isinstance(temperature, Tensor):
            temperature = temperature.expand(shape[:1]).repeat_interleave(len(groups.lengths))
    scores, labels, sample_weight, value = fields  # type: ignore[assignment]
    return Problems(
        scores,
        temperature,
        labels,
        sample_weight,
        layout=layout,
        value=value,
        is_graded=is_graded,
        backend=backend,
    )


def _of(found: Tensor, problems: Problems, scores: Tensor) -> tuple[Tensor, Tensor]:
    """A metric and where it is valid, of the scores' own dimensions, and one for groups."""
    shape = problems.layout.shape_of_values(scores.shape[:-1])
    return found if found.shape == shape else found.view(shape), problems.valid.view(shape)
