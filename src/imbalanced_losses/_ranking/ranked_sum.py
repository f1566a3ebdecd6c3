"""Sums over queries of what each is worth at its soft ranks: value and gradient in one pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from imbalanced_losses._checks import arguments as _checks
from imbalanced_losses._checks.tracing import is_traced, is_transformed
from imbalanced_losses._ranking.backends import rank_plan, sigmoid_sums
from imbalanced_losses._ranking.canonical import canonical, smallest
from imbalanced_losses._ranking.cuda.prepared import PreparedQueries
from imbalanced_losses._ranking.operator import traced_ranks
from imbalanced_losses._ranking.plan import ROWS, Canonical, Queries, Rows, half_of
from imbalanced_losses._ranking.ranks import Ranks

if TYPE_CHECKING:
    from imbalanced_losses._ranking.problems import Problems

Worth = Callable[[Ranks], Tensor]
Slopes = Callable[[Ranks], tuple[Tensor, ...]]

_ONLY_ALONE = (
    'gather="sums" has first derivatives only, and no compiled form: for create_graph=True, '
    'torch.func and torch.compile use gather="rows"'
)


def ranked_sum(problems: Problems, asked: Asked) -> Tensor:
    """See `Problems.ranked_sum` and `Problems.ranked_mean`."""
    if is_traced(problems.scores):
        _only_alone(problems)
        queries = problems.queries(asked.queries)
        ranks = traced_ranks(problems, asked.queries, asked.among)
        total = queries.total(asked.worth_of(ranks, queries))
        return total / problems.mass_of_positives() if asked.is_mean else total
    if is_transformed():
        _only_alone(problems)
        _refuse_batches(problems)
        return _differentiable(problems, asked)
    found: Tensor = _RankedSum.apply(problems.scores, problems.temperature, problems, asked)
    return found


class Asked:
    """What a metric has asked for."""

    def __init__(
        self,
        worth: Worth,
        queries: Rows,
        among: tuple[Rows, ...],
        slopes: Slopes | None,
        is_mean: bool = False,
    ) -> None:
        _checks.choice("queries", queries, ROWS)
        if not isinstance(among, tuple):
            raise TypeError(f"among must be a tuple of names, got {among!r}")
        for rows in among:
            _checks.choice("among", rows, ROWS)
        self.worth, self.queries, self.among, self.slopes = worth, queries, among, slopes
        self.is_mean = is_mean  # over the mass of the queries, which are the positives then

    def ranks(self, ranks: tuple[Tensor, ...], queries: Queries, index: Any = slice(None)) -> Ranks:
        return Ranks(dict(zip(self.among, ranks, strict=True)), queries, index)

    def worth_of(self, ranks: tuple[Tensor, ...], queries: Queries) -> Tensor:
        if queries.weights is not None:
            ranks = self.possible(ranks)
        worth = self.worth(self.ranks(ranks, queries))
        if worth.shape != ranks[0].shape:
            raise ValueError(
                f"worth must give one number a query, {list(ranks[0].shape)}, got "
                f"{list(worth.shape)}"
            )
        return worth

    def possible(self, ranks: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Clamped to 0 ≤ R ≤ R among all > 0.

        Rounding breaks this when a row's weight is below the precision of the sum it is part of.
        """
        if "all" not in self.among:
            return tuple(rank.clamp(min=0) for rank in ranks)
        whole = self.among.index("all")
        among_all = ranks[whole].clamp(min=smallest(ranks[whole].dtype))
        return tuple(
            among_all if k == whole else torch.minimum(rank.clamp(min=0), among_all)
            for k, rank in enumerate(ranks)
        )


