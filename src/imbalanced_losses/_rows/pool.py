"""The rows that travel together, and the ranking problems that they pose."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from imbalanced_losses._checks.tracing import is_on_host
from imbalanced_losses._ranking.cuda import rows as kernels


class Columns(NamedTuple):
    """The rows of a pool, class by class: one ranking problem each."""

    scores: Tensor  # [C, M] float32 or float64
    is_positive: Tensor  # [C, M] bool
    weights: Tensor | None  # [C, M] ≥ 0, 0 = not in this problem; None = 1 everywhere
    num_live: int  # the rows from here on are constants, without a gradient


class Pool(NamedTuple):
    """Rows to rank: the live batch first, then constants that extend it."""

    logits: Tensor  # [M, C] float32 or float64
    targets: Tensor  # [M] int64, or [M, C] for multi-label
    weights: Tensor | None  # as targets, ≥ 0, in the dtype of the logits; None = 1 everywhere
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
        """As targets, ones where the pool has none."""
        return self.logits.new_ones(self.targets.shape) if self.weights is None else self.weights

    def is_present(self, ignore_index: int) -> Tensor:
        """[M] bool: rows with a target that counts and a weight above zero."""
        present = self.targets != ignore_index
        if self.weights is not None:
            present = present & (self.weights > 0)
        return present.any(1) if present.dim() == 2 else present

    def is_storable(self, ignore_index: int) -> Tensor:
        """[M] bool: rows that are present, and finite in every class."""
        is_finite = self.logits.isfinite().all(1)
        if self.weights is not None:
            is_finite &= _columns(self.weights).isfinite().all(1)
        return is_finite & self.is_present(ignore_index)

    def without_ignored(self, ignore_index: int) -> Pool:
        """The rows that are present, free slots of a queue left out."""
        present = self.is_present(ignore_index)
        return self if present.all() else self.select(present.nonzero().squeeze(1))

    def zero_with_gradient_of_mean(self, ignore_index: int) -> Tensor:
        """[C] zeros whose gradient is that of each class's mean live score.

        AP does not change when all scores move together, but rows of the queue are detached and
        would stay behind; added to them, this lets them move along in the gradient alone.
        """
        weights = self.problems(ignore_index).weights
        usable = self.logits.isfinite()  # [M, C]
        if weights is not None:
            usable &= weights.T > 0
        share = usable / usable.sum(0).clamp(min=1).double()  # [M, C]
        mean = (torch.where(usable, self.logits, 0.0) * share).sum(0)
        return (mean - mean.detach()).to(self.logits.dtype)

    def packed(self) -> Tensor:
        """[M, columns] float64: logits, targets and, where there are any, weights; exact."""
        fields = (self.logits.detach(), self.targets, self.weights)
        return torch.cat([_columns(field).double() for field in fields if field is not None], dim=1)

    def unpacked(self, rows: Tensor, dtype: torch.dtype) -> Pool:
        """Packed rows [n, columns] as a pool of the form of this one, its floats of a dtype."""
        num_classes, per_label = self.logits.shape[1], _columns(self.targets).shape[1]
        widths = [num_classes, per_label] + [per_label] * (self.weights is not None)
        logits, *labels = rows.split(widths, dim=1)
        targets, *weights = (
            columns if self.targets.dim() == 2 else columns.squeeze(1) for columns in labels
        )
        own = weights[0].to(dtype) if weights else None
        return Pool(logits.to(dtype), targets.to(torch.int64), own)

    def problems(self, ignore_index: int) -> Columns:
        """One problem a class: one-vs-rest, or each label by itself for multi-label targets."""
        num_classes = self.logits.shape[1]
        labels = self.targets.T if self.targets.dim() == 2 else self.targets[None]  # [C or 1, M]
        num_live = self.targets.shape[0] - self.num_constant
        if kernels.serves(self.logits):
            given = None if self.weights is None else _columns(self.weights).T
            found = kernels.labelled(labels, given, num_classes, ignore_index, self.logits)
            return Columns(self.logits.T, *found, num_live)
        if num_classes == 1 or self.targets.dim() == 2:
            is_positive = labels == 1
        else:
            classes = torch.arange(num_classes, device=labels.device)
            is_positive = labels == classes[:, None]
        counts = labels != ignore_index
        weights = None
        if self.weights is not None:
            own = self.weights if self.weights.dim() == 1 else self.weights.T
            weights = (own * counts).expand(num_classes, -1)
        elif not (is_on_host(counts) and counts.all()):
            weights = counts.to(self.logits.dtype).expand(num_classes, -1)
        return Columns(self.logits.T, is_positive, weights, num_live)


def _columns(field: Tensor) -> Tensor:
    """[M, k] of a field [M] or [M, k]."""
    return field[:, None] if field.dim() == 1 else field
