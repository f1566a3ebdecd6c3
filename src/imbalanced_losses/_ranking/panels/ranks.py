"""Soft ranks and their slopes by panels: what training asks for at every step."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from imbalanced_losses._ranking.panels.line import Line
from imbalanced_losses._ranking.panels.panels import Cloud, Panels
from imbalanced_losses._ranking.plan import Canonical, Listed, Rows, SlopesOf, at, half_of, is_in

# Negatives from which it is worth looking for those that have a slope, and the share of these up to
# which they are set apart.
_WORTH_PARTING, _MOST_STEEP = 1 << 15, 0.7


class _Moved(NamedTuple):
    """Queries [n] that have a gradient."""

    cloud: Cloud
    problem: Tensor
    row: Tensor
    weights: Tensor | None
    cotangent: Tensor  # [K, n], the slopes by their ranks

    def at(self, index: Tensor, line: Line) -> _Moved:
        """Some of them."""
        problem, row, weights = self.problem, self.row, self.weights
        problem = problem.index_select(0, index) if len(line.origin) > 1 else problem[: len(index)]
        return _Moved(
            Cloud(self.cloud.scores.index_select(0, index), problem, line),
            problem,
            row.index_select(0, index),
            None if weights is None else weights.index_select(0, index),
            self.cotangent.index_select(1, index),
        )


class PanelRanks:
    """Soft ranks in linear time: see `plan.RankPlan` for the contract."""

    is_whole = True

    def __init__(self, given: Canonical, queries: Listed, among: tuple[Rows, ...]) -> None:
        self.given, self.queries, self.among = given, queries, among
        problem = queries.problem
        self.panels = Panels(
            queries.of_row(given.scores),
            problem,
            given.scores,
            given.temperature,
            given.layout,
            for_ranks=True,
            processes=given.processes,
        )
        self._own = None if queries.weights is None else queries.weights[None]  # [1, Q]
        self._ranks: tuple[Tensor, ...] | None = None
        # Beside negatives positives are few: as a list of their own.
        self._positives: Listed | None = None
        if queries.rows == "negatives":
            self._positives = _positives_of(given, self.panels.line.is_asked)

    def ranks(self) -> tuple[Tensor, ...]:
        if self._ranks is None:
            self._ranks = self._ranked()
        return self._ranks

    def _ranked(self) -> tuple[Tensor, ...]:
        panels, given, queries = self.panels, self.given, self.queries
        moments = torch.cat([self._moments_of(rows) for rows in self.among])  # [K, p, S]
        self._moments = moments if given.processes is None else given.processes.sum(moments)
        field = panels.field(self._moments, 0)
        halves = [half_of(queries, rows, given) for rows in self.among]
        ranks = given.scores.new_empty(len(halves), len(queries.row))
        for columns, values in panels.values(field, panels.queries):
            for rank, own, half in zip(ranks, values, halves, strict=True):
                rank[columns] = own.add_(half[columns] if isinstance(half, Tensor) else half)
        return ranks.unbind()

    def _moments_of(self, rows: Rows) -> Tensor:
        """[1, p, S] of the rows of a set."""
        panels = self.panels
        if rows == self.queries.rows:
            return panels.moments(panels.queries, self._own)
        if rows == "positives" and self._positives is not None:
            own = self._positives
            weights = None if own.weights is None else own.weights[None]
            return panels.moments(self._cloud_of(own), weights)
        column = self.given.column(rows)
        return panels.moments(panels.sources, None if column is None else column[None])

    def ranks_and_gradient(self, slopes_of: SlopesOf) -> tuple[tuple[Tensor, ...], Tensor]:
        ranks = self.ranks()
        slopes = slopes_of(ranks, slice(None))
        return ranks, self._gradient(torch.stack(slopes))

    def _gradient(self, cotangent: Tensor) -> Tensor:
        """[K, Q], the slopes by the ranks, -> [C, M]."""
        given, panels = self.given, self.panels
        scores, weights, sources = given.scores, given.weights, panels.sources
        listed, own = self.queries, self._own
        moved = _Moved(
            panels.queries, listed.problem, listed.row, None if own is None else own[0], cotangent
        )
        for_queries = panels.field(self._moments, 1)  # [K, p, S]
        steep = self._steep(cotangent)
        steeply = moved if steep is None else moved.at(steep, panels.line)
        slopes = panels.moments(steeply.cloud, steeply.cotangent)
        if given.processes is not None:
            slopes = given.processes.sum(slopes)
        for_sources = panels.field(slopes, 1, transposed=True)
        num_constant = scores.shape[1] - given.num_live
        if num_constant > 0:  # all rows have moved the fields, but only live ones are moved
            moved = moved.at((moved.row < given.num_live).nonzero().squeeze(1), panels.line)
            steep = None
            sources = Cloud(scores[:, : given.num_live], None, panels.line)
            weights = None if weights is None else weights[:, : given.num_live]
        members = [is_in(self.queries.rows, rows) for rows in self.among]
        # Rows that are no queries are sources of "all", and of the set that queries are not in.
        others = [k for k, rows in enumerate(self.among) if rows == "all" or members[k] is False]
        if self.queries.rows == "all" or not others:
            out = scores.new_zeros(len(scores), given.num_live)
        elif self._positives is not None:
            out = self._slopes_of_positives(for_sources[others].sum(0, keepdim=True))
        else:
            field = for_sources[others].sum(0, keepdim=True)
            out = panels.evaluated(field, sources, scores.dtype)[0]  # [C, num_live]
            out = out.view(len(scores), -1)
            if weights is not None:
                out *= weights
            if given.layout.num_problems > 1:  # one without queries has a gradient of exactly zero
                out *= given.layout.for_rows(panels.line.is_asked.to(out.dtype))
        own_sets = [k for k, member in enumerate(members) if member is not False]
        if steep is None:
            change = self._change(moved, for_queries, own_sets, for_sources)
        else:
            change = self._change(moved, for_queries[:0], own_sets, for_sources)
            change.index_add_(0, steep, self._change(steeply, for_queries, [], for_sources))
        if num_constant > 0:
            out = torch.nn.functional.pad(out, (0, num_constant))
        places = moved.row if len(out) == 1 else moved.row + moved.problem * out.shape[1]
        out.view(-1).index_copy_(0, places, change.to(out.dtype))
        return out

    def _steep(self, cotangent: Tensor) -> Tensor | None:
        """Which queries have slopes that the sums can tell from 0; None if most have.

        Negatives beyond a budget have none, and these are most of them.
        """
        num_queries, is_alone = cotangent.shape[1], self.given.layout.num_problems == 1
        if self._positives is None or num_queries < _WORTH_PARTING:
            return None
        is_flat = torch.ones(num_queries, dtype=torch.bool, device=cotangent.device)
        for sizes in map(torch.abs, cotangent):
            least = sizes.max() * torch.finfo(sizes.dtype).eps ** 1.5 if is_alone else 0.0
            is_flat &= sizes <= least  # no NaN is
        steep = is_flat.logical_not_().nonzero().squeeze(1)
        return steep if len(steep) < _MOST_STEEP * num_queries else None

    def _change(
        self, moved: _Moved, for_queries: Tensor, own_sets: list[int], for_sources: Tensor
    ) -> Tensor:
        """[n] float64. A query is a source of the sets that it is in, and moves its own ranks.

        These cancel: summed in float64.
        """
        fields = torch.cat((for_queries, for_sources[own_sets]))
        change = fields.new_empty(len(moved.row))
        for columns, values in self.panels.values(fields, moved.cloud):
            as_query, as_source = values.split((len(for_queries), len(own_sets)))
            for number, k in enumerate(own_sets):
                if is_in(self.queries.rows, self.among[k]) is None:
                    of_row = at(self.given.is_positive, moved.problem[columns], moved.row[columns])
                    as_source[number] *= of_row == (self.among[k] == "positives")
            total = as_source[0] if len(own_sets) == 1 else as_source.sum(0)
            if moved.weights is not None:
                total *= moved.weights[columns]
            for slope, one in zip(as_query, moved.cotangent, strict=False):
                total.addcmul_(slope, one[columns], value=-1)
            change[columns] = total
        return change

    def _slopes_of_positives(self, field: Tensor) -> Tensor:
        """[C, num_live], what a field [1, p, S] gives to positives as sources."""
        given, own = self.given, self._positives
        assert own is not None
        values = self.panels.evaluated(field, self._cloud_of(own), given.scores.dtype)[0]
        if own.weights is not None:
            values *= own.weights
        out = torch.zeros_like(given.scores, memory_format=torch.contiguous_format)
        out.view(-1).index_copy_(0, own.places(out.shape), values)
        return out[:, : given.num_live]

    def _cloud_of(self, rows: Listed) -> Cloud:
        return Cloud(rows.of_row(self.given.scores), rows.problem, self.panels.line)


def _positives_of(given: Canonical, is_asked: Tensor) -> Listed:
    """The positives of problems that have queries."""
    chosen = given.is_positive if given.weights is None else given.is_positive & (given.weights > 0)
    layout = given.layout
    if layout.num_problems > 1:
        chosen = chosen & (layout.for_rows(is_asked) > 0)
    problem, row = layout.places_of(chosen)
    listed = Listed("positives", problem, row, None, None, layout.num_problems)
    if given.weights is None:
        return listed
    return listed._replace(weights=listed.of_row(given.weights))
