"""The sums in linear time against their definition in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from imbalanced_losses._ranking.backends import Backend
from imbalanced_losses._ranking.dense import DensePlan
from imbalanced_losses._ranking.panels import panels
from imbalanced_losses._ranking.panels import ranks as ranks_by_panels
from imbalanced_losses._ranking.panels.panels import PanelPlan
from imbalanced_losses._ranking.partial_auc import partial_auc
from imbalanced_losses._ranking.problems import Problems
from imbalanced_losses._ranking.ranks import Ranks
from tests.helpers.answers import solved
from tests.helpers.cases import seeded
from tests.helpers.score_families import FAMILIES, PANEL_DTYPES, labels

INF = math.inf


def _assert_exact(
    scores: Tensor, is_positive: Tensor, temperature: float, weights: Tensor | None = None
) -> None:
    """The panels' AP and gradient of scores [M] are those of the definition in float64."""
    got = solved(scores, is_positive, temperature, weights, "panel")
    wide = None if weights is None else weights.double()
    exact = solved(scores.double(), is_positive, temperature, wide, "dense")
    # Positives that are all e^-36 sure of their place have a gradient that is 0 to rounding: each
    # entry is a mean of σ′/τ, and panels out of reach count as 0. 1e-15 is five roundings.
    floor = 1e-15 / temperature * math.sqrt(scores.numel())
    size = exact.gradient.norm().item()
    error = (got.gradient.double() - exact.gradient).norm().item()
    if scores.dtype == torch.float64:
        assert (got.ap - exact.ap).abs().max() <= 1e-12
        assert error <= 1e-9 * size + floor
        return
    dense = solved(scores, is_positive, temperature, weights, "dense")
    dense_error = (dense.gradient.double() - exact.gradient).norm().item()
    assert (got.ap - exact.ap).abs().max() <= 1e-6
    assert error <= max(2 * dense_error, 1e-6 * size) + floor


# The shape of the scores --------------------------------------------------------------------------


@PANEL_DTYPES
@pytest.mark.parametrize("family", FAMILIES)
def test_any_scores_at_any_sharpness(family: str, dtype: torch.dtype) -> None:
    """Range over temperature from 1e-6 to far beyond 1e9: value and gradient are the exact ones."""
    for seed, tau in enumerate([1e-6, 1e-3, 0.01, 0.1, 1.0, 100.0, 1e6]):
        scores = FAMILIES[family](600, seed).to(dtype)
        is_positive = labels(600, seed)
        weights = 3 * torch.rand(600, generator=seeded(seed), dtype=torch.float64).to(dtype)
        _assert_exact(scores, is_positive, tau)
        _assert_exact(scores, is_positive, tau, weights)


@PANEL_DTYPES
@pytest.mark.parametrize(
    "extremes", [(INF,), (-INF,), (INF, -INF), (INF, INF, -INF, 1e30)], ids=str
)
def test_infinite_scores(extremes: tuple[float, ...], dtype: torch.dtype) -> None:
    """Infinities rank as the extremes they are, tied among themselves, with gradient 0."""
    for is_positive in (labels(300, 1), ~labels(300, 1)):
        scores = FAMILIES["normal"](300, 0).to(dtype)
        scores[: len(extremes)] = torch.tensor(extremes, dtype=dtype)
        _assert_exact(scores, is_positive, 0.1)
        answer = solved(scores, is_positive, 0.1, backend="panel")
        assert not answer.gradient[scores.isinf()].any()


@settings(max_examples=150)
@given(
    family=st.sampled_from(sorted(FAMILIES)),
    count=st.integers(2, 60),
    seed=st.integers(0, 999),
    scale=st.floats(-8, 8),
    offset=st.sampled_from([0.0, 1.0, -1e3, 1e6]),
    sharpness=st.floats(-6, 4),
    weighted=st.booleans(),
    single=st.booleans(),
)
def test_random_problems(
    family: str,
    count: int,
    seed: int,
    scale: float,
    offset: float,
    sharpness: float,
    weighted: bool,
    single: bool,
) -> None:
    """Small pools over many decades of scale, offset and temperature."""
    dtype = torch.float32 if single else torch.float64
    largest = torch.finfo(torch.float32).max / 4
    scores = (FAMILIES[family](count, seed) * 10**scale + offset).clamp(-largest, largest)
    weights = torch.randint(4, (count,), generator=seeded(seed)).to(dtype) if weighted else None
    _assert_exact(scores.to(dtype), labels(count, seed, 0.4), 10**sharpness, weights)


@PANEL_DTYPES
@pytest.mark.parametrize("family", ["normal", "Cauchy"])
def test_large_pool(family: str, dtype: torch.dtype) -> None:
    """100 000 rows, several blocks: ranks and their transposed sums at sampled rows."""
    count, tau = 100_000, 0.01
    scores, is_positive = FAMILIES[family](count, 0).to(dtype), labels(count, 0, 0.01)
    problem, queries = torch.zeros(int(is_positive.sum()), dtype=torch.int64), scores[is_positive]
    weights = torch.stack((torch.ones_like(scores), is_positive.to(dtype)), dim=-1)[None]
    cotangent = torch.randn(len(queries), 2, generator=seeded(1), dtype=torch.float64)
    plan = PanelPlan(queries, problem, scores[None], tau)
    some = slice(None, None, 23)

    wide = DensePlan(queries[some].double(), problem[some], scores[None].double(), tau)
    exact = wide.sums(0, weights.double())
    error = (plan.sums(0, weights)[some] - exact).abs() / (1 + exact)
    assert error.max() <= (2e-7 if dtype == torch.float32 else 1e-12)

    rows = slice(None, None, 2311)
    wide = DensePlan(queries.double(), problem, scores[None, rows].double(), tau)
    exact = wide.transposed_sums(1, cotangent)
    got = plan.transposed_sums(1, cotangent.to(dtype))[:, rows]
    assert (got - exact).norm() <= (1e-6 if dtype == torch.float32 else 1e-11) * exact.norm()


