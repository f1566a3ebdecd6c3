"""One primitive under every ranking loss: weighted sums of sigmoids, differentiable to any order.

    sigmoid_sums(queries [Q], problem [Q], sources [C, M], weights [C, M, K], temperature) -> [Q, K]
    out[q, k] = Σ_m weights[c, m, k] · σ((sources[c, m] − queries[q]) / τ_c),   c = problem[q]

A soft rank is such a sum, and so every ranking loss is arithmetic around this one call. The C
problems (classes, lists) are independent; queries are ragged and addressed by `problem`, so there
is neither a loop over classes nor padding.

Letters, here and in every backend:
    M  sources of a problem (pool rows)      Q  queries over all problems (positives)
    C  problems (classes)                    K  weight columns summed at once
    x  (source − query) / τ                  φₙ the n-th derivative of σ; φ₀ = σ

Three layers, each in files of its own: *choose* a backend (`_choose`), *differentiate*
(`_autograd`), *compute* (`_dense`: the definition, tiled; `_panel`: linear time). A backend is a
plan, built once for the geometry (queries, problem, sources, temperature) and asked for Φₙ·weights
and Φₙᵀ·cotangent, where Φₙ[q, m] = φₙ(x); and a second, leaner plan for what training needs: soft
ranks and their first derivative. `_plan` has both contracts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from imbalanced_losses._ranking.choose import choose
from imbalanced_losses._ranking.cuda.ranks import fused_plan, has_kernels
from imbalanced_losses._ranking.dense import DensePlan
from imbalanced_losses._ranking.panels.panels import PanelPlan, PanelRanks
from imbalanced_losses._ranking.plan import ALONE, Exchange, Plan, RankPlan
from imbalanced_losses._ranking.sums import differentiable_sums
from imbalanced_losses._ranking.tiles import DenseRanks, DenseRanksOfMany

Backend = Literal["auto", "dense", "panel"]
__all__ = [
    "ALONE",
    "BACKENDS",
    "PLANS",
    "Backend",
    "Exchange",
    "RankPlan",
    "detached",
    "fused_plan",
    "has_kernels",
    "rank_plan",
    "sigmoid_sums",
]

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
    plan = PLANS[chosen](queries.detach(), problem, sources.detach(), detached(temperature))
    return differentiable_sums(plan, queries, sources, temperature, weights)


def rank_plan(
    scores: Tensor,
    is_positive: Tensor,
    problem: Tensor,
    row: Tensor,
    weights: Tensor | None,
    temperature: float | Tensor,
    *,
    backend: Backend = "auto",
    num_live: int | None = None,
    exchange: Exchange = ALONE,
) -> RankPlan:
    """Soft ranks of the positives, with their first derivative in one go.

    The sums of `sigmoid_sums`, plus ½ω, for queries scores[problem, row] and two weight columns: of
    all rows, and of the positives; what training asks for at every step, without the overhead of
    derivatives of every order.

    Args:
        scores: [C, M] float32 or float64, detached.
        is_positive: [C, M] bool; more than the queries only in problems without any.
        problem, row: [Q] int64, the positives to rank, by problem and then by row.
        weights: [C, M] ≥ 0, None for 1 everywhere.
        temperature: τ > 0, or [C].
        backend: see `sigmoid_sums`.
        num_live: rows from here on are constants, whose gradient is taken for 0; None = M.
        exchange: the processes that hold rows of the same problems, of which the arguments give
            those of this one: ranks are among the rows of all, by panels.
    """
    num_problems, num_rows = scores.shape  # `len` of a tensor takes ten times as long
    if num_live is None:
        num_live = num_rows
    if exchange is not ALONE or _chosen(backend, row.shape[0], scores) == "panel":
        return PanelRanks(scores, problem, row, weights, temperature, num_live, exchange)
    if num_problems == 1:
        return DenseRanks(scores, is_positive, row, weights, temperature, num_live)
    return DenseRanksOfMany(scores, problem, row, weights, temperature, num_live)


def _chosen(backend: Backend, num_queries: int, sources: Tensor) -> str:
    num_problems, num_rows = sources.shape
    if num_queries == 0 or sources.numel() == 0:
        return "dense"  # nothing to compute, and no range of scores to lay panels over
    if backend != "auto":
        return backend
    num_pairs, num_located = num_queries * num_rows, num_problems * num_rows + num_queries
    return choose(sources.device.type, sources.dtype, num_pairs, num_problems, num_located)


def detached(temperature: float | Tensor) -> float | Tensor:
    """The temperature as plans take it."""
    return temperature.detach() if isinstance(temperature, Tensor) else temperature
