"""Losses that train PyTorch classifiers on imbalanced data by optimising the ranking itself."""

from imbalanced_losses import functional
from imbalanced_losses.ap_loss import SmoothAPLoss
from imbalanced_losses.cross_entropy import CrossEntropy
from imbalanced_losses.diagnostics import Diagnostics
from imbalanced_losses.mixed_loss import MixedLoss
from imbalanced_losses.ndcg_loss import NDCGLoss
from imbalanced_losses.partial_auc_loss import PartialAUCLoss
from imbalanced_losses.recall_at_fpr_loss import RecallAtFPRLoss
from imbalanced_losses.recall_at_k_loss import RecallAtKLoss
from imbalanced_losses.sampling import GroupBatchSampler

__all__ = [
    "CrossEntropy",
    "Diagnostics",
    "GroupBatchSampler",
    "MixedLoss",
    "NDCGLoss",
    "PartialAUCLoss",
    "RecallAtFPRLoss",
    "RecallAtKLoss",
    "SmoothAPLoss",
    "functional",
]
__version__ = "1.0.0"
