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
from imbalanced_losses._ranking.plan import Canonical, Listed, Rows, SlopesOf, half_of
from imbalanced_losses._ranking.scratch import Place, scratch

# So many pairs, or fewer, take less time than the calls that would spare them something.
_FEW_PAIRS = 1 << 13
# So many pairs, or fewer, of one problem take less time than telling those of constants apart.
_PAIRS_NOT_TO_SORT_OUT = 1 << 18
# The difference in τ that stands for all larger ones: as far as any sum can tell σ is 0 or 1 there,
# and σ′ is taken for 0. Exponentials further out are subnormal, which take several times as long.
_FARTHEST = {torch.float32: 64.0, torch.float64: 600.0}


# Places in memory: what a set's differences stand in, and, one further, its sigmoids.
_PLACES = (Place.PAIRS, Place.MORE_PAIRS, Place.STILL_MORE_PAIRS, Place.LAST_PAIRS)

_softplus_backward = torch.ops.aten.softplus_backward.grad_input


class DenseRanks:
    """Soft ranks of one problem by the definition: see `plan.RankPlan` for the contract.

    Both sums are taken from the same pairs, in the fewest calls: small batches are all overhead.
    """

    def __init__(self, given: Canonical, queries: Listed, among: tuple[Rows, ...]) -> None:
        scores, row, num_rows = given.scores, queries.row, given.scores.shape[1]
        self.scores = scores  # [1, M]
        self.row = row  # [Q]
        self.temperature = given.temperature
        # ω of each set's rows [1, M], None where all are 1; and ½ω of queries that are in it.
        self._columns = [given.column(rows) for rows in among]
        self._halves = [half_of(queries, rows, given) for rows in among]
        self._num_live, self._num_live_queries = given.num_live, row.shape[0]
        if row.shape[0] * num_rows <= _PAIRS_NOT_TO_SORT_OUT:
            self._num_live = num_rows
        elif given.num_live < num_rows:
            self._num_live_queries = int((row < given.num_live).sum())
        self._queries = scores.T.index_select(0, row)  # [Q, 1]
        self._tiles = tile_slices(row.shape[0], num_rows) or [slice(0, 0)]
        self.is_whole = len(self._tiles) == 1

    def ranks(self) -> tuple[Tensor, ...]:
        return _joined([self._compared(tile)[2] for tile in self._tiles])

    def ranks_and_gradient(self, slopes_of: SlopesOf) -> tuple[tuple[Tensor, ...], Tensor]:
        parts: list[tuple[Tensor, ...]] = []
        gradient: Tensor | None = None  # [num_live]
        num_rows = self.scores.shape[1]
        for tile in self._tiles:
            x, sigmoid, ranks = self._compared(tile)
            slopes = slopes_of(ranks, tile)
            if self._num_live == num_rows:
                pairs = self._moved(x, sigmoid, slopes)
                as_source, as_query = pairs.sum(0), pairs.sum(1)
            else:
                # A pair moves its source and its query: live queries have pairs with all rows, the
                # others only with live ones.
                live = max(0, self._num_live_queries - tile.start)
                pairs = self._moved(x[:live], sigmoid[:live], [slope[:live] for slope in slopes])
                as_source, as_query = pairs[:, : self._num_live].sum(0), pairs.sum(1)
                rest = (slice(live, None), slice(self._num_live))
                pairs = self._moved(x[rest], sigmoid[rest], [slope[live:] for slope in slopes])
                as_source += pairs.sum(0)
            gradient = as_source if gradient is None else gradient.add_(as_source)
            parts.append((*ranks, as_query))
        assert gradient is not None
        *found, as_query = _joined(parts)
        row = self.row
        if self._num_live < num_rows:
            row = row[: self._num_live_queries]
            gradient = torch.cat((gradient, gradient.new_zeros(num_rows - self._num_live)))
        gradient.index_add_(0, row, as_query, alpha=-1)
        return tuple(found), gradient.unsqueeze(0)

    def _moved(self, x: Tensor, sigmoid: Tensor, slopes: Sequence[Tensor]) -> Tensor:
        """What slopes [q] make of the pairs of q queries with the first m rows [q, m]."""
        counts: float | Tensor = 0.0  # Σ slope · ω[source] over the sets, [q, 1] where ω = 1
        memory = _memory(Place.STILL_MORE_PAIRS, x.shape, x)
        for column, slope in zip(self._columns, slopes, strict=True):
            by_rank = slope.unsqueeze(1)
            if column is None:
                counts = by_rank + counts if isinstance(counts, Tensor) else by_rank
                continue
            own = column if x.shape[1] == column.shape[1] else column[:, : x.shape[1]]
            if isinstance(counts, Tensor):
                counts = torch.addcmul(counts, own, by_rank, out=memory)
            else:
                counts = torch.mul(own, by_rank, out=memory)
        return _slope(x, sigmoid).mul_(counts)

    def _compared(self, tile: slice) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """x and σ(x) [q, M] of some queries, and their ranks [q]."""
        queries = self._queries if len(self._tiles) == 1 else self._queries[tile]
        x, sigmoid = _compared(self.scores, queries, self.temperature)
        ranks = []
        for column, half in zip(self._columns, self._halves, strict=True):
            own = sigmoid
            if column is not None:
                own = torch.mul(sigmoid, column, out=_memory(Place.STILL_MORE_PAIRS, x.shape, x))
            rank = own.sum(1)
            ranks.append(rank.add_(half[tile] if isinstance(half, Tensor) else half))
        return x, sigmoid, tuple(ranks)


