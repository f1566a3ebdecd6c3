"""What rows are worth: the spread of scores, the weights at a prior, the gain of a grade."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from imbalanced_losses._checks import arguments as _checks
from imbalanced_losses._ranking.canonical import compute_dtype, least_spread
from imbalanced_losses._ranking.cuda import facts
from imbalanced_losses._ranking.layout import Layout
from imbalanced_losses._ranking.plan import Processes


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
    is_positive: Tensor, target_prior: float | Tensor, sample_weight: Tensor | None = None
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


def spread(
    scores: Tensor, weights: Tensor | None, layout: Layout, processes: Processes | None = None
) -> Tensor:
    """`functional.score_spread` [C] of the rows [C, M] of all processes."""
    if processes is None and facts.fits(scores, layout, weights):
        return facts.spread(
            scores, weights, layout, lambda own: _spread(own, weights, layout, None)
        )
    return _spread(scores, weights, layout, processes)


def _spread(
    scores: Tensor, weights: Tensor | None, layout: Layout, processes: Processes | None
) -> Tensor:
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
    least = torch.finfo(dtype).tiny ** 0.5 / unit
    floor = torch.maximum(least_spread(dtype) * mean.detach().abs(), least)
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
    if processes is None and facts.fits(weights, layout, weights, target_prior):
        return facts.weights_at_prior(is_positive, target_prior, weights, layout)
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
