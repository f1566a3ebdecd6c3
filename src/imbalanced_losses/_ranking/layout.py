"""Which rows make up each of C problems: as many each, or stretches of one line."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Columns from which indices that lie close together are worth another call.
_FEW = 1 << 13


class Layout:
    """The shape that tensors of rows have: [C, M], or [1, S] where the rows lie side by side.

    Attributes:
        num_problems: C.
        lengths: [C] int64, the rows of each problem, the first problem first; None: M each.
        ends: [C] int64, the row after the last of each problem; None: M each.
        problem: [S] int64 ascending, the problem of each row; None: M each.
        num_rows: M or S.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        lengths: Tensor | None = None,
        problem: Tensor | None = None,
    ) -> None:
        self.lengths = lengths
        self.num_problems = shape[0] if lengths is None else lengths.shape[0]
        self.num_rows = shape[1]
        self._ends: Tensor | None = None
        self._problem = problem

    @property
    def ends(self) -> Tensor | None:
        if self._ends is None and self.lengths is not None:
            self._ends = self.lengths.cumsum(0)
        return self._ends

    @property
    def problem(self) -> Tensor | None:
        if self._problem is None and self.lengths is not None:
            number = torch.arange(self.num_problems, device=self.lengths.device)
            self._problem = number.repeat_interleave(self.lengths, output_size=self.num_rows)
        return self._problem

    def shape_of_values(self, classes: tuple[int, ...]) -> tuple[int, ...]:
        """Of a value [C] for each problem: [] or [C] of classes, and one dimension for groups."""
        if self.lengths is None:
            return classes
        return *classes, self.num_problems // max(1, math.prod(classes))

    def places_of(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Problem and column [Q] of the rows that are True."""
        is_line = mask.shape[0] == 1 and mask.shape[1] > _FEW
        if self.lengths is None and not is_line:
            problem, row = mask.nonzero().unbind(1)
            return problem, row
        row = mask[0].nonzero().squeeze(1)
        if self.problem is not None:
            return self.problem.index_select(0, row), row
        return row.new_zeros(1).expand(row.shape), row

    def for_rows(self, values: Tensor) -> Tensor:
        """A value [C] for each row, [C, 1] or [1, S]."""
        if self.problem is None:
            return values.unsqueeze(1)  # a third of the time of an index
        return values.index_select(0, self.problem).unsqueeze(0)

    def total(self, values: Tensor) -> Tensor:
        """The sum [C] of a value of each row."""
        if self.problem is None:
            return values.sum(1)
        values = values.long() if values.dtype == torch.bool else values
        return values.new_zeros(self.num_problems).index_add(0, self.problem, values[0])

    def largest(self, values: Tensor) -> Tensor:
        """The largest [C] of a value ≥ 0 of each row; 0 without rows."""
        if self.problem is not None:
            none = values.new_zeros(self.num_problems)
            return none.scatter_reduce(0, self.problem, values[0], "amax")
        return values.amax(1) if values.shape[1] > 0 else values.new_zeros(len(values))
