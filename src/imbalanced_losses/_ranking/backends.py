"""The backends by name, and which of them serves a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from imbalanced_losses._ranking.choose import choose
from imbalanced_losses._ranking.cuda.prepared import PreparedQueries
from imbalanced_losses._ranking.cuda.ranks import fused_plan
from imbalanced_losses._ranking.dense import DensePlan
from imbalanced_losses._ranking.panels.panels import PanelPlan, PanelRanks
from imbalanced_losses._ranking.plan import Canonical, Listed, Plan, Queries, RankPlan, Rows
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
    chosen = _chosen(backend, len(queries), sources)
    plan = PLANS[chosen](queries.detach(), problem, sources.detach(), _detached(temperature))
    return differentiable_sums(plan, queries, sources, temperature, weights)


def rank_plan(
    given: Canonical, queries: Queries, among: tuple[Rows, ...], backend: Backend
) -> RankPlan:
    """The plan for soft ranks of queries: what training asks for at every step."""
    if isinstance(queries, PreparedQueries):
        return fused_plan(given, queries, among, backend)
    assert isinstance(queries, Listed)
    num_queries = queries.row.shape[0]
    if given.processes is not None or _chosen(backend, num_queries, given.scores) == "panel":
        return PanelRanks(given, queries, among)
    if given.scores.shape[0] == 1:  # `len` of a tensor takes ten times as long
        return DenseRanks(given, queries, among)
    return DenseRanksOfMany(given, queries, among)


def _chosen(backend: Backend, num_queries: int, sources: Tensor) -> str:
    num_problems, num_rows = sources.shape
    if num_queries == 0 or sources.numel() == 0:
        return "dense"  # nothing to compute, and no range of scores to lay panels over
    if backend != "auto":
        return backend
    num_pairs, num_located = num_queries * num_rows, num_problems * num_rows + num_queries
    return choose(sources.device.type, sources.dtype, num_pairs, num_problems, num_located)


def _detached(temperature: float | Tensor) -> float | Tensor:
    """The temperature as plans take it."""
    return temperature.detach() if isinstance(temperature, Tensor) else temperature
