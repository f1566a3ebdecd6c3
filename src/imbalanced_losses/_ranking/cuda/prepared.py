"""Problems as kernels take them, made by one kernel (two, and a sum, of many rows).

Nothing is read back to the host, and no shape depends on a value.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from imbalanced_losses._checks.tracing import is_traced, is_transformed
from imbalanced_losses._ranking.canonical import InUnits, compute_dtype, smallest
from imbalanced_losses._ranking.cuda.facts import value_in_units
from imbalanced_losses._ranking.cuda.launches import (
    MOST_UNREAD,
    blocks_of,
    expanded,
    has_kernels,
    launch,
)
from imbalanced_losses._ranking.plan import ROWS, Canonical, Rows

if TYPE_CHECKING:
    from imbalanced_losses._ranking.problems import Problems

# Rows that one program looks at together, of a problem of unequal length.
_SEGMENT = 1 << 9


def prepared(problems: Problems) -> Prepared | None:
    """Problems for the kernels; None where others compute."""
    scores = problems.scores
    if problems.processes is not None:
        return None
    if is_traced(scores) or is_transformed():  # first: compilers can't look for Triton
        return None
    if not has_kernels(scores, problems.is_positive.shape):
        return None
    if problems.layout.lengths is not None and not _are_short(problems):
        return None
    return Prepared(problems)


def _are_short(problems: Problems) -> bool:
    """Whether all pairs of problems of unequal length are compared, which nobody has to read.

    Linear ranks of those are for others, who read the lengths.
    """
    if problems.backend != "auto":
        return problems.backend == "dense"
    is_few = problems.is_positive.shape[1] <= MOST_UNREAD
    return is_few or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


class Prepared:
    """What is known before anything is ranked.

    Attributes:
        given: the problems in canonical form, with `sides` [C, M]: the weight of a positive, minus
            that of a negative, 0 of a row left out.
        segments: where problems of unequal length are in [1, S]: the problem [S] of each row, the
            lengths and the ends [C].
        in_units: their weights and values.
        valid: [C] bool.
        mass_by_value: [C], Σ ω v of the positives; 1 where not valid.
        order: [C, M] int32, the positives, then the negatives, then the others.
        numbers: [2, C] int32, how many are positive, and how many there are; 0 where not valid.
        masses: [3, C], the summed weights of all rows, positives and negatives; 1 where not valid.
        rates: [C], 1 / τ.
    """

    def __init__(self, problems: Problems) -> None:
        scores, is_positive = problems.scores.detach(), problems.is_positive
        shape, dtype, device = is_positive.shape, compute_dtype(scores), scores.device
        layout, num_rows = problems.layout, shape[1]
        num_problems = layout.num_problems
        self.segments: tuple[Tensor, ...] = ()
        if layout.lengths is not None and layout.problem is not None and layout.ends is not None:
            self.segments = layout.problem, layout.lengths, layout.ends
        scores, weights = expanded(scores, shape), problems.given_weights
        is_weighted = weights is not None
        weights = scores if weights is None else expanded(weights.detach(), shape)
        tau = problems.temperature
        by_problem, bits = scores, 0
        if isinstance(tau, Tensor):
            tau = tau.detach().to(device, dtype).clamp(min=smallest(dtype)).expand(num_problems)
            by_problem = tau
        else:
            tau = max(tau, smallest(dtype))
            (bits,) = struct.unpack("q", struct.pack("d", tau))
        block, num_blocks = (_SEGMENT, 1) if self.segments else blocks_of(num_rows)
        ready = torch.empty(shape, dtype=dtype, device=device)
        sides = torch.empty_like(ready)  # each by itself: views take as long, and are not aligned
        unit_weights = torch.empty_like(ready) if is_weighted else ready
        self.order = torch.empty(shape, dtype=torch.int32, device=device)
        self.numbers = self.order.new_empty(2, num_problems)
        self.valid = torch.empty(num_problems, dtype=torch.bool, device=device)
        masses = ready.new_empty(3, num_problems, num_blocks)
        self.rates = ready.new_empty(num_problems)
        units = torch.empty_like(self.rates) if is_weighted else self.rates
        labels = is_positive.view(torch.uint8)
        strides = (*labels.stride(), *weights.stride())
        options: dict[str, Any] = {
            "WEIGHTED": is_weighted,
            "FIXED": not isinstance(tau, Tensor),
            "ONE_SIDED": problems.is_graded,
            "SMALLEST": smallest(dtype),
            "LARGEST": torch.finfo(dtype).max / 2,
            "BLOCK": block,
        }
        made = ready, sides, unit_weights, self.order, self.numbers, self.valid.view(torch.uint8)
        made += (masses, self.rates, units)  # type: ignore[assignment]
        if self.segments:
            launch(
                "segment_facts",
                (num_problems, 1),
                *(scores, labels, weights, by_problem, *self.segments[1:], *made, bits),
                *(scores.stride(1), labels.stride(1), weights.stride(1), by_problem.stride(0)),
                **options,
            )
        else:
            facts = ready
            if num_blocks > 1:
                facts = torch.empty(3, num_problems, num_blocks, dtype=torch.float64, device=device)
                launch(
                    "block_facts",
                    (num_blocks, num_problems),
                    *(labels, weights, facts, *strides, num_rows),
                    WEIGHTED=is_weighted,
                    BLOCK=block,
                )
            launch(
                "prepare",
                (num_blocks, num_problems),
                *(scores, labels, weights, by_problem, facts, *made, bits),
                *(*scores.stride(), *strides, by_problem.stride(0), num_rows),
                BLOCKS=1 << (num_blocks - 1).bit_length(),
                num_warps=8,
                **options,
            )
        self.masses = masses.squeeze(2) if num_blocks == 1 else masses.sum(2)
        own = InUnits(unit_weights, units, None) if is_weighted else InUnits(None, None, None)
        self.given = Canonical(
            *(ready, False, is_positive, own.weights, tau, problems.num_live, None),
            *(problems.layout, sides),
        )
        self.in_units, self.mass_by_value = own, self.mass("positives")
        if problems.given_value is not None:
            value, self.mass_by_value = value_in_units(
                *(problems.given_value.detach(), sides, self.numbers, self.valid, self.masses),
                *(layout, problems.is_graded),
            )
            self.in_units = own._replace(value=value)

    def mass(self, rows: Rows) -> Tensor:
        found: Tensor = self.masses[ROWS.index(rows)]
        return found

    def mean_weight(self, rows: Rows) -> Tensor:
        """[C], 1 where not valid."""
        if self.given.weights is None:
            return torch.ones_like(self.rates)
        positives, present = self.numbers
        number = {"all": present, "positives": positives, "negatives": present - positives}[rows]
        mean: Tensor = self.mass(rows) / number.clamp(min=1)
        return mean


class PreparedQueries:
    """The rows of a set in valid problems, known to the kernels alone.

    Ranks and slopes are [C, M], of which only those of the queries are looked at. What weights do
    to them is done by kernels.
    """

    weighs_slopes = True  # by the weight of the query

    def __init__(self, rows: Rows, prepared: Prepared, divisor: Tensor | None = None) -> None:
        self.rows, self.prepared, self.divisor = rows, prepared, divisor
        sides = prepared.given.sides
        assert sides is not None
        self.sides, self.weights = sides, prepared.given.weights
        self.value = prepared.in_units.value if rows == "positives" else None

    def per(self, divisor: Tensor) -> PreparedQueries:
        """The same, whose totals, and the slopes of these, are divided by a value [C]."""
        return PreparedQueries(self.rows, self.prepared, divisor)

    @property
    def mask(self) -> Tensor:
        """[C, M]."""
        own, sides = self.prepared.given, self.sides
        chosen: Tensor = {"all": sides != 0, "positives": sides > 0, "negatives": sides < 0}[
            self.rows
        ]
        return chosen & own.layout.for_rows(self.prepared.valid)

    def of_problem(self, values: Tensor, index: Any = None) -> Tensor:
        """A value [C] for each row [C, 1]."""
        return self.prepared.given.layout.for_rows(values)

    def of_row(self, values: Tensor, index: Any = None) -> Tensor:
        """A value for each row [C, M]."""
        return values

    def factor(self, by_value: bool) -> Tensor | None:
        return self.value if by_value else None  # the kernels know the weights

    def total(self, values: Tensor, by_value: bool = False) -> Tensor:
        """The weighted sum [C] of values [C, M] over the queries of each problem."""
        if by_value and self.value is not None:
            values = values * self.value
        own, (num_problems, num_rows) = self.prepared, values.shape
        divisor = own.rates if self.divisor is None else self.divisor
        options: dict[str, Any] = {"QUERIES": self.rows, "DIVIDED": self.divisor is not None}
        given = values.contiguous(), self.sides, own.numbers
        if own.segments:
            totals = values.new_empty(own.given.layout.num_problems)
            launch(
                "segment_totals",
                (len(totals), 1),
                *(*given, *own.segments[1:], divisor, totals),
                BLOCK=_SEGMENT,
                **options,
            )
            return totals
        block, num_blocks = blocks_of(num_rows)
        totals = values.new_empty(num_problems, num_blocks)
        launch(
            "weighted_totals",
            (num_blocks, num_problems),
            *(*given, divisor, totals, num_rows),
            BLOCK=block,
            **options,
        )
        return totals.squeeze(1) if num_blocks == 1 else totals.sum(1)
