"""Names that version 0.9 had here."""

from imbalanced_losses._loss import RankingLoss as _QueuedRankingLoss

__all__ = ["_QueuedRankingLoss"]
