"""Soft ranks of problems of unequal length, without padding to the longest.

Small problems of similar length form a rectangle, in which a row below all others fills the shorter
ones: there is no loop over problems, only one over rectangles, whose number grows with the
logarithm of the longest problem beside the shortest. Large ones share a line of panels as they lie.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from operator import neg
from typing import NamedTuple

import torch
from torch import Tensor

from imbalanced_losses._ranking.layout import Layout
from imbalanced_losses._ranking.plan import Canonical, Listed, RankPlan, SlopesOf

# The longest problem of a rectangle beside its shortest: at most so much of it is padding.
_EVEN = 1.25


class Part(NamedTuple):
    """Some of the problems, as a rectangle of the form of others or as a line."""

    problems: Tensor  # [k], which
    rows: Tensor  # [k, m], where their rows are, or [1, s]; the one after the last is padding
    queries: Tensor  # [q], which of the queries, problem by problem
    problem: Tensor  # [q], the problem of each in 0..k-1
    row: Tensor  # [q], its column
    lengths: Tensor | None  # [k] of a line

    def of(self, given: Canonical) -> Canonical:
        """The same problems as if there were no others."""
        tau = given.temperature
        # Padding is below every score, and a σ of 0 beside them.
        lowest = torch.finfo(given.scores.dtype).min
        return given._replace(
            scores=self.taken(given.scores, lowest),
            is_positive=self.taken(given.is_positive),
            weights=None if given.weights is None else self.taken(given.weights),
            temperature=tau[self.problems] if isinstance(tau, Tensor) else tau,
            num_live=self.rows.shape[1],
            layout=Layout(self.rows.shape, self.lengths),
        )

    def listed(self, queries: Listed) -> Listed:
        """The queries among them."""
        weights = None if queries.weights is None else queries.weights[self.queries]
        return Listed(queries.rows, self.problem, self.row, weights, None, len(self.problems))

    def repeated(self, values: Tensor) -> Tensor:
        """A value [1, S] of each of their rows, that of the first row again for padding."""
        is_padding = self.rows == values.shape[1]
        return values[0][torch.where(is_padding, self.rows[:, :1], self.rows)]

    def taken(self, values: Tensor, padding: float = 0) -> Tensor:
        """A value [1, S, ...] of each of their rows."""
        last = values.new_full((1, *values.shape[2:]), padding)
        taken = torch.cat((values[0], last)).index_select(0, self.rows.flatten())
        return taken.view(*self.rows.shape, *last.shape[1:])


class RaggedRanks:
    """Soft ranks of problems that lie side by side: see `plan.RankPlan` for the contract."""

    is_whole = False

    def __init__(
        self,
        given: Canonical,
        queries: Listed,
        num_sets: int,
        plans: Sequence[tuple[Part, RankPlan]],
    ) -> None:
        self._scores, self._num_queries, self._num_sets = given.scores, len(queries.row), num_sets
        self._plans = plans

    def ranks(self) -> tuple[Tensor, ...]:
        ranks = self._empty()
        for part, plan in self._plans:
            ranks[:, part.queries] = torch.stack(plan.ranks())
        return ranks.unbind()

    def ranks_and_gradient(self, slopes_of: SlopesOf) -> tuple[tuple[Tensor, ...], Tensor]:
        ranks, num_rows = self._empty(), self._scores.shape[1]
        gradient = self._scores.new_zeros(num_rows + 1)
        for part, plan in self._plans:
            own, slopes = plan.ranks_and_gradient(
                lambda found, index, part=part: slopes_of(found, part.queries[index])
            )
            ranks[:, part.queries] = torch.stack(own)
            gradient[part.rows] = slopes
        return ranks.unbind(), gradient[None, :num_rows]

    def _empty(self) -> Tensor:
        return self._scores.new_empty(self._num_sets, self._num_queries)


def parts_of(layout: Layout, queries: Listed) -> Iterator[Part]:
    """Problems of similar length, until every problem that has queries is in one of them."""
    assert layout.lengths is not None
    assert layout.problem is not None
    lengths, problem = layout.lengths, queries.problem
    num_problems, num_rows = layout.num_problems, int(layout.problem.shape[0])
    starts = lengths.cumsum(0) - lengths
    counts = problem.bincount(minlength=num_problems)
    sizes, order = torch.where(counts > 0, lengths, 0).sort(descending=True, stable=True)
    number = torch.empty_like(order).scatter_(
        0, order, torch.arange(num_problems, device=order.device)
    )
    by_size = number[problem]
    number_of_query, queries_by_size = by_size.sort(stable=True)
    ends = counts[order].cumsum(0).tolist()
    on_host = sizes.tolist()
    first = 0
    while first < num_problems and on_host[first] > 0:
        longest = on_host[first]
        last = bisect.bisect_right(on_host, -longest / _EVEN, first, key=neg)
        mine = slice(ends[first - 1] if first else 0, ends[last - 1])
        problems, chosen = order[first:last], queries_by_size[mine]
        place = torch.arange(longest, device=order.device)
        rows = starts[problems, None] + place
        if on_host[last - 1] < longest:
            rows = torch.where(place < sizes[first:last, None], rows, num_rows)
        yield Part(
            problems,
            rows,
            chosen,
            number_of_query[mine] - first,
            queries.row[chosen] - starts[problem[chosen]],
            None,
        )
        first = last


def joined(parts: list[Part], layout: Layout) -> Part:
    """Parts as one line, their problems in turn."""
    assert layout.lengths is not None
    assert layout.problem is not None
    problems, queries = (
        torch.cat(found) for found in zip(*(part[:1] + part[2:3] for part in parts), strict=True)
    )
    rows = torch.cat([part.rows.flatten() for part in parts])
    rows = rows[rows < layout.problem.shape[0]]
    lengths = layout.lengths[problems]
    starts = lengths.cumsum(0) - lengths
    first, found = 0, []
    for part in parts:
        found.append(part.problem + first)
        first += len(part.problems)
    problem = torch.cat(found)
    row = torch.cat([part.row for part in parts]) + starts[problem]
    return Part(problems, rows[None], queries, problem, row, lengths)
