"""Losses that train PyTorch classifiers on imbalanced data by optimising the ranking itself."""

from imbalanced_losses import functional
from imbalanced_losses.ap_loss import SmoothAPLoss
from imbalanced_losses.cross_entropy import CrossEntropy
from imbalanced_losses.diagnostics import Diagnostics
from imbalanced_losses.mixed_loss import MixedLoss
from imbalanced_losses.sampling import GroupBatchSampler

__all__ = [
    "CrossEntropy",
    "Diagnostics",
    "GroupBatchSampler",
    "MixedLoss",
    "SmoothAPLoss",
    "functional",
]
__version__ = "0.9.0"
