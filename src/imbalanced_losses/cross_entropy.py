"""Cross-entropy for the targets that the ranking losses take."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from imbalanced_losses import _checks

__all__ = ["CrossEntropy"]


class CrossEntropy(nn.Module):
    """PyTorch's cross-entropies with the arguments of `SmoothAPLoss`.

    Binary cross-entropy for one class and for multi-label targets, softmax cross-entropy for
    several classes; the mean over what is not ignored. A partner for a ranking loss in `MixedLoss`:
    same targets, same `ignore_index`, same `sample_weight`, and 0 rather than NaN without rows.

    Args:
        num_classes: C; 1 for binary targets.
        class_weight: [C] floating, > 0. Multi-class: the factor of rows of each class, as `weight`
            of `torch.nn.CrossEntropyLoss`. Binary and multi-label: the factor of the positives, as
            `pos_weight` of `torch.nn.BCEWithLogitsLoss`; √(negatives / positives) is the baseline
            to beat on imbalanced data. None = 1.
        ignore_index: target that marks rows, or labels of rows, to leave out.
        multilabel: targets are [N, C] in {0, 1, ignore_index}.

    Example:
        >>> import torch
        >>> loss_fn = CrossEntropy(1, class_weight=torch.tensor([10.0]))
        >>> round(loss_fn(torch.zeros(2, 1), torch.tensor([0, 1])).item(), 4)  # (1 + 10)/2 · log 2
        3.8123

    Note:
        In distributed training it is the mean over the rank's rows, and trainers average that over
        ranks: the mean over all rows where ranks hold as many.
    """

    class_weight: Tensor | None

    #: Compare the values of targets and sample_weight with what is allowed; reads one bool back
    #: from the device in each forward pass.
    check_values: bool = True

    def __init__(
        self,
        num_classes: int,
        class_weight: Tensor | None = None,
        ignore_index: int = -100,
        *,
        multilabel: bool = False,
    ) -> None:
        super().__init__()
        self.num_classes = _checks.integer("num_classes", num_classes, minimum=1)
        self.multilabel = _checks.boolean("multilabel", multilabel)
        self.ignore_index = _checks.ignore_index(ignore_index, self.multilabel or num_classes == 1)
        if class_weight is not None:
            _checks.class_weight(class_weight, num_classes)
        self.register_buffer("class_weight", class_weight, persistent=False)

    def forward(
        self, logits: Tensor, targets: Tensor, *, sample_weight: Tensor | None = None
    ) -> Tensor:
        """The mean cross-entropy of a batch.

        Args:
            logits: [N, C] floating; float16 and bfloat16 are computed in float32.
            targets: [N] integers in {0..C-1}, {0, 1} for one class, or ignore_index; [N, C] with
                multilabel=True.
            sample_weight: [N], finite and ≥ 0: how many rows each row stands for.

        Returns:
            [] ≥ 0, float32 (float64 for float64 logits); 0, attached to the graph, where every row
            is ignored or there is none.

        Raises:
            TypeError: an argument of the wrong type or dtype.
            ValueError: a shape or a value that does not fit.
        """
        logits = _checks.logits(logits, self.num_classes)
        targets = _checks.targets(targets, logits, self.multilabel)
        if sample_weight is not None:
            sample_weight = _checks.sample_weight(sample_weight, logits)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        weights = logits.new_ones(len(logits))
        if sample_weight is not None:
            weights = sample_weight.detach().to(logits.dtype)
        is_binary = self.multilabel or self.num_classes == 1
        if self.check_values and not logits.is_meta:
            num_labels = 2 if is_binary else self.num_classes
            _checks.row_values(targets, sample_weight, weights, num_labels, self.ignore_index)
        targets = targets.to(torch.int64)
        counts = (targets != self.ignore_index) & (
            weights if targets.dim() == 1 else weights[:, None]
        ).bool()
        of_classes = None if self.class_weight is None else self.class_weight.to(logits)
        if is_binary:
            targets, counts = targets.view(logits.shape), counts.view(logits.shape)
            weights = weights[:, None] * counts
            labels = torch.where(counts, targets, 0).to(logits.dtype)
            total = binary_cross_entropy_with_logits(
                torch.where(counts, logits, 0.0),
                labels,
                weights,
                reduction="sum",
                pos_weight=of_classes,
            )
        else:
            labels = torch.where(counts, targets, 0)
            weights = weights * counts
            if of_classes is not None:
                weights = weights * of_classes[labels]
            rows = cross_entropy(
                torch.where(counts[:, None], logits, 0.0), labels, reduction="none"
            )
            total = (weights * rows).sum()
        mass = weights.sum()
        return total / torch.where(mass > 0, mass, 1.0)

    def extra_repr(self) -> str:
        weight = None if self.class_weight is None else self.class_weight.tolist()
        return (
            f"num_classes={self.num_classes}, class_weight={weight}, multilabel={self.multilabel}"
        )
