"""Sums over queries of what each is worth at its soft ranks: value and gradient in one pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from imbalanced_losses._checks import arguments as _checks
from imbalanced_losses._checks.tracing import is_transformed
from imbalanced_losses._ranking.backends import rank_plan, sums_of_queries
from imbalanced_losses._ranking.canonical import canonical, smallest
from imbalanced_losses._ranking.cuda import facts
from imbalanced_losses._ranking.cuda.prepared import PreparedQueries
from imbalanced_losses._ranking.operator import traced_ranks, traced_sum
from imbalanced_losses._ranking.plan import ROWS, Canonical, Queries, Rows, half_of
from imbalanced_losses._ranking.ranks import Ranks

if TYPE_CHECKING:
    from imbalanced_losses._ranking.problems import Problems

Worth = Callable[..., Tensor]  # of `Ranks`
# Of `Ranks` and what these are worth; of an average of `Ranks`, the share of each query, the
# average, and how much of what is added to the sum is added to the average.
Slopes = Callable[..., tuple[Tensor, ...]]

_ONLY_ALONE = (
    'gather="sums" has first derivatives only, and no compiled form: for create_graph=True, '
    'torch.func and torch.compile use gather="rows"'
)


def ranked_sum(problems: Problems, asked: Asked) -> Tensor:
    """See `Problems.ranked_sum`, `ranked_mean` and `ranked_average`."""
    if not (problems.is_traced or is_transformed()):
        found: Tensor = _RankedSum.apply(problems.scores, problems.temperature, problems, asked)
        return found
    if problems.processes is not None:
        raise RuntimeError(_ONLY_ALONE)
    if problems.is_traced and asked.name:
        return traced_sum(problems, asked)
    if problems.is_traced:
        queries = problems.queries(asked.queries)
        ranks = traced_ranks(problems, asked.queries, asked.among, asked.by_value)
        return asked.found(problems, asked.clamped(ranks, queries), queries)
    _refuse_batches(problems)
    return _differentiable(problems, asked)


# What compilers need not look into, by name: from constants [C] to what is asked.
KNOWN: dict[str, Callable[..., Asked]] = {}


def known(
    name: str,
    worth: Worth,
    slopes: Slopes,
    among: tuple[Rows, ...] = ("all",),
    share: Worth | None = None,
) -> Callable[..., Asked]:
    """What is asked, given constants [C] that its functions take last, and takes none unseen.

    A mean over positives; or, by a share, an average over negatives, among which positives count
    their value, divided by its first constant at least.
    """

    def asked(*constants: Tensor) -> Asked:
        own: dict[str, Any] = {"slopes": slopes, "name": name, "constants": constants}
        if share is None:
            return Asked(worth, "positives", among, is_mean=True, **own)
        counted = Share(share, constants[0].detach())
        return Asked(worth, "negatives", among, by_value=True, share=counted, **own)

    KNOWN[name] = asked
    return asked


class Share(NamedTuple):
    """By how much each query of an average counts, and the least [C] that it is divided by."""

    of: Worth
    least: Tensor


class Asked:
    """What a metric has asked for."""

    def __init__(
        self,
        worth: Worth,
        queries: Rows,
        among: tuple[Rows, ...],
        slopes: Slopes | None = None,
        is_mean: bool = False,
        by_value: bool = False,
        share: Share | None = None,
        name: str = "",
        constants: tuple[Tensor, ...] = (),
    ) -> None:
        _checks.choice("queries", queries, ROWS)
        if not isinstance(among, tuple):
            raise TypeError(f"among must be a tuple of names, got {among!r}")
        for rows in among:
            _checks.choice("among", rows, ROWS)
        if by_value and (queries != "negatives" or "all" in among):
            raise ValueError(
                'by_value=True is for queries="negatives" and among without "all": only beside '
                f"negatives does a positive count its value; got {queries!r} among {among}"
            )
        self.worth, self.queries, self.among, self.slopes = worth, queries, among, slopes
        self.is_mean = is_mean  # by value, of the queries, which are the positives then
        self.by_value = by_value  # of the positives that queries are ranked among
        self.share = share  # of the queries in an average
        self.name, self.constants = name, constants  # of `known`

    def found(self, problems: Problems, ranks: tuple[Tensor, ...], queries: Queries) -> Tensor:
        """What was asked for [C], over all processes."""
        if self.share is not None:
            counted = self.counted(self.share, ranks, queries)
            return _average(self.share, problems, counted, queries)[0]
        return self.sum_of(self.worth_of(ranks, queries), problems, queries)

    def sum_of(self, worth: Tensor, problems: Problems, queries: Queries) -> Tensor:
        """The sum or mean [C] of what all queries are worth."""
        total = problems.summed(queries.total(worth, self.is_mean))
        if not self.is_mean or isinstance(queries, PreparedQueries):  # whose kernels divide
            return total
        return total / problems.mass_of_positives()

    def counted(
        self, share: Share, ranks: tuple[Tensor, ...], queries: Queries
    ) -> tuple[Tensor, Tensor]:
        """What each query adds to the sum and to the divisor of an average."""
        counts = share.of(Ranks(self.among, ranks, queries), *self.constants)
        return counts * self.worth_of(ranks, queries), counts

    def worth_of(self, ranks: tuple[Tensor, ...], queries: Queries, index: Any = None) -> Tensor:
        worth = self.worth(Ranks(self.among, ranks, queries, index), *self.constants)
        if worth.shape != ranks[0].shape:
            raise ValueError(
                f"worth must give one number a query, {list(ranks[0].shape)}, got "
                f"{list(worth.shape)}"
            )
        return worth

    def clamped(self, ranks: tuple[Tensor, ...], queries: Queries) -> tuple[Tensor, ...]:
        """Clamped to 0 ≤ R ≤ R among all > 0.

        Rounding breaks this when a row's weight is below the precision of the sum it is part of.
        """
        if queries.weights is None or isinstance(queries, PreparedQueries):  # clamped by kernels
            return ranks
        if "all" not in self.among:
            return tuple(rank.clamp(min=0) for rank in ranks)
        whole = self.among.index("all")
        among_all = ranks[whole].clamp(min=smallest(ranks[whole].dtype))
        return tuple(
            among_all if k == whole else torch.minimum(rank.clamp(min=0), among_all)
            for k, rank in enumerate(ranks)
        )


class _SlopesOf:
    """∂/∂ranks of what was asked for, times ω of the query; and the value, where it comes along.

    Attributes:
        found: [C], once the worth of all queries was seen at their ranks.
    """

    def __init__(self, asked: Asked, problems: Problems, queries: Queries, is_whole: bool) -> None:
        self.asked, self.problems, self.queries = asked, problems, queries
        self.is_whole = is_whole  # whether it is called once
        self.found: Tensor | None = None
        self.factor = queries.factor(asked.is_mean)
        self._of_average: tuple[Tensor, ...] | None = None

    def __call__(self, ranks: tuple[Tensor, ...], index: Any) -> tuple[Tensor, ...]:
        asked, queries = self.asked, self.queries
        if asked.share is not None:
            if self._of_average is None:
                self.average(ranks)
            assert self._of_average is not None
            return tuple(slope[index] for slope in self._of_average)
        ranks = asked.clamped(ranks, queries)
        factor = None if self.factor is None else self.factor[index]
        with torch.set_grad_enabled(asked.slopes is None):
            leaves = _leaves(ranks) if asked.slopes is None else ranks
            worth = asked.worth_of(leaves, queries, index)
        if self.is_whole:
            self.found = asked.sum_of(worth.detach(), self.problems, queries)
        if asked.slopes is None:
            return _derivatives((worth,), leaves, (factor,))
        slopes = asked.slopes(Ranks(asked.among, ranks, queries, index), worth, *asked.constants)
        return slopes if factor is None else tuple(slope * factor for slope in slopes)

    def average(self, ranks: tuple[Tensor, ...]) -> None:
        """Find an average, and its derivatives by the ranks of all queries."""
        asked, problems, queries, share = self.asked, self.problems, self.queries, self.asked.share
        assert share is not None
        ranks = asked.clamped(ranks, queries)
        with torch.set_grad_enabled(asked.slopes is None):
            leaves = _leaves(ranks) if asked.slopes is None else ranks
            counted = asked.counted(share, leaves, queries)
        detached = counted[0].detach(), counted[1].detach()
        self.found, divisor, moving = _average(share, problems, detached, queries)
        if asked.slopes is not None:
            per, average = (queries.of_problem(one) for one in (1 / divisor, moving))
            if self.factor is not None:
                per = per * self.factor
            at = Ranks(asked.among, ranks, queries)
            self._of_average = asked.slopes(at, counted[1], average, per, *asked.constants)
            return
        # What a count adds is what the query is worth beyond the average.
        per_query = tuple(queries.of_problem(one) for one in (1 / divisor, -moving / divisor))
        if self.factor is not None:
            per_query = tuple(one * self.factor for one in per_query)
        self._of_average = _derivatives(counted, leaves, per_query)


def _average(
    share: Share, problems: Problems, counted: tuple[Tensor, Tensor], queries: Queries
) -> tuple[Tensor, Tensor, Tensor]:
    """[C] each: the average, what it is divided by, and the average where the divisor moves."""
    total, counts = (problems.summed(queries.total(own)) for own in counted)
    divisor = torch.maximum(counts, share.least)
    average = total / divisor
    return average, divisor, torch.where(counts > share.least, average, 0)


def _leaves(ranks: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(rank.detach().requires_grad_() for rank in ranks)


def _derivatives(
    outputs: tuple[Tensor, ...], leaves: tuple[Tensor, ...], factors: tuple[Tensor | None, ...]
) -> tuple[Tensor, ...]:
    """Those of Σ factor · output by the leaves, 0 where it does not depend on them."""
    moving = [pair for pair in zip(outputs, factors, strict=True) if pair[0].requires_grad]
    if not moving:
        return tuple(map(torch.zeros_like, leaves))
    given = [
        (output.new_ones(()) if factor is None else factor).expand_as(output)
        for output, factor in moving
    ]
    return torch.autograd.grad([pair[0] for pair in moving], leaves, given, materialize_grads=True)


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
        processes = problems.processes
        everywhere = processes is not None and processes.is_differentiated
        is_moved = everywhere or any(ctx.needs_input_grad)
        is_tensor = isinstance(temperature, Tensor)
        moves_temperature = is_tensor and (everywhere or ctx.needs_input_grad[1])
        found, slopes, by_temperature = with_gradient(problems, asked, is_moved, moves_temperature)
        if slopes is not None:
            ctx.again, ctx.asked, ctx.layout = problems.again, asked, problems.layout
            ctx.is_shared = processes is not None
            ctx.fixed_temperature = None if is_tensor else temperature
            of_temperature = (temperature, by_temperature) if is_tensor else ()
            ctx.save_for_backward(scores, slopes.view(scores.shape), *of_temperature)
        return found.view(()) if scores.dim() == 1 else found

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
        by_scores = (grads[0] if scores.dim() == 1 else ctx.layout.for_rows(grads[0])) * slopes
        return by_scores.to(scores.dtype), by_temperature, None, None


def with_gradient(
    problems: Problems, asked: Asked, is_moved: bool, moves_temperature: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What was asked for [C], and where it moves its gradient by the scores [C, M] and by τ [C]."""
    given, queries = problems.canonical(), problems.queries(asked.queries)
    if asked.by_value:
        given = problems.by_value(given)
    per = problems.mass_of_positives() if asked.is_mean else 1
    if isinstance(queries, PreparedQueries) and isinstance(per, Tensor):
        queries, per = queries.per(per), 1
    if moves_temperature:  # what τ changes is told from the slopes of all rows
        given = given._replace(num_live=given.scores.shape[1])
    plan = rank_plan(given, queries, asked.among, problems.backend)
    found = slopes = by_temperature = None
    if not is_moved:
        ranks = plan.ranks()
    else:
        slopes_of = _SlopesOf(asked, problems, queries, plan.is_whole)
        if asked.share is not None and not plan.is_whole:
            slopes_of.average(plan.ranks())
        ranks, slopes = plan.ranks_and_gradient(slopes_of)
        found = slopes_of.found
        slopes, by_temperature = gradient_of(given, slopes, moves_temperature, per)
    if found is None:
        found = asked.found(problems, asked.clamped(ranks, queries), queries)
    return found, slopes, by_temperature


