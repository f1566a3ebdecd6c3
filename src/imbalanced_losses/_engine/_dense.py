"""The definition, tiled over queries: the reference, and the fastest at small sizes.

Time O(Q·M) a pass, memory O(TILE + C·M·K): no tile outlives its step and a backward pass computes
its tiles anew. Derivatives of σ are polynomials in σ, and they are taken at −|x|, where σ is small
and its relative error stays at rounding: so gradients of far pairs come out right, not as the
difference of two numbers near one.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from imbalanced_losses._engine._derivatives import sigmoid_derivative_

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
            yield tile, problem, sigmoid_derivative_(order, x.div_(temperature))


class DenseRanks:
    """Soft counts above each positive by the definition: see `_plan.RankPlan` for the contract.

    σ is made from z = σ(−|x|), whose z − z² is σ′ to full relative precision. Where all pairs fit
    one tile, z is kept from the sums to the gradient, which follows at once.
    """

    def __init__(
        self,
        scores: Tensor,
        problem: Tensor,
        row: Tensor,
        weights: Tensor | None,
        positive_weights: Tensor,
        temperature: float | Tensor,
    ) -> None:
        self.scores = scores  # [C, M]
        self.problem, self.row = problem, row  # [Q]
        self.weights, self.positive_weights = weights, positive_weights  # [C, M]
        self.temperature = temperature  # float or [C]
        step = max(1, TILE // max(1, scores.shape[1]))
        self._tiles = [slice(start, start + step) for start in range(0, len(row), step)]
        self._kept: Tensor | None = None
        if len(scores) == 1:
            ones = torch.ones_like(scores) if weights is None else weights
            self._columns = torch.cat((ones, positive_weights))  # [2, M]

    def sums(self) -> Tensor:
        if len(self._tiles) == 1:
            return self._tile_sums(self._tiles[0])
        # Into one tensor: small results kept between large tiles would fragment the heap.
        out = self.scores.new_empty(len(self.row), 2)
        for tile in self._tiles:
            out[tile] = self._tile_sums(tile)
        return out

    def gradient(self, cotangent: Tensor) -> Tensor:
        out = torch.zeros_like(self.scores, memory_format=torch.contiguous_format)
        for tile in self._tiles:
            z = self._far_side(self._differences(tile), tile) if self._kept is None else self._kept
            self._add_gradient(out, z.addcmul_(z, z, value=-1), cotangent[tile], tile)
        self._kept = None
        temperature = self.temperature
        return out.div_(temperature[:, None] if isinstance(temperature, Tensor) else temperature)

    def _tile_sums(self, tile: slice) -> Tensor:
        x = self._differences(tile)
        is_above = (x * torch.finfo(x.dtype).max).clamp_(0, 1)  # a third of the time of x > 0
        z = self._far_side(x, tile)
        if len(self._tiles) == 1:
            self._kept = z
        sigmoid = is_above.sub_(z).abs_()  # [q, M]
        if len(self.scores) == 1:
            return _matmul(sigmoid, self._columns.T)
        problem = self.problem[tile]
        among_positives = (sigmoid * self.positive_weights[problem]).sum(1)
        if self.weights is not None:
            sigmoid *= self.weights[problem]
        return torch.stack((sigmoid.sum(1), among_positives), dim=1)

    def _add_gradient(self, out: Tensor, slope: Tensor, cotangent: Tensor, tile: slice) -> None:
        """Add to out [C, M] what the queries of a tile give, from σ′ of their pairs [q, M]."""
        row = self.row[tile]
        if len(out) == 1:
            at_queries = (_matmul(slope, self._columns.T) * cotangent).sum(1)  # [q]
            out += (_matmul(cotangent.T, slope) * self._columns).sum(0)
            out[0].index_add_(0, row, at_queries, alpha=-1)
            return
        problem = self.problem[tile]
        # The pair (q, m) counts cotangent[q, 0]·ω[m] + cotangent[q, 1]·ω⁺[m] times.
        counts = self.positive_weights[problem].mul_(cotangent[:, 1:])
        if self.weights is None:
            counts += cotangent[:, :1]
        else:
            counts.addcmul_(self.weights[problem], cotangent[:, :1])
        pairs = slope.mul_(counts)  # [q, M]
        out.index_add_(0, problem, pairs)
        out.index_put_((problem, row), pairs.sum(1).neg_(), accumulate=True)

    def _differences(self, tile: slice) -> Tensor:
        """Score of every row minus score of the query, [q, M]."""
        problem, row = self.problem[tile], self.row[tile]
        if len(self.scores) == 1:
            return self.scores - self.scores[0].index_select(0, row)[:, None]
        return self.scores[problem].sub_(self.scores[problem, row][:, None])

    def _far_side(self, x: Tensor, tile: slice) -> Tensor:
        """σ(−|x| / τ), overwriting x."""
        temperature = self.temperature
        if isinstance(temperature, Tensor):
            return x.abs_().div_(-temperature[self.problem[tile], None]).sigmoid_()
        return x.abs_().div_(-temperature).sigmoid_()


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
