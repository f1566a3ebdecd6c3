"""What a metric gets to see of the queries: their soft ranks, and constants beside them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from imbalanced_losses._ranking.plan import Queries, Rows


class Ranks:
    """Soft ranks of some queries, whose form is none of a metric's business.

    A rank is Σ ω σ((score − own score) / τ) over a set of rows, plus ½ω if the query is one of
    them: 1 for the highest, as every row counts itself fully.
    """

    def __init__(
        self, sets: tuple[Rows, ...], ranks: tuple[Tensor, ...], queries: Queries, index: Any = None
    ) -> None:
        self._sets, self._ranks, self._queries, self._index = sets, ranks, queries, index

    def among(self, rows: Rows) -> Tensor:
        """The rank of each query among these rows, which `ranked_sum` was asked for."""
        if rows not in self._sets:
            raise ValueError(
                f"among={self._sets} of ranked_sum does not hold {rows!r}: ask for it there"
            )
        return self._ranks[self._sets.index(rows)]

    @property
    def weights(self) -> Tensor | float:
        """ω of each query, in units of the heaviest row of its problem."""
        weights = self._queries.weights
        if weights is None:
            return 1.0
        return weights if self._index is None else weights[self._index]

    def of_problem(self, values: Tensor) -> Tensor:
        """A constant [C], for each query."""
        return self._queries.of_problem(values.detach(), self._index)

    def of_row(self, values: Tensor) -> Tensor:
        """A constant [C, M], for each query."""
        return self._queries.of_row(values.detach(), self._index)