def gradient_of(
    given: Canonical, slopes: Tensor, moves_temperature: bool, per: int | Tensor = 1
) -> tuple[Tensor, Tensor | None]:
    """Slopes [C, M] by score / τ, written over by those by the scores; and those by τ [C].

    Both divided by `per`, a number or [C].
    """
    if given.has_extremes:
        # Nothing moves an infinity; where several tie, their slopes would be finite.
        slopes.masked_fill_(given.scores.abs() == torch.finfo(slopes.dtype).max / 2, 0)
    if given.sides is None:
        tau = given.temperature * per
        slopes.div_(given.layout.for_rows(tau) if isinstance(tau, Tensor) else tau)
    return slopes, _slopes_in_temperature(given, slopes) if moves_temperature else None


def _twice_differentiable_gradient(
    ctx: Any, scores: Tensor, rest: list[Tensor], grad: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """The gradient in scores and temperature as a function that autograd can go through."""
    # Views, so that what the temperature owes to the scores is not told twice.
    wanted = [tensor.view_as(tensor) for tensor in (scores, *rest[:1])]
    temperature = wanted[1] if rest else ctx.fixed_temperature
    problems = ctx.again(scores=wanted[0], temperature=temperature)
    total = _differentiable(problems, ctx.asked).view(grad.shape)
    by_scores = by_temperature = None
    if ctx.needs_input_grad[0]:
        (by_scores,) = torch.autograd.grad(total, wanted[0], grad, create_graph=True)
    if rest and ctx.needs_input_grad[1]:
        (by_temperature,) = torch.autograd.grad(total, wanted[1], grad, create_graph=True)
    return by_scores, by_temperature


def _differentiable(problems: Problems, asked: Asked) -> Tensor:
    """`ranked_sum` by `sigmoid_sums`: slower, with derivatives of every order."""
    given = canonical(problems, problems.scores, problems.temperature)
    if asked.by_value:
        given = problems.by_value(given)
    queries = problems.listed(asked.queries)
    columns = [given.column(rows) for rows in asked.among]
    weights = torch.stack(
        [torch.ones_like(given.scores) if column is None else column for column in columns], dim=-1
    )
    sums = sums_of_queries(given, queries, weights.detach(), problems.backend)
    ranks = tuple(
        own + half_of(queries, rows, given)
        for own, rows in zip(sums.unbind(1), asked.among, strict=True)
    )
    return asked.found(problems, ranks, queries)


def _slopes_in_temperature(given: Canonical, slopes: Tensor) -> Tensor:
    """∂/∂τ [C] of a sum, from the slopes [C, M] in the scores.

    A sum depends on scores and τ only through their quotient, so that Euler's identity gives it as
    −Σ score · slope / τ. Slopes sum to zero: any origin will do, and one amid the scores that have
    a slope keeps the products small.
    """
    tau = given.temperature
    if given.sides is not None and isinstance(tau, Tensor) and facts.fits(slopes, given.layout):
        return facts.by_temperature(given.scores, slopes, tau, given.layout)
    # So that no product overflows: slopes are at most 1/τ < 1e155, and scores so many τ from zero
    # are equal or out of reach of each other.
    layout, dtype = given.layout, torch.float64
    temperature = torch.as_tensor(tau, dtype=dtype)
    scaled = (given.scores.double() / layout.for_rows(temperature)).clamp(-1e140, 1e140)
    slopes = slopes.double()
    scaled = torch.where(slopes != 0, scaled, 0.0)  # a NaN that no sum has seen counts for nothing
    size = slopes.abs()
    moments = torch.stack((layout.total(size * scaled), layout.total(size)))
    if given.processes is not None:
        moments = given.processes.sum(moments)
    origin = moments[0] / moments[1].clamp(min=1e-300)
    by_temperature = -layout.total((scaled - layout.for_rows(origin)) * slopes)
    if given.processes is not None:
        by_temperature = given.processes.sum(by_temperature)
    # A temperature that was raised to the smallest moves nothing.
    return by_temperature.masked_fill(temperature <= smallest(given.scores.dtype), 0.0)


def _refuse_batches(problems: Problems) -> None:
    """Raise where torch.func.vmap is at work."""
    functorch = torch._C._functorch
    wrapped: list[Any] = [problems.scores, problems.is_positive, problems.temperature]
    wrapped += problems.given_weights, problems.given_value
    for value in wrapped:
        if isinstance(value, Tensor) and functorch.is_functorch_wrapped_tensor(value):
            if functorch.is_batchedtensor(value):
                raise NotImplementedError(
                    "ranks can't be mapped by torch.func.vmap: stack the problems along the "
                    "dimension C of scores [C, M]"
                )
            wrapped.append(functorch.get_unwrapped(value))
