"""Scores of every shape that a pool may have, for the backend whose cost depends on their range."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.helpers.cases import seeded


def _uniform(count: int, seed: int) -> Tensor:
    return torch.rand(count, generator=seeded(seed), dtype=torch.float64)


def _normal(count: int, seed: int) -> Tensor:
    return torch.randn(count, generator=seeded(seed), dtype=torch.float64)


def _with_outliers(scores: Tensor, *outliers: float) -> Tensor:
    places = [(3 + 7 * k) % len(scores) for k in range(len(outliers))]
    scores[places] = torch.tensor(outliers, dtype=scores.dtype)
    return scores


def _coin(count: int, seed: int) -> Tensor:
    return (_uniform(count, seed + 1000) < 0.5).double()


PANEL_DTYPES = pytest.mark.parametrize(
    "dtype", ["float32", "float32, fine", "float32, finest", "float64"], indirect=True
)

# (number of rows, seed) -> scores [M] float64
FAMILIES: dict[str, Callable[[int, int], Tensor]] = {
    "normal": _normal,
    "constant": lambda count, _: torch.full((count,), 0.7, dtype=torch.float64),
    "ties": lambda count, seed: (3 * _normal(count, seed)).round() / 3,
    "uniform grid": lambda count, _: torch.linspace(-3, 3, count, dtype=torch.float64),
    "offset 1e4": lambda count, seed: 1e4 + _normal(count, seed),
    "offset 1e8": lambda count, seed: 1e8 + _normal(count, seed),
    "far clusters": lambda count, seed: 1e6 * _coin(count, seed) + _normal(count, seed),
    "tight clusters": lambda count, seed: 1e6 * _coin(count, seed) + 1e-6 * _normal(count, seed),
    "two values": lambda count, seed: 1e30 * _coin(count, seed),
    "Cauchy": lambda count, seed: torch.tan(math.pi * (_uniform(count, seed) - 0.5)),
    "lognormal": lambda count, seed: (4 * _normal(count, seed)).exp(),
    "24 decades": lambda count, _: torch.logspace(-12, 12, count, dtype=torch.float64),
    "outlier 1e12": lambda count, seed: _with_outliers(_normal(count, seed), 1e12),
    "outliers 1e38": lambda count, seed: _with_outliers(_normal(count, seed), 1e38, -1e38),
    "constant, outliers": lambda count, _: _with_outliers(
        torch.full((count,), 0.7, dtype=torch.float64), 1e38, -1e12, 5.0
    ),
}


def labels(count: int, seed: int, rate: float = 0.15) -> Tensor:
    """[M] bool with a positive and a negative."""
    is_positive = _uniform(count, seed + 2000) < rate
    is_positive[0], is_positive[-1] = True, False
    return is_positive
