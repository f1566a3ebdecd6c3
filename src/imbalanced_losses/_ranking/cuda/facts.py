"""What rows are worth, on a device: a launch each for problems that one program can go through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from imbalanced_losses._checks.tracing import is_traced, is_transformed
from imbalanced_losses._ranking.canonical import compute_dtype, least_spread, smallest
from imbalanced_losses._ranking.cuda.launches import (
    MOST_UNREAD,
    ceil,
    has_kernels,
    launch,
    launch_through,
    stretches,
    strides,
)
from imbalanced_losses._ranking.layout import Layout

# Rows of a problem that a program goes through, at most, of as many each.
_MOST_ROWS = 1 << 15
# Pairs of rows that are compared rather than sorted.
_MOST_PAIRS = 1 << 28
# Programs that keep a large device busy.
_PROGRAMS = 1 << 12


def fits(rows: Tensor, layout: Layout, *constants: Tensor | float | None) -> bool:
    """Whether one program may go through each problem of rows [C, M]; constants get no gradient."""
    if torch.is_grad_enabled() and any(
        isinstance(constant, Tensor) and constant.requires_grad for constant in constants
    ):
        return False
    most = _MOST_ROWS if layout.lengths is None else MOST_UNREAD
    is_plain = not (is_traced(rows) or is_transformed())
    return is_plain and rows.shape[1] <= most and has_kernels(rows, tuple(rows.shape))


def are_few_pairs(rows: Tensor, layout: Layout) -> bool:
    """Whether `ideal_terms` is quicker than sorting, however unequal the problems are."""
    pairs = rows.shape[0] * rows.shape[1] ** 2
    return pairs <= _MOST_PAIRS and fits(rows, layout)


def spread(
    scores: Tensor, weights: Tensor | None, layout: Layout, again: Callable[[Tensor], Tensor]
) -> Tensor:
    """`weighting.spread`; `again` is the same in PyTorch, for derivatives of higher order."""
    found: Tensor = _Spread.apply(scores, weights, layout, again)
    return found


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        scores: Tensor,
        weights: Tensor | None,
        layout: Layout,
        again: Callable[[Tensor], Tensor],
    ) -> Tensor:
        dtype = compute_dtype(scores)
        given = scores if weights is None else weights.detach().expand(scores.shape)
        deviations = scores.new_empty(layout.num_problems, dtype=dtype)
        facts = scores.new_empty(3, layout.num_problems, dtype=torch.float64)
        options: dict[str, Any] = {"WEIGHTED": weights is not None}
        options["LARGEST"] = torch.finfo(scores.dtype).max
        steps = *strides(scores, layout), *strides(given, layout)
        launch_through(
            "whole_spread",
            layout,
            *(scores, given, *stretches(layout, scores), deviations, facts, *steps),
            EPSILON=least_spread(dtype),
            ROOT=smallest(dtype),
            **options,
        )
        ctx.save_for_backward(scores, given, facts)
        ctx.layout, ctx.again, ctx.steps, ctx.options = layout, again, steps, options
        return deviations

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scores, given, facts = ctx.saved_tensors
        if torch.is_grad_enabled():
            (slopes,) = torch.autograd.grad(ctx.again(scores), scores, grads[0], create_graph=True)
            return slopes, None, None, None
        slopes = torch.empty_like(scores, memory_format=torch.contiguous_format)
        launch_through(
            "whole_spread_slopes",
            ctx.layout,
            *(scores, given, *stretches(ctx.layout, scores), facts, grads[0], slopes),
            *(*ctx.steps, grads[0].stride(0)),
            **ctx.options,
        )
        return slopes, None, None, None


def by_temperature(scores: Tensor, slopes: Tensor, temperature: Tensor, layout: Layout) -> Tensor:
    """`ranked_sum._slopes_in_temperature` of contiguous scores and slopes [C, M]."""
    found = scores.new_empty(layout.num_problems, dtype=torch.float64)
    launch_through(
        "whole_temperature",
        layout,
        *(scores, slopes, *stretches(layout, scores), temperature, found, temperature.stride(0)),
        SMALLEST=smallest(scores.dtype),
        FARTHEST=1e140,
    )
    return found


def weights_at_prior(
    is_positive: Tensor, prior: float | Tensor, weights: Tensor, layout: Layout
) -> Tensor:
    """`weighting.weights_at_prior` of weights [C, M]."""
    made = torch.empty_like(weights, memory_format=torch.contiguous_format)
    if not isinstance(prior, Tensor):
        prior = weights.new_full((), prior, dtype=torch.float64)
    prior = prior.expand(layout.num_problems)
    launch_through(
        "whole_prior",
        layout,
        *(is_positive.view(torch.uint8), weights, *stretches(layout, weights), prior, made),
        *(*strides(is_positive, layout), *strides(weights, layout), prior.stride(0)),
    )
    return made


def value_in_units(
    value: Tensor,
    sides: Tensor,
    numbers: Tensor,
    valid: Tensor,
    masses: Tensor,
    layout: Layout,
    is_graded: bool,
) -> tuple[Tensor, Tensor]:
    """Values [C, M] in units of the largest, 0 of all but positives, and their mass [C].

    Where that is 0, numbers, validity and masses are written over as of a problem not valid.
    """
    value = value.expand(sides.shape)
    if layout.lengths is None and not fits(sides, layout):
        return _value_in_units(value, sides, numbers, valid, masses, is_graded)
    unit_value, mass = torch.empty_like(sides), sides.new_empty(layout.num_problems)
    launch_through(
        "whole_values",
        layout,
        *(value, sides, *stretches(layout, sides), unit_value, mass),
        *(numbers, valid.view(torch.uint8), masses, *strides(value, layout)),
        GRADED=is_graded,
    )
    return unit_value, mass


def _value_in_units(
    value: Tensor,
    sides: Tensor,
    numbers: Tensor,
    valid: Tensor,
    masses: Tensor,
    is_graded: bool,
) -> tuple[Tensor, Tensor]:
    """The same of many rows, as many in each problem."""
    value = torch.where((sides > 0) & valid[:, None], value, 0)
    largest = value.amax(1, keepdim=True)
    unit_value = (value / torch.where(largest > 0, largest, 1)).to(sides.dtype)
    mass = (sides.double() * unit_value).sum(1)
    valid &= mass > 0
    if is_graded:
        valid &= (unit_value == 1).sum(1) < numbers[1]
    numbers.masked_fill_(~valid, 0)
    masses.masked_fill_(~valid, 1)
    return unit_value, torch.where(valid, mass, 1).to(sides.dtype)


def ideal_terms(
    unit_value: Tensor, sides: Tensor, units: Tensor, budget: Tensor | None, layout: Layout
) -> Tensor:
    """What each row [C, M] adds to the ideal of `ndcg`, a row of weight 1."""
    terms, block, num_rows = torch.empty_like(sides), 16, sides.shape[1]
    launch(
        "whole_ideal",
        (
            layout.num_problems,
            min(ceil(num_rows, block), max(1, _PROGRAMS // layout.num_problems)),
        ),
        *(unit_value, sides, *stretches(layout, sides), units, units if budget is None else budget),
        *(terms, units.stride(0), num_rows),
        SEGMENTED=layout.lengths is not None,
        LIMITED=budget is not None,
        BQ=block,
        BM=64,
    )
    return terms
