"""The rows that travel together, and the ranking problems that they pose."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Problems(NamedTuple):
    """C ranking problems over M rows: all that a ranking loss gets to see."""

    scores: Tensor  # [C, M] float32 or float64
    is_positive: Tensor  # [C, M] bool
    weights: Tensor  # [C, M] ≥ 0; 0 = not in this problem


class Pool(NamedTuple):
    """Rows to rank: the live batch first, then whatever extends it."""

    logits: Tensor  # [M, C] float32 or float64
    targets: Tensor  # [M] int64, or [M, C] for multi-label
    weights: Tensor  # [M] ≥ 0, in the dtype of the logits

    def select(self, index: Tensor) -> Pool:
        """The rows at index: [k] int64, or [M] bool."""
        return Pool(*(field[index] for field in self))

    def extend(self, rows: Pool) -> Pool:
        """These rows, then those."""
        return Pool(*(torch.cat(pair) for pair in zip(self, rows, strict=True)))

    def is_present(self, ignore_index: int) -> Tensor:
        """[M] bool: rows with a target that counts and a weight above zero."""
        counts = self.targets != ignore_index
        if counts.dim() == 2:
            counts = counts.any(1)
        return counts & (self.weights > 0)

    def problems(self, ignore_index: int) -> Problems:
        """One problem a class: one-vs-rest, or each label by itself for multi-label targets."""
        num_classes = self.logits.shape[1]
        scores = self.logits.T  # [C, M]
        if self.targets.dim() == 2:
            labels = self.targets.T  # [C, M]
            return Problems(scores, labels == 1, self.weights * (labels != ignore_index))
        positive_label = (
            self.targets.new_ones(1)
            if num_classes == 1
            else torch.arange(num_classes, device=self.targets.device)
        )
        is_positive = self.targets == positive_label[:, None]
        weights = self.weights * (self.targets != ignore_index)
        return Problems(scores, is_positive, weights.expand(scores.shape))
