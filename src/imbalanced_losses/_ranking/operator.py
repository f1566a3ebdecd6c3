"""Soft ranks as operators, which compilers take as a whole: their values steer what they do.

What a metric makes of the ranks is traced as the plain code that it is, and ranks are computed once
for it and once for its gradient. A metric that is known beforehand is part of an operator that does
what eager code does. Differentiable once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from imbalanced_losses._ranking.backends import rank_plan
from imbalanced_losses._ranking.canonical import compute_dtype
from imbalanced_losses._ranking.cuda.prepared import PreparedQueries
from imbalanced_losses._ranking.layout import Layout
from imbalanced_losses._ranking.plan import Listed, Rows

if TYPE_CHECKING:
    from imbalanced_losses._ranking.problems import Problems
    from imbalanced_losses._ranking.ranked_sum import Asked

_PROBLEMS = (
    "Tensor scores, Tensor is_positive, Tensor? temperatures, Tensor? weights, Tensor? value, "
    "Tensor? lengths, float temperature, bool moves_temperature, SymInt num_live, str backend, "
    "bool is_graded"
)


def traced_ranks(
    problems: Problems, queries: Rows, among: tuple[Rows, ...], by_value: bool
) -> tuple[Tensor, ...]:
    """K ranks [C, M], 1 where a row is no query."""
    given = _arguments(problems, problems.weights, problems.value)
    ranks: Tensor = torch.ops.imbalanced_losses.soft_ranks(
        *given, queries, ",".join(among), by_value
    )
    return ranks.unbind()


def traced_sum(problems: Problems, asked: Asked) -> Tensor:
    """`ranked_sum` of something that is known by a name."""
    given = _arguments(problems, problems.given_weights, problems.given_value)
    is_moved = (given[0].requires_grad or given[7]) and torch.is_grad_enabled()
    constants = [constant.detach() for constant in asked.constants]
    outputs = torch.ops.imbalanced_losses.ranked_sum(*given, asked.name, constants, is_moved)
    found: Tensor = outputs[0]
    return found.view(()) if problems.scores.dim() == 1 else found


def _arguments(problems: Problems, weights: Tensor | None, value: Tensor | None) -> tuple[Any, ...]:
    """Those of `_PROBLEMS`: of weights and values no gradient is known."""
    weights, value = (own if own is None else own.detach() for own in (weights, value))
    scores, temperature = problems.scores, problems.temperature
    rows = scores.unsqueeze(0) if scores.dim() == 1 else scores
    fixed, by_problem, moves_temperature = 0.0, None, False
    if isinstance(temperature, Tensor):
        by_problem = temperature.to(scores.device).expand(problems.layout.num_problems)
        moves_temperature = by_problem.requires_grad
    else:
        fixed = temperature
    num_live = rows.shape[1] if moves_temperature else problems.num_live
    return (
        *(rows, problems.is_positive, by_problem, weights, value, problems.layout.lengths),
        *(fixed, moves_temperature, num_live, problems.backend, problems.is_graded),
    )


def _problems_of(scores: Tensor, is_positive: Tensor, *rest: Any) -> Problems:
    from imbalanced_losses._ranking.problems import Problems

    temperatures, weights, value, lengths, temperature, _, num_live, backend, is_graded = rest
    return Problems(
        scores,
        temperature if temperatures is None else temperatures,
        is_positive,
        weights,
        value=value,
        is_graded=is_graded,
        layout=Layout(is_positive.shape, lengths),
        num_live=num_live,
        backend=backend,
    )


class _AskedRanks:
    """The arguments of `soft_ranks` as problems, and the plan for them."""

    def __init__(self, *arguments: Any) -> None:
        *own, queries, among, by_value = arguments
        problems = _problems_of(*own)
        self.given = problems.by_value(problems.canonical()) if by_value else problems.canonical()
        self.queries = problems.queries(queries)
        sets = cast("tuple[Rows, ...]", tuple(among.split(",")))
        self.plan = rank_plan(self.given, self.queries, sets, problems.backend)

    def spread(self, ranks: tuple[Tensor, ...]) -> Tensor:
        """[K, C, M], 1 where a row is no query."""
        if not isinstance(self.queries, Listed):
            return torch.stack(ranks)
        out = self.given.scores.new_ones(len(ranks), *self.given.scores.shape)
        out.flatten(1)[:, self.queries.places(out.shape[1:])] = torch.stack(ranks)
        return out


def _soft_ranks(scores: Tensor, *rest: Any) -> Tensor:
    asked = _AskedRanks(scores, *rest)
    return asked.spread(asked.plan.ranks())


def _gradient(grad: Tensor, scores: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    from imbalanced_losses._ranking.ranked_sum import gradient_of

    asked = _AskedRanks(scores, *rest)
    queries = asked.queries
    if isinstance(queries, Listed):
        at_queries = grad.flatten(1)[:, queries.places(scores.shape)]  # [K, Q]
        _, by_scores = asked.plan.ranks_and_gradient(
            lambda ranks, index: at_queries[:, index].unbind()
        )
    else:
        assert isinstance(queries, PreparedQueries)
        queries.weighs_slopes = False  # `worth` is traced, and with it its weights
        _, by_scores = asked.plan.ranks_and_gradient(lambda ranks, index: grad.unbind())
    by_scores, by_temperature = gradient_of(asked.given, by_scores, rest[6])
    if by_temperature is None:
        by_temperature = by_scores.new_empty(0, dtype=torch.float64)
    return by_scores, by_temperature


_RANKS = f"{_PROBLEMS}, str queries, str among, bool by_value"
_ranks_operator = torch.library.custom_op(
    "imbalanced_losses::soft_ranks", _soft_ranks, mutates_args=(), schema=f"({_RANKS}) -> Tensor"
)
_gradient_operator = torch.library.custom_op(
    "imbalanced_losses::soft_ranks_gradient",
    _gradient,
    mutates_args=(),
    schema=f"(Tensor grad, {_RANKS}) -> (Tensor, Tensor)",
)


@_ranks_operator.register_fake
def _shape_of_ranks(scores: Tensor, *rest: Any) -> Tensor:
    among = rest[11]
    return scores.new_empty((among.count(",") + 1, *scores.shape), dtype=compute_dtype(scores))


@_gradient_operator.register_fake
def _shapes_of_gradient(grad: Tensor, scores: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    num_temperatures = rest[1].shape[0] if rest[6] else 0
    by_scores = scores.new_empty(scores.shape, dtype=grad.dtype)
    return by_scores, scores.new_empty(num_temperatures, dtype=torch.float64)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.rest = inputs[6:]
    ctx.save_for_backward(*inputs[:6])


def _backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    scores, _, temperatures, *_ = ctx.saved_tensors
    by_scores, by_temperature = torch.ops.imbalanced_losses.soft_ranks_gradient(
        grads[0], *ctx.saved_tensors, *ctx.rest
    )
    by_temperatures = by_temperature.to(temperatures.dtype) if ctx.rest[1] else None
    return by_scores.to(scores.dtype), None, by_temperatures, *[None] * 11


_ranks_operator.register_autograd(_backward, setup_context=_remember)


def _ranked_sum(scores: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    from imbalanced_losses._ranking.ranked_sum import KNOWN, with_gradient

    *own, name, constants, is_moved = rest
    problems, moves_temperature = _problems_of(scores, *own), own[6]
    found, slopes, by_temperature = with_gradient(
        problems, KNOWN[name](*constants), is_moved, is_moved and moves_temperature
    )
    slopes = found.new_empty(0) if slopes is None else slopes.contiguous()
    if by_temperature is None:
        by_temperature = scores.new_empty(0, dtype=torch.float64)
    return found, slopes, by_temperature


_SUM = f"{_PROBLEMS}, str name, Tensor[] constants, bool is_moved"
_sum_operator = torch.library.custom_op(
    "imbalanced_losses::ranked_sum",
    _ranked_sum,
    mutates_args=(),
    schema=f"({_SUM}) -> (Tensor, Tensor, Tensor)",
)


@_sum_operator.register_fake
def _shapes_of_sum(scores: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    lengths, is_moved, dtype = rest[4], rest[-1], compute_dtype(scores)
    num_problems = (scores if lengths is None else lengths).shape[0]
    return (
        scores.new_empty(num_problems, dtype=dtype),
        scores.new_empty(scores.shape if is_moved else 0, dtype=dtype),
        scores.new_empty(num_problems if is_moved and rest[6] else 0, dtype=torch.float64),
    )


def _remember_sum(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *given, constants, ctx.is_moved = inputs
    ctx.rest = given[6:]
    ctx.save_for_backward(*output[1:], *given[:6], *constants)


def _backward_sum(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError("gradients of compiled code can't be differentiated again")
    slopes, by_temperature, *given = ctx.saved_tensors
    given, constants = given[:6], given[6:]
    if not ctx.is_moved:  # known only now, as of an exported program that is trained
        found = torch.ops.imbalanced_losses.ranked_sum(*given, *ctx.rest, constants, True)
        slopes, by_temperature = found[1:]
    scores, _, temperatures, *_, lengths = given
    by_scores = Layout(slopes.shape, lengths).for_rows(grads[0]) * slopes
    by_temperatures = None
    if ctx.rest[1]:
        by_temperatures = (grads[0] * by_temperature).to(temperatures.dtype)
    rest = *[None] * 9, [None] * len(constants), None
    return by_scores.to(scores.dtype), None, by_temperatures, *rest


_sum_operator.register_autograd(_backward_sum, setup_context=_remember_sum)
