"""Soft ranks by their definition, and the gradient from the same pairs.

A tile holds the pairs of some queries with all their sources, so that ranks, slopes and gradient
come out of it in one go. Every step is elementwise or a plain sum: autocast and global settings of
float32 products would round the factors of a matrix product.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator, Sequence
from operator import neg
from typing import NamedTuple

import torch
from torch import Tensor

from imbalanced_losses._engine import _dense
from imbalanced_losses._engine._dense import tile_slices
from imbalanced_losses._engine._plan import SlopesOf
from imbalanced_losses._engine._scratch import scratch

# So many pairs, or fewer, take less time than the calls that would spare them something.
_FEW_PAIRS = 1 << 13
# The difference in τ that stands for all larger ones: as far as any sum can tell σ is 0 or 1 there,
# and σ′ is taken for 0. Exponentials further out are subnormal, which take several times as long.
_FARTHEST = {torch.float32: 64.0, torch.float64: 600.0}


class DenseRanks:
    """Soft ranks of one problem by the definition: see `_plan.RankPlan` for the contract.

    Both sums are taken from the same pairs, in the fewest calls: small batches are all overhead.
    """

    def __init__(
        self,
        scores: Tensor,
        is_positive: Tensor,
        row: Tensor,
        weights: Tensor | None,
        temperature: float | Tensor,
    ) -> None:
        self.scores, self.weights = scores, weights  # [1, M]
        self.row = row  # [Q]
        self.temperature = temperature
        self.positive_weights = is_positive.to(scores.dtype)  # [1, M]
        self._half: float | Tensor = 0.5
        if weights is not None:
            self.positive_weights *= weights
            self._half = 0.5 * weights[0, row]
        self._queries = scores.T.index_select(0, row)  # [Q, 1]
        self._tiles = tile_slices(len(row), scores.shape[1]) or [slice(0, 0)]

    def ranks(self) -> tuple[Tensor, Tensor]:
        among_all, among_positives = _joined([self._compared(tile)[2:] for tile in self._tiles])
        return among_all, among_positives

    def ranks_and_gradient(self, slopes_of: SlopesOf) -> tuple[Tensor, Tensor, Tensor]:
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        gradient: Tensor | None = None  # [M]
        for tile in self._tiles:
            x, sigmoid, among_all, among_positives = self._compared(tile)
            by_all, by_positives = slopes_of(among_all, among_positives, tile)
            # A pair counts by_all · ω[source] + by_positives · ω⁺[source] times.
            counts = torch.mul(
                self.positive_weights, by_positives.unsqueeze(1), out=_memory(2, x.shape, x)
            )
            if self.weights is None:
                counts += by_all.unsqueeze(1)
            else:
                counts.addcmul_(self.weights, by_all.unsqueeze(1))
            pairs = _slope(x, sigmoid).mul_(counts)
            as_source = pairs.sum(0)
            gradient = as_source if gradient is None else gradient.add_(as_source)
            parts.append((among_all, among_positives, pairs.sum(1)))
        assert gradient is not None
        among_all, among_positives, as_query = _joined(parts)
        gradient.index_add_(0, self.row, as_query, alpha=-1)
        return among_all, among_positives, gradient.unsqueeze(0)

    def _compared(self, tile: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x and σ(x) [q, M] of some queries, and their ranks [q]."""
        scores, weights = self.scores, self.weights
        half = self._half[tile] if isinstance(self._half, Tensor) else self._half
        queries = self._queries if len(self._tiles) == 1 else self._queries[tile]
        x, sigmoid = _compared(scores, queries, self.temperature, 0)
        spare = _memory(2, x.shape, x)
        of_all = sigmoid if weights is None else torch.mul(sigmoid, weights, out=spare)
        among_all = of_all.sum(1).add_(half)
        of_positives = torch.mul(sigmoid, self.positive_weights, out=spare)
        return x, sigmoid, among_all, of_positives.sum(1).add_(half)


