"""Soft ranks on a CUDA device: fused kernels, shapes that do not depend on values.

Nothing is read back to the host, so that a step of any size can be captured as a CUDA graph. Both
plans therefore take and give whole [C, M] tensors, of which the queries alone are looked at, where
the plans in plain PyTorch take a list, whose length would have to be read.

`FusedLinear` does not lay panels, whose number depends on the range of the scores: it would have to
be read, or bounded, and what is beyond the bound be ranked in some other way. It sorts the scores
instead. Pairs of a block of rows are computed one by one. For all others, e^(−|x|) being at most 1,
σ is a polynomial in it, of the degree that the dtype calls for, so that a rank is made of sums of
exponentials. These need no range: each follows from that of the block before by one factor. Beside
the sort that is three kernels a pass; panels take some 60 operations, Fourier transforms among
them, and twice the memory traffic.

The kernels are Triton's (3.2 or newer), which comes with CUDA builds of PyTorch; without it the
plans in plain PyTorch serve these devices too.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from imbalanced_losses._ranking.canonical import smallest
from imbalanced_losses._ranking.choose import choose_fused
from imbalanced_losses._ranking.cuda.launches import ceil, expanded, launch
from imbalanced_losses._ranking.cuda.prepared import PreparedQueries
from imbalanced_losses._ranking.plan import ROWS, Canonical, Rows, SlopesOf

# Programs that keep a large device busy, if a tenth of the rows are queries.
_PROGRAMS = 1 << 13
# Pairs of a tile, and how many of one row are summed before float64 takes over.
_TILE, _CHUNK = 1 << 10, 1 << 9
# Sorted rows of a block, queries of it that are ranked at once, and blocks whose moments are summed
# up at once. Half the rows are half the pairs within blocks, and twice the moments.
_ROWS = {torch.float32: 1 << 7, torch.float64: 1 << 6}
_QUERIES, _SCANNED = 1 << 4, 1 << 11
# e^(−k·distance), k from 0 on: enough for σ to 1e-11 and 1e-16.
_POWERS = {torch.float32: 16, torch.float64: 32}
_DEGREES = {torch.float32: 15, torch.float64: 22}
# What the linear kernels have been launched for.
_LOADED: set[tuple[Any, ...]] = set()


def fused_plan(
    given: Canonical, queries: PreparedQueries, among: tuple[Rows, ...], backend: str
) -> _FusedRanks:
    """Soft ranks of the rows that are queries; `backend` is "auto", "dense" or "panel"."""
    if queries.prepared.segments:
        return FusedSegments(given, queries, among)
    kind = given.scores.dtype, given.scores.device, queries.rows, among
    if backend == "auto":
        num_problems, num_rows = given.scores.shape
        backend = choose_fused(num_problems, num_rows)
        in_graph = choose_fused(num_problems, num_rows, is_captured=True)
        if backend != in_graph and _is_for_a_graph(kind):
            backend = in_graph
    if backend != "panel":
        return FusedDense(given, queries, among)
    _LOADED.add(kind)
    return FusedLinear(given, queries, among)


def _is_for_a_graph(kind: tuple[Any, ...]) -> bool:
    """Whether calls are captured, or rehearse that on a stream of their own.

    What no rehearsal has loaded can't be captured.
    """
    device = kind[1]
    if device.type != "cuda":
        return False
    if torch.cuda.current_stream(device) == torch.cuda.default_stream(device):
        return False
    return kind in _LOADED or not torch.cuda.is_current_stream_capturing()


class _FusedRanks:
    """What both plans share: `plan.RankPlan` for prepared queries.

    The gradient is that by the scores, divided as the queries are.
    """

    is_whole = True

    def __init__(self, given: Canonical, queries: PreparedQueries, among: tuple[Rows, ...]) -> None:
        self.given, self.queries, self.among = given, queries, among

    def ranks(self) -> tuple[Tensor, ...]:
        return self._ranks(self.given.scores, with_slopes=False)

    def ranks_and_gradient(self, slopes_of: SlopesOf) -> tuple[tuple[Tensor, ...], Tensor]:
        scores, divisor = self.given.scores, self.queries.divisor
        sums = scores.new_empty(2, *scores.shape, dtype=torch.float64)
        ranks = self._ranks(sums, with_slopes=True)
        by: dict[str, Tensor] = {}
        for rows, slope in zip(self.among, slopes_of(ranks, slice(None)), strict=True):
            by[rows] = by[rows] + slope if rows in by else slope
        slopes = [expanded(by[r], scores.shape).contiguous() if r in by else scores for r in ROWS]
        gradient = torch.empty_like(scores)
        options: dict[str, Any] = {rows.upper(): rows in by for rows in ROWS}
        options |= {"QUERIES": self.queries.rows, "WEIGHS": self.queries.weighs_slopes}
        rest = (sums, scores if divisor is None else divisor, gradient)
        self._slopes(slopes, rest, options, DIVIDED=divisor is not None)
        return ranks, gradient

    def _ranks(self, sums: Tensor, with_slopes: bool) -> tuple[Tensor, ...]:
        scores, among = self.given.scores, [*dict.fromkeys(self.among)]
        ranks = scores.new_empty(len(among), *scores.shape)
        options: dict[str, Any] = {
            rows.upper(): among.index(rows) if rows in among else -1 for rows in ROWS
        }
        self._rank(
            *(ranks, sums),
            QUERIES=self.queries.rows,
            WITH_SLOPES=with_slopes,
            SMALLEST=smallest(scores.dtype),
            **options,
        )
        of_set = dict(zip(among, ranks, strict=True))
        return tuple(of_set[rows] for rows in self.among)

    def _rank(self, ranks: Tensor, sums: Tensor, **options: Any) -> None:
        """Write the ranks [K, C, M], and Σ ω σ′ of both sides [2, C, M] if asked for."""
        raise NotImplementedError

    def _slopes(
        self, slopes: list[Tensor], rest: tuple[Tensor, ...], kind: dict[str, Any], DIVIDED: bool
    ) -> None:
        """Write the gradient, from slopes by the ranks among `ROWS`."""
        raise NotImplementedError


class FusedDense(_FusedRanks):
    """The definition: O(Q·M) pairs, none of which leaves the registers; O(C·M) memory."""

    def __init__(self, given: Canonical, queries: PreparedQueries, among: tuple[Rows, ...]) -> None:
        super().__init__(given, queries, among)
        own = queries.prepared
        self._geometry = given.scores, given.sides, own.order, own.numbers, own.rates
        # Queries of a program: few of a small pool, so that it fills the device.
        num_scores = given.scores.numel()
        self._size = next((size for size in (16, 4) if num_scores >= size * _PROGRAMS), 1)

    def _rank(self, ranks: Tensor, sums: Tensor, **options: Any) -> None:
        num_problems, num_rows = self.given.scores.shape
        launch(
            "soft_ranks",
            (ceil(num_rows, self._size), num_problems),
            *(*self._geometry, ranks, sums, num_rows),
            BQ=self._size,
            BM=_TILE // self._size,
            CHUNK=max(_CHUNK, _TILE // self._size),
            **options,
        )

    def _slopes(
        self, slopes: list[Tensor], rest: tuple[Tensor, ...], kind: dict[str, Any], DIVIDED: bool
    ) -> None:
        num_problems, num_rows = self.given.scores.shape
        sources = 4 * self._size
        launch(
            "score_slopes",
            (ceil(num_rows, sources), num_problems),
            *(*self._geometry, *slopes, *rest, num_rows, self.given.num_live),
            LARGEST=torch.finfo(self.given.scores.dtype).max / 2,
            BQ=_TILE // sources,
            BM=sources,
            BLOCKS=max(1, _CHUNK * sources // (2 * _TILE)),
            DIVIDED=DIVIDED,
            **kind,
        )


class FusedSegments(_FusedRanks):
    """The same of problems of unequal length: each pays for its own pairs alone."""

    def __init__(self, given: Canonical, queries: PreparedQueries, among: tuple[Rows, ...]) -> None:
        super().__init__(given, queries, among)
        own = queries.prepared
        self._geometry = given.scores, given.sides, own.order, own.numbers, own.rates, *own.segments

    def _rank(self, ranks: Tensor, sums: Tensor, **options: Any) -> None:
        num_rows = self.given.scores.shape[1]
        launch(
            "segment_ranks",
            (ceil(num_rows, 16), 1),
            *(*self._geometry, ranks, sums, num_rows, self.given.layout.num_problems),
            **{"BQ": 16, "BM": 64},
            **options,
        )

    def _slopes(
        self, slopes: list[Tensor], rest: tuple[Tensor, ...], kind: dict[str, Any], DIVIDED: bool
    ) -> None:
        num_rows, num_problems = self.given.scores.shape[1], self.given.layout.num_problems
        launch(
            "segment_slopes",
            (ceil(num_rows, 64), 1),
            *(*self._geometry, *slopes, *rest, num_rows, self.given.num_live, num_problems),
            LARGEST=torch.finfo(self.given.scores.dtype).max / 2,
            DIVIDED=DIVIDED,
            **{"BQ": 16, "BM": 64},
            **kind,
        )


class FusedLinear(_FusedRanks):
    """O(C·M) beside a sort, whatever the range of the scores."""

    def __init__(self, given: Canonical, queries: PreparedQueries, among: tuple[Rows, ...]) -> None:
        super().__init__(given, queries, among)
        scores, own = given.scores, queries.prepared
        (num_problems, num_rows), dtype = scores.shape, scores.dtype
        ordered, index = (part.view(scores.shape) for part in _sorted(scores))
        rows, powers = _ROWS[dtype], _POWERS[dtype]
        self._grid = ceil(num_rows, rows), num_problems
        picked = own.order.new_empty(scores.shape)
        counts = own.order.new_empty(num_problems, self._grid[0])
        moments = scores.new_empty(4, powers, *counts.shape, dtype=torch.float64)
        self._numbers, self._order = own.numbers, (ordered, index)
        self._lists = own.rates, torch.empty_like(scores), picked, counts, moments
        self._coefficients = _coefficients(_DEGREES[dtype], powers, scores.device)
        # Farther apart, no power but the first is above 0.
        limit = -math.log(torch.finfo(dtype).tiny) + 100
        self._constants = {"LIMIT": limit, "POWERS": powers, "BLOCK": rows}

    def _rank(self, ranks: Tensor, sums: Tensor, **options: Any) -> None:
        rows, num_rows = options.pop("QUERIES"), ranks.shape[2]
        launch(
            "block_moments",
            self._grid,
            *(self.given.sides, *self._order, self._numbers, *self._lists, num_rows),
            QUERIES=rows,
            **self._constants,
        )
        self._scan()
        launch(
            "far_ranks",
            self._grid,
            *(self.given.sides, *self._order, *self._lists, self._coefficients),
            *(ranks.fill_(1), sums, num_rows),
            BQ=_QUERIES,
            **self._constants | options,
        )

    def _slopes(
        self, slopes: list[Tensor], rest: tuple[Tensor, ...], kind: dict[str, Any], DIVIDED: bool
    ) -> None:
        num_rows, scores = self.given.scores.shape[1], self.given.scores
        sorted_slopes, rows = scores.new_empty(2, *scores.shape), kind.pop("QUERIES")
        launch(
            "slope_moments",
            self._grid,
            *(*slopes, *self._order, *self._lists, sorted_slopes, num_rows),
            BQ=_QUERIES,
            **self._constants | kind,
        )
        self._scan()
        launch(
            "far_slopes",
            self._grid,
            *(*self._order, self._numbers, *self._lists, self._coefficients, sorted_slopes),
            *(*rest, num_rows, self.given.num_live),
            QUERIES=rows,
            DIVIDED=DIVIDED,
            LARGEST=torch.finfo(scores.dtype).max / 2,
            BQ=_QUERIES,
            **self._constants,
        )

    def _scan(self) -> None:
        """The moments of each block become those of all blocks below and above, and its own."""
        num_blocks, num_problems = self._grid
        if num_blocks > 1:
            rates, *_, moments = self._lists
            launch(
                "scan_blocks",
                (4 * self._constants["POWERS"], num_problems),  # type: ignore[arg-type]
                *(moments, self._order[0], rates, self.given.scores.shape[1], num_blocks),
                CHUNK=min(_SCANNED, 1 << (num_blocks - 1).bit_length()),
                **self._constants,
            )


def _sorted(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Scores [C, M] in ascending order, and the rows that they are of."""
    if scores.shape[0] == 1:
        return scores[0].sort(stable=True)
    return scores.sort(dim=1, stable=True)


