"""What a backend provides, a plan for one geometry, and what it may need from other processes."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from imbalanced_losses._ranking.layout import Layout

Rows = Literal["all", "positives", "negatives"]
ROWS: tuple[Rows, ...] = ("all", "positives", "negatives")


class Plan(Protocol):
    """The matrix Φₙ[q, m] = φₙ((sources[c, m] − queries[q]) / τ_c), c = problem[q], never formed.

    Nothing here is differentiable and nothing in it changes: one plan serves the forward pass and
    every backward pass.
    """

    problem: Tensor  # [Q]

    def sums(self, order: int, weights: Tensor) -> Tensor:
        """Φₙ·weights with n = order: [C, M, K] -> [Q, K]."""

    def transposed_sums(self, order: int, cotangent: Tensor) -> Tensor:
        """Φₙᵀ·cotangent with n = order: [Q, K] -> [C, M, K]."""

    def both_sums(self, order: int, weights: Tensor, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        """(Φₙ·weights, Φₙᵀ·cotangent): cheaper together, where a backend can share the work."""


class Processes(Protocol):
    """The processes that hold the rows of the same problems, each of them some.

    Every call is collective: all make it, in the same order, and get the same bits.
    """

    is_differentiated: bool  # whether any of them needs a gradient

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over processes, of the same shape; its gradient reaches this one's part."""

    def max(self, tensor: Tensor) -> Tensor:
        """The largest over processes, of the same shape; nothing may be NaN."""

    def concatenated(self, rows: Tensor) -> Tensor:
        """[n, ...] of each process, n its own, one behind the other."""


class Canonical(NamedTuple):
    """Problems as backends take them: nothing is attached to a graph, and no sum overflows.

    [C, M] is [1, S] where rows of problems of unequal length lie side by side.
    """

    scores: Tensor  # [C, M] float32 or float64, contiguous, finite or NaN
    has_extremes: bool  # whether some scores stand for infinities, which have no gradient
    is_positive: Tensor  # [C, M] bool
    weights: Tensor | None  # [C, M] in [0, 1], None = 1 everywhere
    temperature: float | Tensor  # or [C] in the dtype of the scores
    num_live: int  # rows from here on are constants, without a gradient
    processes: Processes | None  # those that hold other rows of the problems
    layout: Layout
    sides: Tensor | None = None  # of kernels, who see to infinities and τ in gradients themselves

    def column(self, rows: Rows) -> Tensor | None:
        """The weight [C, M] of each row in a set; None = 1 everywhere."""
        if rows == "all":
            return self.weights
        column = (self.is_positive if rows == "positives" else ~self.is_positive).to(
            self.scores.dtype
        )
        return column if self.weights is None else column.mul_(self.weights)


def at(values: Tensor, problem: Tensor, row: Tensor) -> Tensor:
    """Values [C, M] at places [Q], or of tiles [n, Q]."""
    if values.shape[0] > 1:
        return values[problem, row]
    if row.dim() > 1:
        return values[0, row]
    return values[0].index_select(0, row)  # a third of the time of an index


class Listed(NamedTuple):
    """The rows of a set by their places, which takes reading how many there are."""

    rows: Rows
    problem: Tensor  # [Q], ascending
    row: Tensor  # [Q], the column
    weights: Tensor | None  # [Q], None = 1 everywhere
    value: Tensor | None  # [Q] of positives, what finding each is worth; None = 1 everywhere
    num_problems: int

    def of_problem(self, values: Tensor, index: Any = None) -> Tensor:
        """A value [C] for some queries."""
        if self.num_problems == 1:
            return values
        return values[self.problem if index is None else self.problem[index]]

    def of_row(self, values: Tensor, index: Any = None) -> Tensor:
        """A value [C, M] for some queries."""
        if index is None:
            return at(values, self.problem, self.row)
        return at(values, self.problem[index], self.row[index])

    def places(self, shape: tuple[int, ...]) -> Tensor:
        """Where the queries are among all rows, flattened [Q]."""
        return self.row if shape[0] == 1 else self.row + self.problem * shape[1]

    def factor(self, by_value: bool) -> Tensor | None:
        """What each query counts, ω or ω v; None = 1 everywhere."""
        return product(self.weights, self.value if by_value else None)

    def total(self, values: Tensor, by_value: bool = False) -> Tensor:
        """The sum [C] of values [Q] over the queries of each problem."""
        factor = self.factor(by_value)
        if factor is not None:
            values = values * factor
        if self.num_problems == 1:
            return values.sum(0, keepdim=True)
        return values.new_zeros(self.num_problems).index_add(0, self.problem, values)