class DenseRanksOfMany:
    """Soft ranks of several problems by the definition: see `_plan.RankPlan` for the contract.

    A tile holds as many queries of each of its problems. Positives are few beside all rows, so
    that comparing them among themselves once more is cheaper than picking their pairs out of all.
    """

    def __init__(
        self,
        scores: Tensor,
        problem: Tensor,
        row: Tensor,
        weights: Tensor | None,
        temperature: float | Tensor,
    ) -> None:
        self.scores, self.weights = scores, weights  # [C, M]
        self.problem, self.row = problem, row  # [Q]
        self.temperature = temperature  # float or [C]
        self._queries = scores[problem, row]  # [Q]
        self._query_weights = None if weights is None else weights[problem, row]
        self._counts = problem.bincount(minlength=len(scores))  # [C] queries

    def ranks(self) -> tuple[Tensor, Tensor]:
        among_all, among_positives = self.scores.new_empty(2, len(self.row))
        for tile in self._tiles():
            index = tile.queries
            among_all[index] = self._rank(tile, tile.of_all, 0, with_slope=False)[0]
            among_positives[index] = self._rank(tile, tile.of_positives, 0, with_slope=False)[0]
        return among_all, among_positives

    def ranks_and_gradient(self, slopes_of: SlopesOf) -> tuple[Tensor, Tensor, Tensor]:
        among_all, among_positives = self.scores.new_empty(2, len(self.row))
        gradient = torch.empty_like(self.scores, memory_format=torch.contiguous_format)
        gradient.index_fill_(0, (self._counts == 0).nonzero().squeeze(1), 0)  # in no tile
        at_queries = torch.zeros_like(self._queries)
        for tile in self._tiles():
            index = tile.queries
            rank, slope = self._rank(tile, tile.of_all, 0)
            rank_among_positives, slope_among_positives = self._rank(tile, tile.of_positives, 1)
            among_all[index], among_positives[index] = rank, rank_among_positives
            slopes = slopes_of(rank, rank_among_positives, index)
            if tile.is_real is not None:
                slopes = (slopes[0] * tile.is_real, slopes[1] * tile.is_real)

            as_source, as_query = self._spread(slope, slopes[0], tile.of_all)
            if tile.is_first:
                gradient.index_copy_(0, tile.problems, as_source)
            else:
                gradient.index_add_(0, tile.problems, as_source)
            as_positive, as_query_too = self._spread(
                slope_among_positives, slopes[1], tile.of_positives
            )
            at_queries.index_add_(0, tile.positives.flatten(), as_positive.flatten())
            at_queries.index_add_(0, index.flatten(), (as_query + as_query_too).flatten(), alpha=-1)
        place = self.row + self.problem * self.scores.shape[1]
        gradient.view(-1).index_add_(0, place, at_queries)
        return among_all, among_positives, gradient

    def _rank(
        self, tile: _Tile, sources: _Sources, place: int, with_slope: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Ranks [k, q] of a tile's queries, and σ′ of its pairs [k, q, m] at a place in memory."""
        x, sigmoid = _compared(sources.scores, tile.scores, tile.temperature, place)
        slope = _slope(x, sigmoid) if with_slope else x
        if sources.weights is not None:
            sigmoid *= sources.weights
        return sigmoid.sum(2).add_(tile.half), slope

    def _spread(self, slope: Tensor, by_rank: Tensor, sources: _Sources) -> tuple[Tensor, Tensor]:
        """What derivatives by the ranks [k, q] give to sources [k, m] and, negative, queries."""
        pairs = slope.mul_(by_rank.unsqueeze(2))
        as_source = pairs.sum(1)
        if sources.weights is not None:
            as_source *= sources.weights.squeeze(1)
            pairs *= sources.weights
        return as_source, pairs.sum(2)

    def _tiles(self) -> Iterator[_Tile]:
        """Tiles that hold every query once."""
        weights, temperature = self.weights, self.temperature
        num_rows = self.scores.shape[1]
        halves = None if self._query_weights is None else 0.5 * self._query_weights
        for problems, index, is_real in _blocks(self._counts, num_rows):
            of_all = _Sources(
                self.scores[problems].unsqueeze(1),
                None if weights is None else weights[problems].unsqueeze(1),
            )
            own_weights = None if is_real is None else is_real.to(self.scores.dtype)
            if self._query_weights is not None:
                own_weights = self._query_weights[index]
                own_weights = own_weights if is_real is None else own_weights * is_real
            queries = self._queries[index]
            of_positives = _Sources(
                queries.unsqueeze(1), None if own_weights is None else own_weights.unsqueeze(1)
            )
            tau = temperature
            if isinstance(tau, Tensor):
                tau = tau[problems].view(-1, 1, 1)
            for tile in tile_slices(index.shape[1], len(problems) * num_rows):
                yield _Tile(
                    tile.start == 0,
                    problems,
                    index[:, tile],
                    index,
                    None if is_real is None else is_real[:, tile],
                    queries[:, tile].unsqueeze(2),
                    0.5 if halves is None else halves[index[:, tile]],
                    tau,
                    of_all,
                    of_positives,
                )


class _Sources(NamedTuple):
    """What queries are compared with."""

    scores: Tensor  # [k, 1, m]
    weights: Tensor | None  # [k, 1, m], None = 1 everywhere


class _Tile(NamedTuple):
    """q queries of each of k problems."""

    is_first: bool  # of the tiles of these problems
    problems: Tensor  # [k]
    queries: Tensor  # [k, q] in 0..Q-1; where a problem has fewer queries, its last stands in
    positives: Tensor  # [k, n], all queries of these problems
    is_real: Tensor | None  # [k, q], False where a query stands in; None where none does
    scores: Tensor  # [k, q, 1] of the queries
    half: float | Tensor  # ½ω of the queries, or [k, q]
    temperature: float | Tensor  # or [k, 1, 1]
    of_all: _Sources
    of_positives: _Sources


def _blocks(counts: Tensor, num_rows: int) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Problems [k] that share tiles, the index [k, n] of their queries, and which are real [k, n].

    `counts` [C] are the queries of each problem.

    Only problems of similar size share one, so that at most half of it stands in for nothing.
    """
    num_problems = len(counts)
    sizes, order = counts.sort(descending=True, stable=True)
    starts = (counts.cumsum(0) - counts)[order]
    on_host = sizes.tolist()
    first = 0
    while first < num_problems and on_host[first] > 0:
        longest = on_host[first]
        room = max(1, _dense.TILE // (longest * num_rows))
        last = bisect.bisect_right(
            on_host, -longest / 2, first, min(first + room, num_problems), key=neg
        )
        size, start = sizes[first:last, None], starts[first:last, None]
        number = torch.arange(longest, device=counts.device)  # within the problem
        is_even = on_host[last - 1] == longest
        is_real = None if is_even else number < size
        yield order[first:last], start + torch.minimum(number, size - 1), is_real
        first = last


def _compared(
    sources: Tensor, queries: Tensor, temperature: float | Tensor, place: int
) -> tuple[Tensor, Tensor]:
    """x and σ(x) [..., q, m] of sources [..., 1, m] and queries [..., q, 1], at two places."""
    shape = (*queries.shape[:-1], sources.shape[-1])
    x = torch.sub(sources, queries, out=_memory(place, shape, sources)).div_(temperature)
    if x.numel() > _FEW_PAIRS:
        limit = _FARTHEST[x.dtype]
        x.clamp_(-limit, limit)
    return x, torch.sigmoid(x, out=_memory(place + 1, shape, x))


def _memory(place: int, shape: tuple[int, ...], like: Tensor) -> Tensor | None:
    """`scratch`, which small batches do not even ask: they are all overhead."""
    if len(shape) == 2 and shape[0] * shape[1] <= _FEW_PAIRS:
        return None
    return scratch(place, shape, like)


def _slope(x: Tensor, sigmoid: Tensor) -> Tensor:
    """σ′(x) over x: as σ(−x)·σ(x) it has full relative precision on both sides."""
    slope = x.neg_().sigmoid_().mul_(sigmoid)
    if slope.numel() <= _FEW_PAIRS:
        return slope
    return torch.threshold_(slope, 2 * math.exp(-_FARTHEST[slope.dtype]), 0.0)


def _joined(parts: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """The fields of all parts, each in one tensor."""
    return parts[0] if len(parts) == 1 else tuple(map(torch.cat, zip(*parts, strict=True)))
