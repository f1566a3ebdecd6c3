"""Average Precision of soft ranks."""

from __future__ import annotations

from torch import Tensor

from imbalanced_losses._ranking.problems import Problems
from imbalanced_losses._ranking.ranked_sum import known, ranked_sum
from imbalanced_losses._ranking.ranks import Ranks


def average_precision(problems: Problems) -> Tensor:
    """Σ_P ω R⁺/R ÷ Σ_P ω: [C] in [0, 1], 0 where a problem is not valid."""
    return ranked_sum(problems, _mean_precision())


def _precision(ranks: Ranks) -> Tensor:
    return ranks.among("positives") / ranks.among("all")


def _slopes(ranks: Ranks, precision: Tensor) -> tuple[Tensor, Tensor]:
    among_all = ranks.among("all")
    return (precision / among_all).neg_(), among_all.reciprocal()


_mean_precision = known("mean precision", _precision, _slopes, ("all", "positives"))
