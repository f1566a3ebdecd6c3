"""The definition, tiled over queries: the reference, and the fastest at small sizes.

Time O(Q·M) a pass, memory O(TILE + C·M·K): no tile outlives its step and a backward pass computes
its tiles anew. Derivatives of σ are polynomials in σ, and they are taken at −|x|, where σ is small
and its relative error stays at rounding: so gradients of far pairs come out right, not as the
difference of two numbers near one.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

# Elements of one tile: 1 MiB of float32, which stays in a core's second-level cache.
TILE = 1 << 18


class DensePlan:
    """Φₙ by its definition: see `_plan.Plan` for the contract."""

    def __init__(
        self, queries: Tensor, problem: Tensor, sources: Tensor, temperature: float | Tensor
    ) -> None:
        self.queries = queries  # [Q]
        self.problem = problem  # [Q]
        self.sources = sources  # [C, M]
        self.temperature = temperature  # float or [C]

    def sums(self, order: int, weights: Tensor) -> Tensor:
        out = weights.new_empty(len(self.queries), weights.shape[-1])
        for tile, problem, kernel in self._tiles(order):
            out[tile] = _times_weights(kernel, weights, problem)
        return out

    def transposed_sums(self, order: int, cotangent: Tensor) -> Tensor:
        out = cotangent.new_zeros(*self.sources.shape, cotangent.shape[-1])
        for tile, problem, kernel in self._tiles(order):
            _add_transposed(out, kernel, cotangent[tile], problem)
        return out

    def both_sums(self, order: int, weights: Tensor, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        # Each made from the tensor it depends on, so that either may be batched by vmap.
        at_queries = weights.new_empty(cotangent.shape)
        at_sources = cotangent.new_zeros(weights.shape)
        for tile, problem, kernel in self._tiles(order):
            at_queries[tile] = _times_weights(kernel, weights, problem)
            _add_transposed(at_sources, kernel, cotangent[tile], problem)
        return at_queries, at_sources

    def _tiles(self, order: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield (rows of the query axis [q], their problems [q], φₙ [q, M])."""
        num_problems, num_sources = self.sources.shape
        step = max(1, TILE // max(1, num_sources))
        for start in range(0, len(self.queries), step):
            tile = slice(start, start + step)
            problem = self.problem[tile]
            sources = self.sources if num_problems == 1 else self.sources[problem]
            x = sources - self.queries[tile, None]  # [q, M]
            temperature = self.temperature
            if isinstance(temperature, Tensor):
                temperature = temperature[problem, None]  # [q, 1]
            yield tile, problem, _kernel(order, x.div_(temperature))


def _kernel(order: int, x: Tensor) -> Tensor:
    """φₙ(x), overwriting x."""
    if order == 0:
        return x.sigmoid_()
    sign = x.sign().neg_() if order % 2 == 0 else None  # φₙ is odd for even n, even for odd n
    z = x.abs_().neg_().sigmoid_()
    *lower, leading = _derivative_polynomial(order)
    out = z * leading
    for coefficient in reversed(lower):
        out.add_(coefficient).mul_(z)
    return out if sign is None else out.mul_(sign)


@lru_cache
def _derivative_polynomial(order: int) -> tuple[int, ...]:
    """Coefficients a₁, a₂, … of φₙ = a₁σ + a₂σ² + …, from σ′ = σ − σ²."""
    polynomial = {1: 1}
    for _ in range(order):
        raised: dict[int, int] = {}
        for power, coefficient in polynomial.items():
            raised[power] = raised.get(power, 0) + power * coefficient
            raised[power + 1] = raised.get(power + 1, 0) - power * coefficient
        polynomial = raised
    return tuple(polynomial[power] for power in sorted(polynomial))


def _times_weights(kernel: Tensor, weights: Tensor, problem: Tensor) -> Tensor:
    """[q, M] with [C, M, K] -> [q, K]."""
    if len(weights) == 1:
        return _matmul(kernel, weights[0])
    return _matmul(kernel[:, None, :], weights[problem]).squeeze(1)


def _add_transposed(out: Tensor, kernel: Tensor, cotangent: Tensor, problem: Tensor) -> None:
    """Add [q, M]ᵀ with [q, K] into [C, M, K]."""
    if len(out) == 1:
        out[0] += _matmul(kernel.T, cotangent)
    else:
        out.index_add_(0, problem, kernel[:, :, None] * cotangent[:, None, :])


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """A matrix product that no global setting makes coarser: ranks need every digit.

    Autocast and `torch.set_float32_matmul_precision("high" | "medium")` would round the operands
    to bfloat16 or TF32.
    """
    if torch.get_float32_matmul_precision() != "highest" and a.dtype == torch.float32:
        return (a.unsqueeze(-1) * b.unsqueeze(-3)).sum(-2)
    if torch.is_autocast_enabled(a.device.type):
        with torch.autocast(a.device.type, enabled=False):
            return a @ b
    return a @ b
