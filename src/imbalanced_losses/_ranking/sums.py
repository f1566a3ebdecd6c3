"""Derivatives of the sums, for any backend.

Forward sums A = Φₙ·W and transposed sums B = Φₙᵀ·G are the two halves of one scalar

    F = ⟨G, Φₙ·W⟩ = Σ_q Σ_m Σ_k G[q, k] · φₙ((sources[m] − queries[q]) / τ) · W[m, k]

whose gradients are again such sums, one order up:

    ∂F/∂G = Φₙ·W                            ∂F/∂W = Φₙᵀ·G
    ∂F/∂query[q]  = −1/τ · Σ_k G[q, k] · (Φₙ₊₁·W)[q, k]
    ∂F/∂source[m] = +1/τ · Σ_k W[m, k] · (Φₙ₊₁ᵀ·G)[m, k]
    ∂F/∂τ         = −1/τ · (Σ_m source[m] · ∂F/∂source[m] + Σ_q query[q] · ∂F/∂query[q])

The last line is Euler's identity: F depends on scores and τ only through their quotient. So the
family is closed, backward is written in terms of the Function itself, and derivatives of every
order follow. Forward-mode differentiation is not provided.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from imbalanced_losses._ranking.plan import Plan


def differentiable_sums(
    plan: Plan, queries: Tensor, sources: Tensor, temperature: float | Tensor, weights: Tensor
) -> Tensor:
    """Φ₀·weights [Q, K], attached to queries, sources, temperature and weights."""
    out: Tensor = _Sums.apply(queries, sources, temperature, weights, 0, False, plan)
    return out


class _Sums(torch.autograd.Function):
    """weights [C, M, K] -> Φₙ·weights [Q, K]; transposed: cotangent [Q, K] -> Φₙᵀ·it [C, M, K]."""

    @staticmethod
    def forward(
        queries: Tensor,
        sources: Tensor,
        temperature: float | Tensor,
        columns: Tensor,
        order: int,
        is_transposed: bool,
        plan: Plan,
    ) -> Tensor:
        return (plan.transposed_sums if is_transposed else plan.sums)(order, columns)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        queries, sources, temperature, columns, *ctx.constants = inputs
        ctx.fixed_temperature = None if isinstance(temperature, Tensor) else temperature
        tensors = (queries, sources, temperature, columns)
        ctx.save_for_backward(*(t for t in tensors if isinstance(t, Tensor)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        order, is_transposed, plan = ctx.constants
        geometry, columns = _saved(ctx)
        sides = (grads[0], columns) if is_transposed else (columns, grads[0])
        geometry_grads = _geometry_gradients(ctx, geometry, *sides)
        columns_grad = None
        if ctx.needs_input_grad[3]:
            columns_grad = _Sums.apply(*geometry, grads[0], order, not is_transposed, plan)
        return (*geometry_grads, columns_grad, None, None, None)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Tensor, int]:
        """Over the columns alone, by making the batch more of them."""
        *geometry, columns, order, is_transposed, plan = inputs
        if any(dim is not None for dim in in_dims[:3]):
            raise NotImplementedError(
                "vmap over the scores or the temperature of sigmoid_sums is not supported: "
                "stack the problems along its dimension C instead"
            )
        columns = columns.movedim(in_dims[3], -1).flatten(-2)  # [..., K·B]
        out = _Sums.apply(*geometry, columns, order, is_transposed, plan)
        return out.unflatten(-1, (-1, info.batch_size)), out.dim()


class _Geometry(NamedTuple):
    queries: Tensor
    sources: Tensor
    temperature: float | Tensor


def _saved(ctx: Any) -> tuple[_Geometry, Tensor]:
    """The geometry and the columns; checkpointing lets them be unpacked only once."""
    if ctx.fixed_temperature is None:
        queries, sources, temperature, columns = ctx.saved_tensors
        return _Geometry(queries, sources, temperature), columns
    queries, sources, columns = ctx.saved_tensors
    return _Geometry(queries, sources, ctx.fixed_temperature), columns


def _geometry_gradients(
    ctx: Any, geometry: _Geometry, weights: Tensor, cotangent: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of F = ⟨cotangent, Φₙ·weights⟩ in queries [Q], sources [C, M], temperature [C]."""
    if not any(ctx.needs_input_grad[:3]):
        return None, None, None
    queries, sources, temperature = geometry
    order, _, plan = ctx.constants
    if torch.is_grad_enabled():
        at_queries = _Sums.apply(*geometry, weights, order + 1, False, plan)
        at_sources = _Sums.apply(*geometry, cotangent, order + 1, True, plan)
    else:
        at_queries, at_sources = plan.both_sums(order + 1, weights, cotangent)

    queries_grad = -(cotangent * at_queries).sum(-1)  # [Q]
    sources_grad = (weights * at_sources).sum(-1)  # [C, M]
    if not isinstance(temperature, Tensor):
        return queries_grad / temperature, sources_grad / temperature, None

    problem = plan.problem
    queries_grad = queries_grad / temperature[problem]
    sources_grad = sources_grad / temperature[:, None]
    if not ctx.needs_input_grad[2]:
        return queries_grad, sources_grad, None
    # Gradients of a problem sum to zero, so any origin will do; the mean keeps the products small.
    origin = sources.detach().sum(dim=1) / max(1, sources.shape[1])  # [C]
    moments = ((sources - origin[:, None]) * sources_grad).sum(-1)  # [C]
    moments = moments.index_add(0, problem, (queries - origin[problem]) * queries_grad)
    return queries_grad, sources_grad, -moments / temperature