class _SlopesOf:
    """∂(ω · worth)/∂ranks of some queries."""

    def __init__(self, asked: Asked, queries: Queries) -> None:
        self.asked, self.queries = asked, queries

    def __call__(self, ranks: tuple[Tensor, ...], index: Any) -> tuple[Tensor, ...]:
        asked, queries = self.asked, self.queries
        if queries.weights is not None:
            ranks = asked.possible(ranks)
        if asked.slopes is not None:
            slopes = asked.slopes(asked.ranks(ranks, queries, index))
        else:
            slopes = self._by_autograd(ranks, index)
        if queries.weights is None:
            return slopes
        return tuple(slope * queries.weights[index] for slope in slopes)

    def _by_autograd(self, ranks: tuple[Tensor, ...], index: Any) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            leaves = tuple(rank.detach().requires_grad_() for rank in ranks)
            total = self.asked.worth(self.asked.ranks(leaves, self.queries, index)).sum()
            if not total.requires_grad:  # worth the same wherever it ranks
                return tuple(map(torch.zeros_like, leaves))
            found = torch.autograd.grad(total, leaves, allow_unused=True)
        return tuple(
            torch.zeros_like(leaf) if slope is None else slope
            for leaf, slope in zip(leaves, found, strict=True)
        )


class _RankedSum(torch.autograd.Function):
    """`ranked_sum` with its gradient taken in the forward pass, from the same sums.

    The sum of a problem depends on the scores of that problem alone, so the gradient is one tensor
    of the shape of the scores, which backward only has to scale. Where backward itself is to be
    differentiated, it takes the route of `_differentiable` instead.
    """

    @staticmethod
    def forward(
        ctx: Any, scores: Tensor, temperature: float | Tensor, problems: Problems, asked: Asked
    ) -> Tensor:
        given, queries = problems.canonical(), problems.queries(asked.queries)
        per = problems.mass_of_positives() if asked.is_mean else 1
        if isinstance(queries, PreparedQueries) and isinstance(per, Tensor):
            queries, per = queries.per(per), 1
        everywhere = given.processes is not None and given.processes.is_differentiated
        moves_temperature = isinstance(temperature, Tensor) and (
            everywhere or ctx.needs_input_grad[1]
        )
        if moves_temperature:  # what τ changes is told from the slopes of all rows
            given = given._replace(num_live=given.scores.shape[1])
        plan = rank_plan(given, queries, asked.among, problems.backend)
        if not (everywhere or any(ctx.needs_input_grad)):
            ranks = plan.ranks()
        else:
            ranks, slopes = plan.ranks_and_gradient(_SlopesOf(asked, queries))
            slopes, by_temperature = gradient_of(given, slopes, moves_temperature, per)
            ctx.constants, ctx.asked, ctx.kind = problems.constants(), asked, type(problems)
            ctx.is_shared = given.processes is not None
            tensors = [scores, slopes.view(scores.shape)]
            if isinstance(temperature, Tensor):
                tensors.append(temperature)
            if by_temperature is not None:
                tensors.append(by_temperature)
            ctx.save_for_backward(*tensors)
        total = problems.summed(queries.total(asked.worth_of(ranks, queries)))
        if asked.is_mean and not isinstance(queries, PreparedQueries):
            total.div_(per)
        return total.view(scores.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scores, slopes, *rest = ctx.saved_tensors
        if torch.is_grad_enabled():
            if ctx.is_shared:
                raise RuntimeError(_ONLY_ALONE)
            return *_twice_differentiable_gradient(ctx, scores, rest, grads[0]), None, None
        by_temperature = None
        if ctx.needs_input_grad[1]:
            temperature = rest[0]
            by_temperature = (grads[0] * rest[1]).sum_to_size(temperature.shape)
            by_temperature = by_temperature.to(temperature.dtype)
        by_scores = (grads[0] if scores.dim() == 1 else grads[0][:, None]) * slopes
        return by_scores.to(scores.dtype), by_temperature, None, None


def gradient_of(
    given: Canonical, slopes: Tensor, moves_temperature: bool, per: int | Tensor = 1
) -> tuple[Tensor, Tensor | None]:
    """Slopes [C, M] by score / τ, written over by those by the scores; and those by τ [C].

    Both divided by `per`, a number or [C].
    """
    if given.has_extremes:
        # Nothing moves an infinity; where several tie, their slopes would be finite.
        slopes.masked_fill_(given.scores.abs() == torch.finfo(slopes.dtype).max / 2, 0)
    if not given.by_kernels:
        tau = given.temperature * per
        slopes.div_(tau[:, None] if isinstance(tau, Tensor) else tau)
    return slopes, _slopes_in_temperature(given, slopes) if moves_temperature else None


def _twice_differentiable_gradient(
    ctx: Any, scores: Tensor, rest: list[Tensor], grad: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """The gradient in scores and temperature as a function that autograd can go through."""
    tau = {"temperature": rest[0]} if rest else {}
    problems = ctx.kind(scores=scores, **tau, **ctx.constants)
    total = _differentiable(problems, ctx.asked).view(grad.shape)
    by_scores = by_temperature = None
    if ctx.needs_input_grad[0]:
        (by_scores,) = torch.autograd.grad(total, scores, grad, create_graph=True)
    if rest and ctx.needs_input_grad[1]:
        (by_temperature,) = torch.autograd.grad(total, rest[0], grad, create_graph=True)
    return by_scores, by_temperature


def _differentiable(problems: Problems, asked: Asked) -> Tensor:
    """`ranked_sum` by `sigmoid_sums`: slower, with derivatives of every order."""
    given = canonical(problems, problems.scores, problems.temperature)
    queries = problems.listed(asked.queries)
    columns = [given.column(rows) for rows in asked.among]
    weights = torch.stack(
        [torch.ones_like(given.scores) if column is None else column for column in columns], dim=-1
    )
    problem, row = queries.problem, queries.row
    sums = sigmoid_sums(
        given.scores[problem, row],
        problem,
        given.scores,
        weights.detach(),
        given.temperature,
        backend=problems.backend,
    )
    ranks = tuple(
        own + half_of(queries, rows, given)
        for own, rows in zip(sums.unbind(1), asked.among, strict=True)
    )
    total = queries.total(asked.worth(asked.ranks(ranks, queries)))
    return total / problems.mass_of_positives() if asked.is_mean else total


def _slopes_in_temperature(given: Canonical, slopes: Tensor) -> Tensor:
    """∂/∂τ [C] of a sum, from the slopes [C, M] in the scores.

    A sum depends on scores and τ only through their quotient, so that Euler's identity gives it as
    −Σ score · slope / τ. Slopes sum to zero: any origin will do, and one amid the scores that have
    a slope keeps the products small.
    """
    # So that no product overflows: slopes are at most 1/τ < 1e155, and scores so many τ from zero
    # are equal or out of reach of each other.
    temperature = torch.as_tensor(given.temperature, dtype=torch.float64)[:, None]
    scaled = (given.scores.double() / temperature).clamp(-1e140, 1e140)
    slopes = slopes.double()
    scaled = torch.where(slopes != 0, scaled, 0.0)  # a NaN that no sum has seen counts for nothing
    size = slopes.abs()
    moments = torch.stack(((size * scaled).sum(1), size.sum(1)))
    if given.processes is not None:
        moments = given.processes.sum(moments)
    origin = moments[0] / moments[1].clamp(min=1e-300)
    by_temperature = -((scaled - origin[:, None]) * slopes).sum(1)
    if given.processes is not None:
        by_temperature = given.processes.sum(by_temperature)
    # A temperature that was raised to the smallest moves nothing.
    return by_temperature.masked_fill(temperature.squeeze(1) <= smallest(given.scores.dtype), 0.0)


def _only_alone(problems: Problems) -> None:
    if problems.processes is not None:
        raise RuntimeError(_ONLY_ALONE)


def _refuse_batches(problems: Problems) -> None:
    """Raise where torch.func.vmap is at work."""
    functorch = torch._C._functorch
    wrapped: list[Any] = [
        problems.scores,
        problems.is_positive,
        problems.given_weights,
        problems.temperature,
    ]
    for value in wrapped:
        if isinstance(value, Tensor) and functorch.is_functorch_wrapped_tensor(value):
            if functorch.is_batchedtensor(value):
                raise NotImplementedError(
                    "ranks can't be mapped by torch.func.vmap: stack the problems along the "
                    "dimension C of scores [C, M]"
                )
            wrapped.append(functorch.get_unwrapped(value))
