"""Average Precision of soft ranks."""

from __future__ import annotations

from torch import Tensor

from imbalanced_losses._ranking.problems import Problems
from imbalanced_losses._ranking.ranked_sum import Asked, ranked_sum
from imbalanced_losses._ranking.ranks import Ranks


def average_precision(problems: Problems) -> Tensor:
    """Σ_P ω R⁺/R ÷ Σ_P ω: [C] in [0, 1], 0 where a problem is not valid."""
    return ranked_sum(problems, _MEAN_PRECISION)


def _precision(ranks: Ranks) -> Tensor:
    return ranks.among("positives") / ranks.among("all")


def _slopes(ranks: Ranks) -> tuple[Tensor, Tensor]:
    among_all = ranks.among("all")
    by_positives = among_all.reciprocal()
    return (ranks.among("positives") * by_positives).div_(among_all).neg_(), by_positives


_MEAN_PRECISION = Asked(
    _precision,
    "positives",
    ("all", "positives"),
    _slopes,
    is_mean=True,
    name="mean precision",
)
