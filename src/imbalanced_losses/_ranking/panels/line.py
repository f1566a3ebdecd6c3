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

from imbalanced_losses._checks.tracing import is_on_host
from imbalanced_losses._ranking.plan import Processes
from imbalanced_losses._ranking.scratch import Place, scratch

# Rows that tell where the bulk of the scores lies.
_SAMPLE = 1024
# Rows from which finer panels are worth a line that is cut.
_WORTH_CUTTING = 1 << 16
# Panels whose masses one product sums up.
_SUMMED = 256


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
        is_asked: [C] float64, 1 for a problem that has queries, else 0.
        segments: one for each problem, where the line is cut; else empty.
        occupied: [S] int64 ascending, the slots that hold a score, where only these are kept; the
            S panels are then numbered in this order. Else None.
        poison: [C], where some problem holds a NaN: NaN for such a problem, if it has queries, and
            0 for the others. The NaN itself is located as 0. Else None.
    """

    origin: Tensor
    per_panel: Tensor
    length: int
    is_asked: Tensor
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
                scores,
                origin.double(),
                out=scratch(Place.COORDINATES, shape, scores, torch.float64),
            ).mul_(per_panel)
            memory = scratch(Place.COORDINATES, shape, scores, torch.int64)
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
            counts[..., skipped:] = _cumulated(mass)[..., :-skipped]
        else:
            # Summed from the top, where ranks are small, so that small ranks keep every digit.
            counts[..., :-skipped] = _cumulated(mass.flip(2)).flip(2)[..., skipped:]
        return counts.reshape(len(mass), -1)

    def _of(self, problem: Tensor | None) -> tuple[Tensor, Tensor]:
        """Origin and panels per unit, to go with scores [C, m] or [n]."""
        if problem is None:
            return self.origin, self.per_panel
        if len(self.origin) == 1:
            return self.origin[0], self.per_panel[0]
        return (
            self.origin[:, 0].index_select(0, problem),
            self.per_panel[:, 0].index_select(0, problem),
        )

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
                total = torch.nn.functional.pad(_cumulated(own), (1, 0))  # before each panel
                counts.append(total[:, torch.searchsorted(position, position - reach)])
            else:
                from_each_on = _cumulated(own.flip(1)).flip(1)
                total = torch.nn.functional.pad(from_each_on, (0, 1))
                counts.append(total[:, torch.searchsorted(position, position + reach + 1)])
        return torch.cat(counts, dim=1)


def _cumulated(mass: Tensor) -> Tensor:
    """Cumulative sums over the last dimension."""
    if mass.is_cuda and torch.are_deterministic_algorithms_enabled():
        return _cumulated_by_products(mass)  # PyTorch's own refuses then
    return mass.cumsum(-1)


def _cumulated_by_products(mass: Tensor) -> Tensor:
    """The same by matrix products: within blocks, and of blocks."""
    length = mass.shape[-1]
    size = min(length, _SUMMED)
    ones = mass.new_ones(size, size).triu()
    if length <= size:
        return mass @ ones
    padded = torch.nn.functional.pad(mass, (0, -length % size))
    within = padded.unflatten(-1, (-1, size)) @ ones
    up_to = _cumulated_by_products(within[..., -1])
    before = torch.nn.functional.pad(up_to[..., :-1], (1, 0))
    summed: Tensor = (within + before[..., None]).flatten(-2)[..., :length]
    return summed


def lay_line(
    sources: Tensor,
    queries: Tensor,
    problem: Tensor,
    is_asked: Tensor,
    temperature: Tensor,
    precisions: Sequence[Precision],
    processes: Processes | None = None,
) -> tuple[Precision, Line]:
    """The line for sources [C, M] and queries [Q] of `problem`, finite or NaN.

    Queries that are sources need not be given (Q = 0). `is_asked` [C] is 1 for problems that have
    queries of either kind, else 0. Of the precisions, finest panels first, it takes the first that
    gets by with few panels beside the rows. `temperature` is [C, 1] float64. Processes that hold
    rows of the same problems lay the same line. Reads the range of the scores back to the host.
    """
    num_problems = len(sources)
    num_rows = sources.shape[1] + len(queries) // num_problems
    low, high, holds_nan = _range(sources, queries, problem)
    is_asked = is_asked.double()
    if processes is not None:
        own_rows = torch.full_like(low, num_rows)
        found = processes.max(torch.stack((-low, high, holds_nan, is_asked, own_rows)))
        num_rows = int(found[4].max())  # what a process spends on rows; each convolves all panels
        low, high, holds_nan, is_asked = -found[0], found[1], found[2], found[3]
        is_empty = low > high
        low, high = low.masked_fill(is_empty, 0), high.masked_fill(is_empty, 0)
    low, high = low[:, None], high[:, None]
    extents = (high - low) / temperature  # in τ
    extent, any_nan = _numbers(torch.stack((extents.max(), holds_nan.max())))
    poison = None
    if any_nan:
        sources, queries = sources.nan_to_num(), queries.nan_to_num()
        is_poisoned = (holds_nan > 0) & (is_asked > 0)
        poison = torch.where(is_poisoned, math.inf, 0.0).mul_(0).to(sources.dtype)  # ∞ · 0
    for precision in precisions:
        is_last = precision is precisions[-1]
        longest = num_rows // 32
        if is_last:
            longest = max(1024 // num_problems, min(num_rows, 4096), num_rows // 4)
        per_panel = 1 / (precision.width * temperature)
        needed = extent / precision.width
        if needed < longest:
            length = int(needed) + 1 + precision.reach
            return precision, Line(low, per_panel, length, is_asked, poison=poison)
        if num_rows < _WORTH_CUTTING and not is_last:
            continue
        segments, length = _segments(sources, queries, problem, per_panel, precision, processes)
        line = Line(low, per_panel, length, is_asked, segments, poison=poison)
        if length <= longest:
            return precision, line
    own, strangers = (
        line.locate(sources, None)[0].flatten().clone(),
        line.locate(queries, problem)[0],
    )
    occupied = torch.cat((own, strangers)).unique()
    if processes is not None:
        occupied = processes.concatenated(occupied).unique()
    return precision, line._replace(occupied=occupied)


def _numbers(values: Tensor) -> list[float]:
    """The values [n] as Python's: one read of a device."""
    if is_on_host(values):
        return [value.item() for value in values]  # tolist of torch 2.6 fails under torch.func
    found: list[float] = values.tolist()
    return found


