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
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from imbalanced_losses._engine._scratch import scratch

# Rows that tell where the bulk of the scores lies.
_SAMPLE = 1024
# Rows from which finer panels are worth a line that is cut.
_WORTH_CUTTING = 1 << 16


class Precision(NamedTuple):
    """What decides the error: see the module docstring."""

    degree: int  # p, coefficients a panel
    width: float  # h, panel width in units of the temperature
    reach: int  # W, panels to either side that are summed by polynomials


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
        """Panel (int64) and place in [−1, 1] (float64) of scores [C, m], or [n] of `problem`.

        Both in scratch memory, maybe, which the next call takes.
        """
        if self.poison is not None:
            scores = scores.nan_to_num()
        if self.segments:
            slot, place = self._locate_in_segments(scores, problem)
        else:
            origin, per_panel = self._of(problem)
            shape = tuple(scores.shape)
            coordinate = torch.sub(
                scores, origin.double(), out=scratch(0, shape, scores, torch.float64)
            ).mul_(per_panel)
            memory = scratch(0, shape, scores, torch.int64)
            slot = coordinate.long() if memory is None else memory.copy_(coordinate)
            place = coordinate.frac_().mul_(2).sub_(1)
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


def lay_line(
    sources: Tensor,
    queries: Tensor,
    problem: Tensor,
    temperature: Tensor,
    precisions: Sequence[Precision],
) -> tuple[Precision, Line]:
    """The line for sources [C, M], M > 0, and queries [Q] of `problem`, finite or NaN.

    Queries that are sources need not be given (Q = 0). Of the precisions, finest panels first, it
    takes the first that gets by with few panels beside the rows. `temperature` is [C, 1] float64.
    Reads the range of the scores back to the host.
    """
    low, high = sources.amin(1, keepdim=True), sources.amax(1, keepdim=True)  # [C, 1]
    if len(queries):
        low = low[:, 0].scatter_reduce(0, problem, queries, "amin")[:, None]
        high = high[:, 0].scatter_reduce(0, problem, queries, "amax")[:, None]
    extent = float(((high.double() - low.double()) / temperature).max())  # in τ
    if math.isnan(extent):
        precision, line = lay_line(
            sources.nan_to_num(), queries.nan_to_num(), problem, temperature, precisions
        )
        return precision, line._replace(poison=low[:, 0] * 0)
    num_problems, num_rows = len(sources), sources.shape[1] + len(queries)
    for precision in precisions:
        is_last = precision is precisions[-1]
        longest = num_rows // 32
        if is_last:
            longest = max(1024 // num_problems, min(num_rows, 4096), num_rows // 4)
        per_panel = 1 / (precision.width * temperature)
        needed = extent / precision.width
        if needed < longest:
            return precision, Line(low, per_panel, int(needed) + 1 + precision.reach)
        if num_rows < _WORTH_CUTTING and not is_last:
            continue
        line = _cut_line(sources, queries, problem, low, per_panel, precision.reach)
        if line.length <= longest:
            return precision, line
    own, strangers = (
        line.locate(sources, None)[0].flatten().clone(),
        line.locate(queries, problem)[0],
    )
    return precision, line._replace(occupied=torch.cat((own, strangers)).unique())


def _cut_line(
    sources: Tensor, queries: Tensor, problem: Tensor, low: Tensor, per_panel: Tensor, reach: int
) -> Line:
    """The line in which long gaps are shortened."""
    parts = [torch.cat((own, queries[problem == c])) for c, own in enumerate(sources)]
    rates = per_panel[:, 0].tolist()
    cut = [_segments(own, rate, reach) for own, rate in zip(parts, rates, strict=True)]
    length = max(length for _, length in cut) + reach
    return Line(low, per_panel, length, tuple(segments for segments, _ in cut))


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
