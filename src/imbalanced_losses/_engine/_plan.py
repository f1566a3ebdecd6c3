"""What a backend provides: a plan for one geometry, asked for sums in both directions."""

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
    """Soft counts of the rows above each positive, and their first derivative.

    The case of a plan that trains models: the queries are rows of the pool themselves (`row` of
    `problem`), and two sums are asked for, over all rows and over the positives.
    """

    def sums(self) -> Tensor:
        """[Q, 2]: Σ_m ω[m] σ(x) over all rows, and over the positives."""

    def gradient(self, cotangent: Tensor) -> Tensor:
        """∂⟨cotangent [Q, 2], sums⟩/∂scores, [C, M]: of every score as source and as query."""
