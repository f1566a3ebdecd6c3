"""Ranking problems: the one bundle from the pool to the kernels, and what a metric asks of it."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from imbalanced_losses._checks import arguments as _checks
from imbalanced_losses._checks.tracing import is_traced
from imbalanced_losses._ranking.backends import Backend
from imbalanced_losses._ranking.canonical import InUnits, canonical, compute_dtype, in_units
from imbalanced_losses._ranking.cuda.prepared import Prepared, PreparedQueries, prepared
from imbalanced_losses._ranking.layout import Layout
from imbalanced_losses._ranking.plan import (
    ROWS,
    Canonical,
    Listed,
    Masked,
    Processes,
    Queries,
    Rows,
    at,
    product,
)
from imbalanced_losses._ranking.ranked_sum import Asked, Share, Worth, ranked_sum
from imbalanced_losses._ranking.weighting import spread, weights_at_prior

_PLAIN = InUnits(None, None, None)


class Problems:
    """C ranking problems over M rows: what a metric is a function of.

    Problems of unequal length lie side by side, [1, S] for [C, M], as their `layout` says.

    Attributes:
        scores: [C, M] floating, attached to the graph.
        is_positive: [C, M] bool.
        weights: [C, M] ≥ 0, 0 = not in this problem; None = 1 everywhere. How many rows a row
            stands for, in units of the heaviest row of its problem.
        value: [C, M] ≥ 0, what finding a positive is worth, in units of the most valuable one of
            its problem, 0 of all other rows; None = 1 of every positive. It weights means over
            positives, and never ranks; of negatives no value is looked at.
        temperature: τ > 0 in units of the scores, a float or [C].
        valid: [C] bool, whether a problem has a positive that is worth something and a negative;
            of graded problems, whether two rows differ in what they are worth.
    """

    # What is not known yet.
    _for_kernels: Prepared | None = None
    _is_prepared = False
    _canonical: Canonical | None = None
    _facts: tuple[Tensor, int | Tensor] | None = None

    def __init__(
        self,
        scores: Tensor,
        temperature: float | Tensor,
        is_positive: Tensor,
        weights: Tensor | None = None,
        *,
        layout: Layout | None = None,
        value: Tensor | None = None,
        is_graded: bool = False,
        draws: Tensor | None = None,
        num_live: int | None = None,
        processes: Processes | None = None,
        backend: Backend = "auto",
    ) -> None:
        self.scores = scores
        self.is_positive = is_positive if is_positive.dim() == 2 else is_positive.unsqueeze(0)
        self.layout = layout or Layout(self.is_positive.shape)
        self.given_weights, self.given_value = weights, value
        self.is_graded = is_graded  # by value, which is then > 0 of positives
        self.draws = draws  # [C or 1, M], how many rows each was drawn for; None = 1 everywhere
        self.temperature = temperature
        self.num_live = scores.shape[-1] if num_live is None else num_live
        self.processes = processes
        self.backend: Backend = backend
        # The same for other scores and another temperature: it is attached to no graph.
        self.again = partial(
            Problems,
            is_positive=is_positive,
            weights=weights,
            layout=self.layout,
            value=value,
            is_graded=is_graded,
            draws=draws,
            num_live=num_live,
            processes=processes,
            backend=backend,
        )
        self.is_traced = is_traced(scores)
        is_plain = weights is None and value is None and processes is None
        self._in_units: InUnits | None = _PLAIN if is_plain else None
        self._queries: dict[Rows, Queries] = {}
        self._mean_weights: dict[Rows, Tensor] = {}

    def replaced(self, **changes: Any) -> Problems:
        """The same with other arguments."""
        return self.again(**{"scores": self.scores, "temperature": self.temperature, **changes})

    # --- What a metric asks ------------------------------------------------------------------

    @property
    def weights(self) -> Tensor | None:
        return (self._in_units or self._counted()).weights

    @property
    def value(self) -> Tensor | None:
        return (self._in_units or self._counted()).value

    @property
    def valid(self) -> Tensor:
        return self._positives_and_mass()[0]

    @property
    def unit(self) -> Tensor:
        """The heaviest weight [C] of each problem, in the caller's numbers: 1 without weights."""
        unit, dtype = (self._in_units or self._counted()).unit, compute_dtype(self.scores)
        unit = self.scores.new_ones((), dtype=dtype) if unit is None else unit.to(dtype)
        return unit.expand(self.layout.num_problems)

    def mass(self, rows: Rows, *, by_value: bool = False) -> Tensor:
        """The summed weights [C] of rows, over all processes; 1 where a problem is not valid.

        With `by_value` of positives: each times its value.
        """
        _checks.choice("rows", rows, ROWS)
        valid, mass = self._positives_and_mass()
        dtype = compute_dtype(self.scores)
        if rows == "positives" and (by_value or self.value is None):
            if isinstance(mass, Tensor):
                return mass
            return torch.full((1,), max(1, mass), dtype=dtype, device=valid.device)
        if self._prepared is not None:
            return self._prepared.mass(rows)
        own = self._is_query(rows)
        if self.weights is not None:
            own = torch.where(own, self.weights, 0).double()
        return torch.where(valid, self.summed(self.layout.total(own).double()).to(dtype), 1)

    def mean_weight(self, rows: Rows) -> Tensor:
        """The mean weight [C] of rows that have one above 0, before any were drawn.

        Over all processes; 1 where a problem is not valid, or has none.
        """
        _checks.choice("rows", rows, ROWS)
        if rows not in self._mean_weights:
            self._mean_weights[rows] = self._mean_weight(rows)
        return self._mean_weights[rows]

    def ranked_sum(
        self,
        worth: Worth,
        *,
        queries: Rows = "positives",
        among: tuple[Rows, ...] = ("all",),
        by_value: bool = False,
    ) -> Tensor:
        """Σ ω · worth(ranks) over the queries of each problem.

        Args:
            worth: `Ranks` of some queries -> what each is worth, elementwise in the queries. Plain
                torch arithmetic; tensors that it takes from elsewhere are constants.
            queries: the rows that are ranked.
            among: the sets of rows that they are ranked among.
            by_value: among positives each counts ω times its value. For queries="negatives", and
                among sets without "all".

        Returns:
            [C], over all processes; 0 where a problem is not valid. Differentiable in scores and
            temperature, to any order.
        """
        return ranked_sum(self, Asked(worth, queries, among, by_value=by_value))

    def ranked_mean(self, worth: Worth, *, among: tuple[Rows, ...] = ("all",)) -> Tensor:
        """Σ ω v · worth(ranks) ÷ Σ ω v over the positives, each worth its value v."""
        return ranked_sum(self, Asked(worth, "positives", among, is_mean=True))

    def spread(self) -> Tensor:
        """The standard deviation [C] of the scores, with gradient; see `score_spread`."""
        rows = self.scores.unsqueeze(0) if self.scores.dim() == 1 else self.scores
        return spread(rows, self.given_weights, self.layout, self.processes)

    def with_prior(self, prior: float | Tensor) -> Problems:
        """The same where a share of the rows, a float or [C], is positive; see `prior_weights`."""
        own = self.scores.new_ones(()) if self.given_weights is None else self.given_weights
        weights = weights_at_prior(self.is_positive, prior, own, self.layout, self.processes)
        return self.replaced(weights=weights)

    def ranked_average(
        self,
        worth: Worth,
        share: Worth,
        least: Tensor,
        *,
        queries: Rows = "positives",
        among: tuple[Rows, ...] = ("all",),
        by_value: bool = False,
    ) -> Tensor:
        """Σ ω s · worth(ranks) ÷ max(Σ ω s, least), s = share(ranks): by how much a query counts.

        `least` [C] is a constant above 0.
        """
        counted = Share(share, least.detach())
        return ranked_sum(self, Asked(worth, queries, among, by_value=by_value, share=counted))

    # --- What is made of it beneath ----------------------------------------------------------

    @property
    def _prepared(self) -> Prepared | None:
        if not self._is_prepared:  # a cached_property has a lock, which compilers refuse
            self._for_kernels, self._is_prepared = prepared(self), True
        return self._for_kernels

    def mass_of_positives(self) -> int | Tensor:
        """Σ ω v [C], or of one problem a number; 1 where not valid."""
        mass = self._positives_and_mass()[1]
        return mass if isinstance(mass, Tensor) else max(1, mass)

    def _mean_weight(self, rows: Rows) -> Tensor:
        valid = self.valid
        if self._prepared is not None and self.draws is None:
            return self._prepared.mean_weight(rows)
        if self.weights is None:
            return torch.ones_like(valid, dtype=compute_dtype(self.scores))
        present = self._is_query(rows)
        drawn = present if self.draws is None else present * self.draws
        own = (self.weights * present).double(), drawn.double()
        totals = torch.stack([self.layout.total(one) for one in own])
        mass, number = self.summed(totals).unbind()
        return torch.where(valid & (number > 0), mass / number, 1).to(self.weights.dtype)

    def _counted(self) -> InUnits:
        own = self._prepared
        self._in_units = in_units(self) if own is None else own.in_units
        return self._in_units

    def summed(self, tensor: Tensor) -> Tensor:
        """A tensor summed over processes."""
        return tensor if self.processes is None else self.processes.sum(tensor)

    def queries(self, rows: Rows) -> Queries:
        """The rows of a set in valid problems, in the form that the plan for these scores takes."""
        if rows not in self._queries:
            if self._prepared is not None:
                self._queries[rows] = PreparedQueries(rows, self._prepared)
            elif self._is_masked():
                self._queries[rows] = self._masked(rows)
            else:
                self._queries[rows] = self._listed(rows)
        return self._queries[rows]

    def listed(self, rows: Rows) -> Listed:
        """The same in the form of a list, whatever the plan."""
        found = self.queries(rows)
        return found if isinstance(found, Listed) else self._listed(rows)

    def canonical(self) -> Canonical:
        if self._prepared is not None:
            return self._prepared.given
        if self._canonical is None:
            tau = self.temperature
            tau = tau.detach() if isinstance(tau, Tensor) else tau
            self._canonical = canonical(self, self.scores.detach(), tau)
        return self._canonical

    def by_value(self, given: Canonical) -> Canonical:
        """The same with positives that count ω v."""
        if self.value is None:
            return given
        counted, sides = torch.where(self.is_positive, self.value, 1), given.sides
        sides = sides if sides is None else sides * counted
        return given._replace(weights=product(given.weights, counted), sides=sides)

    def _is_masked(self) -> bool:
        """Whether no value may be read."""
        return self.processes is None and self.is_traced

    def _is_query(self, rows: Rows) -> Tensor:
        is_positive, weights = self.is_positive, self.weights
        if rows == "all":
            return torch.ones_like(is_positive) if weights is None else weights > 0
        chosen = is_positive if rows == "positives" else ~is_positive
        return chosen if weights is None else chosen & (weights > 0)

    def _masked(self, rows: Rows) -> Masked:
        mask = self._is_query(rows) & self.layout.for_rows(self.valid)
        value = self.value if rows == "positives" else None
        return Masked(rows, mask, self.weights, value, self.layout)

    def _listed(self, rows: Rows) -> Listed:
        problem, row = self.layout.places_of(self._is_query(rows))
        if rows == "positives" and self._facts is None:
            self._facts = self._facts_of(problem, row)
        valid, mass = self._facts or self._positives_and_mass()
        # Of one problem it is known from the number of its positives.
        is_valid = mass > 0 if isinstance(mass, int) else bool(valid.all())
        if not is_valid:
            kept = valid[problem].nonzero().squeeze(1)
            problem, row = problem[kept], row[kept]
        weights, value = self.weights, self.value if rows == "positives" else None
        weights = None if weights is None else at(weights, problem, row)
        value = None if value is None else at(value, problem, row)
        return Listed(rows, problem, row, weights, value, self.layout.num_problems)

    def _positives_and_mass(self) -> tuple[Tensor, int | Tensor]:
        """What is valid [C], and the mass of the positives: [C], 1 where not valid; or of one
        problem a number, 0 where it is not.
        """
        if self._facts is None:
            if self._prepared is not None:
                self._facts = self._prepared.valid, self._prepared.mass_by_value
            elif self._is_masked():
                self._facts = self._facts_without_reading()
            else:
                self.queries("positives")
        assert self._facts is not None
        return self._facts

    def _facts_of(self, problem: Tensor, row: Tensor) -> tuple[Tensor, int | Tensor]:
        """From the positives that are present."""
        factor = product(self.weights, self.value)
        num_problems, num_rows = self.layout.num_problems, self.is_positive.shape[1]
        if factor is None and num_problems == 1 and self.processes is None:
            num_positives = row.shape[0]
            is_valid = 0 < num_positives < num_rows
            valid = torch.full((1,), is_valid, device=row.device)
            return valid, num_positives if is_valid else 0
        counts, dtype = problem.bincount(minlength=num_problems), compute_dtype(self.scores)  # [C]
        mass = counts.to(dtype)
        if factor is not None:
            mass = torch.zeros_like(mass).index_add(0, problem, at(factor, problem, row))
        if self.is_graded and self.value is not None:
            is_best = at(self.value, problem, row) == 1
            counts = problem[is_best].bincount(minlength=num_problems)
        num_present = self._num_present()
        if self.processes is not None:
            num_present = torch.as_tensor(num_present, device=counts.device).expand_as(counts)
            found = torch.stack((counts, num_present, mass)).double()
            counts, num_present, mass = self.processes.sum(found).unbind()
            mass = mass.to(dtype)
        valid = (counts > 0) & (counts < num_present) & (mass > 0)
        return valid, torch.where(valid, mass, 1)

    def _facts_without_reading(self) -> tuple[Tensor, Tensor]:
        is_query = self._is_query("positives")
        factor, dtype = product(self.weights, self.value), compute_dtype(self.scores)
        counts, layout = self.layout.total(is_query), self.layout
        mass = counts if factor is None else layout.total(torch.where(is_query, factor, 0.0))
        if self.is_graded and self.value is not None:
            counts = layout.total(is_query & (self.value == 1))
        valid = (counts > 0) & (counts < self._num_present()) & (mass > 0)
        return valid, torch.where(valid, mass.to(dtype), 1)

    def _num_present(self) -> int | Tensor:
        """The rows of each problem, or [C] of weight above 0."""
        if self.weights is not None:
            return self.layout.total(self.weights > 0)
        lengths = self.layout.lengths
        return self.is_positive.shape[1] if lengths is None else lengths
