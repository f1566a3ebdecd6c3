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
like ρ^(−p) with ρ = 2π/h + √((2π/h)² + 1) = 6.44 at h = 2; a derivative costs a factor of about p.
The constants of `_Precision` make the interpolation error of σ and σ′ (measured, as the largest
over all panels) 1e-8 and 5e-8 for float32 scores, below float32's own rounding, and 3e-13 and 2e-12
for float64. The tail that is dropped is e^(−W·h): 2e-16 of each source for float32, 4e-18 for
float64. Places, moments and convolution are float64 throughout, so that neither the offset of the
scores nor the number of rows adds to this.

Any scores. Where the range of the scores is too many panels, gaps without a source are shortened
to W + 1 panels, which no sum can tell from the true gap (`_line`). An outlier costs two panels and
no sort.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from imbalanced_losses._engine._panel_line import Line, lay_line
from imbalanced_losses._engine._panel_table import translation_table
from imbalanced_losses._engine._plan import SlopesOf

# Sources that pass through moments and evaluation at a time: their powers stay in the cache.
BLOCK = 1 << 16


class _Precision(NamedTuple):
    """What decides the error: see the module docstring."""

    degree: int  # p, coefficients a panel
    width: float  # h, panel width in units of the temperature
    reach: int  # W, panels to either side that are summed by polynomials


_PRECISIONS = {
    torch.float32: _Precision(degree=10, width=2.0, reach=18),
    torch.float64: _Precision(degree=16, width=2.0, reach=20),
}


class _Points(NamedTuple):
    """Scores as the panels see them."""

    slot: Tensor  # [n] int64, the panel on the line
    powers: Tensor  # [p, n] float64, place⁰ … placeᵖ⁻¹ with the place in [−1, 1]


