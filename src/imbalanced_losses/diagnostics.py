"""Measure how much gradient signal a pool of rows carries."""

from __future__ import annotations

from collections.abc import Callable
from textwrap import TextWrapper
from typing import NamedTuple

import torch
from torch import Tensor

from imbalanced_losses._ranking import Problems
from imbalanced_losses._ranking.average_precision import average_precision
from imbalanced_losses._ranking.budget import Budget
from imbalanced_losses._rows.pool import Columns
from imbalanced_losses._rows.reduce import mark_invalid

__all__ = ["Diagnostics"]

# If scores are farther apart than this many τ, the gradient is below a hundredth of the largest:
# σ′(6) / σ′(0).
REACH = 6.0


class Diagnostics(NamedTuple):
    """What `SmoothAPLoss.diagnose` found for each class; `print` shows advice too.

    A positive and a negative *carry gradient* for each other while their scores
    are at most 6 τ apart; beyond, the slope of the sigmoid is below a
    hundredth of its largest.

    Attributes:
        ap: [C] in [0, 1], exact Average Precision of the pool, ties as in
            scikit-learn. NaN where a score is; and for a class without a
            positive or without a negative, here and in all other floats.
        smooth_ap: [C] in [0, 1], what `SmoothAPLoss` makes of it.
        metric: [C], one minus the loss: what it makes of its own metric.
        temperature: [C] > 0, effective τ in units of the scores.
        spread: [C] > 0, standard deviation of the scores in the pool.
        active_pairs: [C] in [0, 1], share of the pairs of a positive and a
            negative that carry gradient.
        active_positives: [C] in [0, 1], share of the positives with a negative
            that does.
        positives_in_batch: [C] int64.
        positives_in_pool: [C] int64, those of the queue included.
        pool_size: [C] int64, rows ranked.
        queue_age: steps since the oldest row in the queue came; 0 without a
            queue. Rows of a checkpoint count from its loading.
        near_budget: [C] in [0, 1], share of the positives whose step at the
            budget (k, or a false positive rate) has a slope: at most 6 widths
            from it. None for a loss without a budget.
        valid_groups: [C] int64, groups of the pool in which the class has a
            positive and a negative; where there are groups, the floats above
            are means over those of the batch. None without groups.
    """

    ap: Tensor
    smooth_ap: Tensor
    metric: Tensor
    temperature: Tensor
    spread: Tensor
    active_pairs: Tensor
    active_positives: Tensor
    positives_in_batch: Tensor
    positives_in_pool: Tensor
    pool_size: Tensor
    queue_age: int
    near_budget: Tensor | None = None
    valid_groups: Tensor | None = None

    @property
    def gap(self) -> Tensor:
        """[C], smooth minus exact AP: what the smoothing distorts."""
        return self.smooth_ap - self.ap

    def advice(self) -> list[str]:
        """Advice on what stands out, the most serious first; may be empty."""
        num_classes = len(self.ap)
        invalid = (self.positives_in_pool == 0) | (self.positives_in_pool == self.pool_size)
        if self.valid_groups is not None:
            invalid |= self.valid_groups == 0
        invalid &= self.metric.isnan()
        sharp, near = self.spread / self.temperature, self.near_budget
        found = [
            (
                self.metric.isnan() & ~invalid,
                "a score is NaN, and so is the loss: look at the inputs of the batch and at the "
                "last update of the model. The queue has not kept the row",
            ),
            (
                invalid,
                "no positive, or no negative, in the pool: the class has no loss. Larger batches, "
                "a sampler that draws positives (within groups: whole groups), or a queue",
            ),
            (
                invalid & False if near is None else (near == 0) & (self.metric < 0.99),
                "no positive is near the budget, where alone its rank counts: raise softness, or "
                "begin with SmoothAPLoss",
            ),
            (
                (self.active_pairs < 0.01) & (self.ap < 0.99) & (sharp > 50),
                "fewer than 1 % of the pairs carry gradient, and the spread of the scores is more "
                'than 50 τ: raise the temperature, or set temperature_unit="spread" with 0.1',
            ),
            (
                (self.active_positives < 0.5) & (self.ap < 0.99) & ~(sharp > 50),
                "half of the positives are out of reach of every negative: begin with a higher "
                "temperature and anneal it, or mix in cross-entropy",
            ),
            (
                self.gap.abs() > 0.1,
                "smooth and exact AP differ by more than 0.1: τ is too large for the order that "
                "is there, or scores are nearly constant",
            ),
            (
                sharp < 1,
                "τ is larger than the spread of the scores: rank logits rather than "
                'probabilities, lower the temperature, or set temperature_unit="spread" with 0.1',
            ),
            (
                (self.ap >= 0.99) & (self.pool_size < 4096),
                "the pool is ranked almost perfectly and has little left to teach: rank more rows "
                "at once",
            ),
            (
                ~invalid & (self.positives_in_batch == 0),
                "no positive in the batch: only the queue's, which have no gradient, are ranked",
            ),
            (
                ~invalid & (self.positives_in_pool < 3),
                "fewer than three positives in the pool: its AP is mostly chance",
            ),
        ]
        return [
            text if num_classes == 1 else f"{_classes(where)}: {text}"
            for where, text in found
            if bool(where.any())
        ]

    def __str__(self) -> str:
        hidden = {
            "queue_age",
            *(name for name, field in zip(self._fields, self, strict=True) if field is None),
        }
        names = [name for name in self._fields if name not in hidden]
        shown = [min(5, len(self.ap)), len(self.ap)]  # as many as 80 columns hold
        lines = []
        for name in names:
            values = getattr(self, name)[: shown[0]].tolist()
            cells = (f"{v:,}" if isinstance(v, int) else f"{v:.4g}" for v in values)
            lines.append(f"{name:<20}" + "".join(f"{cell:>11}" for cell in cells))
        if shown[0] < shown[1]:
            lines.append(f"(the first {shown[0]} of {shown[1]} classes)")
        lines.append(f"{'queue_age':<20}{self.queue_age:>11,}")
        wrapped = TextWrapper(width=80, initial_indent="- ", subsequent_indent="  ")
        return "\n".join([*lines, *map(wrapped.fill, self.advice())])