class DenseRanksOfMany:
    """Soft ranks of several problems by the definition: see `plan.RankPlan` for the contract.

    A tile holds as many queries of each of its problems. Positives are few beside all rows, so
    that comparing them among themselves once more is cheaper than picking their pairs out of all.
    """

    is_whole = False

    def __init__(self, given: Canonical, queries: Listed, among: tuple[Rows, ...]) -> None:
        self.scores, self.temperature = given.scores, given.temperature
        self.num_live, self.queries, self.among = given.num_live, queries, among
        # ω of each set's rows [C, M]; queries among themselves are compared apart.
        self._columns = [None if rows == queries.rows else given.column(rows) for rows in among]
        self._halves = [half_of(queries, rows, given) for rows in among]
        problem, row = queries.problem, queries.row
        self._scores_of_queries = given.scores[problem, row]  # [Q]
        num_problems, num_rows = given.scores.shape
        self._counts = problem.bincount(minlength=num_problems)  # [C] queries
        self._live_counts = self._counts
        if given.num_live < num_rows:
            self._live_counts = problem[row < given.num_live].bincount(minlength=num_problems)

    def ranks(self) -> tuple[Tensor, ...]:
        found = self._empty_ranks()
        for tile in self._tiles():
            for k, sources in enumerate(tile.sources):
                found[k][tile.queries] = self._rank(tile, sources, 0, with_slope=False)[0]
        return found

    def ranks_and_gradient(self, slopes_of: SlopesOf) -> tuple[tuple[Tensor, ...], Tensor]:
        found = self._empty_ranks()
        gradient = torch.zeros_like(self.scores, memory_format=torch.contiguous_format)
        of_live = gradient[:, : self.num_live]
        at_queries = torch.zeros_like(self._scores_of_queries)
        for tile in self._tiles():
            index = tile.queries
            # The sigmoids of one set give way to the differences of the next.
            pairs = [self._rank(tile, sources, k) for k, sources in enumerate(tile.sources)]
            for own, (rank, _) in zip(found, pairs, strict=True):
                own[index] = rank
            slopes = slopes_of(tuple(rank for rank, _ in pairs), index)
            moved: Tensor | None = None  # [k, q], less what the queries get
            for sources, slope, (_, derivative) in zip(tile.sources, slopes, pairs, strict=True):
                by_rank = slope if tile.is_real is None else slope * tile.is_real
                as_source, as_query = self._spread(derivative, by_rank, tile, sources)
                if sources.are_queries:
                    at_queries.index_add_(0, tile.live_queries.flatten(), as_source.flatten())
                else:
                    of_live.index_add_(0, tile.problems, as_source)
                moved = as_query if moved is None else moved.add_(as_query)
            assert moved is not None
            live = index[:, : tile.num_live]
            at_queries.index_add_(0, live.flatten(), moved.flatten(), alpha=-1)
        place = self.queries.row + self.queries.problem * self.scores.shape[1]
        gradient.view(-1).index_add_(0, place, at_queries)
        gradient[:, self.num_live :] = 0
        return found, gradient

    def _empty_ranks(self) -> tuple[Tensor, ...]:
        return self.scores.new_empty(len(self.among), self.queries.row.shape[0]).unbind()

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
        return sigmoid.sum(2).add_(sources.half), x

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
        temperature, num_rows = self.temperature, self.scores.shape[1]
        for problems, index, is_real, num_live in _blocks(
            self._counts, self._live_counts, num_rows
        ):
            queries = self._scores_of_queries[index]
            own_weights = None if is_real is None else is_real.to(self.scores.dtype)
            if self.queries.weights is not None:
                own_weights = self.queries.weights[index]
                own_weights = own_weights if is_real is None else own_weights * is_real
            tau = temperature
            if isinstance(tau, Tensor):
                tau = tau[problems].view(-1, 1, 1)
            for tile in tile_slices(index.shape[1], len(problems) * num_rows):
                sources = []
                for rows, column, half in zip(self.among, self._columns, self._halves, strict=True):
                    own_half = half[index[:, tile]] if isinstance(half, Tensor) else half
                    if rows == self.queries.rows:
                        weights = None if own_weights is None else own_weights.unsqueeze(1)
                        sources.append(
                            _Sources(num_live, queries.unsqueeze(1), weights, own_half, True)
                        )
                    else:
                        weights = None if column is None else column[problems].unsqueeze(1)
                        scores = self.scores[problems].unsqueeze(1)
                        sources.append(_Sources(self.num_live, scores, weights, own_half, False))
                yield _Tile(
                    max(0, num_live - tile.start),
                    problems,
                    index[:, tile],
                    index[:, :num_live],
                    None if is_real is None else is_real[:, tile],
                    queries[:, tile].unsqueeze(2),
                    tau,
                    tuple(sources),
                )


