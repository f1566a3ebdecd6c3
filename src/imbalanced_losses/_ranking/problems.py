"""Ranking problems: the one bundle from the pool to the kernels, and what a metric asks of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from imbalanced_losses._checks import arguments as _checks
from imbalanced_losses._checks.tracing import is_traced
from imbalanced_losses._ranking.backends import Backend
from imbalanced_losses._ranking.canonical import canonical, compute_dtype, unit_weights
from imbalanced_losses._ranking.cuda.prepared import PreparedQueries, prepared
from imbalanced_losses._ranking.plan import (
    ROWS,
    Canonical,
    Listed,
    Masked,
    Processes,
    Queries,
    Rows,
)
from imbalanced_losses._ranking.ranked_sum import Asked, Slopes, Worth, ranked_sum


class Problems:
    """C ranking problems over M rows: what a metric is a function of.

    Attributes:
        scores: [C, M] floating, attached to the graph.
        is_positive: [C, M] bool.
        weights: [C, M] ≥ 0, 0 = not in this problem; None = 1 everywhere. How many rows a row
            stands for, in units of the heaviest row of its problem.
        temperature: τ > 0 in units of the scores, a float or [C].
        valid: [C] bool, whether a problem has a positive and a negative.
    """

    def __init__(
        self,
        scores: Tensor,
        temperature: float | Tensor,
        is_positive: Tensor,
        weights: Tensor | None = None,
        *,
        num_live: int | None = None,
        processes: Processes | None = None,
        backend: Backend = "auto",
    ) -> None:
        self.scores = scores
        self.is_positive = is_positive if is_positive.dim() == 2 else is_positive.unsqueeze(0)
        self.given_weights = weights
        self.temperature = temperature
        self.num_live = scores.shape[-1] if num_live is None else num_live
        self.processes = processes
        self.backend: Backend = backend
        self._prepared = prepared(self)
        self.weights = (
            unit_weights(self) if self._prepared is None else self._prepared.given.weights
        )
        self._canonical: Canonical | None = None
        self._facts: tuple[Tensor, int | Tensor] | None = None
        self._queries: dict[Rows, Queries] = {}

    def constants(self) -> dict[str, Any]:
        """The constructor's arguments that are attached to no graph, but for the scores."""
        tau = self.temperature
        return {
            **({} if isinstance(tau, Tensor) else {"temperature": tau}),
            "is_positive": self.is_positive,
            "weights": self.given_weights,
            "num_live": self.num_live,
            "backend": self.backend,
        }

    # --- What a metric asks ------------------------------------------------------------------

    @property
    def valid(self) -> Tensor:
        return self._positives_and_mass()[0]

    def mass(self, rows: Rows) -> Tensor:
        """The summed weights [C] of rows, over all processes; 1 where a problem is not valid."""
        _checks.choice("rows", rows, ROWS)
        valid, mass = self._positives_and_mass()
        shape, dtype = self.is_positive.shape, compute_dtype(self.scores)
        if rows == "positives":
            if isinstance(mass, Tensor):
                return mass
            return torch.full((1,), max(1, mass), dtype=dtype, device=valid.device)
        if self._prepared is not None:
            return self._prepared.mass(rows)
        own = self.weights
        if own is None:
            own = torch.ones((), dtype=dtype, device=self.scores.device).expand(shape)
        if rows == "negatives":
            own = torch.where(self.is_positive, 0, own)
        return torch.where(valid, self.summed(own.double().sum(1)).to(dtype), 1)

    def ranked_sum(
        self,
        worth: Worth,
        *,
        queries: Rows = "positives",
        among: tuple[Rows, ...] = ("all",),
        slopes: Slopes | None = None,
    ) -> Tensor:
        """Σ ω · worth(ranks) over the queries of each problem.

        Args:
            worth: `Ranks` of some queries -> what each is worth, elementwise in the queries. Plain
                torch arithmetic; tensors that it takes from elsewhere are constants.
            queries: the rows that are ranked.
            among: the sets of rows that they are ranked among.
            slopes: `Ranks` -> ∂worth/∂rank for each set of `among`, in that order; None: taken by
                autograd, which costs a fraction of a small step.

        Returns:
            [C], over all processes; 0 where a problem is not valid. Differentiable in scores and
            temperature, to any order.
        """
        return self._ranked(Asked(worth, queries, among, slopes))

    def ranked_mean(
        self, worth: Worth, *, among: tuple[Rows, ...] = ("all",), slopes: Slopes | None = None
    ) -> Tensor:
        """`ranked_sum` of the positives over their mass, in fewer calls."""
        return self._ranked(Asked(worth, "positives", among, slopes, is_mean=True))

    # --- What is made of it beneath ----------------------------------------------------------

    def _ranked(self, asked: Asked) -> Tensor:
        return ranked_sum(self, asked)

    def mass_of_positives(self) -> int | Tensor:
        """[C], or of one problem a number; 1 where not valid."""
        mass = self._positives_and_mass()[1]
        return mass if isinstance(mass, Tensor) else max(1, mass)

    def summed(self, tensor: Tensor) -> Tensor:
        """A tensor summed over processes."""
        return tensor if self.processes is None else self.processes.sum(tensor)

    def queries(self, rows: Rows) -> Queries:
        """The rows of a set in valid problems, in the form that the plan for these scores takes."""
        if rows not in self._queries:
            if self._prepared is not None:
                self._queries[rows] = PreparedQueries(rows, self._prepared)
            elif is_traced(self.scores):
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

    def _is_query(self, rows: Rows) -> Tensor:
        is_positive, weights = self.is_positive, self.weights
        if rows == "all":
            return torch.ones_like(is_positive) if weights is None else weights > 0
        chosen = is_positive if rows == "positives" else ~is_positive
        return chosen if weights is None else chosen & (weights > 0)

    def _masked(self, rows: Rows) -> Masked:
        return Masked(rows, self._is_query(rows) & self.valid[:, None], self.weights)

    def _listed(self, rows: Rows) -> Listed:
        problem, row = self._is_query(rows).nonzero().unbind(1)
        if rows == "positives" and self._facts is None:
            self._facts = self._facts_of(problem, row)
        valid, mass = self._positives_and_mass()
        # Of one problem it is known from the number of its positives.
        is_valid = mass > 0 if isinstance(mass, int) else bool(valid.all())
        if not is_valid:
            kept = valid[problem].nonzero().squeeze(1)
            problem, row = problem[kept], row[kept]
        weights = None if self.weights is None else self.weights[problem, row]
        return Listed(rows, problem, row, weights, len(valid))

    def _positives_and_mass(self) -> tuple[Tensor, int | Tensor]:
        """What is valid [C], and the mass of the positives: [C], 1 where not valid; or of one
        problem a number, 0 where it is not.
        """
        if self._facts is None:
            if self._prepared is not None:
                self._facts = self._prepared.valid, self._prepared.mass("positives")
            elif is_traced(self.scores):
                self._facts = self._facts_without_reading()
            else:
                self.queries("positives")
        assert self._facts is not None
        return self._facts

    def _facts_of(self, problem: Tensor, row: Tensor) -> tuple[Tensor, int | Tensor]:
        """From the positives that are present."""
        weights, (num_problems, num_rows) = self.weights, self.is_positive.shape
        dtype = compute_dtype(self.scores)
        if weights is None and num_problems == 1 and self.processes is None:
            num_positives = row.shape[0]
            is_valid = 0 < num_positives < num_rows
            valid = torch.full((1,), is_valid, device=row.device)
            return valid, num_positives if is_valid else 0
        counts = problem.bincount(minlength=num_problems)  # [C]
        num_present = counts.new_full((), num_rows) if weights is None else (weights > 0).sum(1)
        mass = counts.to(dtype)
        if weights is not None:
            mass = mass.new_zeros(num_problems).index_add(0, problem, weights[problem, row])
        if self.processes is not None:
            found = torch.stack((counts, num_present.expand_as(counts), mass)).double()
            counts, num_present, mass = self.processes.sum(found).unbind()
            mass = mass.to(dtype)
        valid = (counts > 0) & (counts < num_present)
        return valid, torch.where(valid, mass, 1)

    def _facts_without_reading(self) -> tuple[Tensor, Tensor]:
        is_query, weights = self._is_query("positives"), self.weights
        counts, dtype = is_query.sum(1), compute_dtype(self.scores)
        num_present = is_query.shape[1] if weights is None else (weights > 0).sum(1)
        valid = (counts > 0) & (counts < num_present)
        mass = counts if weights is None else torch.where(is_query, weights, 0.0).sum(1)
        return valid, torch.where(valid, mass.to(dtype), 1)