@lru_cache(maxsize=16)
def _coefficients(degree: int, num_powers: int, device: torch.device) -> Tensor:
    """[3, num_powers]: of σ(−x), σ(x) and σ′(x) as polynomials in u = e^(−x), x ≥ 0.

    σ(−x) = u / (1 + u) and σ′ = u / (1 + u)², interpolated over u in the Chebyshev nodes of [0, 1],
    which have the pole at −1 as far away as makes the error fall by 5.8 with each degree.
    """
    nodes = torch.cos(math.pi * (torch.arange(degree, dtype=torch.float64) + 0.5) / degree)
    u = (nodes + 1) / 2
    table = torch.zeros(3, num_powers, dtype=torch.float64)
    for line, values in ((0, 1 / (1 + u)), (2, (1 + u) ** -2.0)):
        table[line, 1 : degree + 1] = _polynomial(values)
    table[1], table[1, 0] = -table[0], 1
    return table.to(device)


def _polynomial(values: Tensor) -> Tensor:
    """Coefficients in u of the polynomial with these values at the Chebyshev nodes of [0, 1]."""
    degree = len(values)
    k = torch.arange(degree, dtype=torch.float64)
    cosines = torch.cos(math.pi * k[:, None] * (k[None, :] + 0.5) / degree) * (2 / degree)
    cosines[0] /= 2
    powers = torch.zeros(degree, degree, dtype=torch.float64)  # [a, k]: of uᵃ in T_k(2u − 1)
    powers[0, 0] = 1
    if degree > 1:
        powers[:2, 1] = torch.tensor([-1.0, 2.0], dtype=torch.float64)
    for n in range(2, degree):
        powers[1:, n] = 4 * powers[:-1, n - 1]
        powers[:, n] -= 2 * powers[:, n - 1] + powers[:, n - 2]
    return powers @ (cosines @ values)