class _Sources(NamedTuple):
    """What queries are compared with, live ones first."""

    num_live: int
    scores: Tensor  # [k, 1, m]
    weights: Tensor | None  # [k, 1, m], None = 1 everywhere
    half: float | Tensor  # ½ω of the queries that are among them, or [k, q]
    are_queries: bool  # whether they are the queries themselves, rather than all rows


class _Tile(NamedTuple):
    """q queries of each of k problems, live ones first."""

    num_live: int  # of the problem that has most of them
    problems: Tensor  # [k]
    queries: Tensor  # [k, q] in 0..Q-1; where a problem has fewer queries, its last stands in
    live_queries: Tensor  # [k, l], all live queries of these problems
    is_real: Tensor | None  # [k, q], False where a query stands in; None where none does
    scores: Tensor  # [k, q, 1] of the queries
    temperature: float | Tensor  # or [k, 1, 1]
    sources: tuple[_Sources, ...]  # of each set


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
    sources: Tensor, queries: Tensor, temperature: float | Tensor, place: int = 0
) -> tuple[Tensor, Tensor]:
    """x and σ(x) [..., q, m] of sources [..., 1, m] and queries [..., q, 1], at two places."""
    shape, (first, second) = (*queries.shape[:-1], sources.shape[-1]), _PLACES[place : place + 2]
    x = torch.sub(sources, queries, out=_memory(first, shape, sources)).div_(temperature)
    if x.numel() > _FEW_PAIRS:
        limit = _FARTHEST[x.dtype]
        x.clamp_(-limit, limit)
    return x, torch.sigmoid(x, out=_memory(second, shape, x))


def _memory(place: Place, shape: tuple[int, ...], like: Tensor) -> Tensor | None:
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
