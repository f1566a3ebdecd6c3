"""Cross-entropy for the targets that the ranking losses take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from imbalanced_losses._checks import arguments as _checks
from imbalanced_losses._checks.typing import typed_as
from imbalanced_losses._module import LossModule, arguments_of
from imbalanced_losses._ranking.cuda.rows import check_values

__all__ = ["CrossEntropy"]


class CrossEntropy(LossModule):
    """PyTorch's cross-entropies with the arguments of `SmoothAPLoss`.

    Binary cross-entropy for one class and for multi-label targets, softmax
    cross-entropy for several classes; the mean over what is not ignored. A
    partner for a ranking loss in `MixedLoss`: same targets, same
    `ignore_index`, same `sample_weight`, and 0 rather than NaN without rows.

    Args:
        num_classes: C; 1 for binary targets.
        class_weight: [C] floats > 0, a tensor or a list. Multi-class: the
            factor of rows of each class, as `weight` of
            `torch.nn.CrossEntropyLoss`. Binary and multi-label: that of the
            positives, as `pos_weight` of `torch.nn.BCEWithLogitsLoss`;
            √(negatives / positives) is the baseline to beat. None = 1.
        ignore_index: target that marks rows, or labels of rows, to leave out.
        multilabel: targets are [N, C] in {0, 1, ignore_index}.
        gamma: focusing parameter γ ≥ 0: every term is multiplied by (1 − p)^γ,
            with p the probability of the true label, so that what is right
            already counts little. 0 is plain cross-entropy, 2 the published
            choice.

    Attributes:
        check_values: False skips the check of the values of targets and
            sample_weight, which reads one bool back from the device. On the
            class or on one loss.

    Raises:
        TypeError, ValueError: an argument that does not fit.

    Example:
        >>> import torch
        >>> loss_fn = CrossEntropy(1, class_weight=torch.tensor([10.0]))
        >>> logits, targets = torch.zeros(2, 1), torch.tensor([0, 1])
        >>> round(loss_fn(logits, targets).item(), 4)  # (1 + 10)/2 · log 2
        3.8123
        >>> CrossEntropy(1, gamma=2.0)(logits, targets)  # ¼ · log 2
        tensor(0.1733)

    Note:
        In distributed training it is the mean over the rows of the process. The
        trainer's average is that over all rows if all hold the same number.

    Source: Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017,
    arXiv 1708.02002, eq. 4, for gamma.
    """

    check_values: bool = True
    _anchor = "class_weight"

    def __init__(
        self,
        num_classes: int,
        class_weight: Tensor | Sequence[float] | None = None,
        ignore_index: int = -100,
        *,
        multilabel: bool = False,
        gamma: float = 0.0,
    ) -> None:
        """See the class for the arguments."""
        super().__init__()
        self.num_classes = _checks.integer("num_classes", num_classes, minimum=1)
        self.multilabel = _checks.boolean("multilabel", multilabel)
        self.ignore_index = _checks.ignore_index(
            ignore_index, 2 if self.multilabel or num_classes == 1 else 0
        )
        self.gamma = _checks.number_at_least_zero("gamma", gamma)
        # Follows the device of the module or of a batch.
        self.class_weight = _checks.maybe(
            _checks.class_weight, "class_weight", class_weight, num_classes
        )
        self._settings = arguments_of(CrossEntropy)

    def forward(
        self, logits: Tensor, targets: Tensor, *, sample_weight: Tensor | None = None
    ) -> Tensor:
        """The mean cross-entropy of a batch.

        Args:
            logits: [N, C] floating; below float32 computed in float32.
            targets: [N] integers in {0..C-1}, {0, 1} for one class, or
                ignore_index; [N, C] with multilabel=True.
            sample_weight: [N] ≥ 0: how many rows each row stands for. With
                multilabel=True also [N, C].

        Returns:
            [] ≥ 0, float32 (float64 for float64 logits); 0, attached to the
            graph, where every row is ignored or there is none.

        Raises:
            TypeError: an argument of the wrong type or dtype.
            ValueError: a shape or a value that does not fit.
        """
        logits, targets, weights, *_ = _checks.rows(
            self, logits, targets, sample_weight, check=check_values
        )
        if weights is None:
            weights = logits.new_ones(targets.shape)
        self._follow(logits.device)
        of_classes = None if self.class_weight is None else self.class_weight.to(logits)
        if is_binary := self.multilabel or self.num_classes == 1:
            targets, weights = targets.view(logits.shape), weights.view(logits.shape)
        counts = (targets != self.ignore_index) & weights.bool()
        weights, labels = weights * counts, torch.where(counts, targets, 0)
        used = torch.where(counts if is_binary else counts[:, None], logits, 0.0)
        if is_binary:
            terms = binary_cross_entropy_with_logits(used, labels.to(used.dtype), reduction="none")
            factor = self._focus(terms)
            if of_classes is not None:
                factor = factor * torch.where(labels == 1, of_classes, 1.0)
        else:
            terms = cross_entropy(used, labels, reduction="none")
            factor = self._focus(terms)
            if of_classes is not None:
                weights = weights * of_classes[labels]
        mass = weights.sum()
        return (weights * factor * terms).sum() / torch.where(mass > 0, mass, 1.0)

    if TYPE_CHECKING:

        @typed_as(forward)
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def _focus(self, terms: Tensor) -> Tensor:
        """(1 − p)^γ of terms −log p."""
        if self.gamma == 0:
            return terms.new_ones(())
        # Just above 0, because a power below 1 has no finite slope at 0.
        return (-torch.expm1(-terms)).clamp(min=torch.finfo(terms.dtype).tiny) ** self.gamma