def _range(sources: Tensor, queries: Tensor, problem: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Lowest score, highest score, and whether one is NaN, which the others are taken without.

    [C] float64 each; +inf and −inf where there is no score.
    """
    low, high = _lowest_and_highest(sources, queries, problem)
    is_nan = low.isnan()
    if not is_on_host(low) or bool(is_nan.any()):
        low, high = _lowest_and_highest(sources.nan_to_num(), queries.nan_to_num(), problem)
    return low, high, is_nan.double()


def _lowest_and_highest(sources: Tensor, queries: Tensor, problem: Tensor) -> tuple[Tensor, Tensor]:
    if sources.shape[1]:
        low, high = sources.amin(1).double(), sources.amax(1).double()
    else:
        low = torch.full((len(sources),), math.inf, dtype=torch.float64, device=sources.device)
        high = -low
    if len(queries):
        low = low.scatter_reduce(0, problem, queries.double(), "amin")
        high = high.scatter_reduce(0, problem, queries.double(), "amax")
    return low, high


def _segments(
    sources: Tensor,
    queries: Tensor,
    problem: Tensor,
    per_panel: Tensor,
    precision: Precision,
    processes: Processes | None,
) -> tuple[tuple[Segments, ...], int]:
    """Segments of every problem on the line in which long gaps are shortened, and its length."""
    reach, rates = precision.reach, _numbers(per_panel[:, 0])
    intervals = [
        _intervals(torch.cat((own, queries[problem == c])), rate, reach)
        for c, (own, rate) in enumerate(zip(sources, rates, strict=True))
    ]
    if processes is not None:
        numbers = [torch.full_like(own[:, :1], c) for c, own in enumerate(intervals)]
        own_rows = torch.cat((torch.cat(numbers), torch.cat(intervals)), dim=1)
        rows = processes.concatenated(own_rows)
        intervals = [
            _merged(rows[rows[:, 0] == c, 1:], rate, reach) for c, rate in enumerate(rates)
        ]
    cut = [_laid(own, rate, reach) for own, rate in zip(intervals, rates, strict=True)]
    segments = tuple(
        Segments(starts.to(sources.dtype).contiguous(), slots) for starts, slots, _ in cut
    )
    return segments, max(length for *_, length in cut) + reach


def _intervals(scores: Tensor, per_panel: float, reach: int) -> Tensor:
    """First and last score [n, 2] float64 of each segment of one problem's scores [m].

    Scores near the median are one segment as they stand; only those outside are sorted.
    """
    if len(scores) == 0:
        return scores.new_empty(0, 2, dtype=torch.float64)
    sample = scores[:: max(1, len(scores) // _SAMPLE)].double()
    half_window = math.inf  # a panel wider than any number
    if per_panel > 0:
        half_window = max(1024, len(scores)) / (2 * per_panel)
    is_inside = (scores - sample.median()).abs_() < half_window
    inside, outside = scores[is_inside], scores[~is_inside]
    core = torch.stack(inside.aminmax())
    values, order = torch.cat((outside, core)).sort(stable=True)

    values = values.double()
    is_cut = values.diff().mul_(per_panel) > reach + 2  # in panels
    is_cut &= order[:-1] != len(outside)  # the gap that follows core's lowest is not empty
    starts = torch.nn.functional.pad(is_cut, (1, 0), value=True)
    ends = torch.nn.functional.pad(is_cut, (0, 1), value=True)
    return torch.stack((values[starts], values[ends]), dim=1)


def _merged(intervals: Tensor, per_panel: float, reach: int) -> Tensor:
    """Intervals [n, 2] of several processes, those joined that are not a long gap apart."""
    starts, order = intervals[:, 0].sort()
    ends = intervals[order, 1].cummax(0).values
    is_cut = (starts[1:] - ends[:-1]).mul_(per_panel) > reach + 2
    first = torch.nn.functional.pad(is_cut, (1, 0), value=True)
    last = torch.nn.functional.pad(is_cut, (0, 1), value=True)
    return torch.stack((starts[first], ends[last]), dim=1)


def _laid(intervals: Tensor, per_panel: float, reach: int) -> tuple[Tensor, Tensor, int]:
    """Start and slot [n] of each segment, and how many panels they take."""
    starts, ends = intervals.unbind(1)
    # The panels of a segment, then the empty ones.
    steps = (ends - starts).mul_(per_panel).long() + 1 + reach + 1
    slots = steps.cumsum(0) - steps
    return starts, slots, int(steps.sum())
