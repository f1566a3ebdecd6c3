"""Positives above a negative, averaged over the negatives of a range of false positive rates."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from imbalanced_losses._ranking.budget import Budget
from imbalanced_losses._ranking.problems import Problems
from imbalanced_losses._ranking.ranked_sum import Asked, known, ranked_sum
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
    number, limits = last.number, [last.number, last.width]
    if min_fpr > 0:
        before = min_fpr * mass  # [C] k₀
        # k₁ − k₀, without the difference of two that are nearly equal.
        least = problems.mean_weight("negatives") - before
        number = torch.maximum((max_fpr - min_fpr) * mass, least)
        limits = [before, softness * before, *(limits if max_fpr < 1 else ())]
    asked = _RANGES[min_fpr > 0, max_fpr < 1]
    return ranked_sum(problems, asked(number, *limits)) / problems.mass("positives", by_value=True)


def _range(has_first: bool, has_last: bool) -> Callable[..., Asked]:
    """The average of R⁺ over the negatives of a range: of k₁ − k₀, then the number and the width of
    each limit that it has.
    """
    name = f"positives above negatives{' from' * has_first}{' to' * has_last}"

    def held(ranks: Ranks, limits: tuple[Tensor, ...]) -> list[Tensor]:
        pairs = zip(limits[::2], limits[1::2], strict=True)
        return [Budget("negatives", *own).holds(ranks) for own in pairs]

    def counts(ranks: Ranks, number: Tensor, *limits: Tensor) -> Tensor:
        """h: 1 for negatives of the range, 0 for others, softly."""
        own = held(ranks, limits)
        if not has_first:
            return own[0]
        return (own[1] if has_last else 1) - own[0]

    def slopes(
        ranks: Ranks, h: Tensor, average: Tensor, per: Tensor, number: Tensor, *limits: Tensor
    ) -> tuple[Tensor, Tensor]:
        own = held(ranks, limits) if has_first else [h]
        moved = [
            (one - 1) * one / ranks.of_problem(width)
            for one, width in zip(own, limits[1::2], strict=True)
        ]
        by_rank = moved[0]
        if has_first:
            by_rank = (moved[1] if has_last else 0) - by_rank
        return h * per, by_rank * (ranks.among("positives") - average) * per

    return known(name, _above, slopes, ("positives", "negatives"), counts)


def _above(ranks: Ranks, *_: Tensor) -> Tensor:
    return ranks.among("positives")


_RANGES = {kind: _range(*kind) for kind in ((False, True), (True, True), (True, False))}


def _auc(problems: Problems) -> Tensor:
    """The same over all negatives: positives are fewer, so that they are asked what is above."""
    return ranked_sum(problems, _share_below(problems.mass("negatives")))


def _below(ranks: Ranks, mass: Tensor) -> Tensor:
    return (1 - ranks.among("negatives") / ranks.of_problem(mass)).clamp(min=0)


def _slopes_below(ranks: Ranks, below: Tensor, mass: Tensor) -> tuple[Tensor]:
    return (torch.where(below > 0, -1 / ranks.of_problem(mass), 0),)


_share_below = known("share below", _below, _slopes_below, ("negatives",))
