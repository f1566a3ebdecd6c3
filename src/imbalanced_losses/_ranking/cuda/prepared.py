"""Problems as kernels take them, made by one kernel (two, and a sum, of many rows).

Nothing is read back to the host, and no shape depends on a value.
"""

from __future__ import annotations

import importlib
import struct
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from imbalanced_losses._checks.tracing import is_traced, is_transformed
from imbalanced_losses._ranking.canonical import compute_dtype, smallest
from imbalanced_losses._ranking.plan import ROWS, Canonical, Rows

if TYPE_CHECKING:
    from imbalanced_losses._ranking.problems import Problems

# Where the kernels run.
DEVICES = ("cuda",)
_OLDEST_TRITON = (3, 2)
# Rows that one program prepares or sums up, at most.
_BLOCK = 1 << 12
# The last two dimensions of a grid.
_MOST_PROBLEMS = (1 << 16) - 1


def prepared(problems: Problems) -> Prepared | None:
    """Problems for the kernels; None where others compute."""
    scores = problems.scores
    if problems.processes is not None or not has_kernels(scores, problems.is_positive.shape):
        return None
    return None if is_traced(scores) or is_transformed() else Prepared(problems)


def has_kernels(scores: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether scores of a shape [C, M] can be ranked by kernels."""
    return (
        scores.device.type in DEVICES
        and 0 < shape[0] <= _MOST_PROBLEMS
        and shape[1] > 0
        and _has_triton()
    )


@cache
def _has_triton() -> bool:
    """Whether there is a Triton that the kernels have been tested on."""
    try:
        triton = importlib.import_module("triton")
    except ImportError:
        return False
    return tuple(map(int, triton.__version__.split(".")[:2])) >= _OLDEST_TRITON


class Prepared:
    """What is known before anything is ranked.

    Attributes:
        given: the problems in canonical form.
        valid: [C] bool.
        sides: [C, M], the weight of a positive, minus that of a negative, 0 of a row left out.
        order: [C, M] int32, the positives, then the negatives, then the others.
        numbers: [2, C] int32, how many are positive, and how many there are; 0 where not valid.
        rates: [C], 1 / τ.
    """

    def __init__(self, problems: Problems) -> None:
        scores, is_positive = problems.scores.detach(), problems.is_positive
        shape, dtype, device = is_positive.shape, compute_dtype(scores), scores.device
        num_problems, num_rows = shape
        scores = scores.expand(shape)
        weights = problems.given_weights
        is_weighted = weights is not None
        weights = scores if weights is None else weights.detach().expand(shape)
        tau = problems.temperature
        by_problem, bits = scores, 0
        if isinstance(tau, Tensor):
            tau = tau.detach().to(device, dtype).clamp(min=smallest(dtype)).expand(num_problems)
            by_problem = tau
        else:
            tau = max(tau, smallest(dtype))
            (bits,) = struct.unpack("q", struct.pack("d", tau))
        block, num_blocks = blocks_of(num_rows)
        ready, self.sides, unit_weights = torch.empty(3, *shape, dtype=dtype, device=device)
        self.order = torch.empty(shape, dtype=torch.int32, device=device)
        self.numbers = self.order.new_empty(2, num_problems)
        self.valid = torch.empty(num_problems, dtype=torch.bool, device=device)
        self._masses = ready.new_empty(3, num_problems, num_blocks)
        self.rates = ready.new_empty(num_problems)
        labels = is_positive.view(torch.uint8)
        strides = (*labels.stride(), *weights.stride())
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
            *(scores, labels, weights, by_problem, facts, ready, self.sides, unit_weights),
            *(self.order, self.numbers, self.valid.view(torch.uint8), self._masses, self.rates),
            *(bits, *scores.stride(), *strides, by_problem.stride(0), num_rows),
            WEIGHTED=is_weighted,
            FIXED=not isinstance(tau, Tensor),
            SMALLEST=smallest(dtype),
            LARGEST=torch.finfo(dtype).max / 2,
            BLOCK=block,
            BLOCKS=1 << (num_blocks - 1).bit_length(),
            num_warps=8,
        )
        own = unit_weights if is_weighted else None
        self.given = Canonical(
            *(ready, False, is_positive, own, tau, problems.num_live, None), by_kernels=True
        )

    @cached_property
    def masses(self) -> tuple[Tensor, ...]:
        """The summed weights [C] of all rows, positives and negatives; 1 where not valid."""
        found = self._masses
        masses: tuple[Tensor, ...] = (
            found[..., 0] if found.shape[2] == 1 else found.sum(2)
        ).unbind()
        return masses

    def mass(self, rows: Rows) -> Tensor:
        return self.masses[ROWS.index(rows)]


class PreparedQueries:
    """The rows of a set in valid problems, known to the kernels alone.

    Ranks and slopes are [C, M], of which only those of the queries are looked at. What weights do
    to them is done by kernels.
    """

    weights = None
    weighs_slopes = True  # by the weight of the query

    def __init__(self, rows: Rows, prepared: Prepared, divisor: Tensor | None = None) -> None:
        self.rows, self.prepared, self.divisor = rows, prepared, divisor

    def per(self, divisor: Tensor) -> PreparedQueries:
        """The same, whose totals, and the slopes of these, are divided by a value [C]."""
        return PreparedQueries(self.rows, self.prepared, divisor)

    @property
    def mask(self) -> Tensor:
        """[C, M]."""
        sides = self.prepared.sides
        chosen: Tensor = {"all": sides != 0, "positives": sides > 0, "negatives": sides < 0}[
            self.rows
        ]
        return chosen & self.prepared.valid[:, None]

    def of_problem(self, values: Tensor, index: Any = slice(None)) -> Tensor:
        """A value [C] for each row [C, 1]."""
        return values[:, None]

    def of_row(self, values: Tensor, index: Any = slice(None)) -> Tensor:
        """A value for each row [C, M]."""
        return values

    def total(self, values: Tensor) -> Tensor:
        """The weighted sum [C] of values [C, M] over the queries of each problem."""
        own, (num_problems, num_rows) = self.prepared, values.shape
        block, num_blocks = blocks_of(num_rows)
        totals = values.new_empty(num_problems, num_blocks)
        launch(
            "weighted_totals",
            (num_blocks, num_problems),
            *(values.contiguous(), own.sides, own.numbers),
            *(own.rates if self.divisor is None else self.divisor, totals, num_rows),
            QUERIES=self.rows,
            DIVIDED=self.divisor is not None,
            BLOCK=block,
        )
        return totals[:, 0] if num_blocks == 1 else totals.sum(1)


def blocks_of(num_rows: int) -> tuple[int, int]:
    """Rows of a block, a power of two, and how many blocks there are."""
    block = min(_BLOCK, max(256, 1 << (num_rows - 1).bit_length()))
    return block, ceil(num_rows, block)


def ceil(number: int, step: int) -> int:
    return -(-number // step)


def launch(name: str, grid: tuple[int, int], *arguments: object, **constants: Any) -> None:
    """Launch a kernel; with fused multiply-adds, whatever the default of this Triton is."""
    getattr(_kernels(), name)[grid](*arguments, **constants, enable_fp_fusion=True)


def _kernels() -> Any:
    """The module of the kernels, which imports Triton."""
    from imbalanced_losses._ranking.cuda import kernels

    return kernels
