"""The backends by name, and which of them serves a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from imbalanced_losses._ranking.choose import choose
from imbalanced_losses._ranking.cuda.prepared import PreparedQueries
from imbalanced_losses._ranking.cuda.ranks import fused_plan
from imbalanced_losses._ranking.dense import DensePlan
from imbalanced_losses._ranking.panels.panels import PanelPlan
from imbalanced_losses._ranking.panels.ranks import PanelRanks
from imbalanced_losses._ranking.plan import Canonical, Listed, Plan, Queries, RankPlan, Rows
from imbalanced_losses._ranking.ragged import Part, RaggedRanks, joined, parts_of
from imbalanced_losses._ranking.sums import differentiable_sums
from imbalanced_losses._ranking.tiles import DenseRanks, DenseRanksOfMany

Backend = Literal["auto", "dense", "panel"]

#: The plans of `sigmoid_sums` by name.
PLANS: dict[str, Callable[[Tensor, Tensor, Tensor, float | Tensor], Plan]] = {
    "dense": DensePlan,
    "panel": PanelPlan,
}
BACKENDS: tuple[str, ...] = ("auto", *PLANS)


def sigmoid_sums(
    queries: Tensor,
    problem: Tensor,
    sources: Tensor,
    weights: Tensor,
    temperature: float | Tensor,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """Weighted sums of sigmoids of score differences, one per query and weight column.

    Definition: out[q, k] = Σ_m weights[c, m, k] · σ((sources[c, m] − queries[q]) / τ_c)
    with c = problem[q].

    Differentiable to any order in queries, sources, weights and temperature. Inputs are trusted:
    finite scores (or NaN, which propagates), matching shapes, one floating dtype.

    Args:
        queries: [Q] float32 or float64, the scores whose ranks are asked for.
        problem: [Q] int64 in [0, C), the problem that each query belongs to.
        sources: [C, M], the scores that queries are compared with; same dtype as queries.
        weights: [C, M, K], the weight of each source in each of K sums.
        temperature: τ > 0 in units of the scores; a float, or a tensor [C] with one τ a problem.
        backend: "dense" is the definition, O(Q·M) time; "panel" is exact to rounding in O(C·M + Q)
            time; both in O(C·M) memory. "auto" takes the faster one.

    Returns:
        [Q, K], in [0, Σ_m weights[c, m, k]] for weights ≥ 0; [0, K] when there are no queries.

    Example:
        >>> import torch
        >>> scores = torch.tensor([[2.0, 1.0, 0.0]])
        >>> sums = sigmoid_sums(
        ...     scores[0], torch.zeros(3, dtype=torch.int64), scores, torch.ones(1, 3, 1), 0.01
        ... )
        >>> (0.5 + sums).flatten()  # the ranks 1, 2, 3: a score is half above itself
        tensor([1., 2., 3.])
    """
    is_linear = _is_linear(backend, len(queries), sources, sources.shape)
    plan_of = PLANS["panel" if is_linear else "dense"]
    plan = plan_of(queries.detach(), problem, sources.detach(), _detached(temperature))
    return differentiable_sums(plan, queries, sources, temperature, weights)


def sums_of_queries(given: Canonical, queries: Listed, weights: Tensor, backend: Backend) -> Tensor:
    """`sigmoid_sums` [Q, K] of queries that are rows of the problems, with weights [C, M, K]."""
    if given.layout.lengths is not None:
        found = []
        for part in parts_of(given.layout, queries):
            alone = part.of(given)._replace(scores=part.repeated(given.scores))
            taken = alone, part.listed(queries), part.taken(weights)  # 0 where it is padding
            found.append((part, sums_of_queries(*taken, backend)))
        if not found:  # attached to what it would depend on
            none, tau = given.scores[0, :0], given.temperature
            none = none + tau[:0] if isinstance(tau, Tensor) else none
            return none[:, None] * weights[0, :0]
        order = torch.cat([part.queries for part, _ in found])
        return torch.cat([sums for _, sums in found])[order.argsort()]
    own, problem = queries.of_row(given.scores), queries.problem
    return sigmoid_sums(own, problem, given.scores, weights, given.temperature, backend=backend)


def rank_plan(
    given: Canonical, queries: Queries, among: tuple[Rows, ...], backend: Backend
) -> RankPlan:
    """The plan for soft ranks of queries: what training asks for at every step."""
    if isinstance(queries, PreparedQueries):
        return fused_plan(given, queries, among, backend)
    assert isinstance(queries, Listed)
    if given.layout.lengths is not None:
        return _ragged_plan(given, queries, among, backend)
    is_linear = given.processes is not None or _is_linear(
        backend, queries.row.shape[0], given.scores, given.scores.shape
    )
    return _plan_of_chosen(given, queries, among, is_linear)


def _ragged_plan(
    given: Canonical, queries: Listed, among: tuple[Rows, ...], backend: Backend
) -> RankPlan:
    """Small problems as rectangles, large ones on one line."""
    parts: dict[bool, list[Part]] = {False: [], True: []}
    for part in parts_of(given.layout, queries):
        shape = part.rows.shape
        parts[_is_linear(backend, len(part.queries), given.scores, shape)].append(part)
    if parts[True] and not parts[False]:
        return PanelRanks(given, queries, among)  # as they lie
    found = [(part, False) for part in parts[False]]
    if parts[True]:
        found.append((joined(parts[True], given.layout), True))
    plans = [
        (part, _plan_of_chosen(part.of(given), part.listed(queries), among, is_linear))
        for part, is_linear in found
    ]
    return RaggedRanks(given, queries, len(among), plans)


def _plan_of_chosen(
    given: Canonical, queries: Listed, among: tuple[Rows, ...], is_linear: bool
) -> RankPlan:
    if is_linear:
        return PanelRanks(given, queries, among)
    if given.scores.shape[0] == 1:  # `len` of a tensor takes ten times as long
        return DenseRanks(given, queries, among)
    return DenseRanksOfMany(given, queries, among)


def _is_linear(backend: Backend, num_queries: int, like: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether panels serve so many queries of sources of a shape [C, M]."""
    num_problems, num_rows = shape
    if num_queries == 0 or num_rows == 0:
        return False  # nothing to compute, and no range of scores to lay panels over
    if backend != "auto":
        return backend == "panel"
    num_pairs, num_located = num_queries * num_rows, num_problems * num_rows + num_queries
    return choose(like.device.type, like.dtype, num_pairs, num_problems, num_located) == "panel"


def _detached(temperature: float | Tensor) -> float | Tensor:
    """The temperature as plans take it."""
    return temperature.detach() if isinstance(temperature, Tensor) else temperature
