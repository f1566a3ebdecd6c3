"""Error of value and gradient against the definition in float64, for scores of every shape.

    python -m benchmarks.speed.accuracy [--quick]

The gradient's error is its norm over the norm of the exact gradient. Up to 10,000 rows the exact
one is the definition itself. Beyond, it is the definition at sampled rows: the ranks of sampled
positives, and the gradient at sampled rows from all positives, with coefficients that the panels
compute in float64; `rank_error` says how far those are off at the sampled positives. The value is
compared with the panels' in float64 there. "dense" is measured where it is the reference's size.

Where all positives are certain of their place the gradient is 0 to rounding, and its relative
error says nothing: `gradient_size` is its norm times the temperature.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from benchmarks import _measure, _peers
from benchmarks._measure import Row
from imbalanced_losses._ranking import Problems
from imbalanced_losses._ranking.backends import rank_plan
from imbalanced_losses.functional import smooth_ap

SIZES = (1_000, 10_000, 100_000, 1_000_000)
TEMPERATURES = (0.001, 0.01, 0.1, 1.0)
DTYPES = {"float32": torch.float32, "float64": torch.float64}
LARGEST_EXACT = 10_000  # rows up to which the reference is computed whole
SAMPLED = 16  # positives, and as many rows, beyond that
MOST_POSITIVES = 1_000
TILE = 1 << 20  # pairs at a time
VANISHED = 1e-12  # gradient_size below which there is nothing to compare

# [M] standard normal and [M] uniform random numbers -> scores [M], all float64
FAMILIES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "normal": lambda normal, _: normal,
    "constant": lambda normal, _: torch.full_like(normal, 0.7),
    "ties": lambda normal, _: (3 * normal).round() / 3,
    "uniform grid": lambda normal, _: torch.linspace(-3, 3, len(normal), dtype=torch.float64),
    "offset 1e4": lambda normal, _: 1e4 + normal,
    "far clusters": lambda normal, uniform: normal + 1e6 * (uniform < 0.5),
    "Cauchy": lambda _, uniform: torch.tan(math.pi * (uniform - 0.5)),
    "lognormal(4)": lambda normal, _: (4 * normal).exp(),
    "outlier 1e12": lambda normal, _: _with_outliers(normal, 1e12),
    "outliers 1e38": lambda normal, _: _with_outliers(normal, 1e38, -1e38),
}


class Problem(NamedTuple):
    """One pool; scores are exact in the dtype that they have."""

    scores: Tensor  # [M]
    is_positive: Tensor  # [M]
    temperature: float


class Reference(NamedTuple):
    """What is exact, and where."""

    ap: float
    rows: Tensor  # [n], where the gradient is known
    gradient: Tensor  # [n] float64
    rank_error: float | str


def _with_outliers(scores: Tensor, *outliers: float) -> Tensor:
    scores = scores.clone()
    scores[: len(outliers)] = torch.tensor(outliers, dtype=scores.dtype)
    return scores


def problems(num_rows: int, family: str, dtype: torch.dtype) -> Iterator[Problem]:
    """The same rows at each temperature, a tenth positive but no more than the reference can do."""
    generator = torch.Generator().manual_seed(num_rows)
    normal = torch.randn(num_rows, generator=generator, dtype=torch.float64)
    uniform = torch.rand(num_rows, generator=generator, dtype=torch.float64)
    scores = FAMILIES[family](normal, uniform).to(dtype)
    order = torch.randperm(num_rows, generator=generator)
    is_positive = order < min(num_rows // 10, MOST_POSITIVES)
    for temperature in TEMPERATURES:
        yield Problem(scores, is_positive, temperature)


def solve(problem: Problem, backend: str) -> tuple[float, Tensor]:
    """AP and its gradient [M] in float64, computed in the dtype of the scores."""
    leaf = problem.scores.clone().requires_grad_()
    ap, _ = smooth_ap(leaf, problem.is_positive, problem.temperature, backend=backend)
    (gradient,) = torch.autograd.grad(ap, leaf)
    return ap.item(), gradient.double()


def reference(problem: Problem) -> Reference:
    """The definition in float64, whole or at sampled rows."""
    wide = problem._replace(scores=problem.scores.double())
    num_rows = len(wide.scores)
    if num_rows <= LARGEST_EXACT:
        return Reference(*_in_order(solve(wide, "dense"), num_rows), "")
    row = wide.is_positive.nonzero().squeeze(1)  # [Q]
    positive = wide.is_positive.double()
    whole = Problems(wide.scores[None], wide.temperature, wide.is_positive[None])
    queries = whole.queries("positives")
    plan = rank_plan(whole.canonical(), queries, ("all", "positives"), "panel")
    ranks = torch.stack(plan.ranks(), dim=1)  # [Q, 2]
    precision = ranks[:, 1] / ranks[:, 0]

    sampled = torch.linspace(0, len(row) - 1, SAMPLED).long()
    kernel = _sigmoid_slopes(wide, wide.scores[row[sampled]], 0)  # [SAMPLED, M]
    exact_ranks = 0.5 + torch.stack((kernel.sum(1), kernel @ positive), dim=1)
    rank_error = ((ranks[sampled] - exact_ranks) / exact_ranks).abs().max().item()

    coefficients = torch.stack((-precision, torch.ones_like(precision))) / (ranks[:, 0] * len(row))
    rows = torch.cat((torch.linspace(0, num_rows - 1, SAMPLED).long(), row[sampled]))
    gradient = _gradient_at(wide, row, coefficients, rows)
    return Reference(precision.mean().item(), rows, gradient, rank_error)


def _in_order(solved: tuple[float, Tensor], num_rows: int) -> tuple[float, Tensor, Tensor]:
    return solved[0], torch.arange(num_rows), solved[1]


def _sigmoid_slopes(problem: Problem, queries: Tensor, order: int) -> Tensor:
    """σ or σ′ of (score − query) / τ, [q, M] float64."""
    x = (problem.scores - queries[:, None]) / problem.temperature
    if order == 0:
        return x.sigmoid_()
    far = x.abs_().neg_().sigmoid_()
    return far - far.square()


def _gradient_at(problem: Problem, row: Tensor, coefficients: Tensor, rows: Tensor) -> Tensor:
    """∂AP/∂score at some rows, as source for all positives and as query of all rows.

    Args:
        row: [Q], the positives.
        coefficients: [2, Q], ∂AP/∂(sum over all rows, sum over positives) of each.
    """
    scores, positive = problem.scores, problem.is_positive.double()
    as_source = torch.zeros(len(rows), dtype=torch.float64)
    some = problem._replace(scores=scores[rows])
    step = max(1, TILE // len(rows))
    for start in range(0, len(row), step):
        tile = slice(start, start + step)
        slopes = _sigmoid_slopes(some, scores[row[tile]], 1)  # [q, n]
        of_all, of_positives = coefficients[:, tile] @ slopes
        as_source += of_all + positive[rows] * of_positives

    place = torch.full((len(scores),), -1).index_copy_(0, row, torch.arange(len(row)))[rows]
    is_query = place >= 0
    slopes = _sigmoid_slopes(problem, scores[rows[is_query]], 1)  # [n, M]
    sums = torch.stack((slopes.sum(1), slopes @ positive))  # [2, n]
    as_source[is_query] -= (coefficients[:, place[is_query]] * sums).sum(0)
    return as_source / problem.temperature


def measure(num_rows: int, family: str, dtype: str) -> Iterator[Row]:
    """A row for each temperature and backend."""
    for problem in problems(num_rows, family, DTYPES[dtype]):
        exact = reference(problem)
        size = exact.gradient.norm().item()
        for backend in ("panel", "dense") if num_rows <= LARGEST_EXACT else ("panel",):
            ap, gradient = solve(problem, backend)
            error = (gradient[exact.rows] - exact.gradient).norm().item()
            yield {
                "family": family,
                "num_rows": num_rows,
                "dtype": dtype,
                "temperature": problem.temperature,
                "backend": backend,
                "value_error": f"{abs(ap - exact.ap):.1e}",
                "gradient_error": f"{error / size:.1e}" if size else "",
                "gradient_size": f"{size * problem.temperature:.1e}",
                "reference": "whole" if num_rows <= LARGEST_EXACT else "sampled",
                "rank_error": f"{exact.rank_error:.1e}" if exact.rank_error != "" else "",
            }


def show(results: list[Row]) -> None:
    """The worst over sizes and temperatures, a line a family."""
    table = Table(title="largest error: value, gradient (relative)")
    table.add_column("scores")
    columns = [(dtype, backend) for dtype in DTYPES for backend in ("panel", "dense")]
    for dtype, backend in columns:
        table.add_column(f"{dtype}\n{backend}", justify="right", no_wrap=True)
    for family in dict.fromkeys(row["family"] for row in results):
        here = [row for row in results if row["family"] == family]
        cells = [
            _worst([row for row in here if (row["dtype"], row["backend"]) == column])
            for column in columns
        ]
        table.add_row(family, *cells)
    Console().print(table)


def _worst(rows: list[Row]) -> str:
    value = max(float(row["value_error"]) for row in rows)
    told = [row for row in rows if float(row["gradient_size"]) > VANISHED]
    gradient = max((float(row["gradient_error"]) for row in told), default=math.nan)
    return f"{value:.0e}  {gradient:.0e}"


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, a few seconds")
    options = parser.parse_args()
    torch.set_num_threads(1)

    wanted = [
        (num_rows, family, dtype)
        for num_rows in SIZES[: 1 if options.quick else None]
        for family in FAMILIES
        for dtype in DTYPES
    ]
    results = [row for cell in track(wanted, "measuring") for row in measure(*cell)]
    show(results)
    name = "accuracy-quick" if options.quick else "accuracy"
    lines = _measure.header(1)
    path = _measure.write_csv(results, f"cpu-{name}", lines)
    print(f"written: {path.relative_to(_peers.ROOT)}")


if __name__ == "__main__":
    main()
