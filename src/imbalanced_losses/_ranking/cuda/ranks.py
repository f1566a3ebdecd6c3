"""Soft ranks on a CUDA device: fused kernels, shapes that do not depend on values.

Nothing is read back to the host by `FusedDense`, so that a step can be captured as a CUDA graph;
`FusedPanels` reads the range of the scores, once. Both therefore take and give whole [C, M] tensors
with a mask of the positives, where the other plans take a list of them, whose length would have to
be read.

The kernels are Triton's (3.2 or newer), which comes with CUDA builds of PyTorch; without it the
plans in plain PyTorch serve these devices too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from imbalanced_losses._ranking.canonical import smallest
from imbalanced_losses._ranking.choose import choose_fused
from imbalanced_losses._ranking.cuda.prepared import PreparedQueries, ceil, launch
from imbalanced_losses._ranking.panels.panels import PRECISIONS, Panels
from imbalanced_losses._ranking.plan import ROWS, Canonical, Rows, SlopesOf, is_in

# Programs that keep a large device busy, if a tenth of the rows are queries.
_PROGRAMS = 1 << 13
# Pairs of a tile, and how many of one row are summed before float64 takes over.
_TILE, _CHUNK = 1 << 10, 1 << 9
# Rows of a panel that one program sums, items that another does, rows that a third evaluates.
_ITEM, _ITEMS, _ROWS = 128, 128, 256


def fused_plan(
    given: Canonical, queries: PreparedQueries, among: tuple[Rows, ...], backend: str
) -> FusedDense | FusedPanels:
    """Soft ranks of the rows that are queries; `backend` is "auto", "dense" or "panel"."""
    if backend == "auto":
        backend = choose_fused(*given.scores.shape)
    make: type[FusedDense] | type[FusedPanels] = FusedPanels if backend == "panel" else FusedDense
    return make(given, queries, among)


class FusedDense:
    """The definition: O(Q·M) pairs, none of which leaves the registers; O(C·M) memory.

    `plan.RankPlan` for prepared queries.
    """

    def __init__(self, given: Canonical, queries: PreparedQueries, among: tuple[Rows, ...]) -> None:
        self.given, self.queries, self.among = given, queries, among
        own = queries.prepared
        self._geometry = given.scores, own.sides, own.order, own.numbers, own.rates

    def ranks(self) -> tuple[Tensor, ...]:
        return self._ranks(self.given.scores, with_slopes=False)

    def ranks_and_gradient(self, slopes_of: SlopesOf) -> tuple[tuple[Tensor, ...], Tensor]:
        scores, (num_problems, num_rows) = self.given.scores, self.given.scores.shape
        sums = scores.new_empty(2, *scores.shape, dtype=torch.float64)
        ranks = self._ranks(sums, with_slopes=True)
        by: dict[str, Tensor] = {}
        for rows, slope in zip(self.among, slopes_of(ranks, slice(None)), strict=True):
            by[rows] = by[rows] + slope if rows in by else slope
        slopes = [by[r].expand(scores.shape).contiguous() if r in by else scores for r in ROWS]
        gradient, divisor = torch.empty_like(scores), self.queries.divisor
        sources = 4 * self._size()
        launch(
            "score_slopes",
            (ceil(num_rows, sources), num_problems),
            *(*self._geometry, *slopes, sums),
            *(scores if divisor is None else divisor, gradient, num_rows, self.given.num_live),
            QUERIES=self.queries.rows,
            **{rows.upper(): rows in by for rows in ROWS},
            WEIGHS=self.queries.weighs_slopes,
            DIVIDED=divisor is not None,
            LARGEST=torch.finfo(scores.dtype).max / 2,
            BQ=_TILE // sources,
            BM=sources,
            BLOCKS=max(1, _CHUNK * sources // (2 * _TILE)),
        )
        return ranks, gradient

    def _ranks(self, sums: Tensor, with_slopes: bool) -> tuple[Tensor, ...]:
        scores, (num_problems, num_rows) = self.given.scores, self.given.scores.shape
        among = [*dict.fromkeys(self.among)]
        ranks = scores.new_empty(len(among), num_problems, num_rows)
        size = self._size()
        launch(
            "soft_ranks",
            (ceil(num_rows, size), num_problems),
            *(*self._geometry, ranks, sums, num_rows),
            QUERIES=self.queries.rows,
            **{rows.upper(): among.index(rows) if rows in among else -1 for rows in ROWS},
            WITH_SLOPES=with_slopes,
            SMALLEST=smallest(scores.dtype),
            BQ=size,
            BM=_TILE // size,
            CHUNK=max(_CHUNK, _TILE // size),
        )
        of_set = dict(zip(among, ranks, strict=True))
        return tuple(of_set[rows] for rows in self.among)

    def _size(self) -> int:
        """Queries of a program: few of a small pool, so that it fills the device."""
        num_scores = self.given.scores.numel()
        return next((size for size in (16, 4) if num_scores >= size * _PROGRAMS), 1)


class _FusedRanks:
    """What both plans share; `plan.RankPlan` with masks for lists.

    Kernels sum over the two sides, negatives and positives, of which every set is made.
    """

    def __init__(self, given: Canonical, queries: PreparedQueries, among: tuple[Rows, ...]) -> None:
        self.given, self.queries, self.among = given, queries, among
        self.scores = given.scores
        self.asked = queries.mask
        self.weights = None if given.weights is None else given.weights.contiguous()
        temperature = given.temperature
        if not isinstance(temperature, Tensor):
            temperature = given.scores.new_full((given.scores.shape[0],), temperature)
        self.temperature = temperature

    def ranks(self) -> tuple[Tensor, ...]:
        return self._ranked(self._sums(with_slopes=False))

    def ranks_and_gradient(self, slopes_of: SlopesOf) -> tuple[tuple[Tensor, ...], Tensor]:
        sums = self._sums(with_slopes=True)
        ranks = self._ranked(sums)
        slopes = slopes_of(ranks, slice(None))
        own = 1 if self.weights is None or not self.queries.weighs_slopes else self.weights
        slopes = tuple(torch.where(self.asked, slope * own, 0) for slope in slopes)
        # A row of a side moves the ranks among all sets that hold that side; they nearly cancel.
        by_negatives, by_positives = (
            self._by_side(slopes, side) for side in ("negatives", "positives")
        )
        gradient = self._as_sources(by_negatives, by_positives)  # [C, num_live] float64
        as_query = sums[2].mul_(by_negatives).add_(sums[3].mul_(by_positives))
        num_live = self.given.num_live
        gradient -= as_query[:, :num_live]  # they cancel: in float64
        scale = self.queries.prepared.rates.double()
        if self.queries.divisor is not None:
            scale = scale / self.queries.divisor
        gradient = gradient * scale[:, None]
        live = self.scores[:, :num_live]
        gradient = gradient.masked_fill(live.abs() == torch.finfo(live.dtype).max / 2, 0)
        rest = self.scores.shape[1] - num_live
        if rest > 0:
            gradient = torch.nn.functional.pad(gradient, (0, rest))
        return ranks, gradient.to(self.scores.dtype)

    def _by_side(self, slopes: tuple[Tensor, ...], side: str) -> Tensor:
        parts = [
            slope for slope, rows in zip(slopes, self.among, strict=True) if rows in ("all", side)
        ]
        return sum(parts[1:], parts[0]) if parts else torch.zeros_like(slopes[0])

    def _ranked(self, sums: Tensor) -> tuple[Tensor, ...]:
        """Σ ω σ of both sides [2, C, M] -> the ranks among each set."""
        of_side = {"negatives": sums[0], "positives": sums[1]}
        half = 0.5 if self.weights is None else 0.5 * self.weights
        ranks = []
        for rows in self.among:
            rank = sums[0] + sums[1] if rows == "all" else of_side[rows]
            member = is_in(self.queries.rows, rows)
            if member is None:
                is_positive = self.given.is_positive
                rank = rank + half * (is_positive if rows == "positives" else ~is_positive)
            elif member:
                rank = rank + half
            ranks.append(torch.where(self.asked, rank, 1).to(self.scores.dtype))
        if "all" not in self.among:
            return tuple(rank.clamp(min=0) for rank in ranks)
        among_all = ranks[self.among.index("all")].clamp(min=smallest(self.scores.dtype))
        return tuple(torch.minimum(rank.clamp(min=0), among_all) for rank in ranks)

    def _sums(self, with_slopes: bool) -> Tensor:
        """Σ ω σ, then Σ ω σ′, of negatives and of positives: [2 or 4, C, M].

        Returns a new float64 tensor. Rows that are not queries hold any finite value. A query's
        pair with itself may be included, as long as `_as_sources` includes it too (the two cancel).
        """
        raise NotImplementedError

    def _as_sources(self, by_negatives: Tensor, by_positives: Tensor) -> Tensor:
        """What live rows get as sources [C, num_live] float64, new.

        From the derivatives [C, M] by the ranks among all sets that hold a side.
        """
        raise NotImplementedError


class FusedPanels(_FusedRanks):
    """Linear time by panels: moments of sorted rows, and evaluation, in kernels."""

    def __init__(self, given: Canonical, queries: PreparedQueries, among: tuple[Rows, ...]) -> None:
        super().__init__(given, queries, among)
        scores = given.scores
        self._panels = panels = Panels(
            scores[0, :0],
            torch.empty(0, dtype=torch.int64, device=scores.device),
            scores,
            self.temperature,
            for_ranks=True,
            precisions=PRECISIONS[scores.dtype][-1:],
            is_asked=self.asked.any(1),
        )
        slot, place = panels.line.locate(scores, None)
        self._place = place.flatten()
        self._slot = slot.flatten().to(torch.int32)
        self._mask = self.asked.flatten().contiguous().view(torch.uint8)
        # The rows of each panel together, and cut into items of so many rows.
        self._order, self._items = _sorted_items(self._slot, panels.line.num_panels)
        own = scores.new_ones(scores.shape) if self.weights is None else self.weights
        sides = (own * ~given.is_positive, own * given.is_positive)
        self._columns = torch.stack(sides).view(2, -1)  # ω of each side

    def _sums(self, with_slopes: bool) -> Tensor:
        moments = self._moments(self._columns)
        fields = [self._panels.field(moments, order) for order in range(1 + with_slopes)]
        return self._evaluated(torch.cat(fields), self._mask)

    def _as_sources(self, by_negatives: Tensor, by_positives: Tensor) -> Tensor:
        cotangent = torch.stack((by_negatives, by_positives)).view(2, -1)
        field = self._panels.field(self._moments(cotangent), 1, transposed=True)
        slopes = self._evaluated(field, None).mul_(self._columns.view(2, *self.scores.shape))
        # A problem without queries has a gradient of exactly zero.
        slopes = torch.where(self.asked.any(1, keepdim=True), slopes.sum(0), 0)
        return slopes[:, : self.given.num_live]

    def _moments(self, columns: Tensor) -> Tensor:
        """Σ value · placeᵇ of each panel: columns [K, C·M] -> [K, p, S]."""
        panels, degree = self._panels, self._panels.precision.degree
        if panels.line.poison is not None:
            columns = columns.nan_to_num()  # of the problem that is NaN anyhow
        num_panels, num_items = panels.line.num_panels, len(self._items.panel)
        partial = columns.new_zeros(len(columns), degree, num_items, dtype=torch.float64)
        launch(
            "panel_moments",
            (num_items, len(columns)),
            self._order,
            self._place,
            columns.contiguous(),
            self._items.panel,
            self._items.begin,
            self._items.row_ends,
            partial,
            len(self._place),
            num_items,
            num_panels,
            DEGREE=degree,
            ROWS=_ITEM,
        )
        moments = partial.new_empty(len(columns), degree, num_panels)
        launch(
            "panel_totals",
            (num_panels, len(columns)),
            partial,
            self._items.item_ends,
            moments,
            num_items,
            num_panels,
            DEGREE=degree,
            BLOCK=_ITEMS,
        )
        return moments

    def _evaluated(self, field: Tensor, mask: Tensor | None) -> Tensor:
        """Σ_a field[k, a, panel] · placeᵃ: [K, p, S] -> [K, C, M] float64, 0 where masked."""
        num_columns, degree, num_panels = field.shape
        num_rows = len(self._place)
        out = field.new_empty(num_columns, *self.scores.shape)
        launch(
            "panel_values",
            (ceil(num_rows, _ROWS), num_columns),
            self._slot,
            self._place,
            self._slot if mask is None else mask,
            field.contiguous(),
            out,
            num_rows,
            num_panels,
            MASKED=mask is not None,
            DEGREE=degree,
            BLOCK=_ROWS,
        )
        poison = self._panels.line.poison
        return out if poison is None else out + poison[:, None]


class _Items:
    """Runs of at most `_ITEM` rows of one panel, so that crowded panels are shared by programs."""

    def __init__(self, row_ends: Tensor, num_items: int) -> None:
        begins = torch.nn.functional.pad(row_ends[:-1], (1, 0))
        number = (row_ends - begins + (_ITEM - 1)).div_(_ITEM, rounding_mode="floor")  # [S]
        self.row_ends, self.item_ends = row_ends, number.cumsum(0)
        item = torch.arange(num_items, device=row_ends.device)
        self.panel = torch.searchsorted(self.item_ends, item, right=True)  # S for those to spare
        panel = self.panel.clamp(max=len(row_ends) - 1)
        first = (self.item_ends - number)[panel]
        self.begin = begins[panel] + (item - first) * _ITEM


def _sorted_items(slot: Tensor, num_panels: int) -> tuple[Tensor, _Items]:
    """Rows ordered by panel, stable; and the items that they make."""
    ordered, order = slot.sort(stable=True)
    panel = torch.arange(num_panels, dtype=slot.dtype, device=slot.device)
    row_ends = torch.searchsorted(ordered, panel, right=True)
    return order, _Items(row_ends, num_panels + len(slot) // _ITEM)
