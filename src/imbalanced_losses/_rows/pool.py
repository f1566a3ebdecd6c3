"""The rows that travel together, and the ranking problems that they pose."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from imbalanced_losses._checks.tracing import is_on_host
from imbalanced_losses._ranking.cuda import rows as kernels
from imbalanced_losses._ranking.weighting import gain_of
from imbalanced_losses._rows.groups import Groups


class Columns(NamedTuple):
    """The rows of a pool, class by class: one ranking problem each."""

    scores: Tensor  # [C, M] float32 or float64
    is_positive: Tensor  # [C, M] bool
    weights: Tensor | None  # [C, M] ≥ 0, 0 = not in this problem; None = 1 everywhere
    value: Tensor | None  # [C, M] ≥ 0, what finding a positive is worth; None = 1 everywhere
    draws: Tensor | None  # [C or 1, M], how many rows each was drawn for; None = 1 everywhere
    num_live: int  # the rows from here on are constants, without a gradient

    def within(self, groups: Groups) -> Columns:
        """The same rows [1, C·M] side by side, group by group of each class."""
        num_classes = self.scores.shape[0]
        scores, is_positive, *rest, _ = self

        def lined_up(field: Tensor) -> Tensor:
            return groups.side_by_side(field.expand(num_classes, -1))

        weights, value, draws = (None if field is None else lined_up(field) for field in rest)
        rows = lined_up(scores)
        return Columns(rows, lined_up(is_positive), weights, value, draws, rows.shape[1])


class Pool(NamedTuple):
    """Rows to rank: the live batch first, then constants that extend it.

    The compiler of torch 2.6 takes neither slices nor `_replace` of a named tuple.
    """

    logits: Tensor  # [M, C] float32 or float64
    targets: Tensor  # [M] int64, or [M, C] for multi-label
    weights: Tensor | None = None  # as targets, ≥ 0, like the logits; None = 1 everywhere
    value: Tensor | None = None  # as targets, like the logits, below 0 = the default; None = all
    group: Tensor | None = None  # [M] int64, rows are ranked within groups; None = one group
    num_constant: int = 0  # the last of the rows, which have no gradient
    draws: Tensor | None = None  # [M], how many rows each was drawn for; None = 1 everywhere

    @classmethod
    def of(cls, fields: Iterable[Tensor | None], num_constant: int = 0) -> Pool:
        """From the five fields that rows have."""
        logits, targets, weights, value, group = fields
        assert logits is not None
        assert targets is not None
        return cls(logits, targets, weights, value, group, num_constant)

    def fields(self) -> tuple[Tensor | None, ...]:
        """The five fields that rows have."""
        return self.logits, self.targets, self.weights, self.value, self.group

    def select(self, index: Tensor) -> Pool:
        """The rows at index [k] int64, ascending where some are constants."""
        num_constant = self.num_constant
        if num_constant > 0:
            num_constant = int((index >= len(self.targets) - num_constant).sum())
        fields = [f if f is None else f.index_select(0, index) for f in self.fields()]
        return Pool.of(fields, num_constant)

    def extend(self, rows: Pool) -> Pool:
        """These rows, then those; constants if they need no gradient."""
        pools = [
            pool.filled(weights=beside.weights is not None, value=beside.value is not None)
            for pool, beside in ((self, rows), (rows, self))
        ]
        if self.logits.shape[1] == 1:
            logits = torch.cat([pool.logits for pool in pools])
        else:  # memory is laid out class by class, as the rows will be ranked
            logits = torch.cat([pool.logits.T for pool in pools], dim=1).T
        rest = zip(*(pool.fields()[1:] for pool in pools), strict=True)
        fields = [None if field[0] is None else torch.cat(field) for field in rest]
        num_constant = 0 if rows.logits.requires_grad else rows.targets.shape[0]
        return Pool.of((logits, *fields), num_constant)

    def filled(self, weights: bool = False, value: bool = False, group: bool = False) -> Pool:
        """With the fields asked for, by default where the rows came without."""
        own_weights, own_value, own_group = self.weights, self.value, self.group
        if weights and own_weights is None:
            own_weights = self.logits.new_ones(self.targets.shape)
        if value and own_value is None:
            own_value = self.logits.new_full(self.targets.shape, -1.0)
        if group and own_group is None:
            own_group = self.targets.new_zeros(self.targets.shape[0], dtype=torch.int64)
        rest = own_weights, own_value, own_group, self.num_constant, self.draws
        return Pool(self.logits, self.targets, *rest)

    def whole(self) -> Pool:
        """With every field, as a queue and a checkpoint hold rows."""
        return self.filled(weights=True, value=True, group=True)

    def groups(self) -> Groups | None:
        """The rows group by group, where they are ranked so."""
        return None if self.group is None else Groups.of(self.group)

    def with_logits(self, logits: Tensor) -> Pool:
        rest = self.weights, self.value, self.group, self.num_constant, self.draws
        return Pool(logits, self.targets, *rest)

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

    def zero_with_gradient_of_mean(self, ignore_index: int, group: Tensor | None = None) -> Tensor:
        """[C] zeros whose gradient is that of each class's mean live score.

        AP does not change when all scores move together, but rows of the queue are detached and
        would stay behind; added to them, this lets them move along in the gradient alone. With
        groups [m, C], the mean of each row's own group; 0 where that has no live rows.
        """
        weights = self.problems(ignore_index).weights
        usable = self.logits.isfinite()  # [M, C]
        if weights is not None:
            usable &= weights.T > 0
        scores = torch.where(usable, self.logits, 0.0)
        if self.group is None:
            share = usable / usable.sum(0).clamp(min=1).double()  # [M, C]; their sum can't overflow
            mean = (scores * share).sum(0)
            return (mean - mean.detach()).to(self.logits.dtype)
        assert group is not None
        # The place of a group's first row, of the rows sorted by group, stands for the group.
        ids = self.group.sort().values
        own, theirs = (
            torch.searchsorted(ids, one).clamp(max=len(ids) - 1) for one in (self.group, group)
        )
        none = torch.zeros_like(scores, dtype=torch.float64)
        number = none.index_add(0, own, usable.double()).clamp(min=1)
        mean = none.index_add(0, own, scores / number[own])[theirs]  # [m, C]
        zero = torch.where((ids[theirs] == group)[:, None], mean - mean.detach(), 0)
        return zero.to(self.logits.dtype)

    def packed(self) -> Tensor:
        """[M, columns] float64: logits, targets and what else there is; exact."""
        fields = [self.logits.detach(), self.targets, self.weights, self.value]
        if self.group is not None:  # in two halves, which are below 2⁵³
            fields += [self.group >> 32, self.group & 0xFFFFFFFF]
        return torch.cat([_columns(field).double() for field in fields if field is not None], dim=1)

    def unpacked(self, rows: Tensor, dtype: torch.dtype) -> Pool:
        """Packed rows [n, columns] as a pool of the form of this one, its floats of a dtype."""
        logits, rows = rows.tensor_split([self.logits.shape[1]], dim=1)
        fields: list[Tensor | None] = []
        for field in self.fields()[1:4]:
            if field is None:
                fields.append(None)
                continue
            own, rows = rows.tensor_split([_columns(field).shape[1]], dim=1)
            fields.append(
                (own if field.dim() == 2 else own.squeeze(1)).to(
                    field.dtype if len(fields) == 0 else dtype
                )
            )
        group = None if self.group is None else (rows[:, 0].long() << 32) | rows[:, 1].long()
        return Pool.of((logits.to(dtype), *fields, group))

    def problems(self, ignore_index: int, is_graded: bool = False) -> Columns:
        """One problem a class: one-vs-rest, or each label by itself for multi-label targets.

        Targets that are grades are worth what `gain_of` says.
        """
        num_classes, value = self.logits.shape[1], None
        labels = self.targets.T if self.targets.dim() == 2 else self.targets.unsqueeze(0)
        weights = None
        if kernels.serves(self.logits):
            own = None if self.weights is None else _columns(self.weights).T
            given = labels, own, num_classes, ignore_index, self.logits, is_graded
            is_positive, weights, value = kernels.labelled(*given)
        elif is_graded:
            value = gain_of(labels.masked_fill(labels == ignore_index, 0), None, self.logits.dtype)
            is_positive = value > 0
        elif num_classes == 1 or self.targets.dim() == 2:
            is_positive = labels == 1
        else:
            classes = torch.arange(num_classes, device=labels.device)
            is_positive = labels == classes[:, None]
        if self.value is not None:
            own = self.value if self.value.dim() == 1 else self.value.T
            default = self.logits.new_ones(()) if value is None else value
            value = torch.where(is_positive & (own >= 0), own, default)
        if weights is None:
            weights = self._counted(labels != ignore_index)
        num_live = self.targets.shape[0] - self.num_constant
        draws = None if self.draws is None else self.draws[None]
        return Columns(self.logits.T, is_positive, weights, value, draws, num_live)

    def _counted(self, counts: Tensor) -> Tensor | None:
        """The weights [C, M] of labels [C or 1, M], 0 where they do not count; None = all 1."""
        if self.weights is not None:
            own = self.weights if self.weights.dim() == 1 else self.weights.T
            weights = own * counts
        elif is_on_host(counts) and counts.all():
            return None
        else:
            weights = counts.to(self.logits.dtype)
        return weights.expand(self.logits.shape[1], -1)


def _columns(field: Tensor) -> Tensor:
    """[M, k] of a field [M] or [M, k]."""
    return field.unsqueeze(1) if field.dim() == 1 else field
