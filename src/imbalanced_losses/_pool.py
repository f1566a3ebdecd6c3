"""The rows that travel together, and the ranking problems that they pose."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from imbalanced_losses._engine import ALONE, Exchange
from imbalanced_losses._tracing import is_on_host


class Problems(NamedTuple):
    """C ranking problems over M rows: all that a ranking loss gets to see."""

    scores: Tensor  # [C, M] float32 or float64
    is_positive: Tensor  # [C, M] bool
    weights: Tensor | None  # [C, M] ≥ 0, 0 = not in this problem; None = 1 everywhere
    num_live: int  # the rows from here on are constants, without a gradient
    exchange: Exchange = ALONE  # the processes that hold other rows of the problems


class Pool(NamedTuple):
    """Rows to rank: the live batch first, then constants that extend it."""

    logits: Tensor  # [M, C] float32 or float64
    targets: Tensor  # [M] int64, or [M, C] for multi-label
    weights: Tensor | None  # [M] ≥ 0, in the dtype of the logits; None = 1 everywhere
    num_constant: int = 0  # the last of the rows, which have no gradient

    def select(self, index: Tensor) -> Pool:
        """The rows at index [k] int64, ascending where some are constants."""
        weights = None if self.weights is None else self.weights.index_select(0, index)
        num_constant = self.num_constant
        if num_constant > 0:
            num_constant = int((index >= len(self.targets) - num_constant).sum())
        return Pool(
            self.logits.index_select(0, index),
            self.targets.index_select(0, index),
            weights,
            num_constant,
        )

    def extend(self, rows: Pool) -> Pool:
        """These rows, then those; constants if they need no gradient."""
        weights = None
        if self.weights is not None or rows.weights is not None:
            weights = torch.cat((self.row_weights(), rows.row_weights()))
        # Class by class in memory, as they will be ranked.
        logits = torch.cat((self.logits.T, rows.logits.T), dim=1).T
        num_constant = 0 if rows.logits.requires_grad else rows.targets.shape[0]
        return Pool(logits, torch.cat((self.targets, rows.targets)), weights, num_constant)

    def row_weights(self) -> Tensor:
        """[M], ones where the pool has none."""
        if self.weights is not None:
            return self.weights
        return self.logits.new_ones(self.logits.shape[0])

    def is_present(self, ignore_index: int) -> Tensor:
        """[M] bool: rows with a target that counts and a weight above zero."""
        present = self.targets != ignore_index
        if present.dim() == 2:
            present = present.any(1)
        return present if self.weights is None else present & (self.weights > 0)

    def problems(self, ignore_index: int) -> Problems:
        """One problem a class: one-vs-rest, or each label by itself for multi-label targets."""
        num_classes = self.logits.shape[1]
        labels = self.targets.T if self.targets.dim() == 2 else self.targets[None]  # [C or 1, M]
        if num_classes == 1 or self.targets.dim() == 2:
            is_positive = labels == 1
        else:
            classes = torch.arange(num_classes, device=labels.device)
            is_positive = labels == classes[:, None]
        counts = labels != ignore_index
        weights = None
        if self.weights is not None:
            weights = (self.weights * counts).expand(num_classes, -1)
        elif not (is_on_host(counts) and counts.all()):
            weights = counts.to(self.logits.dtype).expand(num_classes, -1)
        num_live = self.targets.shape[0] - self.num_constant
        return Problems(self.logits.T, is_positive, weights, num_live)
