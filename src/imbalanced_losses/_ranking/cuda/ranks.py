"""Soft ranks on a CUDA device: fused kernels, shapes that do not depend on values.

Nothing is read back to the host by `FusedDense`, so that a step can be captured as a CUDA graph;
`FusedPanels` reads the range of the scores, once. Both therefore take and give whole [C, M] tensors
with a mask of the positives, where the other plans take a list of them, whose length would have to
be read.

The kernels are Triton's (3.2 or newer), which comes with CUDA builds of PyTorch; without it the
plans in plain PyTorch serve these devices too.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import torch
from torch import Tensor

from imbalanced_losses._ranking.choose import choose_fused
from imbalanced_losses._ranking.panels.panels import PRECISIONS, Panels
from imbalanced_losses._ranking.plan import Canonical, Masked, Rows, SlopesOf, is_in

# Where the kernels run.
DEVICES = ("cuda",)
_OLDEST_TRITON = (3, 2)
# A tile of pairs, and how many sources or query blocks are summed before float64 takes over.
_QUERIES, _SOURCES, _CHUNK, _BLOCKS = 16, 64, 512, 16
# Programs that keep a large device busy, if a tenth of the rows are positive.
_PROGRAMS = 1 << 10
# Rows of a panel that one program sums, items that another does, rows that a third evaluates.
_ITEM, _ITEMS, _ROWS = 128, 128, 256
# The last two dimensions of a grid.
_MOST_PROBLEMS = (1 << 16) - 1


def has_kernels(scores: Tensor) -> bool:
    """Whether scores [C, M] can be ranked by kernels."""
    return (
        scores.device.type in DEVICES
        and 0 < len(scores) <= _MOST_PROBLEMS
        and scores.shape[1] > 0
        and _has_triton()
    )


@cache
def _has_triton() -> bool:
    """Whether there is a Triton that the kernels have been tested on."""
    try:
        triton = importlib.import_module("triton")
    except ImportError:
        return False
    return tuple(map(int, triton.__version__.split(".")[:2])) >= _OLDEST_TRITON


def fused_plan(
    given: Canonical, queries: Masked, among: tuple[Rows, ...], backend: str
) -> FusedDense | FusedPanels:
    """Soft ranks of the rows that are queries; `backend` is "auto", "dense" or "panel"."""
    if backend == "auto":
        backend = choose_fused(*given.scores.shape)
    make: type[FusedDense] | type[FusedPanels] = FusedPanels if backend == "panel" else FusedDense
    return make(given, queries, among)


class _FusedRanks:
    """What both plans share; `plan.RankPlan` with masks for lists.

    Kernels sum over the two sides, negatives and positives, of which every set is made.
    """

    def __init__(self, given: Canonical, queries: Masked, among: tuple[Rows, ...]) -> None:
        self.given, self.queries, self.among = given, queries, among
        self.scores = given.scores
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
        # A row of a side moves the ranks among all sets that hold that side; they nearly cancel.
        by_negatives, by_positives = (
            self._by_side(slopes, side) for side in ("negatives", "positives")
        )
        gradient = self._as_sources(by_negatives, by_positives)  # [C, num_live] float64
        as_query = sums[2].mul_(by_negatives).add_(sums[3].mul_(by_positives))
        num_live = self.given.num_live
        gradient -= as_query[:, :num_live]  # they cancel: in float64
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
            ranks.append(torch.where(self.queries.mask, rank, 1).to(self.scores.dtype))
        return tuple(ranks)

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


class FusedDense(_FusedRanks):
    """The definition: O(Q·M) pairs, none of which leaves the registers; O(C·M) memory."""

    def __init__(self, given: Canonical, queries: Masked, among: tuple[Rows, ...]) -> None:
        super().__init__(given, queries, among)
        is_query, (num_problems, num_rows) = queries.mask, given.scores.shape
        number = is_query.cumsum(1)  # [C, M], 1 for the first query
        self._counts = number[:, -1].to(torch.int32)
        # The queries one behind the other; other rows go to a place that nobody looks at.
        slot = torch.where(is_query, number - 1, num_rows)
        row = torch.arange(num_rows, dtype=torch.int32, device=given.scores.device)
        self._rows = row.new_empty(num_problems, num_rows + 1)
        self._rows.scatter_(1, slot, row.expand(num_problems, -1))
        self._mask = given.is_positive.contiguous().view(torch.uint8)
        self._rates = self.temperature.reciprocal()

    def _sums(self, with_slopes: bool) -> Tensor:
        num_problems, num_rows = self.scores.shape
        blocks = _ceil(num_rows, _QUERIES)
        splits = min(_ceil(num_rows, _CHUNK), self._splits(blocks // 10))
        stretch = _ceil(_ceil(num_rows, splits), _CHUNK) * _CHUNK
        splits = _ceil(num_rows, stretch)
        sums = self.scores.new_zeros(
            4 if with_slopes else 2, splits, num_problems, num_rows, dtype=torch.float64
        )
        _launch(
            "rank_sums",
            (blocks * splits, num_problems),
            *self._geometry(),
            sums,
            num_rows,
            num_rows + 1,
            splits,
            stretch,
            WEIGHTED=self.weights is not None,
            WITH_SLOPES=with_slopes,
            BQ=_QUERIES,
            BM=_SOURCES,
            CHUNK=_CHUNK,
        )
        return sums[:, 0] if splits == 1 else sums.sum(1)

    def _as_sources(self, by_negatives: Tensor, by_positives: Tensor) -> Tensor:
        (num_problems, num_rows), num_live = self.scores.shape, self.given.num_live
        blocks = _ceil(num_live, _SOURCES)
        splits = self._splits(blocks)
        slopes = self.scores.new_empty(splits, num_problems, num_live, dtype=torch.float64)
        if num_live > 0:
            _launch(
                "source_slopes",
                (blocks * splits, num_problems),
                *self._geometry(),
                by_negatives.contiguous(),
                by_positives.contiguous(),
                slopes,
                num_rows,
                num_rows + 1,
                num_live,
                splits,
                WEIGHTED=self.weights is not None,
                BQ=_QUERIES,
                BM=_SOURCES,
                BLOCKS=_BLOCKS,
            )
        return slopes[0] if splits == 1 else slopes.sum(0)

    def _geometry(self) -> tuple[Tensor, ...]:
        weights = self.scores if self.weights is None else self.weights
        return self.scores, weights, self._mask, self._rows, self._counts, self._rates

    def _splits(self, blocks: int) -> int:
        """Into how many parts the sum of each block goes, so that small pools fill the device."""
        return min(8, max(1, _PROGRAMS // max(1, blocks * len(self.scores))))


class FusedPanels(_FusedRanks):
    """Linear time by panels: moments of sorted rows, and evaluation, in kernels."""

    def __init__(self, given: Canonical, queries: Masked, among: tuple[Rows, ...]) -> None:
        super().__init__(given, queries, among)
        scores = given.scores
        self._panels = panels = Panels(
            scores[0, :0],
            torch.empty(0, dtype=torch.int64, device=scores.device),
            scores,
            self.temperature,
            for_ranks=True,
            precisions=PRECISIONS[scores.dtype][-1:],
            is_asked=queries.mask.any(1),
        )
        slot, place = panels.line.locate(scores, None)
        self._place = place.flatten()
        self._slot = slot.flatten().to(torch.int32)
        self._mask = queries.mask.flatten().contiguous().view(torch.uint8)
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
        slopes = torch.where(self.queries.mask.any(1, keepdim=True), slopes.sum(0), 0)
        return slopes[:, : self.given.num_live]

    def _moments(self, columns: Tensor) -> Tensor:
        """Σ value · placeᵇ of each panel: columns [K, C·M] -> [K, p, S]."""
        panels, degree = self._panels, self._panels.precision.degree
        if panels.line.poison is not None:
            columns = columns.nan_to_num()  # of the problem that is NaN anyhow
        num_panels, num_items = panels.line.num_panels, len(self._items.panel)
        partial = columns.new_zeros(len(columns), degree, num_items, dtype=torch.float64)
        _launch(
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
        _launch(
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
        _launch(
            "panel_values",
            (_ceil(num_rows, _ROWS), num_columns),
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


def _kernels() -> Any:
    """The module of the kernels, which imports Triton."""
    from imbalanced_losses._ranking.cuda import kernels

    return kernels


def _launch(name: str, grid: tuple[int, int], *arguments: object, **constants: Any) -> None:
    """Launch a kernel; with fused multiply-adds, whatever the default of this Triton is."""
    getattr(_kernels(), name)[grid](*arguments, **constants, enable_fp_fusion=True)


def _ceil(number: int, step: int) -> int:
    return -(-number // step)
