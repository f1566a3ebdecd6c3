"""Positives above a negative, averaged over the negatives of a range of false positive rates."""

from __future__ import annotations

import torch
from torch import Tensor

from imbalanced_losses._ranking.budget import Budget
from imbalanced_losses._ranking.problems import Problems
from imbalanced_losses._ranking.ranks import Ranks


def highest_negatives(problems: Problems, max_fpr: float, softness: float) -> Budget:
    """The highest share of the negatives, of one at least."""
    number = torch.maximum(max_fpr * problems.mass("negatives"), problems.mean_weight("negatives"))
    return Budget("negatives", number, softness * number)


def partial_auc(problems: Problems, max_fpr: float, min_fpr: float, softness: float) -> Tensor:
    """Σ_N ω h R⁺ ÷ (Ω⁺ · max(Σ_N ω h, k₁ − k₀)): [C] in [0, 1], 0 where a problem is not valid."""
    if max_fpr == 1 and min_fpr == 0:
        return _auc(problems)
    mass = problems.mass("negatives")
    last = highest_negatives(problems, max_fpr, softness)
    first, number = None, last.number
    if min_fpr > 0:
        before = min_fpr * mass  # [C] k₀
        first = Budget("negatives", before, softness * before)
        # k₁ − k₀, without the difference of two that are nearly equal.
        least = problems.mean_weight("negatives") - before
        number = torch.maximum((max_fpr - min_fpr) * mass, least)

    def counts(ranks: Ranks) -> Tensor:
        """h: 1 for negatives of the range, 0 for others, softly."""
        if first is None:
            return last.holds(ranks)
        up_to = 1 if max_fpr == 1 else last.holds(ranks)
        return up_to - first.holds(ranks)

    found = problems.ranked_average(
        lambda ranks: ranks.among("positives"),
        counts,
        number,
        queries="negatives",
        among=("positives", "negatives"),
        by_value=True,
    )
    return found / problems.mass("positives", by_value=True)


def _auc(problems: Problems) -> Tensor:
    """The same over all negatives: positives are fewer, so that they are asked what is above."""
    mass = problems.mass("negatives")

    def below(ranks: Ranks) -> Tensor:
        return (1 - ranks.among("negatives") / ranks.of_problem(mass)).clamp(min=0)

    return problems.ranked_mean(below, among=("negatives",))