@pytest.mark.parametrize("block", [1, 7, 64, 200])
@pytest.mark.parametrize("num_problems", [1, 3])
def test_blocks_do_not_show(monkeypatch: pytest.MonkeyPatch, num_problems: int, block: int) -> None:
    """However points are cut into blocks, ranks, sums and gradients stay the same."""
    scores = torch.stack([FAMILIES["normal"](90, seed) for seed in range(num_problems)])
    is_positive = torch.stack([labels(90, seed, 0.4) for seed in range(num_problems)])
    weights = torch.rand(scores.shape, generator=seeded(0), dtype=torch.float64)
    whole = solved(scores, is_positive, 0.1, weights, "panel")
    monkeypatch.setattr(panels, "BLOCK", block)
    found = solved(scores, is_positive, 0.1, weights, "panel")
    torch.testing.assert_close(tuple(found), tuple(whole), rtol=1e-11, atol=1e-13)


@PANEL_DTYPES
@pytest.mark.parametrize("num_live", [400, 150])
@pytest.mark.parametrize("num_problems", [1, 3])
@pytest.mark.parametrize("weighted", [False, True])
def test_negatives_without_a_slope_are_set_apart(
    monkeypatch: pytest.MonkeyPatch,
    num_problems: int,
    num_live: int,
    weighted: bool,
    dtype: torch.dtype,
) -> None:
    """Beyond a budget, where they are moved by others alone."""
    scores = torch.stack([FAMILIES["normal"](400, seed) for seed in range(num_problems)])
    is_positive = torch.stack([labels(400, seed, 0.2) for seed in range(num_problems)])
    weights = torch.rand(scores.shape, generator=seeded(0), dtype=torch.float64)
    softness = 0.02 if dtype == torch.float32 else 1e-3  # so that slopes underflow
    shares: list[float] = []
    steep_of = ranks_by_panels.PanelRanks._steep

    def seen(self: ranks_by_panels.PanelRanks, cotangent: Tensor) -> Tensor | None:
        steep = steep_of(self, cotangent)
        if steep is not None:
            shares.append(len(steep) / cotangent.shape[1])
        return steep

    def gradient(dtype: torch.dtype, backend: Backend) -> Tensor:
        leaf = scores.to(dtype).requires_grad_()
        own = weights.to(dtype) if weighted else None
        problems = Problems(leaf, 0.1, is_positive, own, num_live=num_live, backend=backend)
        partial_auc(problems, 0.1, 0.02, softness).sum().backward()
        assert leaf.grad is not None
        return leaf.grad[:, :num_live].double()

    monkeypatch.setattr(ranks_by_panels, "_WORTH_PARTING", 1)
    monkeypatch.setattr(ranks_by_panels.PanelRanks, "_steep", seen)
    got, exact = gradient(dtype, "panel"), gradient(torch.float64, "dense")
    assert len(shares) == 1
    assert 0 < shares[0] < 0.7
    tolerance = 1e-5 if dtype == torch.float32 else 1e-10
    assert (got - exact).norm() < tolerance * exact.norm()


def test_slopes_of_a_problem_that_is_worth_little_are_not_set_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scores = torch.stack([FAMILIES["normal"](400, seed) for seed in range(2)])
    is_positive = torch.stack([labels(400, seed, 0.2) for seed in range(2)])
    size = torch.tensor([1, 1e-30], dtype=torch.float64)

    def worth(ranks: Ranks) -> Tensor:
        return ranks.of_problem(size) * torch.sigmoid(30 - 9 * ranks.among("negatives"))

    def gradient(backend: Backend) -> Tensor:
        leaf = scores.clone().requires_grad_()
        problems = Problems(leaf, 0.1, is_positive, backend=backend)
        found = problems.ranked_sum(worth, queries="negatives", among=("negatives",))
        return torch.autograd.grad(found.sum(), leaf)[0]

    monkeypatch.setattr(ranks_by_panels, "_WORTH_PARTING", 1)
    got, exact = gradient("panel"), gradient("dense")
    assert ((got - exact).norm(dim=1) < 1e-9 * exact.norm(dim=1)).all()


@pytest.mark.parametrize("num_panels", [1, 8, 9, 16, 30])
def test_stretches_do_not_show(monkeypatch: pytest.MonkeyPatch, num_panels: int) -> None:
    """A long line is convolved piece by piece."""
    generator = seeded(num_panels)
    moments = torch.randn(2, 3, num_panels, generator=generator, dtype=torch.float64)
    table = torch.randn(3, 3, 7, generator=generator, dtype=torch.float64)
    whole = torch.nn.functional.conv1d(moments, table, padding=3)
    monkeypatch.setattr(panels, "_STRETCH", 8)
    torch.testing.assert_close(panels._convolved(moments, table), whole, rtol=0, atol=1e-14)


# Derivatives --------------------------------------------------------------------------------------
