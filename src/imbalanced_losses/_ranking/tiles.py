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

from imbalanced_losses._ranking import dense as _dense
from imbalanced_losses._ranking.dense import tile_slices
from imbalanced_losses._ranking.plan import SlopesOf
from imbalanced_losses._ranking.scratch import scratch

# So many pairs, or fewer, take less time than the calls that would spare them something.
_FEW_PAIRS = 1 << 13
# So many pairs, or fewer, of one problem take less time than telling those of constants apart.
_PAIRS_NOT_TO_SORT_OUT = 1 << 18
# The difference in τ that stands for all larger ones: as far as any sum can tell σ is 0 or 1 there,
# and σ′ is taken for 0. Exponentials further out are subnormal, which take several times as long.
_FARTHEST = {torch.float32: 64.0, torch.float64: 600.0}


_softplus_backward = torch.ops.aten.softplus_backward.grad_input


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
        num_live: int,
    ) -> None:
        self.scores, self.weights = scores, weights  # [1, M]
        self.row = row  # [Q]
        self.temperature = temperature
        self.positive_weights = is_positive.to(scores.dtype)  # [1, M]
        self._half: float | Tensor = 0.5
        if weights is not None:
            self.positive_weights *= weights
            self._half = 0.5 * weights[0, row]
        self._num_live, self._num_live_queries = num_live, row.shape[0]
        if row.shape[0] * scores.shape[1] <= _PAIRS_NOT_TO_SORT_OUT:
            self._num_live = scores.shape[1]
        elif num_live < scores.shape[1]:
            self._num_live_queries = int((row < num_live).sum())
        self._queries = scores.T.index_select(0, row)  # [Q, 1]
        self._tiles = tile_slices(row.shape[0], scores.shape[1]) or [slice(0, 0)]

    def ranks(self) -> tuple[Tensor, Tensor]:
        among_all, among_positives = _joined([self._compared(tile)[2:] for tile in self._tiles])
        return among_all, among_positives

    def ranks_and_gradient(self, slopes_of: SlopesOf) -> tuple[Tensor, Tensor, Tensor]:
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        gradient: Tensor | None = None  # [num_live]
        num_rows = self.scores.shape[1]
        for tile in self._tiles:
            x, sigmoid, among_all, among_positives = self._compared(tile)
            by_all, by_positives = slopes_of(among_all, among_positives, tile)
            if self._num_live == num_rows:
                pairs = self._moved(x, sigmoid, by_all, by_positives)
                as_source, as_query = pairs.sum(0), pairs.sum(1)
            else:
                # A pair moves its source and its query: live queries have pairs with all rows, the
                # others only with live ones.
                live = max(0, self._num_live_queries - tile.start)
                pairs = self._moved(x[:live], sigmoid[:live], by_all[:live], by_positives[:live])
                as_source, as_query = pairs[:, : self._num_live].sum(0), pairs.sum(1)
                rest = (slice(live, None), slice(self._num_live))
                pairs = self._moved(x[rest], sigmoid[rest], by_all[live:], by_positives[live:])
                as_source += pairs.sum(0)
            gradient = as_source if gradient is None else gradient.add_(as_source)
            parts.append((among_all, among_positives, as_query))
        assert gradient is not None
        among_all, among_positives, as_query = _joined(parts)
        row = self.row
        if self._num_live < num_rows:
            row = row[: self._num_live_queries]
            gradient = torch.cat((gradient, gradient.new_zeros(num_rows - self._num_live)))
        gradient.index_add_(0, row, as_query, alpha=-1)
        return among_all, among_positives, gradient.unsqueeze(0)

    def _moved(self, x: Tensor, sigmoid: Tensor, by_all: Tensor, by_positives: Tensor) -> Tensor:
        """What slopes [q] make of the pairs of q queries with the first m rows [q, m]."""
        positive_weights, weights = self.positive_weights, self.weights
        if x.shape[1] < self.scores.shape[1]:
            positive_weights = positive_weights[:, : x.shape[1]]
            weights = None if weights is None else weights[:, : x.shape[1]]
        # A pair counts by_all · ω[source] + by_positives · ω⁺[source] times.
        by_all, by_positives = by_all.unsqueeze(1), by_positives.unsqueeze(1)
        counts = torch.mul(positive_weights, by_positives, out=_memory(2, x.shape, x))
        counts = counts.add_(by_all) if weights is None else counts.addcmul_(weights, by_all)
        return _slope(x, sigmoid).mul_(counts)

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
        num_live: int,
    ) -> None:
        self.scores, self.weights = scores, weights  # [C, M]
        self.problem, self.row = problem, row  # [Q]
        self.temperature = temperature  # float or [C]
        self.num_live = num_live
        self._queries = scores[problem, row]  # [Q]
        self._query_weights = None if weights is None else weights[problem, row]
        self._counts = problem.bincount(minlength=len(scores))  # [C] queries
        self._live_counts = self._counts
        if num_live < scores.shape[1]:
            self._live_counts = problem[row < num_live].bincount(minlength=len(scores))

    def ranks(self) -> tuple[Tensor, Tensor]:
        among_all, among_positives = self.scores.new_empty(2, len(self.row))
        for tile in self._tiles():
            index = tile.queries
            among_all[index] = self._rank(tile, tile.of_all, 0, with_slope=False)[0]
            among_positives[index] = self._rank(tile, tile.of_positives, 0, with_slope=False)[0]
        return among_all, among_positives

    def ranks_and_gradient(self, slopes_of: SlopesOf) -> tuple[Tensor, Tensor, Tensor]:
        among_all, among_positives = self.scores.new_empty(2, len(self.row))
        gradient = torch.zeros_like(self.scores, memory_format=torch.contiguous_format)
        of_live = gradient[:, : self.num_live]
        at_queries = torch.zeros_like(self._queries)
        for tile in self._tiles():
            index = tile.queries
            rank, slope = self._rank(tile, tile.of_all, 0)
            rank_among_positives, slope_among_positives = self._rank(tile, tile.of_positives, 1)
            among_all[index], among_positives[index] = rank, rank_among_positives
            slopes = slopes_of(rank, rank_among_positives, index)
            if tile.is_real is not None:
                slopes = (slopes[0] * tile.is_real, slopes[1] * tile.is_real)

            as_source, as_query = self._spread(slope, slopes[0], tile, tile.of_all)
            of_live.index_add_(0, tile.problems, as_source)
            as_positive, as_query_too = self._spread(
                slope_among_positives, slopes[1], tile, tile.of_positives
            )
            at_queries.index_add_(0, tile.positives.flatten(), as_positive.flatten())
            as_query += as_query_too
            live = index[:, : tile.num_live]
            at_queries.index_add_(0, live.flatten(), as_query.flatten(), alpha=-1)
        place = self.row + self.problem * self.scores.shape[1]
        gradient.view(-1).index_add_(0, place, at_queries)
        gradient[:, self.num_live :] = 0
        return among_all, among_positives, gradient

    def _rank(
        self, tile: _Tile, sources: _Sources, place: int, with_slope: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Ranks [k, q] of a tile's queries, and σ′ of its pairs [k, q, m] at a place in memory.

        x still stands where neither the query nor the source is live.
        """
        x, sigmoid = _compared(sources.scores, tile.scores, tile.temperature, place)
        if with_slope:
            for pairs in _moving_pairs(tile, sources):
                _slope(x[pairs], sigmoid[pairs])
        if sources.weights is not None:
            sigmoid *= sources.weights
        return sigmoid.sum(2).add_(tile.half), x

    def _spread(
        self, slope: Tensor, by_rank: Tensor, tile: _Tile, sources: _Sources
    ) -> tuple[Tensor, Tensor]:
        """What derivatives by the ranks [k, q] give to live sources and, negative, live queries."""
        of_live_queries, *of_others = _moving_pairs(tile, sources)
        pairs = slope[of_live_queries].mul_(by_rank[of_live_queries[:2]].unsqueeze(2))
        as_source = pairs[:, :, : sources.num_live].sum(1)
        for others in of_others:
            as_source += slope[others].mul_(by_rank[others[:2]].unsqueeze(2)).sum(1)
        if sources.weights is not None:
            as_source *= sources.weights[:, 0, : sources.num_live]
            pairs *= sources.weights
        return as_source, pairs.sum(2)

    def _tiles(self) -> Iterator[_Tile]:
        """Tiles that hold every query once."""
        weights, temperature = self.weights, self.temperature
        num_rows = self.scores.shape[1]
        halves = None if self._query_weights is None else 0.5 * self._query_weights
        for problems, index, is_real, num_live in _blocks(
            self._counts, self._live_counts, num_rows
        ):
            of_all = _Sources(
                self.num_live,
                self.scores[problems].unsqueeze(1),
                None if weights is None else weights[problems].unsqueeze(1),
            )
            own_weights = None if is_real is None else is_real.to(self.scores.dtype)
            if self._query_weights is not None:
                own_weights = self._query_weights[index]
                own_weights = own_weights if is_real is None else own_weights * is_real
            queries = self._queries[index]
            of_positives = _Sources(
                num_live,
                queries.unsqueeze(1),
                None if own_weights is None else own_weights.unsqueeze(1),
            )
            tau = temperature
            if isinstance(tau, Tensor):
                tau = tau[problems].view(-1, 1, 1)
            for tile in tile_slices(index.shape[1], len(problems) * num_rows):
                yield _Tile(
                    max(0, num_live - tile.start),
                    problems,
                    index[:, tile],
                    index[:, :num_live],
                    None if is_real is None else is_real[:, tile],
                    queries[:, tile].unsqueeze(2),
                    0.5 if halves is None else halves[index[:, tile]],
                    tau,
                    of_all,
                    of_positives,
                )


class _Sources(NamedTuple):
    """What queries are compared with, live ones first."""

    num_live: int
    scores: Tensor  # [k, 1, m]
    weights: Tensor | None  # [k, 1, m], None = 1 everywhere


class _Tile(NamedTuple):
    """q queries of each of k problems, live ones first."""

    num_live: int  # of the problem that has most of them
    problems: Tensor  # [k]
    queries: Tensor  # [k, q] in 0..Q-1; where a problem has fewer queries, its last stands in
    positives: Tensor  # [k, l], all live queries of these problems
    is_real: Tensor | None  # [k, q], False where a query stands in; None where none does
    scores: Tensor  # [k, q, 1] of the queries
    half: float | Tensor  # ½ω of the queries, or [k, q]
    temperature: float | Tensor  # or [k, 1, 1]
    of_all: _Sources
    of_positives: _Sources


def _moving_pairs(tile: _Tile, sources: _Sources) -> list[tuple[slice, ...]]:
    """The pairs of live queries with all sources, and of the other queries with live sources."""
    every, live = slice(None), slice(tile.num_live)
    of_live_queries = (every, live, every)
    if tile.num_live >= tile.queries.shape[1]:
        return [of_live_queries]
    return [of_live_queries, (every, slice(tile.num_live, None), slice(sources.num_live))]


def _blocks(
    counts: Tensor, live_counts: Tensor, num_rows: int
) -> Iterator[tuple[Tensor, Tensor, Tensor | None, int]]:
    """Problems [k] that share tiles, the index [k, n] of their queries, and which are real [k, n].

    Last comes how many live queries the problem has that has most of them. `counts` [C] are the
    queries of each problem, `live_counts` the live ones among them.

    Only problems of similar size share one, so that at most half of it stands in for nothing.
    """
    num_problems = len(counts)
    sizes, order = counts.sort(descending=True, stable=True)
    starts = (counts.cumsum(0) - counts)[order]
    on_host, live_on_host = torch.stack((sizes, live_counts[order])).tolist()
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
        index = start + torch.minimum(number, size - 1)
        yield order[first:last], index, is_real, max(live_on_host[first:last])
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
    if x.numel() <= _FEW_PAIRS:  # which may be unclamped: e^(−x) below would overflow
        return x.neg_().sigmoid_().mul_(sigmoid)
    # One pass for three: the derivative of softplus at −x, times a factor.
    slope = _softplus_backward(sigmoid, x, -1.0, math.inf, grad_input=x)
    return torch.threshold_(slope, 2 * math.exp(-_FARTHEST[slope.dtype]), 0.0)


def _joined(parts: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """The fields of all parts, each in one tensor."""
    return parts[0] if len(parts) == 1 else tuple(map(torch.cat, zip(*parts, strict=True)))
