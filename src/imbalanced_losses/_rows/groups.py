"""Rows that are ranked within groups: one problem for each class in each group."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from imbalanced_losses._checks.tracing import is_on_host
from imbalanced_losses._ranking.layout import Layout
from imbalanced_losses._rows.reduce import mean_where


class Groups(NamedTuple):
    """The rows of a pool, group by group."""

    order: Tensor | None  # [M], the rows of the lowest id first; None: as they are
    lengths: Tensor  # [G] int64, the rows of each group, of some 0 where no value is read
    ids: Tensor  # [G], ascending
    number: Tensor | None = None  # [M] int64, the group of each ordered row; None: by lengths

    @classmethod
    def of(cls, group: Tensor, read: bool = False) -> Groups:
        """Of ids [M]; their number is read from a device only if asked to."""
        if read or is_on_host(group):
            is_sorted = bool((group[1:] >= group[:-1]).all())  # as samplers of groups give them
            ids, order = (group, None) if is_sorted else group.sort(stable=True)
            ids, lengths = ids.unique_consecutive(return_counts=True)
            return cls(order, lengths, ids)
        ids, order = group.sort(stable=True)
        number = torch.searchsorted(ids, ids)  # that of its first row: others have no rows
        lengths = torch.zeros_like(ids).index_add(0, number, torch.ones_like(ids))
        return cls(order, lengths, ids, number)

    def layout(self, num_classes: int, num_rows: int) -> Layout:
        """Of all rows [1, C·M] side by side: a problem for each group of each class."""
        lengths, number = self.lengths.repeat(num_classes), self.number
        if number is not None and num_classes > 1:
            before = torch.arange(num_classes, device=number.device) * self.ids.shape[0]
            number = (number + before[:, None]).flatten()
        return Layout((1, num_classes * num_rows), lengths, number)

    def side_by_side(self, values: Tensor) -> Tensor:
        """Values [C, M] as [1, C·M], class by class and in each group by group."""
        ordered = values if self.order is None else values.index_select(1, self.order)
        return ordered.reshape(1, -1)

    def mean(
        self, losses: Tensor, valid: Tensor, live: Tensor, num_classes: int
    ) -> tuple[Tensor, Tensor]:
        """Losses [C·G] -> [C], over the valid groups among the ids `live`; and where any is."""
        shape = (num_classes, self.ids.shape[0])
        return mean_where(losses.view(shape), valid.view(shape) & self._are_in(live))

    def _are_in(self, live: Tensor) -> Tensor:
        """[G] bool, whether groups have an id [n] that is live; `torch.isin` reads the device."""
        ordered = live.sort().values
        return torch.searchsorted(ordered, self.ids, right=True) > torch.searchsorted(
            ordered, self.ids
        )
