"""Normalised discounted cumulative gain."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from imbalanced_losses._ranking.budget import Budget
from imbalanced_losses._ranking.panels.line import _cumulated
from imbalanced_losses._ranking.plan import Listed
from imbalanced_losses._ranking.problems import Problems
from imbalanced_losses._ranking.ranks import Ranks


def ndcg(problems: Problems, budget: Budget | None) -> Tensor:
    """Σ ω g / log₂(1 + R) ÷ ideal of graded problems, whose value is the gain g: [C] ≥ 0."""
    unit = problems.unit

    def discounted(ranks: Ranks) -> Tensor:
        rank = ranks.among("all") * ranks.of_problem(unit)
        discount = math.log(2) / torch.log1p(rank)
        return discount if budget is None else discount * budget.holds(ranks)

    return problems.ranked_mean(discounted) / _ideal(problems, unit, budget)


def _ideal(problems: Problems, unit: Tensor, budget: Budget | None) -> Tensor:
    """The same of rows in descending order of gain, the lighter first among equals; 1 if not valid.

    With a budget of those within it, and of the first.
    """
    gain, weights = _rows_with_gain(problems)  # [C, n]
    order = weights.argsort(dim=1, stable=True)
    gain, weights = gain.gather(1, order), weights.gather(1, order)
    gain, order = gain.sort(dim=1, descending=True, stable=True)
    weights = weights.gather(1, order)
    place = _cumulated(weights)
    terms = weights * gain * math.log(2) / torch.log1p(place * unit[:, None])
    if budget is not None:
        is_within = place <= budget.number[:, None] + 0.5 * weights
        is_within[:, :1] = True
        terms = torch.where(is_within, terms, 0)
    total, mass = terms.sum(1), problems.mass("positives", by_value=True)
    return torch.where(problems.valid, total / mass, 1).to(mass.dtype)


def _rows_with_gain(problems: Problems) -> tuple[Tensor, Tensor]:
    """Gain and weight [C, n] float64 of the rows with a gain, of all processes; else 0."""
    queries = problems.queries("positives")
    gain, weights = queries.value, queries.weights
    assert gain is not None
    weights = torch.ones_like(gain) if weights is None else weights
    if not isinstance(queries, Listed):
        return torch.where(queries.mask, gain, 0).double(), weights.double()
    rows = torch.stack((queries.problem.double(), gain.double(), weights.double()), dim=1)
    if problems.processes is not None:
        rows = problems.processes.concatenated(rows)
        rows = rows[rows[:, 0].argsort(stable=True)]
    problem, (gain, weights) = rows[:, 0].long(), rows[:, 1:].unbind(1)
    counts = problem.bincount(minlength=queries.num_problems)  # [C]
    place = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[problem]
    longest = int(counts.max()) if len(counts) > 0 else 0
    found = rows.new_zeros(2, queries.num_problems, longest)
    found[0, problem, place], found[1, problem, place] = gain, weights
    return found[0], found[1]
