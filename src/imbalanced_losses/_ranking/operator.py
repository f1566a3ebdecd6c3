"""Soft ranks as two operators, which compilers take as a whole: their values steer what they do.

What a metric makes of the ranks is traced as the plain code that it is. Differentiable once.
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

_PROBLEMS = (
    "Tensor scores, Tensor is_positive, Tensor? temperatures, Tensor? weights, Tensor? value, "
    "Tensor? lengths, float temperature, bool moves_temperature, SymInt num_live, str queries, "
    "str among, str backend, bool is_graded, bool by_value"
)


def traced_ranks(
    problems: Problems, queries: Rows, among: tuple[Rows, ...], by_value: bool
) -> tuple[Tensor, ...]:
    """K ranks [C, M], 1 where a row is no query."""
    scores, temperature = problems.scores, problems.temperature
    rows = scores.unsqueeze(0) if scores.dim() == 1 else scores
    fixed, by_problem, moves_temperature = 0.0, None, False
    if isinstance(temperature, Tensor):
        by_problem = temperature.to(scores.device).expand(problems.layout.num_problems)
        moves_temperature = by_problem.requires_grad
    else:
        fixed = temperature
    num_live = rows.shape[1] if moves_temperature else problems.num_live
    ranks: Tensor = torch.ops.imbalanced_losses.soft_ranks(
        *(rows, problems.is_positive, by_problem, problems.weights, problems.value),
        *(problems.layout.lengths, fixed, moves_temperature, num_live, queries),
        *(",".join(among), problems.backend, problems.is_graded, by_value),
    )
    return ranks.unbind()


class _Asked:
    """The arguments of the operators as problems, and the plan for them."""

    def __init__(self, scores: Tensor, is_positive: Tensor, *rest: Any) -> None:
        from imbalanced_losses._ranking.problems import Problems

        temperatures, weights, value, lengths, temperature, _, num_live, *names = rest
        queries, among, backend, is_graded, by_value = names
        problems = Problems(
            scores,
            temperature if temperatures is None else temperatures,
            is_positive,
            weights,
            value=value,
            is_graded=is_graded,
            layout=Layout(is_positive.shape, lengths),
            num_live=num_live,
        )
        self.given = problems.by_value(problems.canonical()) if by_value else problems.canonical()
        self.queries = problems.queries(queries)
        sets = cast("tuple[Rows, ...]", tuple(among.split(",")))
        self.plan = rank_plan(self.given, self.queries, sets, backend)

    def spread(self, ranks: tuple[Tensor, ...]) -> Tensor:
        """[K, C, M], 1 where a row is no query."""
        if not isinstance(self.queries, Listed):
            return torch.stack(ranks)
        out = self.given.scores.new_ones(len(ranks), *self.given.scores.shape)
        out.flatten(1)[:, self.queries.places(out.shape[1:])] = torch.stack(ranks)
        return out


def _soft_ranks(scores: Tensor, *rest: Any) -> Tensor:
    asked = _Asked(scores, *rest)
    return asked.spread(asked.plan.ranks())


def _gradient(grad: Tensor, scores: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    from imbalanced_losses._ranking.ranked_sum import gradient_of

    asked = _Asked(scores, *rest)
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


_ranks_operator = torch.library.custom_op(
    "imbalanced_losses::soft_ranks", _soft_ranks, mutates_args=(), schema=f"({_PROBLEMS}) -> Tensor"
)
_gradient_operator = torch.library.custom_op(
    "imbalanced_losses::soft_ranks_gradient",
    _gradient,
    mutates_args=(),
    schema=f"(Tensor grad, {_PROBLEMS}) -> (Tensor, Tensor)",
)


@_ranks_operator.register_fake
def _shape_of_ranks(scores: Tensor, *rest: Any) -> Tensor:
    among = rest[9]
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
