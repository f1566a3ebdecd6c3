"""Losses that train PyTorch classifiers on imbalanced data by optimising the ranking itself."""

from imbalanced_losses import functional
from imbalanced_losses.ap_loss import SmoothAPLoss

__all__ = ["SmoothAPLoss", "functional"]
__version__ = "0.9.0"
