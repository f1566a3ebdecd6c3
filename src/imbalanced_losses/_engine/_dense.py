"""The definition, tiled over queries: the reference, and the fastest at small sizes.

Time O(Q·M) a pass, memory O(TILE + C·M·K): no tile outlives its step and a backward pass computes
its tiles anew. Derivatives of σ are polynomials in σ, and they are taken at −|x|, where σ is small
and its relative error stays at rounding: so gradients of far pairs come out right, not as the
difference of two numbers near one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from imbalanced_losses._engine._derivatives import sigmoid_derivative_
from imbalanced_losses._engine._plan import SlopesOf

# Elements of one tile: half a MiB of float32, which stays in a core's second-level cache.
TILE = 1 << 17


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
        for tile in _tile_slices(len(self.queries), num_sources):
            problem = self.problem[tile]
            sources = self.sources if num_problems == 1 else self.sources[problem]
            x = sources - self.queries[tile, None]  # [q, M]
            temperature = self.temperature
            if isinstance(temperature, Tensor):
                temperature = temperature[problem, None]  # [q, 1]
            yield tile, problem, sigmoid_derivative_(order, x.div_(temperature))


class DenseRanks:
    """Soft ranks by the definition: see `_plan.RankPlan` for the contract.

    A tile holds all pairs of its queries, so that ranks, slopes and gradient are taken from it in
    one go. σ′ is taken as σ(x)·σ(−x), which has full relative precision on both sides.
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
        self._product = _exact_matmul_for(scores)
        num_sources = scores.shape[1]
        self._tiles = _tile_slices(len(row), num_sources)
        self._buffers: list[Tensor] = []
        if len(self._tiles) > 1:
            step = self._tiles[0].stop
            self._buffers = [scores.new_empty(step, num_sources) for _ in range(3)]
        else:
            self._tiles = []  # all pairs at once

    def ranks(self) -> tuple[Tensor, Tensor]:
        if not self._tiles:
            return self._tile_ranks(self.problem, self.row)[2:]
        among_all, among_positives = self.scores.new_empty(2, len(self.row))
        for tile in self._tiles:
            *_, among_all[tile], among_positives[tile] = self._tile_ranks(
                self.problem[tile], self.row[tile]
            )
        return among_all, among_positives

    def ranks_and_gradient(self, slopes_of: SlopesOf) -> tuple[Tensor, Tensor, Tensor]:
        gradient = torch.zeros_like(self.scores, memory_format=torch.contiguous_format)
        if not self._tiles:
            ranks = self._tile_ranks_and_gradient(gradient, slopes_of, self.problem, self.row, None)
            return *ranks, gradient
        # Into whole tensors: small results kept between large tiles would fragment the heap.
        among_all, among_positives = self.scores.new_empty(2, len(self.row))
        for tile in self._tiles:
            among_all[tile], among_positives[tile] = self._tile_ranks_and_gradient(
                gradient, slopes_of, self.problem[tile], self.row[tile], tile
            )
        return among_all, among_positives, gradient

    def _tile_ranks_and_gradient(
        self,
        gradient: Tensor,
        slopes_of: SlopesOf,
        problem: Tensor,
        row: Tensor,
        tile: slice | None,
    ) -> tuple[Tensor, Tensor]:
        """The ranks [q] of some queries; what they give to the gradient [C, M] is added there."""
        x, sigmoid, among_all, among_positives = self._tile_ranks(problem, row)
        by_ranks = slopes_of(among_all, among_positives, tile)
        slope = x.neg_().sigmoid_().mul_(sigmoid)  # σ′ [q, M]
        if len(self.scores) == 1:
            self._add_gradient_of_one(gradient.squeeze(0), slope, row, *by_ranks)
        else:
            self._add_gradient_of_many(gradient, slope, problem, row, *by_ranks)
        return among_all, among_positives

    def _tile_ranks(self, problem: Tensor, row: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x and σ(x) [q, M] of the pairs of some queries, and their ranks [q]."""
        scores, temperature, weights = self.scores, self.temperature, self.weights
        if len(scores) == 1:
            queries = scores.squeeze(0).index_select(0, row)
            x = torch.sub(scores, queries.unsqueeze(1), out=self._buffer(0, row))
        else:
            x = torch.index_select(scores, 0, problem, out=self._buffer(0, row))
            x.sub_(scores[problem, row].unsqueeze(1))
        if isinstance(temperature, Tensor):
            temperature = temperature[problem].unsqueeze(1)
        sigmoid = torch.sigmoid(x.div_(temperature), out=self._buffer(1, row))
        half: float | Tensor = 0.5 if weights is None else weights[problem, row].mul_(0.5)
        among_all = sigmoid.sum(1) if weights is None else self._sums(sigmoid, weights, problem)
        among_positives = self._sums(sigmoid, self.positive_weights, problem)
        return x, sigmoid, among_all.add_(half), among_positives.add_(half)

    def _sums(self, pairs: Tensor, weights: Tensor, problem: Tensor) -> Tensor:
        """Σ_m pairs[q, m] · weights[c, m]: [q]."""
        if len(weights) == 1:
            return self._product(pairs, weights.squeeze(0))
        own = torch.index_select(weights, 0, problem, out=self._buffer(2, problem))
        return own.mul_(pairs).sum(1)

    def _add_gradient_of_one(
        self, gradient: Tensor, slope: Tensor, row: Tensor, by_all: Tensor, by_positives: Tensor
    ) -> None:
        weights, positive_weights = self.weights, self.positive_weights.squeeze(0)
        as_source = self._product(by_all, slope)  # [M]
        if weights is None:
            gradient += as_source
            at_all = slope.sum(1)
        else:
            gradient.addcmul_(as_source, weights.squeeze(0))
            at_all = self._product(slope, weights.squeeze(0))
        gradient.addcmul_(self._product(by_positives, slope), positive_weights)
        at_positives = self._product(slope, positive_weights)
        as_query = at_all.mul_(by_all).addcmul_(at_positives, by_positives)  # [q]
        gradient.index_add_(0, row, as_query, alpha=-1)

    def _add_gradient_of_many(
        self,
        gradient: Tensor,
        slope: Tensor,
        problem: Tensor,
        row: Tensor,
        by_all: Tensor,
        by_positives: Tensor,
    ) -> None:
        # The pair (q, m) counts by_all[q]·ω[m] + by_positives[q]·ω⁺[m] times.
        counts = torch.index_select(
            self.positive_weights, 0, problem, out=self._buffer(1, row)
        ).mul_(by_positives.unsqueeze(1))
        if self.weights is None:
            counts += by_all.unsqueeze(1)
        else:
            own = torch.index_select(self.weights, 0, problem, out=self._buffer(2, row))
            counts.addcmul_(own, by_all.unsqueeze(1))
        pairs = slope.mul_(counts)
        gradient.index_add_(0, problem, pairs)
        gradient.index_put_((problem, row), pairs.sum(1).neg_(), accumulate=True)

    def _buffer(self, index: int, queries: Tensor) -> Tensor | None:
        """Memory for a tile [q, M]: many tiles share it; one takes what the allocator has."""
        return self._buffers[index][: len(queries)] if self._buffers else None


def _tile_slices(num_queries: int, num_sources: int) -> list[slice]:
    """Stretches of the queries whose pairs with all sources fit a tile."""
    step = max(1, TILE // max(1, num_sources))
    return [slice(start, start + step) for start in range(0, num_queries, step)]


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
    return _exact_matmul_for(a)(a, b)


def _exact_matmul_for(tensor: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """A matrix product that no global setting makes coarser: ranks need every digit.

    Autocast and settings of float32 products such as `torch.set_float32_matmul_precision("high")`
    would round the operands to bfloat16 or TF32.
    """
    if torch.is_autocast_enabled(tensor.device.type):
        return _matmul_by_sums
    if tensor.dtype == torch.float32 and not _float32_products_are_exact():
        return _matmul_by_sums
    return torch.matmul


def _float32_products_are_exact() -> bool:
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # torch refuses to answer once a backend was set by itself
        return False


def _matmul_by_sums(a: Tensor, b: Tensor) -> Tensor:
    if a.dim() == 1:
        return (a[:, None] * b).sum(0)
    if b.dim() == 1:
        return (a * b).sum(-1)
    return (a.unsqueeze(-1) * b.unsqueeze(-3)).sum(-2)