class Masked(NamedTuple):
    """The rows of a set as a mask: no value is read."""

    rows: Rows
    mask: Tensor  # [C, M]
    weights: Tensor | None  # [C, M], None = 1 everywhere
    value: Tensor | None  # [C, M], 0 of all but positives; None = 1 everywhere
    layout: Layout

    def of_problem(self, values: Tensor, index: Any = None) -> Tensor:
        """A value [C] for each row, [C, 1] or [1, S]."""
        return self.layout.for_rows(values)

    def of_row(self, values: Tensor, index: Any = None) -> Tensor:
        """A value for each row [C, M]."""
        return values

    def factor(self, by_value: bool) -> Tensor | None:
        return product(self.weights, self.value if by_value else None)

    def total(self, values: Tensor, by_value: bool = False) -> Tensor:
        """The sum [C] of values [C, M] over the queries of each problem."""
        factor = self.factor(by_value)
        if factor is not None:
            values = values * factor
        return self.layout.total(torch.where(self.mask, values, 0.0))


class Queries(Protocol):
    """The rows of a set in valid problems: `Listed`, `Masked`, or known to kernels alone.

    An index of None is that of all: not every compiler takes a slice as a default.
    """

    @property
    def rows(self) -> Rows: ...

    @property
    def weights(self) -> Tensor | None: ...

    @property
    def value(self) -> Tensor | None: ...

    def of_problem(self, values: Tensor, index: Any = None) -> Tensor: ...

    def of_row(self, values: Tensor, index: Any = None) -> Tensor: ...

    def factor(self, by_value: bool) -> Tensor | None:
        """What the slopes of each query are still to be multiplied by, of ω or ω v."""

    def total(self, values: Tensor, by_value: bool = False) -> Tensor: ...


def product(weights: Tensor | None, value: Tensor | None) -> Tensor | None:
    """ω, or ω v; None = 1 everywhere."""
    if weights is None or value is None:
        return weights if value is None else value
    return weights * value


class RankPlan(Protocol):
    """Soft ranks of queries among sets of rows, and their first derivative.

    The case of a plan that trains models: the queries are rows of the problems themselves. Made of
    `Canonical` problems, the queries, and the names of K sets.
    """

    is_whole: bool  # whether `slopes_of` is called once, for all queries

    def ranks(self) -> tuple[Tensor, ...]:
        """Σ_m ω[m] σ(x), m over the rows of each set, + ½ω[q] where the query is one; K [Q].

        Of queries given as a mask K [C, M], 1 where a row is no query.
        """

    def ranks_and_gradient(self, slopes_of: SlopesOf) -> tuple[tuple[Tensor, ...], Tensor]:
        """The ranks, and ∂/∂(scores / τ) [C, M] of a function of them with the given slopes.

        A score moves the ranks of others, and its own. Constants move nothing: 0.
        """


class SlopesOf(Protocol):
    """The derivatives of what is made of the ranks, by the ranks."""

    def __call__(self, ranks: tuple[Tensor, ...], index: Any) -> tuple[Tensor, ...]:
        """From the ranks of some of the queries, a slice or indices of any shape, to as many
        derivatives of the same shapes.
        """


def is_in(queries: Rows, rows: Rows) -> bool | None:
    """Whether queries are rows of a set: all, none, or None for some of them."""
    if rows in ("all", queries):
        return True
    return None if queries == "all" else False


def half_of(queries: Listed, rows: Rows, given: Canonical) -> float | Tensor:
    """½ω of queries that are rows of a set, 0 of others; a float or [Q]."""
    half = 0.5 if queries.weights is None else 0.5 * queries.weights
    member = is_in(queries.rows, rows)
    if member is None:
        is_positive = queries.of_row(given.is_positive)
        return half * (is_positive if rows == "positives" else ~is_positive)
    return half if member else 0.0
