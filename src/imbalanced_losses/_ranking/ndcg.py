"""Normalised discounted cumulative gain."""

from __future__ import annotations

import torch
from torch import Tensor

from imbalanced_losses._checks.tracing import is_on_host, is_traced
from imbalanced_losses._ranking.budget import Budget
from imbalanced_losses._ranking.cuda import facts
from imbalanced_losses._ranking.cuda.prepared import PreparedQueries
from imbalanced_losses._ranking.panels.line import _cumulated
from imbalanced_losses._ranking.plan import Listed, Masked
from imbalanced_losses._ranking.problems import Problems
from imbalanced_losses._ranking.ranked_sum import known, ranked_sum
from imbalanced_losses._ranking.ranks import Ranks


def ndcg(problems: Problems, budget: Budget | None) -> Tensor:
    """Σ ω g / log(1 + R) ÷ ideal of graded problems, whose value is the gain g: [C] ≥ 0.

    The base of the logarithm is in both.
    """
    unit = problems.unit
    if budget is None:
        gains = ranked_sum(problems, _discounted(unit))
    else:
        gains = ranked_sum(problems, _discounted_within(unit, budget.number, budget.width))
    return gains / _ideal(problems, unit, budget)


def _discount(ranks: Ranks, unit: Tensor) -> Tensor:
    return torch.log1p(_in_rows(ranks, unit)).reciprocal()


def _in_rows(ranks: Ranks, unit: Tensor) -> Tensor:
    """The rank in the caller's weights, which can be too large for the dtype."""
    own = ranks.among("all")
    return (own * ranks.of_problem(unit)).clamp(max=torch.finfo(own.dtype).max)


def _slopes(ranks: Ranks, discount: Tensor, unit: Tensor) -> tuple[Tensor]:
    own = ranks.of_problem(unit)
    return (discount * -own * discount / (_in_rows(ranks, unit) + 1),)


def _discount_within(ranks: Ranks, unit: Tensor, number: Tensor, width: Tensor) -> Tensor:
    return _discount(ranks, unit) * Budget("all", number, width).holds(ranks)


def _slopes_within(
    ranks: Ranks, worth: Tensor, unit: Tensor, number: Tensor, width: Tensor
) -> tuple[Tensor]:
    rank = _in_rows(ranks, unit)
    log = torch.log1p(rank)
    beyond = (worth * log - 1) / ranks.of_problem(width)
    return (worth * (beyond - ranks.of_problem(unit) / (rank + 1) / log),)


_discounted = known("discounted", _discount, _slopes)
_discounted_within = known("discounted within a budget", _discount_within, _slopes_within)


def _ideal(problems: Problems, unit: Tensor, budget: Budget | None) -> Tensor:
    """The same of rows in descending order of gain, the lighter first among equals; 1 if not valid.

    With a budget of those within it, and of the first.
    """
    queries, layout = problems.queries("positives"), problems.layout
    if isinstance(queries, PreparedQueries) and facts.are_few_pairs(queries.sides, layout):
        assert queries.value is not None
        limit = None if budget is None else budget.number
        terms = facts.ideal_terms(queries.value, queries.sides, unit, limit, layout)
        total = queries.total(terms)
    else:
        total = _total_in_order(problems, unit, budget)
    mass = problems.mass("positives", by_value=True)
    return torch.where(problems.valid, total / mass, 1).to(mass.dtype)


def _total_in_order(problems: Problems, unit: Tensor, budget: Budget | None) -> Tensor:
    queries = problems.queries("positives")
    problem, gain, weights = _rows_with_gain(problems)
    order = weights.argsort(stable=True)
    order = order[gain[order].argsort(descending=True, stable=True)]
    order = order[problem[order].argsort(stable=True)]
    problem, gain, weights = problem[order], gain[order], weights[order]
    layout = problems.layout
    if layout.num_problems == 1:
        place = _cumulated(weights)
    elif layout.lengths is None and not isinstance(queries, Listed):  # as many rows each
        place = _cumulated(weights.view(layout.num_problems, -1)).flatten()
    else:
        place = _cumulated_within(weights, problem, layout.num_problems)
    terms = weights * gain / torch.log1p(place * unit[problem])
    if budget is not None:
        is_first = torch.cat((torch.ones_like(problem[:1]), problem.diff())) > 0
        is_within = place <= budget.number[problem] + 0.5 * weights
        terms = torch.where(is_within | is_first, terms, 0)
    return gain.new_zeros(layout.num_problems).index_add(0, problem, terms)


def _cumulated_within(weights: Tensor, problem: Tensor, num_problems: int) -> Tensor:
    """Cumulative sums [n] within problems, ascending; compiled, of light rows only roughly."""
    if is_traced(weights):  # compilers unroll the loop below, some for minutes
        mass = weights.new_zeros(num_problems).index_add(0, problem, weights)
        place = _cumulated(weights) - (_cumulated(mass) - mass)[problem]
        return torch.maximum(place, weights)
    # Not such a difference, in which a light row is lost beside the problems before.
    number = torch.arange(len(weights), device=weights.device)
    for doubling in range((len(weights) - 1).bit_length()):
        before = number - (1 << doubling)  # each sum is of 2^doubling rows, or of all up to it
        place = before.clamp(min=0)
        is_same = (before >= 0) & (problem[place] == problem)
        if is_on_host(is_same) and not is_same.any():
            break
        weights = weights + torch.where(is_same, weights[place], 0)
    return weights


def _rows_with_gain(problems: Problems) -> tuple[Tensor, Tensor, Tensor]:
    """Problem int64, gain and weight float64 [n] of the rows with a gain, of all processes."""
    queries, layout = problems.queries("positives"), problems.layout
    assert queries.value is not None
    weights = torch.ones_like(queries.value) if queries.weights is None else queries.weights
    if not isinstance(queries, Listed):
        assert isinstance(queries, (Masked, PreparedQueries))
        number = torch.arange(layout.num_problems, device=weights.device)
        problem = layout.for_rows(number).expand(weights.shape).flatten()
        gain = torch.where(queries.mask, queries.value, 0)
        return problem, gain.flatten().double(), weights.flatten().double()
    rows = torch.stack((queries.problem.double(), queries.value.double(), weights.double()))
    if problems.processes is not None:
        rows = problems.processes.concatenated(rows.T).T
    problem, gain, weights = rows
    return problem.long(), gain, weights