def _classes(where: Tensor) -> str:
    numbers = where.nonzero().flatten().tolist()
    shown = ", ".join(map(str, numbers[:5])) + (", …" if len(numbers) > 5 else "")
    return f"class {shown}" if len(numbers) == 1 else f"{len(numbers)} classes ({shown})"


def _diagnosed(
    problems: Problems,
    metric: Tensor,
    budget: Budget | None,
    in_batch: Columns,
    ages: Tensor,
    means: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None,
) -> Diagnostics:
    """The diagnostics of a pool's problems, whose scores are detached.

    `means` takes values of groups and whether they are valid, and returns those of classes.
    """
    scores, weights = problems.scores, problems.weights
    positives_in_batch = in_batch.is_positive
    if in_batch.weights is not None:
        positives_in_batch = positives_in_batch & (in_batch.weights > 0)
    unit, smooth_ap = problems.spread(), average_precision(problems)
    temperature = torch.as_tensor(problems.temperature, dtype=unit.dtype, device=unit.device)
    temperature = temperature.expand_as(unit)
    if weights is None:
        weights = scores.new_ones(scores.shape)
    fields, lengths = (scores, problems.is_positive, weights), problems.layout.lengths
    if lengths is None:
        rows = zip(*fields, temperature, strict=True)
    else:
        rows = zip(*(f[0].split(lengths.tolist()) for f in fields), temperature, strict=True)
    found = [_of_class(*own) for own in rows]
    ap, pairs, positives, num_positives, num_rows = map(torch.stack, zip(*found, strict=True))
    valid = (num_positives > 0) & (num_positives < num_rows)

    def marked(value: Tensor, where: Tensor = valid) -> Tensor:
        value = value.to(scores.dtype)
        if means is not None:
            value, where = means(value, where)
        return mark_invalid(value, where)

    num_classes, num_groups = len(in_batch.is_positive), None
    if means is not None:
        num_groups = valid.view(num_classes, -1).sum(1)
    return Diagnostics(
        marked(ap, valid & ~smooth_ap.isnan()),
        marked(smooth_ap),
        marked(metric, problems.valid),
        marked(temperature),
        marked(unit),
        marked(pairs),
        marked(positives),
        positives_in_batch.sum(1),
        num_positives.view(num_classes, -1).sum(1),
        num_rows.view(num_classes, -1).sum(1),
        int(ages.max()) if len(ages) else 0,
        None if budget is None else marked(_near(problems, budget), problems.valid),
        num_groups,
    )


def _near(problems: Problems, budget: Budget) -> Tensor:
    """The share of positives within `REACH` widths of a budget's step."""
    return problems.ranked_mean(
        lambda ranks: (budget.steps(ranks).abs() <= REACH).to(problems.scores.dtype),
        among=(budget.rows,),
    )


def _of_class(
    scores: Tensor, is_positive: Tensor, weights: Tensor, temperature: Tensor
) -> tuple[Tensor, ...]:
    """Exact AP and shares for the scores [M] of one class, in O(M log M).

    Returns:
        [] each: AP, shares of active pairs and positives, numbers of positives and of rows.
    """
    present = weights > 0
    scores, is_positive = scores[present], is_positive[present]
    weights = weights[present].double()
    scores, order = scores.sort()
    is_positive, weights = is_positive[order], weights[order]

    queries, own = scores[is_positive], weights[is_positive]
    # Rows at least as high as each positive: a tie counts, as in scikit-learn.
    first = torch.searchsorted(scores, queries).clamp(max=len(scores) - 1)  # NaN is beyond all
    above = _sum_from(torch.stack((weights, weights * is_positive)))[:, first]
    ap = (own * above[1] / above[0]).sum() / own.sum()

    negatives = scores[~is_positive]
    reach = REACH * temperature
    low = torch.searchsorted(negatives, queries - reach)
    high = torch.searchsorted(negatives, queries + reach, right=True)
    near = (high - low).double()  # negatives within reach of each positive
    return (
        ap,
        near.mean() / max(1, len(negatives)),
        (near > 0).double().mean(),
        is_positive.sum(),
        present.sum(),
    )


def _sum_from(weights: Tensor) -> Tensor:
    """[…, M]: the sum of each row's weight and those after it."""
    return weights.flip(-1).cumsum(-1).flip(-1)