class _Cloud:
    """Scores located on the line, a block at a time; one block is located once and kept."""

    def __init__(self, scores: Tensor, problem: Tensor | None, line: Line, degree: int) -> None:
        self.scores = scores  # [C, M] sources, or [Q] queries
        self.problem = problem  # [Q] for queries, else None
        self.line, self.degree = line, degree
        self._kept: _Points | None = None

    def blocks(self) -> Iterator[tuple[slice | None, _Points]]:
        """Yield (columns of the scores, where they lie); one block of all columns is of None."""
        num_columns = self.scores.shape[-1]
        step = max(1, BLOCK * num_columns // max(1, self.scores.numel()))
        if num_columns <= step:
            if self._kept is None:
                self._kept = self._located(slice(None))
            yield None, self._kept
            return
        for start in range(0, num_columns, step):
            columns = slice(start, start + step)
            yield columns, self._located(columns)

    def _located(self, columns: slice) -> _Points:
        problem = None if self.problem is None else self.problem[columns]
        slot, place = self.line.locate(self.scores[..., columns], problem)
        powers = place.new_empty(self.degree, place.numel())
        powers[0] = 1
        powers[1] = place.flatten()
        for a in range(2, self.degree):
            torch.mul(powers[a - 1], powers[1], out=powers[a])
        return _Points(slot.flatten(), powers)


class Panels:
    """The three steps, for queries [Q] and sources [C, M] on one line of panels."""

    def __init__(
        self,
        queries: Tensor,
        problem: Tensor,
        sources: Tensor,
        temperature: float | Tensor,
        queries_are_sources: bool = False,
    ) -> None:
        self.precision = _PRECISIONS[sources.dtype]
        degree, width, reach = self.precision
        if not isinstance(temperature, Tensor):
            temperature = sources.new_full((len(sources),), temperature, dtype=torch.float64)
        panel = width * temperature.double()[:, None]  # [C, 1]
        strangers = slice(0, 0) if queries_are_sources else slice(None)
        self.line = lay_line(sources, queries[strangers], problem[strangers], panel, reach)
        self.sources = _Cloud(sources, None, self.line, degree)
        self.queries = _Cloud(queries, problem, self.line, degree)
        self.problem = problem

    def moments(self, cloud: _Cloud, weights: Tensor | None) -> Tensor:
        """Σ weight · placeᵇ of each panel: weights [K, *cloud], None = 1 -> [K, p, S]."""
        degree = self.precision.degree
        num_columns = 1 if weights is None else len(weights)
        like = cloud.scores if weights is None else weights  # which vmap may have batched
        out = like.new_zeros(num_columns * degree, self.line.num_panels, dtype=torch.float64)
        for columns, (slot, powers) in cloud.blocks():
            weighted = powers
            if weights is not None:
                own = weights if columns is None else weights[..., columns]
                weighted = powers * own.reshape(num_columns, 1, -1)
                weighted = weighted.reshape(num_columns * degree, -1)
            out.scatter_add_(1, slot.expand(len(out), -1), weighted)
        return out.view(num_columns, degree, -1)

    def field(self, moments: Tensor, order: int, transposed: bool = False) -> Tensor:
        """What moments [K, p, S] give under φₙ, as coefficients of powers of the place [K, p, S].

        Of sources, for queries; transposed, of queries, for sources.
        """
        degree, width, reach = self.precision
        table = translation_table(order, degree, width, reach, moments.device)  # [p, p, 2W + 1]
        if transposed:
            table = table.transpose(0, 1).flip(2)
        if self.line.occupied is None:
            field = torch.nn.functional.conv1d(moments, table, padding=reach)
        else:
            field = _convolved_where_occupied(moments, table, self.line.occupied)
        if order == 0:
            field[:, 0] += self.line.whole_counts(moments[:, 0], reach, transposed)
        return field

    def evaluated(self, field: Tensor, cloud: _Cloud) -> Tensor:
        """Σ_a field[k, a, panel] · placeᵃ: [K, p, S] -> [K, *cloud] float64."""
        num_fields, degree, _ = field.shape
        shape = (num_fields, *cloud.scores.shape)
        flat = field.reshape(num_fields * degree, -1)
        out: Tensor | None = None
        for columns, (slot, powers) in cloud.blocks():
            at_points = flat.gather(1, slot.expand(len(flat), -1))
            values = at_points.view(num_fields, degree, -1).mul_(powers).sum(1)
            if columns is None:
                out = values.view(shape)
            else:
                out = field.new_empty(shape) if out is None else out
                target = out[..., columns]
                target.copy_(values.view(target.shape))
        assert out is not None
        poison = self.line.poison
        if poison is not None:
            # As by the definition, a problem without queries gives nothing to its sources.
            problem = self.problem
            per_problem = torch.zeros_like(poison).index_copy(0, problem, poison[problem])
            out += per_problem[:, None] if cloud.problem is None else per_problem[problem]
        return out


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
        values = panels.evaluated(panels.field(moments, order), panels.queries)  # [K, Q]
        return values.movedim(0, -1).to(weights.dtype)

    def transposed_sums(self, order: int, cotangent: Tensor) -> Tensor:
        panels = self.panels
        moments = panels.moments(panels.queries, cotangent.movedim(-1, 0).double())
        values = panels.evaluated(panels.field(moments, order, transposed=True), panels.sources)
        return values.movedim(0, -1).to(cotangent.dtype)

    def both_sums(self, order: int, weights: Tensor, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        return self.sums(order, weights), self.transposed_sums(order, cotangent)


class PanelRanks:
    """Soft ranks in linear time: see `_plan.RankPlan` for the contract."""

    def __init__(
        self,
        scores: Tensor,
        problem: Tensor,
        row: Tensor,
        weights: Tensor | None,
        positive_weights: Tensor,
        temperature: float | Tensor,
    ) -> None:
        self.scores, self.weights = scores, weights
        self.problem, self.row = problem, row
        self.panels = Panels(scores[problem, row], problem, scores, temperature, True)
        self._query_weights = None if weights is None else weights[problem, row][None]  # [1, Q]

    def ranks(self) -> tuple[Tensor, Tensor]:
        panels, weights = self.panels, self._query_weights
        of_all = panels.moments(
            panels.sources, None if self.weights is None else self.weights[None]
        )
        of_positives = panels.moments(panels.queries, weights)
        self._moments = torch.cat((of_all, of_positives))  # [2, p, S]
        sums = panels.evaluated(panels.field(self._moments, 0), panels.queries)  # [2, Q]
        ranks = sums.add_(0.5 if weights is None else 0.5 * weights).to(self.scores.dtype)
        return ranks[0], ranks[1]

    def ranks_and_gradient(self, slopes_of: SlopesOf) -> tuple[Tensor, Tensor, Tensor]:
        ranks = self.ranks()
        slopes = slopes_of(*ranks, None)
        return *ranks, self._gradient(torch.stack(slopes).double())

    def _gradient(self, cotangent: Tensor) -> Tensor:
        """[2, Q], the slopes by both sums, -> [C, M]."""
        panels, queries = self.panels, self.panels.queries
        for_queries = panels.field(self._moments, 1)  # [2, p, S]
        for_sources = panels.field(panels.moments(queries, cotangent), 1, transposed=True)
        out = panels.evaluated(for_sources[:1], panels.sources)[0]  # [C, M]
        if self.weights is not None:
            out *= self.weights
        # A positive is a query, and a source of both sums.
        as_query, as_source = panels.evaluated(
            torch.cat((for_queries, for_sources[1:])), queries
        ).split((2, 1))
        if self._query_weights is not None:
            as_source = as_source * self._query_weights
        change = as_source[0] - (as_query * cotangent).sum(0)
        out.index_put_((self.problem, self.row), change, accumulate=True)
        return out.to(self.scores.dtype)
