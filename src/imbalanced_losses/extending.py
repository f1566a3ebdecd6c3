"""What a ranking loss of your own is made of.

Subclass `RankingLoss` and implement `metric(problems) -> [C]`, made of `problems.ranked_sum`; the
page "Adding a ranking loss" of the documentation builds one.
"""

from __future__ import annotations

from imbalanced_losses._loss import PerClass, RankingLoss, RankingOptions
from imbalanced_losses._loss import RankingLoss as QueuedRankingLoss
from imbalanced_losses._ranking import Problems, Ranks, sigmoid_sums

__all__ = [
    "PerClass",
    "Problems",
    "QueuedRankingLoss",
    "RankingLoss",
    "RankingOptions",
    "Ranks",
    "sigmoid_sums",
]
