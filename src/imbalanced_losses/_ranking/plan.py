"""What a backend provides, a plan for one geometry, and what it may need from other processes."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


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


class RankPlan(Protocol):
    """Soft ranks of the positives, and their first derivative.

    The case of a plan that trains models: the queries are rows of the pool themselves (`row` of
    `problem`), and are ranked among all rows and among the positives.
    """

    def ranks(self) -> tuple[Tensor, Tensor]:
        """½ω[q] + Σ_m ω[m] σ(x), m over all rows [Q], and over the positives [Q]."""

    def ranks_and_gradient(self, slopes_of: SlopesOf) -> tuple[Tensor, Tensor, Tensor]:
        """The ranks, and τ·∂/∂scores [C, M] of a function of the ranks with the given slopes.

        A score moves the ranks of others, and its own. Constants move nothing: 0.
        """


class Exchange(Protocol):
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


class Alone:
    """The exchange of one process that holds all rows: nothing is exchanged."""

    is_differentiated = False

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor

    def max(self, tensor: Tensor) -> Tensor:
        return tensor

    def concatenated(self, rows: Tensor) -> Tensor:
        return rows


ALONE = Alone()


class SlopesOf(Protocol):
    """The derivatives of what is made of the ranks, by the ranks."""

    def __call__(
        self, among_all: Tensor, among_positives: Tensor, queries: slice | Tensor
    ) -> tuple[Tensor, Tensor]:
        """From both ranks of some of the Q queries to the derivatives by them, of the same shape.

        `queries` says which: a slice, or indices of any shape.
        """
