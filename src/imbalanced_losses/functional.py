"""Ranking losses as pure functions of scores and labels: no state, no randomness."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from imbalanced_losses import _checks
from imbalanced_losses._engine import (
    ALONE,
    BACKENDS,
    Backend,
    Exchange,
    RankPlan,
    detached,
    fused_plan,
    has_kernels,
    rank_plan,
    sigmoid_sums,
)
from imbalanced_losses._tracing import is_on_host, is_traced, is_transformed

__all__ = ["Backend", "SmoothAP", "prior_weights", "score_spread", "smooth_ap"]


class SmoothAP(NamedTuple):
    """What `smooth_ap` returns.

    Attributes:
        ap: [] or [C], smoothed Average Precision in [0, 1]; exactly 0 where not valid.
        valid: [] or [C] bool, False for a class without a positive or without a negative.
    """

    ap: Tensor
    valid: Tensor


def smooth_ap(
    scores: Tensor,
    is_positive: Tensor,
    temperature: float | Tensor = 0.01,
    *,
    sample_weight: Tensor | None = None,
    backend: Backend = "auto",
) -> SmoothAP:
    """Average Precision with every step function replaced by a sigmoid.

    Definition, for one class with scores s, weights ω, positives P and g(x) = σ(x / τ):
        R_i  = ½ω_i + Σ_j ω_j g(s_j − s_i)          soft rank of i among all rows
        R⁺_i = ½ω_i + Σ_{j∈P} ω_j g(s_j − s_i)      soft rank of i among the positives
        AP   = Σ_{i∈P} ω_i R⁺_i / R_i  ÷  Σ_{i∈P} ω_i

    With ω = 1 this is the published 1 + Σ_{j≠i} form. As τ → 0 it becomes scikit-learn's
    `average_precision_score(sample_weight=ω)` where no scores are tied; a tie counts half.
    Differentiable twice and more in scores and temperature.

    Args:
        scores: [M] or [C, M] floating; higher means more likely positive. float16 and bfloat16
            are computed in float32. ±inf ranks as the extreme it is, with gradient 0; NaN gives
            NaN.
        is_positive: bool, same shape as scores.
        temperature: τ > 0 in units of the scores: smaller is closer to the true AP and gives a
            sparser gradient. A float, or a tensor [] or [C] with one τ a class.
        sample_weight: [M] or the shape of scores, finite and ≥ 0: how many rows each row stands
            for. Weight 0 is the same as leaving the row out.
        backend: "dense" is the definition, O(|P|·M) time; "panel" is exact to rounding in O(M)
            time; "auto" takes the faster one. All need O(M) memory.

    Returns:
        SmoothAP(ap, valid), [] for scores [M] and [C] for [C, M]; ap is float32, float64 for
        float64 scores. A class without a positive or without a negative (of weight > 0) has
        valid = False and ap = 0 with gradient 0: zero, not NaN, so that masking it is safe.

    Raises:
        TypeError: scores not floating, is_positive not bool.
        ValueError: shapes or devices that do not fit, a float τ ≤ 0. The values of tensors are
            trusted: reading them would wait for the device.

    Example:
        >>> scores = torch.tensor([2.0, 1.0, 0.5, -1.0], requires_grad=True)
        >>> is_positive = torch.tensor([True, False, True, False])
        >>> ap, valid = smooth_ap(scores, is_positive)
        >>> round(ap.item(), 4), valid.item()  # (1/1 + 2/3) / 2
        (0.8333, True)

    Source: Brown et al., "Smooth-AP: Smoothing the Path Towards Large-Scale Image Retrieval",
    ECCV 2020, arXiv 2007.12163, eq. 5; the weights are ours.
    """
    return _smooth_ap_of_pool(scores, is_positive, temperature, sample_weight, backend, None)


def _smooth_ap_of_pool(
    scores: Tensor,
    is_positive: Tensor,
    temperature: float | Tensor,
    sample_weight: Tensor | None,
    backend: Backend,
    num_live: int | None,
    exchange: Exchange = ALONE,
) -> SmoothAP:
    """`smooth_ap` of rows of which only the first `num_live` need a gradient, None for all.

    The others are constants, such as the rows of a queue: their gradient is not computed, and
    taken for 0. With an exchange the rows are this process's part of the pool: the value is that
    of the whole pool, the gradient its derivative by these rows.
    """
    arguments = _checks.smooth_ap(scores, is_positive, temperature, sample_weight)
    scores, is_positive, temperature, sample_weight = arguments
    _checks.choice("backend", backend, BACKENDS)
    if is_traced(scores):
        _only_alone(exchange)
        return _opaque_smooth_ap(*arguments, backend, num_live)
    if is_transformed():
        _only_alone(exchange)
        _refuse_batches(*arguments)
        return _differentiable_smooth_ap(*arguments, backend)
    constants = (is_positive, sample_weight, backend, num_live)
    of = _problems(scores.detach(), is_positive, detached(temperature), sample_weight, exchange)
    positives = _positives(of)
    ap: Tensor = _SmoothAP.apply(scores, temperature, of, positives, constants)
    return SmoothAP(ap, positives.valid.view(ap.shape))


def score_spread(scores: Tensor, sample_weight: Tensor | None = None) -> Tensor:
    """Standard deviation of the scores of each class: the unit of a scale-free temperature.

    `smooth_ap(scores, is_positive, 0.1 * score_spread(scores))` does not change when the scores
    are multiplied by a constant. Gradient flows through the deviation.

    Args:
        scores: [M] or [C, M] floating; non-finite scores are left out.
        sample_weight: [M] or the shape of scores, ≥ 0; weight 0 is the same as leaving it out.

    Returns:
        [] or [C], > 0: the population deviation, √(Σω(s − μ)² / Σω) with μ = Σωs / Σω. Where the
        scores are constant (or there is none) they have no unit of their own: 1, gradient 0. So
        too where they differ by no more than rounding, or by less than 1e-19 (float64: 1e-154).

    Example:
        >>> score_spread(torch.tensor([1.0, 3.0]))
        tensor(1.)
    """
    scores = _checks.scores(scores)
    return _score_spread_of_pool(scores, _checks.weights_of_scores(sample_weight, scores), ALONE)


def _score_spread_of_pool(
    scores: Tensor, sample_weight: Tensor | None, exchange: Exchange
) -> Tensor:
    """`score_spread` of the rows of all processes."""
    usable = scores.isfinite()
    if sample_weight is not None:
        usable = usable & (sample_weight > 0)
    weights = usable.double() if sample_weight is None else sample_weight.double() * usable
    total = exchange.sum(weights.sum(-1, keepdim=True))
    share = weights / torch.where(total > 0, total, 1.0)

    # In float64, for sums over 10⁶ rows, and in units whose square does not overflow.
    wide = torch.where(usable, scores, 0.0).double()
    unit = exchange.sum((share * wide.detach().abs()).sum(-1, keepdim=True))
    scaled = wide / torch.where(unit > 0, unit, 1.0)
    mean = exchange.sum((share * scaled).sum(-1, keepdim=True))
    if exchange is not ALONE:
        mean = mean.detach()  # what moves with the mean is zero over all rows, not over some
    variance = exchange.sum((share * (scaled - mean).square()).sum(-1))

    dtype = _compute_dtype(scores)
    limits, unit = torch.finfo(dtype), unit.squeeze(-1)
    floor = torch.maximum(limits.eps * mean.detach().squeeze(-1).abs(), limits.tiny**0.5 / unit)
    has_spread = variance.detach() > floor.square()  # not where unit is 0: the floor is infinite
    deviation = torch.where(has_spread, variance, 1.0).sqrt() * unit
    return torch.where(has_spread, deviation, 1.0).to(dtype)


def prior_weights(
    is_positive: Tensor,
    target_prior: float | Tensor,
    sample_weight: Tensor | None = None,
) -> Tensor:
    """Weights that give positives the share that they will have in deployment.

    Precision, and with it AP, depends on how common positives are: scores that reach an AP of 0.98
    among as many positives as negatives may reach 0.5 at one positive in a hundred. With these
    weights a re-balanced sample tells, and `smooth_ap` optimises, the AP at `target_prior`; so
    does `sklearn.metrics.average_precision_score(sample_weight=…)`. It takes for granted that
    positives and negatives each look as they will in deployment, and only their numbers differ.

    Args:
        is_positive: [M] or [C, M] bool.
        target_prior: π, share of positives in deployment, 0 < π < 1; a float, or a tensor [C] with
            one a class, whose values are trusted.
        sample_weight: [M] or the shape of is_positive, finite and ≥ 0: weights to start from.

    Returns:
        The shape of is_positive, float32, or the dtype of sample_weight. Of positives and
        negatives the one side keeps the weights that it had, and those of the other shrink. A
        class without a positive or without a negative keeps all.

    Raises:
        TypeError, ValueError: an argument that does not fit.

    Example:
        >>> prior_weights(torch.tensor([True, True, False, False]), 0.2)
        tensor([0.2500, 0.2500, 1.0000, 1.0000])

    Source: Saerens et al., "Adjusting the Outputs of a Classifier to New a Priori Probabilities",
    Neural Computation 2002, eq. 2.4: what shifts is the ratio of the priors alone.
    """
    arguments = _checks.prior_weights(is_positive, target_prior, sample_weight)
    return _prior_weights_of_pool(*arguments, ALONE)


def _prior_weights_of_pool(
    is_positive: Tensor,
    target_prior: float | Tensor,
    sample_weight: Tensor | None,
    exchange: Exchange,
) -> Tensor:
    """`prior_weights` for the rows of all processes."""
    if sample_weight is None:
        sample_weight = torch.ones(is_positive.shape, device=is_positive.device)
    weights = sample_weight.expand(is_positive.shape)
    wide = weights.double()
    own = torch.stack([torch.where(side, wide, 0).sum(-1) for side in (is_positive, ~is_positive)])
    positive, negative = exchange.sum(own).unbind()
    is_defined = (positive > 0) & (negative > 0)
    odds = positive / torch.where(is_defined, negative, 1)
    factor = odds * (1 - target_prior) / target_prior  # of negatives beside positives
    factor = torch.where(is_defined, factor, 1.0)[..., None]
    scale = torch.where(is_positive, (1 / factor).clamp(max=1), factor.clamp(max=1))
    return (wide * scale).to(weights.dtype)


class _Problems(NamedTuple):
    """The arguments of `smooth_ap` as [C, M] problems that sums can be taken of."""

    scores: Tensor  # [C, M] float32 or float64, finite or NaN
    has_extremes: bool  # whether some stand for infinities, which have no gradient
    temperature: float | Tensor  # or [C]
    weights: Tensor | None  # [C, M]
    is_positive: Tensor  # [C, M]
    exchange: Exchange  # the processes that hold other rows of the problems


class _Listed(NamedTuple):
    """The positives of valid classes by their places, which takes reading how many there are."""

    valid: Tensor  # [C]
    share: float | Tensor  # [Q] ω over the class's sum: precisions are averaged with these
    problem: Tensor  # [Q] the class of each, ascending
    row: Tensor  # [Q]

    def of_problem(self, values: Tensor) -> Tensor:
        """A value [C] for each positive [Q]."""
        return values[self.problem]

    def total(self, values: Tensor, num_problems: int) -> Tensor:
        """The sum [C] of values [Q] over the positives of each class."""
        if num_problems == 1:
            return values.sum(0, keepdim=True)
        return values.new_zeros(num_problems).index_add_(0, self.problem, values)


class _Masked(NamedTuple):
    """The positives of valid classes as a mask: no value is read."""

    valid: Tensor  # [C]
    share: Tensor  # [C, M], 0 elsewhere
    is_query: Tensor  # [C, M]

    def of_problem(self, values: Tensor) -> Tensor:
        """A value [C] for each row [C, 1]."""
        return values[:, None]

    def total(self, values: Tensor, num_problems: int) -> Tensor:
        """The sum [C] of values [C, M]."""
        return values.sum(1)


def _problems(
    scores: Tensor,
    is_positive: Tensor,
    temperature: float | Tensor,
    sample_weight: Tensor | None,
    exchange: Exchange = ALONE,
) -> _Problems:
    dtype = _compute_dtype(scores)
    limits = torch.finfo(dtype)
    if scores.dim() == 1:
        scores, is_positive = scores.unsqueeze(0), is_positive.unsqueeze(0)
    if scores.dtype != dtype:
        scores = scores.to(dtype)
    scores = scores.contiguous()
    weights = _unit_weights(sample_weight, scores, exchange)
    if weights is not None:
        scores = torch.where(weights > 0, scores, 0.0)  # a row left out may hold NaN
    largest = limits.max / 2
    has_extremes = _may_exceed(scores, largest)
    if has_extremes:
        # Two infinities tie instead of differing by NaN, and no difference overflows.
        scores = scores.clamp(-largest, largest)
    smallest = _smallest(dtype)
    if isinstance(temperature, Tensor):
        temperature = temperature.to(scores.device, dtype).clamp(min=smallest).expand(len(scores))
    else:
        temperature = max(temperature, smallest)

    return _Problems(scores, has_extremes, temperature, weights, is_positive, exchange)


def _may_exceed(scores: Tensor, limit: float) -> bool:
    """Whether a score may be beyond ±limit, or NaN: known on the CPU, else assumed."""
    if not is_on_host(scores) or scores.requires_grad or scores.numel() == 0:
        return True
    low, high = torch.aminmax(scores)
    return not (float(low) >= -limit and float(high) <= limit)


def _positives(of: _Problems) -> _Listed | _Masked:
    """In the form that the plan for these scores takes."""
    if of.exchange is ALONE and has_kernels(of.scores):
        return _masked(of)
    return _listed(of)


def _masked(of: _Problems) -> _Masked:
    is_query = of.is_positive
    num_present: int | Tensor = of.scores.shape[1]
    if of.weights is not None:
        is_present = of.weights > 0
        is_query, num_present = is_query & is_present, is_present.sum(1)
    counts = is_query.sum(1)
    valid = (counts > 0) & (counts < num_present)
    is_query = is_query & valid[:, None]
    mass = counts if of.weights is None else torch.where(is_query, of.weights, 0.0).sum(1)
    own = of.scores.new_ones(()) if of.weights is None else of.weights
    share = torch.where(is_query, own, 0) / torch.where(valid, mass, 1)[:, None]
    return _Masked(valid, share, is_query)


def _listed(of: _Problems) -> _Listed:
    is_positive, weights, dtype, exchange = (
        of.is_positive,
        of.weights,
        of.scores.dtype,
        of.exchange,
    )
    num_problems, num_rows = is_positive.shape
    is_query = is_positive if weights is None else is_positive & (weights > 0)
    problem, row = is_query.nonzero().unbind(1)
    if weights is None and num_problems == 1 and exchange is ALONE:
        num_positives = row.shape[0]
        is_valid = 0 < num_positives < num_rows
        valid = torch.full((1,), is_valid, device=row.device)
        if not is_valid:
            problem, row = problem[:0], row[:0]
        return _Listed(valid, 1 / max(1, num_positives), problem, row)

    counts = problem.bincount(minlength=num_problems)  # [C]
    num_present = counts.new_full((), num_rows) if weights is None else (weights > 0).sum(1)
    mass = counts.to(dtype)
    if weights is not None:
        own = weights[problem, row]
        mass = own.new_zeros(num_problems).index_add(0, problem, own)
    if exchange is not ALONE:
        found = torch.stack((counts, num_present.expand_as(counts), mass)).double()
        counts, num_present, mass = exchange.sum(found).unbind()
        mass = mass.to(dtype)
    valid = (counts > 0) & (counts < num_present)
    if not bool(valid.all()):
        kept = valid[problem].nonzero().squeeze(1)
        problem, row = problem[kept], row[kept]
    if weights is None:
        return _Listed(valid, mass.reciprocal()[problem], problem, row)
    return _Listed(valid, weights[problem, row] / mass[problem], problem, row)


def _differentiable_smooth_ap(
    scores: Tensor,
    is_positive: Tensor,
    temperature: float | Tensor,
    sample_weight: Tensor | None,
    backend: Backend,
) -> SmoothAP:
    """`smooth_ap` by `sigmoid_sums`: slower than `_SmoothAP`, with derivatives of every order."""
    of = _problems(scores, is_positive, temperature, sample_weight)
    weights = of.scores.new_ones(of.scores.shape) if of.weights is None else of.weights
    columns = torch.stack((weights, weights * of.is_positive), dim=-1)
    valid, share, problem, row = _listed(of)
    queries = of.scores[problem, row]
    sums = sigmoid_sums(queries, problem, of.scores, columns, of.temperature, backend=backend)
    half = 0.5 if of.weights is None else 0.5 * of.weights[problem, row, None]
    among_all, among_positives = (sums + half).unbind(1)
    precision = among_positives / among_all
    ap = precision.new_zeros(len(of.scores)).index_add(0, problem, share * precision)
    return SmoothAP(ap.view(scores.shape[:-1]), valid.view(scores.shape[:-1]))


def _ap_and_slopes(
    of: _Problems,
    positives: _Listed | _Masked,
    backend: Backend,
    num_live: int | None,
    is_differentiated: bool,
) -> tuple[Tensor, Tensor | None]:
    """AP [C], and its derivative by the scores [C, M] if asked for."""
    plan = _rank_plan(of, positives, backend, num_live)
    slopes = None
    if not is_differentiated:
        among_all, among_positives = plan.ranks()
    else:
        among_all, among_positives, slopes = plan.ranks_and_gradient(
            _SlopesOfPrecision(positives, of.temperature, of.weights is not None)
        )
        if of.has_extremes:
            # Nothing moves an infinity; where several tie, their slopes would be finite.
            slopes.masked_fill_(of.scores.abs() == torch.finfo(slopes.dtype).max / 2, 0)
    if of.weights is not None:
        among_all, among_positives = _possible_ranks(among_all, among_positives)
    weighted = among_positives.div_(among_all).mul_(positives.share)
    return of.exchange.sum(positives.total(weighted, of.scores.shape[0])), slopes


def _rank_plan(
    of: _Problems, positives: _Listed | _Masked, backend: Backend, num_live: int | None
) -> RankPlan:
    if isinstance(positives, _Masked):
        is_query = positives.is_query
        return fused_plan(of.scores, is_query, of.weights, of.temperature, backend, num_live)
    return rank_plan(
        of.scores,
        of.is_positive,
        positives.problem,
        positives.row,
        of.weights,
        of.temperature,
        backend=backend,
        num_live=num_live,
        exchange=of.exchange,
    )


class _SmoothAP(torch.autograd.Function):
    """`smooth_ap` with its gradient taken in the forward pass, from the same sums.

    AP of a class depends on the scores of that class alone, so the gradient is one tensor of the
    shape of the scores, which backward only has to scale. Where backward itself is to be
    differentiated, it takes the route of `_differentiable_smooth_ap` instead.
    """

    @staticmethod
    def forward(
        ctx: Any,
        scores: Tensor,
        temperature: float | Tensor,
        of: _Problems,
        positives: _Listed | _Masked,
        constants: tuple[Tensor, Tensor | None, Backend, int | None],
    ) -> Tensor:
        *_, backend, num_live = constants
        is_differentiated = of.exchange.is_differentiated or any(ctx.needs_input_grad)
        moves_temperature = isinstance(temperature, Tensor) and (
            of.exchange.is_differentiated or ctx.needs_input_grad[1]
        )
        if moves_temperature:
            num_live = None  # what τ changes is told from the slopes of all rows
        ap, slopes = _ap_and_slopes(of, positives, backend, num_live, is_differentiated)
        if slopes is not None:
            ctx.constants, ctx.exchange = constants, of.exchange
            ctx.fixed_temperature = temperature
            tensors = [scores, slopes.view(scores.shape)]
            if isinstance(temperature, Tensor):
                ctx.fixed_temperature = None
                tensors.append(temperature)
            if moves_temperature:
                tensors.append(_slopes_in_temperature(of, slopes))
            ctx.save_for_backward(*tensors)
        return ap if scores.dim() == 2 else ap.squeeze(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scores, slopes, *rest = ctx.saved_tensors
        temperature = rest[0] if ctx.fixed_temperature is None else ctx.fixed_temperature
        if torch.is_grad_enabled():
            _only_alone(ctx.exchange)
            found = _twice_differentiable_gradient(ctx, scores, temperature, grads[0])
            return *found, None, None, None
        by_temperature = None
        if ctx.needs_input_grad[1]:
            by_temperature = (grads[0] * rest[1].view_as(grads[0])).sum_to_size(temperature.shape)
            by_temperature = by_temperature.to(temperature.dtype)
        by_scores = (grads[0] if scores.dim() == 1 else grads[0][:, None]) * slopes
        return by_scores.to(scores.dtype), by_temperature, None, None, None


class _SlopesOfPrecision:
    """∂(share · R⁺ / R) / ∂(R, R⁺) of each positive, over τ."""

    def __init__(
        self, positives: _Listed | _Masked, temperature: float | Tensor, is_weighted: bool
    ) -> None:
        if isinstance(temperature, Tensor):
            temperature = positives.of_problem(temperature)
        self.is_weighted = is_weighted
        self.share = positives.share / temperature  # as positives are given, or a float for all

    def __call__(
        self, among_all: Tensor, among_positives: Tensor, queries: slice | Tensor
    ) -> tuple[Tensor, Tensor]:
        share = self.share[queries] if isinstance(self.share, Tensor) else self.share
        if self.is_weighted:
            among_all, among_positives = _possible_ranks(among_all, among_positives)
        by_positives = among_all.reciprocal().mul_(share)
        return (among_positives * by_positives).div_(among_all).neg_(), by_positives


def _possible_ranks(among_all: Tensor, among_positives: Tensor) -> tuple[Tensor, Tensor]:
    """R and R⁺ as they can be, 0 ≤ R⁺ ≤ R > 0: rounding leaves that where a row's weight is less
    than a float's digit of those around it.
    """
    among_all = among_all.clamp(min=_smallest(among_all.dtype))
    return among_all, torch.minimum(among_positives.clamp(min=0), among_all)


def _slopes_in_temperature(of: _Problems, slopes: Tensor) -> Tensor:
    """∂AP/∂τ [C], from the slopes [C, M] in the scores.

    AP depends on scores and τ only through their quotient, so that Euler's identity gives it as
    −Σ score · slope / τ. Slopes sum to zero: any origin will do, and one amid the scores that have
    a slope keeps the products small.
    """
    # So that no product overflows: slopes are at most 1/τ < 1e155, and scores so many τ from zero
    # are equal or out of reach of each other.
    temperature = torch.as_tensor(of.temperature, dtype=torch.float64)[:, None]
    scaled = (of.scores.double() / temperature).clamp(-1e140, 1e140)
    slopes = slopes.double()
    scaled = torch.where(slopes != 0, scaled, 0.0)  # a NaN that no sum has seen counts for nothing
    size = slopes.abs()
    middle = of.exchange.sum(torch.stack(((size * scaled).sum(1), size.sum(1))))
    origin = middle[0] / middle[1].clamp(min=1e-300)
    by_temperature = -of.exchange.sum(((scaled - origin[:, None]) * slopes).sum(1))
    # A temperature that was raised to the smallest moves nothing.
    return by_temperature.masked_fill(temperature.squeeze(1) <= _smallest(of.scores.dtype), 0.0)


def _only_alone(exchange: Exchange) -> None:
    if exchange is not ALONE:
        raise RuntimeError(
            'gather="sums" has first derivatives only: for create_graph=True or torch.func use '
            'gather="rows"'
        )


def _twice_differentiable_gradient(
    ctx: Any, scores: Tensor, temperature: float | Tensor, grad: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """The gradient in scores and temperature as a function that autograd can go through."""
    is_positive, sample_weight, backend, _ = ctx.constants
    ap, _ = _differentiable_smooth_ap(scores, is_positive, temperature, sample_weight, backend)
    by_scores = by_temperature = None
    if ctx.needs_input_grad[0]:
        (by_scores,) = torch.autograd.grad(ap, scores, grad, create_graph=True)
    if isinstance(temperature, Tensor) and ctx.needs_input_grad[1]:
        (by_temperature,) = torch.autograd.grad(ap, temperature, grad, create_graph=True)
    return by_scores, by_temperature


def _opaque_smooth_ap(
    scores: Tensor,
    is_positive: Tensor,
    temperature: float | Tensor,
    sample_weight: Tensor | None,
    backend: Backend,
    num_live: int | None,
) -> SmoothAP:
    """`smooth_ap` as one operator, which compilers take as a whole: its values steer what it does.

    Differentiable once.
    """
    is_one = scores.dim() == 1
    rows = scores.unsqueeze(0) if is_one else scores
    fixed, by_class = 0.0, None
    if isinstance(temperature, Tensor):
        by_class = temperature.to(scores.device).expand(rows.shape[0])
    else:
        fixed = temperature
    can_need = torch.is_grad_enabled()
    moves_temperature = can_need and by_class is not None and by_class.requires_grad
    needs_slopes = moves_temperature or (can_need and scores.requires_grad)
    ap, valid, *_ = torch.ops.imbalanced_losses.smooth_ap(
        rows,
        is_positive.unsqueeze(0) if is_one else is_positive,
        fixed,
        by_class,
        sample_weight,
        backend,
        rows.shape[1] if num_live is None or moves_temperature else num_live,
        needs_slopes,
        moves_temperature,
    )
    return SmoothAP(ap.squeeze(0), valid.squeeze(0)) if is_one else SmoothAP(ap, valid)


def _computed(
    scores: Tensor,
    is_positive: Tensor,
    temperature: float,
    temperatures: Tensor | None,
    sample_weight: Tensor | None,
    backend: Backend,
    num_live: int,
    needs_slopes: bool,
    moves_temperature: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tau = temperature if temperatures is None else temperatures
    of = _problems(scores, is_positive, tau, sample_weight)
    positives = _positives(of)
    ap, slopes = _ap_and_slopes(of, positives, backend, num_live, needs_slopes)
    valid = positives.valid
    if slopes is None:
        return ap, valid, ap.new_empty(0, 0), ap.new_empty(0, dtype=torch.float64)
    by_temperature = ap.new_empty(0, dtype=torch.float64)
    if moves_temperature:
        by_temperature = _slopes_in_temperature(of, slopes)
    return ap, valid, slopes, by_temperature


_operator = torch.library.custom_op(
    "imbalanced_losses::smooth_ap",
    _computed,
    mutates_args=(),
    schema="(Tensor scores, Tensor is_positive, float temperature, Tensor? temperatures, "
    "Tensor? sample_weight, str backend, SymInt num_live, bool needs_slopes, "
    "bool moves_temperature) "
    "-> (Tensor ap, Tensor valid, Tensor slopes, Tensor slopes_in_temperature)",
)


@_operator.register_fake
def _shapes_of_operator(scores: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *_, needs_slopes, moves_temperature = rest
    num_problems, num_rows = scores.shape
    ap = scores.new_empty(num_problems, dtype=_compute_dtype(scores))
    return (
        ap,
        scores.new_empty(num_problems, dtype=torch.bool),
        ap.new_empty((num_problems, num_rows) if needs_slopes else (0, 0)),
        ap.new_empty(num_problems if moves_temperature else 0, dtype=torch.float64),
    )


def _remember_slopes(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    scores, _, _, temperatures, *_, ctx.moves_temperature = inputs
    _, _, slopes, slopes_in_temperature = output
    ctx.dtypes = scores.dtype, None if temperatures is None else temperatures.dtype
    ctx.save_for_backward(slopes, slopes_in_temperature)


def _gradient_of_operator(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    slopes, slopes_in_temperature = ctx.saved_tensors
    dtype, dtype_of_temperature = ctx.dtypes
    by_scores = (grads[0][:, None] * slopes).to(dtype)
    by_temperature = None
    if ctx.moves_temperature:
        by_temperature = (grads[0] * slopes_in_temperature).to(dtype_of_temperature)
    return by_scores, None, None, by_temperature, None, None, None, None, None


_operator.register_autograd(_gradient_of_operator, setup_context=_remember_slopes)


def _refuse_batches(*arguments: object) -> None:
    """Raise where torch.func.vmap is at work on an argument."""
    functorch, wrapped = torch._C._functorch, list(arguments)
    for value in wrapped:
        if isinstance(value, Tensor) and functorch.is_functorch_wrapped_tensor(value):
            if functorch.is_batchedtensor(value):
                raise NotImplementedError(
                    "smooth_ap can't be mapped by torch.func.vmap: stack the problems along the "
                    "dimension C of scores [C, M]"
                )
            wrapped.append(functorch.get_unwrapped(value))


def _unit_weights(weights: Tensor | None, scores: Tensor, exchange: Exchange) -> Tensor | None:
    """Weights [C, M] over their largest, which leaves AP alone and lets no sum overflow.

    None where all are 1, in every process. One too small beside the largest for its rank to have a
    reciprocal counts as little as can be, rather than not at all.
    """
    if weights is None and exchange is ALONE:
        return None
    num_problems, num_rows = scores.shape
    is_weighted = scores.new_full((num_problems, 1), weights is not None)
    if weights is None:
        weights = scores.new_ones(()).expand(scores.shape)
    weights = weights.detach().expand(scores.shape)
    no_rows = weights.new_zeros(num_problems, 1)
    largest = weights.amax(1, keepdim=True) if num_rows > 0 else no_rows
    if exchange is not ALONE:
        found, is_weighted = exchange.max(torch.stack((largest.double(), is_weighted))).unbind()
        if not bool(is_weighted.any()):
            return None
        largest = found.to(largest.dtype)
    unit = (weights / torch.where(largest > 0, largest, 1)).to(scores.dtype)
    return torch.where(weights > 0, unit.clamp(min=_smallest(scores.dtype)), 0.0)


def _smallest(dtype: torch.dtype) -> float:
    """Of temperatures, and of ranks beside the largest: a gradient goes with 1/τ and 1/R."""
    smallest: float = torch.finfo(dtype).tiny ** 0.5
    return smallest


def _compute_dtype(scores: Tensor) -> torch.dtype:
    return torch.float64 if scores.dtype == torch.float64 else torch.float32
