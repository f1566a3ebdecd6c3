"""Rows that are ranked within groups: one problem for each class in each group."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from imbalanced_losses._checks.tracing import is_on_host


class Groups(NamedTuple):
    """The rows of a pool, group by group."""

    order: Tensor | None  # [M], the rows of the lowest id first; None: as they are
    lengths: Tensor  # [G] int64, the rows of each group; some 0 at the end where no value is read
    ids: Tensor  # [G], ascending; of a group without rows 0

    @classmethod
    def of(cls, group: Tensor, read: bool = False) -> Groups:
        """Of ids [M]; their number is read from a device only if asked to."""
        if read or is_on_host(group):
            is_sorted = bool((group[1:] >= group[:-1]).all())  # as samplers of groups give them
            ids, order = (group, None) if is_sorted else group.sort(stable=True)
            ids, lengths = ids.unique_consecutive(return_counts=True)
            return cls(order, lengths, ids)
        ids, order = group.sort(stable=True)
        is_first = torch.ones_like(ids, dtype=torch.bool)
        is_first[1:] = ids[1:] != ids[:-1]
        number = is_first.cumsum(0) - 1  # there are no more groups than rows
        lengths = torch.zeros_like(ids).index_add(0, number, torch.ones_like(ids))
        return cls(order, lengths, torch.zeros_like(ids).scatter(0, number, ids))

    def side_by_side(self, values: Tensor) -> Tensor:
        """Values [C, M] as [1, C·M], class by class and in each group by group."""
        ordered = values if self.order is None else values.index_select(1, self.order)
        return ordered.reshape(1, -1)

    def mean(
        self, losses: Tensor, valid: Tensor, live: Tensor, num_classes: int
    ) -> tuple[Tensor, Tensor]:
        """Losses [C·G] -> [C], over the valid groups among the ids `live`; and where any is."""
        shape = (num_classes, self.ids.shape[0])
        counted = valid.view(shape) & self._are_in(live)
        total = torch.where(counted, losses.view(shape), 0).sum(1)
        return total / counted.sum(1).clamp(min=1), counted.any(1)

    def _are_in(self, live: Tensor) -> Tensor:
        """[G] bool, whether groups have an id [n] that is live; `torch.isin` reads the device."""
        if live.shape[0] == 0:
            return torch.zeros_like(self.ids, dtype=torch.bool)
        ordered = live.sort().values
        place = torch.searchsorted(ordered, self.ids).clamp(max=ordered.shape[0] - 1)
        return ordered[place] == self.ids
