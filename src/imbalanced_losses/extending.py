"""What a ranking loss of your own is made of.

Subclass `QueuedRankingLoss` and implement `_per_class(problems) -> PerClass`, arithmetic around
`sigmoid_sums`; the page "Adding to it" of the documentation builds one. `_per_class` and
`_effective_temperature` belong to this interface in spite of their names.
"""

from __future__ import annotations

from imbalanced_losses._loss import PerClass
from imbalanced_losses._loss import _QueuedRankingLoss as QueuedRankingLoss
from imbalanced_losses._ranking import sigmoid_sums
from imbalanced_losses._rows.pool import Problems

__all__ = ["PerClass", "Problems", "QueuedRankingLoss", "sigmoid_sums"]
