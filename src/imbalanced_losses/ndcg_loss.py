"""Normalised discounted cumulative gain as a loss."""

from __future__ import annotations

from torch import Tensor

from imbalanced_losses._checks import arguments as _checks
from imbalanced_losses._loss import RankingLoss, RankingOptions
from imbalanced_losses._options import Unpack
from imbalanced_losses._ranking import Problems
from imbalanced_losses._ranking.budget import Budget, of_all
from imbalanced_losses._ranking.ndcg import ndcg


class NDCGLoss(RankingLoss):
    """Differentiable loss of normalised discounted cumulative gain.

    One minus the NDCG of graded targets, its ranks smoothed by sigmoids: for
    rows that are relevant in degrees, each worth 2^grade - 1, less the further
    down it ranks. With unequal weights or a wide softness NDCG may exceed 1 a
    little, and the loss be below 0.

    Args:
        num_classes: C, number of columns; above 1 only with multilabel=True, of
            targets [N, C], each column a problem of its own.
        k: only the k highest scores count: an int >= 1 is a number of rows,
            counted by weight; a float in (0, 1) their share. None = all.
        softness: width of the step at k, as a share of k; finite and > 0.
        options: as for `SmoothAPLoss`, but that targets are grades 0 to 31,
            ignore_index is none of them, and target_prior is refused: grades
            are no two sides.

    Raises:
        TypeError, ValueError: an argument that does not fit.

    Example:
        >>> import torch
        >>> loss_fn = NDCGLoss(k=10)
        >>> logits = torch.randn(64, 1, requires_grad=True)
        >>> loss_fn(logits, torch.arange(64) % 4).backward()
        >>> logits.grad.shape
        torch.Size([64, 1])

    Source: Järvelin and Kekäläinen, "Cumulated Gain-based Evaluation of IR
    Techniques", ACM Transactions on Information Systems 2002; definition in
    `imbalanced_losses.functional.ndcg`.
    """

    _num_grades = 32

    def __init__(
        self,
        num_classes: int = 1,
        k: int | float | None = None,
        softness: float = 0.25,
        **options: Unpack[RankingOptions],
    ) -> None:
        """See the class for the arguments."""
        self.k = None if k is None else _checks.budget("k", k)
        self.softness = _checks.number_above_zero("softness", softness)
        super().__init__(num_classes, **options)
        _checks.grades(self.num_classes, self.multilabel, self.target_prior)

    def metric(self, problems: Problems) -> Tensor:
        """Smooth NDCG of each column.

        Args:
            problems: the C ranking problems of a pool.

        Returns:
            [C], 0 where a problem is not valid.
        """
        return ndcg(problems, self._budget(problems))

    def _budget(self, problems: Problems) -> Budget | None:
        return None if self.k is None else of_all(problems, self.k, self.softness)
