"""Where scores lie on the line of panels, whatever their range.

Usually the panels from the lowest score to the highest simply follow each other. Where that would
be more panels than there are rows, the line is cut into segments: wherever no score lies for
longer than the panels reach, the gap is shortened to just that, which no sum can tell from the
true one. Should even that be too long (rows scattered more thinly than panels), only the occupied
panels are kept.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

# Rows that tell where the bulk of the scores lies.
_SAMPLE = 1024


class Segments(NamedTuple):
    """The line of one problem: from each anchor on, panels follow each other."""

    anchors: Tensor  # [n] ascending, in the dtype of the scores: the first score of each segment
    slots: Tensor  # [n] int64, the slot of each anchor


class Line(NamedTuple):
    """The panels of all problems, one problem behind the other, so far apart that none meet.

    Attributes:
        origin: [C, 1], the lowest score of each problem, in slot 0 of its own.
        per_panel: [C, 1] float64, panels per unit of score.
        length: slots of one problem, of which the last `reach` or more are empty.
        segments: one for each problem, where the line is cut; else empty.
        occupied: [S] int64 ascending, the slots that hold a score, where only these are kept; the
            S panels are then numbered in this order. Else None.
        poison: [C], where some problem holds a NaN: NaN for such a problem and 0 for the others.
            The NaN itself is located as 0. Else None.
    """

    origin: Tensor
    per_panel: Tensor
    length: int
    segments: tuple[Segments, ...] = ()
    occupied: Tensor | None = None
    poison: Tensor | None = None

    @property
    def num_panels(self) -> int:
        """S."""
        return len(self.origin) * self.length if self.occupied is None else len(self.occupied)

    def locate(self, scores: Tensor, problem: Tensor | None) -> tuple[Tensor, Tensor]:
        """Panel (int64) and place in [−1, 1] (float64) of scores [C, m], or [n] of `problem`."""
        if self.poison is not None:
            scores = scores.nan_to_num()
        if self.segments:
            slot, place = self._locate_in_segments(scores, problem)
        else:
            origin, per_panel = self._of(problem)
            coordinate = (scores - origin.double()).mul_(per_panel)
            slot = coordinate.long()
            place = coordinate.sub_(slot).mul_(2).sub_(1)
        if len(self.origin) > 1:
            if problem is None:
                problem = torch.arange(len(scores), device=scores.device)[:, None]
            slot = slot.add_(problem, alpha=self.length)
        if self.occupied is not None:
            slot = torch.searchsorted(self.occupied, slot)
        return slot, place

    def whole_counts(self, mass: Tensor, reach: int, below: bool) -> Tensor:
        """The mass [K, S] in panels more than `reach` above (or below) each panel, [K, S]."""
        if self.occupied is not None:
            return self._whole_counts_of_occupied(mass, self.occupied, reach, below)
        mass = mass.reshape(len(mass), len(self.origin), self.length)  # [K, C, length]
        skipped = reach + 1
        counts = torch.zeros_like(mass)
        if below:
            counts[..., skipped:] = mass.cumsum(2)[..., :-skipped]
        else:
            # Summed from the top, where ranks are small, so that small ranks keep every digit.
            counts[..., :-skipped] = mass.flip(2).cumsum(2).flip(2)[..., skipped:]
        return counts.reshape(len(mass), -1)

    def _of(self, problem: Tensor | None) -> tuple[Tensor, Tensor]:
        """Origin and panels per unit, to go with scores [C, m] or [n]."""
        if problem is None:
            return self.origin, self.per_panel
        if len(self.origin) == 1:
            return self.origin[0], self.per_panel[0]
        return self.origin[problem, 0], self.per_panel[problem, 0]

    def _locate_in_segments(self, scores: Tensor, problem: Tensor | None) -> tuple[Tensor, Tensor]:
        slot = torch.empty(scores.shape, dtype=torch.int64, device=scores.device)
        place = torch.empty(scores.shape, dtype=torch.float64, device=scores.device)
        for c, (anchors, slots) in enumerate(self.segments):
            own = c if problem is None else problem == c
            values = scores[own].contiguous()
            segment = torch.searchsorted(anchors, values, right=True).sub_(1)
            # A difference of neighbours: exact, however far both are from zero.
            coordinate = (values.double() - anchors[segment]).mul_(self.per_panel[c])
            panel = coordinate.long()
            place[own] = coordinate.sub_(panel).mul_(2).sub_(1)
            slot[own] = panel.add_(slots[segment])
        return slot, place

    def _whole_counts_of_occupied(
        self, mass: Tensor, occupied: Tensor, reach: int, below: bool
    ) -> Tensor:
        starts = torch.arange(len(self.origin) + 1, device=occupied.device) * self.length
        bounds = torch.searchsorted(occupied, starts).tolist()
        counts = []
        for start, end in itertools.pairwise(bounds):
            own, position = mass[:, start:end], occupied[start:end]
            if below:
                total = torch.nn.functional.pad(own.cumsum(1), (1, 0))  # before each panel
                counts.append(total[:, torch.searchsorted(position, position - reach)])
            else:
                from_each_on = own.flip(1).cumsum(1).flip(1)
                total = torch.nn.functional.pad(from_each_on, (0, 1))
                counts.append(total[:, torch.searchsorted(position, position + reach + 1)])
        return torch.cat(counts, dim=1)


def lay_line(sources: Tensor, queries: Tensor, problem: Tensor, panel: Tensor, reach: int) -> Line:
    """The line for sources [C, M], M > 0, and queries [Q] of `problem`, finite or NaN.

    Queries that are sources need not be given (Q = 0). Panels are `panel` [C, 1] wide. Reads
    the number of panels back to the host.
    """
    low, high = torch.aminmax(sources, dim=1, keepdim=True)  # [C, 1]
    if len(queries):
        low = low[:, 0].scatter_reduce(0, problem, queries, "amin")[:, None]
        high = high[:, 0].scatter_reduce(0, problem, queries, "amax")[:, None]
    per_panel = 1 / panel
    needed = float(((high.double() - low.double()) * per_panel).max())
    if math.isnan(needed):
        line = lay_line(sources.nan_to_num(), queries.nan_to_num(), problem, panel, reach)
        return line._replace(poison=low[:, 0] * 0)
    num_problems, num_rows = len(sources), sources.shape[1] + len(queries)
    # A panel costs as much as several rows.
    longest = max(1024 // num_problems, num_rows // 4)
    if needed < longest:
        return Line(low, per_panel, int(needed) + 1 + reach)

    parts = [torch.cat((own, queries[problem == c])) for c, own in enumerate(sources)]
    cut = [_segments(own, 1 / float(p), reach) for own, p in zip(parts, panel, strict=True)]
    length = max(length for _, length in cut) + reach
    line = Line(low, per_panel, length, tuple(segments for segments, _ in cut))
    if length <= longest:
        return line
    slots = [line.locate(sources, None)[0].flatten(), line.locate(queries, problem)[0]]
    return line._replace(occupied=torch.cat(slots).unique())


def _segments(scores: Tensor, per_panel: float, reach: int) -> tuple[Segments, int]:
    """Segments for the scores [n] of one problem, and how many panels they take.

    Scores near the median are one segment as they stand; only those outside are sorted.
    """
    sample = scores[:: max(1, len(scores) // _SAMPLE)].double()
    half_window = max(1024, len(scores)) / (2 * per_panel)
    is_inside = (scores - sample.median()).abs_() < half_window
    inside, outside = scores[is_inside], scores[~is_inside]
    core = torch.stack(inside.aminmax())
    values, order = torch.cat((outside, core)).sort(stable=True)

    gaps = values.double().diff().mul_(per_panel)  # in panels
    is_cut = gaps > reach + 2
    is_cut &= order[:-1] != len(outside)  # the gap that follows core's lowest is not empty
    starts = torch.nn.functional.pad(is_cut, (1, 0), value=True)  # [n]: begins a segment
    segment = starts.cumsum(0) - 1
    anchors = values[starts]
    extent = anchors.new_zeros(len(anchors), dtype=torch.float64)
    extent.index_add_(0, segment[1:], torch.where(is_cut, 0.0, gaps))
    steps = extent.long() + 1 + reach + 1  # the panels of a segment, then the empty ones
    slots = steps.cumsum(0) - steps
    return Segments(anchors, slots), int(slots[-1] + steps[-1])
