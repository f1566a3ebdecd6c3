"""Partial area under the ROC curve as a loss."""

from __future__ import annotations

from torch import Tensor

from imbalanced_losses._checks import arguments as _checks
from imbalanced_losses._loss import RankingLoss, RankingOptions
from imbalanced_losses._options import Unpack
from imbalanced_losses._ranking import Problems
from imbalanced_losses._ranking.budget import Budget, of_negatives
from imbalanced_losses._ranking.partial_auc import partial_auc


class PartialAUCLoss(RankingLoss):
    """Differentiable loss of the area under a part of the ROC curve.

    One minus the mean share of the positives of each class above a negative,
    over the negatives between two false positive rates, its ranks and the steps
    at the rates smoothed by sigmoids, averaged over classes. Over all negatives
    it is the AUC; over the highest few, what matters where alarms are scarce.

    Args:
        num_classes: C, number of classes; 1 for binary.
        max_fpr: where the range ends, min_fpr < max_fpr <= 1: that share of the
            negatives, the highest ones, counts; of one negative at least.
        min_fpr: where the range begins, from 0 on: that share does not count.
        softness: width of the steps at both ends, as a share of each; finite
            and > 0.
        options: as for `SmoothAPLoss`.

    Raises:
        TypeError, ValueError: an argument that does not fit.

    Example:
        >>> import torch
        >>> loss_fn = PartialAUCLoss(num_classes=1, max_fpr=0.1)
        >>> logits = torch.randn(64, 1, requires_grad=True)
        >>> loss_fn(logits, torch.arange(64) % 16 == 0).backward()
        >>> logits.grad.shape
        torch.Size([64, 1])

    Source: McClish, "Analyzing a Portion of the ROC Curve", Medical Decision
    Making 1989; definition in `imbalanced_losses.functional.partial_auc`.
    """

    def __init__(
        self,
        num_classes: int,
        max_fpr: float,
        min_fpr: float = 0.0,
        softness: float = 0.25,
        **options: Unpack[RankingOptions],
    ) -> None:
        """See the class for the arguments."""
        self.min_fpr, self.max_fpr = _checks.fpr_range(min_fpr, max_fpr)
        self.softness = _checks.number_above_zero("softness", softness)
        super().__init__(num_classes, **options)

    def metric(self, problems: Problems) -> Tensor:
        """Smooth partial AUC of each class.

        Args:
            problems: the C ranking problems of a pool.

        Returns:
            [C] in [0, 1], 0 where a problem is not valid.
        """
        return partial_auc(problems, self.max_fpr, self.min_fpr, self.softness)

    def _budget(self, problems: Problems) -> Budget:
        return of_negatives(problems, self.max_fpr, self.softness)
