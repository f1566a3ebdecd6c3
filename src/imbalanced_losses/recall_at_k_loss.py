"""Recall among the k highest scores as a loss."""

from __future__ import annotations

from torch import Tensor

from imbalanced_losses._checks import arguments as _checks
from imbalanced_losses._loss import RankingLoss, RankingOptions
from imbalanced_losses._options import Unpack
from imbalanced_losses._ranking import Problems
from imbalanced_losses._ranking.budget import Budget, of_all, recall


class RecallAtKLoss(RankingLoss):
    """Differentiable loss of recall within a budget of k rows.

    One minus the share of the positives of each class that are among its k
    highest scores, its ranks and the step at k smoothed by sigmoids, averaged
    over classes: for whoever looks at the k highest, such as cases a day or
    results on a page. Precision among the k highest is the same up to a factor
    that no score changes, the weight of the positives over k.

    Args:
        num_classes: C, number of classes; 1 for binary.
        k: how many rows are looked at, of the pool that is ranked: an int >= 1
            is a number of rows, counted by weight; a float in (0, 1) their
            share, which fits pools of any size, and is no fewer than one row.
            Where k is all rows, everything is found: recall is 1 up to
            softness.
        softness: width of the step at k, as a share of k; finite and > 0. Wider
            steps give a gradient to positives further from k.
        options: as for `SmoothAPLoss`.

    Raises:
        TypeError, ValueError: an argument that does not fit.

    Example:
        >>> import torch
        >>> loss_fn = RecallAtKLoss(num_classes=1, k=0.05, queue_size=512)
        >>> logits = torch.randn(64, 1, requires_grad=True)
        >>> loss_fn(logits, torch.arange(64) % 16 == 0).backward()
        >>> logits.grad.shape
        torch.Size([64, 1])

    Source: Patel et al., "Recall@k Surrogate Loss with Large Batches and
    Similarity Mixup", CVPR 2022, arXiv 2108.11179; definition in
    `imbalanced_losses.functional.recall_at_k`.
    """

    def __init__(
        self,
        num_classes: int,
        k: int | float,
        softness: float = 0.25,
        **options: Unpack[RankingOptions],
    ) -> None:
        """See the class for the arguments."""
        self.k = _checks.budget("k", k)
        self.softness = _checks.number_above_zero("softness", softness)
        super().__init__(num_classes, **options)

    def metric(self, problems: Problems) -> Tensor:
        """Smooth recall at k of each class.

        Args:
            problems: the C ranking problems of a pool.

        Returns:
            [C] in [0, 1], 0 where a problem is not valid.
        """
        return recall(problems, self._budget(problems))

    def _budget(self, problems: Problems) -> Budget:
        return of_all(problems, self.k, self.softness)
