"""The sums in linear time: panels, moments, one convolution, evaluation.

Cut the score axis into panels of width h·τ. Let x = (source − query)/τ, let s, t ∈ [−1, 1] be the
places of a source and a query within their panels, and d the number of panels between them. Then
x = (d + (s − t)/2)·h and φₙ(x) is a smooth function of s and t, so that a polynomial carries it:

    φₙ((d + (s − t)/2)·h) ≈ Σ_a Σ_b A[a, b, d] · tᵃ · sᵇ,        a, b < p

and a sum over sources falls into three steps, none of which knows about pairs:

    moments      m[b, j] = Σ_{sources in panel j} weight · sᵇ             O(M·p)
    convolution  f[a, i] = Σ_d Σ_b A[a, b, d] · m[b, i + d]               O(panels·p²·(2W + 1))
    evaluation   out     = Σ_a f[a, panel] · tᵃ                           O(Q·p)

Only |d| ≤ W are summed so. Beyond, σ is 0 or 1 to rounding, and sources farther up count whole, by
a cumulative sum; the derivatives of σ vanish. The transposed sums are the same three steps with
queries and sources exchanged.

Error. φₙ is analytic but for its poles at x = ±iπ, so Chebyshev interpolation in a panel converges
like ρ^(−p) with ρ = 2π/h + √((2π/h)² + 1): 6.4 at h = 2, 12.6 at h = 1, 79 at h = 0.16. Far panels
lose nothing by that: φₙ decays there like e^(−|x|), and its interpolation error with it. Measured,
as the largest error over all places and panels, in brackets that of σ′ relative to the largest σ′
of its panel:

    p    h     W     used for                            σ        σ′
    10   2     18    float32, few rows                   2e-8     7e-8    (3e-7)
    7    1     36    float32, 32 rows a panel            5e-8     1e-7    (4e-7)
    4    0.16  225   float32, 32 rows a panel            5e-8     1e-7    (4e-7)
    16   2     20    float64                             2e-13    2e-12   (6e-12)

Errors of different pairs have different signs, so that sums over many are better than this. The
tail that is dropped is e^(−W·h): 2e-16 of each source for float32, 4e-18 for float64. Places,
moments and convolution are float64 throughout: neither the offset of the scores nor the number of
rows adds to the error.

Any scores. Where the range of the scores is too many panels, gaps without a source are shortened
to what the panels reach, which no sum can tell from the true gap (`_panel_line`). An outlier costs
two dozen panels and no sort.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from imbalanced_losses._ranking.layout import Layout
from imbalanced_losses._ranking.panels.line import Line, Precision, lay_line
from imbalanced_losses._ranking.panels.table import table_spectrum, translation_table
from imbalanced_losses._ranking.plan import (
    Canonical,
    Listed,
    Processes,
    Rows,
    SlopesOf,
    at,
    half_of,
    is_in,
)
from imbalanced_losses._ranking.scratch import Place, scratch

# Sources that pass through moments and evaluation at a time: their powers stay in the cache.
BLOCK = 1 << 15
# Panels that one call convolves: it copies 2W + 1 of them for each.
_STRETCH = 1 << 10
# Negatives from which it is worth looking for those that have a slope, and the share of these up to
# which they are set apart.
_WORTH_PARTING, _MOST_STEEP = 1 << 15, 0.7


# Convolutions cost by the panel, the rest by the row and coefficient: the first whose panels are
# few beside the rows is taken, else the last.
PRECISIONS = {
    torch.float32: (
        Precision(degree=4, width=0.16, reach=225),
        Precision(degree=7, width=1.0, reach=36),
        Precision(degree=10, width=2.0, reach=18),
    ),
    torch.float64: (Precision(degree=16, width=2.0, reach=20),),
}


class _Points(NamedTuple):
    """Scores as the panels see them."""

    slot: Tensor  # [n] int64, the panel on the line
    place: Tensor  # [n] float64 in [−1, 1], within the panel

    def powers(self, degree: int) -> Tensor:
        """place⁰ … placeᵖ⁻¹: [p, n]."""
        shape = (degree, len(self.place))
        powers = scratch(Place.POWERS, shape, self.place, torch.float64)
        if powers is None:
            powers = self.place.new_empty(shape)
        first, last, *rest = powers.unbind()
        first.fill_(1)
        last.copy_(self.place)
        for power in rest:
            last = torch.mul(last, self.place, out=power)
        return powers


class _Cloud:
    """Scores located on the line, a block at a time; one block is located once and kept."""

    def __init__(self, scores: Tensor, problem: Tensor | None, line: Line) -> None:
        self.scores = scores  # [C, M] sources, or [Q] queries
        self.problem = problem  # [Q] for queries, else None
        self.line = line
        self._kept: _Points | None = None

    def blocks(self) -> Iterator[tuple[slice, _Points]]:
        """Yield (columns of the scores, where they lie): valid until the next block."""
        num_columns = self.scores.shape[-1]
        step = max(1, BLOCK * num_columns // max(1, self.scores.numel()))
        if num_columns <= step:
            if self._kept is None:
                slot, place = self._located(slice(None))
                self._kept = _Points(slot.clone(), place.clone())
            yield slice(None), self._kept
            return
        for start in range(0, num_columns, step):
            columns = slice(start, start + step)
            yield columns, self._located(columns)

    def _located(self, columns: slice) -> _Points:
        problem = None if self.problem is None else self.problem[columns]
        slot, place = self.line.locate(self.scores[..., columns], problem)
        return _Points(slot.flatten(), place.flatten())


class Panels:
    """The three steps, for queries [Q] and sources [C, M] on one line of panels."""

    def __init__(
        self,
        queries: Tensor,
        problem: Tensor,
        sources: Tensor,
        temperature: float | Tensor,
        layout: Layout | None = None,
        for_ranks: bool = False,
        processes: Processes | None = None,
        precisions: Sequence[Precision] | None = None,
        is_asked: Tensor | None = None,
    ) -> None:
        # Ranks: queries are sources, and vmap, which cannot write to given memory, stays outside.
        self._is_plain = for_ranks
        self.is_single = sources.dtype == torch.float32
        num_problems = len(sources) if layout is None else layout.num_problems
        if not isinstance(temperature, Tensor):
            temperature = sources.new_full((num_problems,), temperature, dtype=torch.float64)
        rectangle = sources
        strangers = queries, problem
        if for_ranks:
            strangers = queries[:0], problem[:0]
        precisions = precisions or PRECISIONS[sources.dtype]
        if processes is not None:
            precisions = precisions[-1:]  # the fewest moments to exchange
        if is_asked is None:
            is_asked = problem.new_zeros(num_problems).index_fill_(0, problem[-1:], 1)
            if num_problems > 1:
                is_asked.index_fill_(0, problem, 1)
        source_problem = None if layout is None else layout.problem
        if source_problem is not None:  # side by side, as queries are
            sources, rectangle = sources[0], sources.new_empty(num_problems, 0)
            strangers = sources, source_problem
        self.precision, self.line = lay_line(
            rectangle,
            *strangers,
            is_asked,
            temperature.double()[:, None],
            precisions,
            processes,
        )
        self.sources = _Cloud(sources, source_problem, self.line)
        self.queries = _Cloud(queries, problem, self.line)

    def _scratch(self, place: Place, shape: tuple[int, ...]) -> Tensor | None:
        return scratch(place, shape, self.sources.scores, torch.float64) if self._is_plain else None

    def moments(self, cloud: _Cloud, weights: Tensor | None) -> Tensor:
        """Σ weight · placeᵇ of each panel: weights [K, *cloud], None = 1 -> [K, p, S]."""
        degree = self.precision.degree
        if weights is not None and self.line.poison is not None:
            weights = weights.nan_to_num()  # of the problem that is NaN anyhow; it must not spread
        num_columns = 1 if weights is None else len(weights)
        like = cloud.scores if weights is None else weights  # which vmap may have batched
        out = like.new_zeros(num_columns * degree, self.line.num_panels, dtype=torch.float64)
        for columns, points in cloud.blocks():
            weighted = points.powers(degree)
            if weights is not None:
                own = _columns(weights, columns).reshape(num_columns, 1, -1)
                shape = (num_columns, *weighted.shape)
                weighted = torch.mul(weighted, own, out=self._scratch(Place.WEIGHTED_POWERS, shape))
                weighted = weighted.reshape(num_columns * degree, -1)
            out.scatter_add_(1, points.slot.expand(len(out), -1), weighted)
        return out.view(num_columns, degree, -1)

    def field(self, moments: Tensor, order: int, transposed: bool = False) -> Tensor:
        """What moments [K, p, S] give under φₙ, as coefficients of powers of the place [K, p, S].

        Of sources, for queries; transposed, of queries, for sources.
        """
        degree, width, reach = self.precision
        occupied = self.line.occupied
        if occupied is None and self.is_single:
            spectrum = partial(table_spectrum, order, *self.precision, transposed, moments.device)
            field = _convolved_by_transform(moments, spectrum, reach)
        else:
            table = translation_table(order, degree, width, reach, moments.device)
            if transposed:
                table = table.transpose(0, 1).flip(2)
            if occupied is None:
                field = _convolved(moments, table)
            else:
                field = _convolved_where_occupied(moments, table, occupied)
        if order == 0:
            field[:, 0] += self.line.whole_counts(moments[:, 0], reach, transposed)
        return field

    def evaluated(self, field: Tensor, cloud: _Cloud, dtype: torch.dtype) -> Tensor:
        """Σ_a field[k, a, panel] · placeᵃ: [K, p, S] -> [K, *cloud] of a dtype."""
        out = field.new_empty((len(field), *cloud.scores.shape), dtype=dtype)
        for columns, values in self.values(field, cloud):
            target = _columns(out, columns)
            target.copy_(values.view(target.shape))
        return out

    def values(self, field: Tensor, cloud: _Cloud) -> Iterator[tuple[slice, Tensor]]:
        """The same a block at a time: columns of the cloud, and [K, rows of the block] float64.

        In memory that the next block takes.
        """
        num_fields, degree, _ = field.shape
        poison = self.line.poison
        flat = field.reshape(num_fields * degree, -1)
        for columns, (slot, place) in cloud.blocks():
            shape = (len(flat), len(slot))
            coefficients = torch.gather(
                flat, 1, slot.expand(shape), out=self._scratch(Place.COEFFICIENTS, shape)
            ).view(num_fields, degree, -1)
            *rest, values = coefficients.unbind(1)
            for coefficient in reversed(rest):
                values = coefficient.addcmul_(values, place)
            if poison is not None and cloud.problem is not None:
                values = values + poison[cloud.problem[columns]]
            elif poison is not None:
                values = (values.unflatten(1, (len(poison), -1)) + poison[:, None]).flatten(1)
            yield columns, values


def _columns(tensor: Tensor, columns: slice) -> Tensor:
    """Some columns; all without a view, for which the vmap of batched gradients has no rule."""
    return tensor if columns == slice(None) else tensor[..., columns]


def _convolved(moments: Tensor, table: Tensor) -> Tensor:
    """The convolution of moments [K, p, S] with a table [p, p, 2W + 1], a stretch at a time."""
    reach = table.shape[2] // 2
    num_panels = moments.shape[2]
    if num_panels <= _STRETCH:
        return torch.nn.functional.conv1d(moments, table, padding=reach)
    padded = torch.nn.functional.pad(moments, (reach, reach))
    stretches = []
    for start in range(0, num_panels, _STRETCH):
        length = min(_STRETCH, num_panels - start) + 2 * reach
        stretches.append(torch.nn.functional.conv1d(padded.narrow(2, start, length), table))
    return torch.cat(stretches, dim=2)


def _convolved_by_transform(
    moments: Tensor, spectrum: Callable[[int], Tensor], reach: int
) -> Tensor:
    """The convolution of moments [K, p, S], by Fourier transforms of overlapping stretches.

    Its error is absolute, 1e-16 of the largest moments in a stretch: nothing beside float32 scores,
    unless weights differ by more than a millionfold.
    """
    num_columns, degree, num_panels = moments.shape
    size = 128 if num_panels <= 128 - 2 * reach else 512 if reach < 128 else 2048
    step = size - 2 * reach  # panels that a stretch gives the field of
    num_stretches = -(-num_panels // step)
    padding = (reach, num_stretches * step + reach - num_panels)
    stretches = torch.nn.functional.pad(moments, padding).unfold(2, size, step)  # [K, p, n, size]
    transform = torch.fft.rfft(stretches).permute(3, 1, 0, 2)  # [F, p, K, n]
    product = spectrum(size) @ transform.reshape(len(transform), degree, -1)
    product = product.view(transform.shape).permute(2, 1, 3, 0)  # [K, p, n, F]
    field: Tensor = torch.fft.irfft(product, n=size)[..., :step]
    return field.reshape(num_columns, degree, -1)[..., :num_panels]


def _convolved_where_occupied(moments: Tensor, table: Tensor, occupied: Tensor) -> Tensor:
    """The convolution of moments [K, p, S] with a table [p, p, 2W + 1], of panels at `occupied`."""
    reach = table.shape[2] // 2
    rows = moments.permute(2, 0, 1).contiguous()  # [S, K, p]
    field = rows @ table[:, :, reach].T
    neighbour = torch.arange(len(occupied), device=occupied.device)
    for distance in range(1, reach + 1):
        # The first panel at least `distance` above each one: one step on where one was nearer.
        neighbour += occupied[neighbour] < occupied + distance
        neighbour.clamp_(max=len(occupied) - 1)
        lower = (occupied[neighbour] == occupied + distance).nonzero().squeeze(1)
        upper = neighbour[lower]
        field.index_add_(0, lower, rows[upper] @ table[:, :, reach + distance].T)
        field.index_add_(0, upper, rows[lower] @ table[:, :, reach - distance].T)
    return field.permute(1, 2, 0).contiguous()


class PanelPlan:
    """Φₙ in linear time: see `_plan.Plan` for the contract."""

    def __init__(
        self, queries: Tensor, problem: Tensor, sources: Tensor, temperature: float | Tensor
    ) -> None:
        self.problem = problem
        self.panels = Panels(queries, problem, sources, temperature)

    def sums(self, order: int, weights: Tensor) -> Tensor:
        panels = self.panels
        moments = panels.moments(panels.sources, weights.movedim(-1, 0).double())
        field = panels.field(moments, order)
        return panels.evaluated(field, panels.queries, weights.dtype).movedim(0, -1)  # [Q, K]

    def transposed_sums(self, order: int, cotangent: Tensor) -> Tensor:
        panels = self.panels
        moments = panels.moments(panels.queries, cotangent.movedim(-1, 0).double())
        field = panels.field(moments, order, transposed=True)
        return panels.evaluated(field, panels.sources, cotangent.dtype).movedim(0, -1)

    def both_sums(self, order: int, weights: Tensor, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        return self.sums(order, weights), self.transposed_sums(order, cotangent)


class _Moved(NamedTuple):
    """Queries [n] that have a gradient."""

    cloud: _Cloud
    problem: Tensor
    row: Tensor
    weights: Tensor | None
    cotangent: Tensor  # [K, n], the slopes by their ranks

    def at(self, index: Tensor, line: Line) -> _Moved:
        """Some of them."""
        problem, row, weights = self.problem, self.row, self.weights
        problem = problem.index_select(0, index) if len(line.origin) > 1 else problem[: len(index)]
        return _Moved(
            _Cloud(self.cloud.scores.index_select(0, index), problem, line),
            problem,
            row.index_select(0, index),
            None if weights is None else weights.index_select(0, index),
            self.cotangent.index_select(1, index),
        )


class PanelRanks:
    """Soft ranks in linear time: see `plan.RankPlan` for the contract."""

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
            sources = _Cloud(scores[:, : given.num_live], None, panels.line)
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

    def _cloud_of(self, rows: Listed) -> _Cloud:
        return _Cloud(rows.of_row(self.given.scores), rows.problem, self.panels.line)


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
