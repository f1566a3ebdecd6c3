"""The highest rows of a set, to so many: a soft step, and the positives that it holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from imbalanced_losses._ranking.plan import Rows
from imbalanced_losses._ranking.problems import Problems
from imbalanced_losses._ranking.ranked_sum import Asked, known, ranked_sum
from imbalanced_losses._ranking.ranks import Ranks


class Budget(NamedTuple):
    """What is looked at: the rows of a set whose ranks are within a number."""

    rows: Rows
    number: Tensor  # [C] k, in units of the heaviest row; without ½ω of the row itself
    width: Tensor  # [C] of the step, in the same units
    counts_itself: bool = True  # whether the rows that are asked about are of the set

    def steps(self, ranks: Ranks) -> Tensor:
        """How far each query is within the budget, in widths of the step."""
        number: Tensor = ranks.of_problem(self.number)
        if self.counts_itself:
            number = number + 0.5 * ranks.weights
        return (number - ranks.among(self.rows)) / ranks.of_problem(self.width)

    def holds(self, ranks: Ranks) -> Tensor:
        """1 for queries within the budget, 0 for those beyond, softly."""
        return torch.sigmoid(self.steps(ranks))


def of_all(problems: Problems, k: float, softness: float) -> Budget:
    """The k highest rows: an int counts them in the caller's weights, a float is their share."""
    if isinstance(k, int):
        number = k / problems.unit
    else:
        number = torch.maximum(k * problems.mass("all"), problems.mean_weight("all"))
    return Budget("all", number, softness * number)


def of_negatives(problems: Problems, max_fpr: float, softness: float) -> Budget:
    """For positives: at most this share of the negatives, k, is above them.

    A step of ½ω̄⁻ past k, so that the k-th negative may be; no narrower than for one negative.
    """
    number, one = max_fpr * problems.mass("negatives"), problems.mean_weight("negatives")
    return Budget("negatives", number + 0.5 * one, softness * torch.maximum(number, one), False)


def recall(problems: Problems, budget: Budget) -> Tensor:
    """The share of positives, by value, that a budget holds: [C] in [0, 1], 0 where not valid."""
    held = _HELD[budget.rows, budget.counts_itself]
    return ranked_sum(problems, held(budget.number, budget.width))


def _held(rows: Rows, counts_itself: bool) -> Callable[..., Asked]:
    def worth(ranks: Ranks, number: Tensor, width: Tensor) -> Tensor:
        return Budget(rows, number, width, counts_itself).holds(ranks)

    def slopes(ranks: Ranks, held: Tensor, number: Tensor, width: Tensor) -> tuple[Tensor]:
        return ((held - 1) * held / ranks.of_problem(width),)

    return known(f"held among {rows}", worth, slopes, (rows,))


_HELD = {kind: _held(*kind) for kind in (("all", True), ("negatives", False))}
