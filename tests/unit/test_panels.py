"""`PanelPlan`: sums of every order in both directions, and the table behind them."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from imbalanced_losses._ranking.dense import DensePlan
from imbalanced_losses._ranking.panels import panels
from imbalanced_losses._ranking.panels.panels import PanelPlan
from imbalanced_losses._ranking.panels.table import translation_table
from imbalanced_losses._ranking.sigmoid import sigmoid_derivative
from tests.helpers.cases import seeded
from tests.helpers.score_families import FAMILIES, PANEL_DTYPES


class Geometry(NamedTuple):
    """Arguments of a plan."""

    queries: Tensor  # [Q]
    problem: Tensor  # [Q]
    sources: Tensor  # [C, M]
    temperature: float | Tensor

    def wide(self) -> Geometry:
        temperature = self.temperature
        if isinstance(temperature, Tensor):
            temperature = temperature.double()
        return Geometry(self.queries.double(), self.problem, self.sources.double(), temperature)


def _several_problems(num_problems: int, dtype: torch.dtype, tau: float, *, wild: bool) -> Geometry:
    """Problems of other ranges, scattered queries that are no sources, one problem without any."""
    names = ("normal", "ties", "outlier 1e12", "Cauchy", "far clusters", "constant", "24 decades")
    names = names if wild else ("normal", "ties", "constant", "uniform grid") * 2
    sources = torch.stack([FAMILIES[names[c]](90, c) for c in range(num_problems)]).to(dtype)
    generator = seeded(0)
    problem = torch.randint(num_problems, (70,), generator=generator)
    problem[problem == 1] = 0
    queries = sources[problem, torch.randint(90, (70,), generator=generator)]
    queries[::3] += tau * torch.randn(24, generator=generator, dtype=torch.float64).to(dtype)
    temperature = tau * torch.linspace(0.5, 2, num_problems, dtype=torch.float64).to(dtype)
    return Geometry(queries, problem, sources, temperature)


def _assert_plan_exact(given: Geometry, num_columns: int) -> None:
    """Sums of orders 0…3 in both directions, as far as the interpolation goes."""
    dtype = given.sources.dtype
    generator = seeded(7)
    shape = (*given.sources.shape, num_columns)
    weights = torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype)
    weights[:, ::4] = 0
    cotangent = torch.randn(len(given.queries), num_columns, generator=generator).to(dtype)
    plan, dense = PanelPlan(*given), DensePlan(*given.wide())
    # Interpolation of φₙ, see test_interpolation; each sum adds up to 90 of such errors, and is
    # rounded to the dtype.
    bounds = {torch.float32: (6e-8, 2e-7, 8e-7, 5e-6), torch.float64: (4e-13, 2e-12, 1e-11, 6e-11)}
    for order, bound in enumerate(bounds[dtype]):
        exact = dense.both_sums(order, weights.double(), cotangent.double())
        together = plan.both_sums(order, weights, cotangent)
        apart = plan.sums(order, weights), plan.transposed_sums(order, cotangent)
        masses = weights.sum(1).max(), cotangent.abs().sum(0).max()
        for got, alone, expected, mass in zip(together, apart, exact, masses, strict=True):
            assert got.dtype == dtype
            assert got.shape == expected.shape
            torch.testing.assert_close(got, alone)
            rounding = torch.finfo(dtype).eps * expected.abs()
            assert ((got - expected).abs() <= bound * mass + rounding).all()
        # ⟨G, Φ·W⟩ = ⟨Φᵀ·G, W⟩
        sides = (cotangent * together[0]).sum().item(), (together[1] * weights).sum().item()
        assert sides[0] == pytest.approx(sides[1], rel=0, abs=5e3 * torch.finfo(dtype).eps)


@PANEL_DTYPES
@pytest.mark.parametrize("num_columns", [1, 2, 3])
@pytest.mark.parametrize("tau", [1e-4, 0.05, 2.0])
@pytest.mark.parametrize("num_problems", [1, 3, 7])
def test_sums_of_every_order(
    num_problems: int, tau: float, num_columns: int, dtype: torch.dtype
) -> None:
    """Several problems of very different ranges in one plan, each with a temperature."""
    for wild in (False, True):
        _assert_plan_exact(_several_problems(num_problems, dtype, tau, wild=wild), num_columns)


# The table ----------------------------------------------------------------------------------------

# (absolute, relative to the largest |φₙ| of the panel pair) for orders 0, 1, 2.
(_FINEST, _FINE, _COARSE), (_FLOAT64,) = panels.PRECISIONS.values()
INTERPOLATION = {
    _FINEST: ((6e-8, 4.1e-7), (1.2e-7, 4.5e-7), (1.8e-7, 2.9e-6)),
    _FINE: ((5e-8, 9e-8), (1.2e-7, 5e-7), (4e-7, 4e-6)),
    _COARSE: ((2e-8, 2.1e-8), (8e-8, 3e-7), (3e-7, 3e-6)),
    _FLOAT64: ((4e-13, 4e-13), (2e-12, 7e-12), (1e-11, 9e-11)),
}


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("precision", INTERPOLATION, ids=str)
def test_interpolation(precision: panels.Precision, order: int) -> None:
    """The polynomials of the table are φₙ between any two panels within reach, to the errors that
    the module states: absolute, and relative in each pair, so that the tails come out right too.
    """
    degree, width, reach = precision
    table = translation_table(order, degree, width, reach, torch.device("cpu"))
    place = torch.linspace(-1, 1, 81, dtype=torch.float64)
    powers = place[:, None] ** torch.arange(degree)
    values = torch.einsum("ta,sb,abd->dts", powers, powers, table)
    distance = torch.arange(-reach, reach + 1, dtype=torch.float64)[:, None, None]
    exact = sigmoid_derivative(order, (distance + (place - place[:, None]) / 2) * width)
    error, size = (values - exact).abs().amax((1, 2)), exact.abs().amax((1, 2))
    absolute, relative = INTERPOLATION[precision][order]
    assert error.max() <= absolute
    assert (error / size).max() <= relative
    assert math.exp(-width * reach) < torch.finfo(torch.float64).eps * 1.1  # what is dropped
