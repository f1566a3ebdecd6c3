"""Recall at a false positive rate as a loss."""

from __future__ import annotations

from torch import Tensor

from imbalanced_losses._checks import arguments as _checks
from imbalanced_losses._loss import RankingLoss, RankingOptions
from imbalanced_losses._options import Unpack
from imbalanced_losses._ranking import Problems
from imbalanced_losses._ranking.budget import Budget, of_negatives, recall


class RecallAtFPRLoss(RankingLoss):
    """Differentiable loss of recall at a false positive rate.

    One minus the share of the positives of each class that have at most a given
    share of the negatives above them, its ranks and the step at that share
    smoothed by sigmoids, averaged over classes. It is a point of the ROC curve:
    sensitivity at a fixed specificity, for screening, or where false alarms
    have a budget.

    Args:
        num_classes: C, number of classes; 1 for binary.
        max_fpr: share of the negatives that may rank above a positive that is
            found, in (0, 1). Pools of fewer than 1 / max_fpr negatives ask for
            positives above all of them: rank enough rows at once.
        softness: width of the step, as a share of max_fpr; finite and > 0.
            Wider steps give a gradient to positives further from it.
        options: as for `SmoothAPLoss`.

    Raises:
        TypeError, ValueError: an argument that does not fit.

    Example:
        >>> import torch
        >>> loss_fn = RecallAtFPRLoss(num_classes=1, max_fpr=0.05)
        >>> logits = torch.randn(64, 1, requires_grad=True)
        >>> loss_fn(logits, torch.arange(64) % 16 == 0).backward()
        >>> logits.grad.shape
        torch.Size([64, 1])

    Source: definition in `imbalanced_losses.functional.recall_at_fpr`.
    """

    def __init__(
        self,
        num_classes: int,
        max_fpr: float,
        softness: float = 0.25,
        **options: Unpack[RankingOptions],
    ) -> None:
        """See the class for the arguments."""
        self.max_fpr = _checks.between_0_and_1("max_fpr", max_fpr)
        self.softness = _checks.number_above_zero("softness", softness)
        super().__init__(num_classes, **options)

    def metric(self, problems: Problems) -> Tensor:
        """Smooth recall at the false positive rate of each class.

        Args:
            problems: the C ranking problems of a pool.

        Returns:
            [C] in [0, 1], 0 where a problem is not valid.
        """
        return recall(problems, self._budget(problems))

    def _budget(self, problems: Problems) -> Budget:
        return of_negatives(problems, self.max_fpr, self.softness)
