"""Panels on a line: where scores lie, at what cost in memory, and who is kept apart."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from imbalanced_losses._ranking.dense import DensePlan
from imbalanced_losses._ranking.panels import line as lines
from imbalanced_losses._ranking.panels.line import Line
from imbalanced_losses._ranking.panels.panels import PRECISIONS, PanelPlan, Panels
from imbalanced_losses.functional import smooth_ap
from tests.helpers.answers import solved
from tests.helpers.cases import seeded
from tests.helpers.memory import LargestTensor
from tests.helpers.score_families import FAMILIES, labels

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])


def _panels(scores: Tensor, temperature: float) -> Panels:
    """What the panel backend makes of scores [C, M]."""
    nothing = torch.zeros(0, dtype=torch.int64)
    return Panels(scores.new_empty(0), nothing, scores, temperature)


def _line(scores: Tensor, temperature: float) -> Line:
    """The line that the panel backend lays for scores [C, M]."""
    return _panels(scores, temperature).line


def _kind(line: Line) -> str:
    """Which of the three kinds of line it is."""
    if line.occupied is not None:
        return "occupied"
    return "segments" if line.segments else "plain"


# Which line ---------------------------------------------------------------------------------------

KINDS = [
    ("normal", 1.0, "plain"),
    ("normal", 2e-3, "occupied"),
    ("normal", 1e-6, "occupied"),
    ("constant", 1e-6, "plain"),
    ("far clusters", 1e6, "plain"),
    ("far clusters", 0.05, "segments"),
    ("tight clusters", 1e-6, "segments"),
    ("two values", 1e-6, "segments"),
    ("Cauchy", 1e-6, "occupied"),
    ("lognormal", 1e-3, "occupied"),
    ("24 decades", 0.01, "occupied"),
    ("outlier 1e12", 0.01, "segments"),
    ("outliers 1e38", 1e-6, "occupied"),
    ("constant, outliers", 1e-6, "segments"),
]


@DTYPES
@pytest.mark.parametrize(("family", "tau", "kind"), KINDS)
def test_kinds_of_line(family: str, tau: float, kind: str, dtype: torch.dtype) -> None:
    """The line that is meant for such scores is the one that they get: no test of the others
    silently stops covering it.
    """
    assert _kind(_line(FAMILIES[family](600, 0).to(dtype)[None], tau)) == kind


@DTYPES
@pytest.mark.parametrize("count", [50, 200, 700])
@pytest.mark.parametrize("share_below", [0.3, 0.5, 0.7])
def test_two_values_are_two_segments(share_below: float, count: int, dtype: torch.dtype) -> None:
    """Many ties at the median, and many beyond any gap: a sort that is not stable may swap the two
    ends of the core, and then the gap is taken for a part of it.
    """
    for seed in range(4):
        is_above = torch.rand(count, generator=seeded(seed)) >= share_below
        line = _line((1e30 * is_above.to(dtype))[None], 0.01)
        assert _kind(line) == "segments"
        assert 40 <= line.num_panels <= 100


# Places -------------------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize(("family", "tau", "_kind_of_line"), KINDS)
def test_places(family: str, tau: float, _kind_of_line: str, dtype: torch.dtype) -> None:
    """Scores within reach keep their distance, those out of reach stay so, and in order."""
    scores = FAMILIES[family](600, 0).to(dtype).sort().values
    panels = _panels(scores[None], tau)
    line, (_, width, reach) = panels.line, panels.precision
    panel, place = (part[0] for part in line.locate(scores[None], None))
    assert place.abs().max() <= 1 + 1e-9
    if line.occupied is not None:
        panel = line.occupied[panel]
    position = panel + (place + 1) / 2  # in panels
    true_distance = scores.double().diff() / (width * tau)
    distance = position.diff()
    near = true_distance <= reach + 1
    # Scores many panels from their anchor lose what float64 loses of such a number.
    torch.testing.assert_close(distance[near], true_distance[near], rtol=1e-9, atol=1e-6)
    assert (panel.diff()[~near] > reach).all()


@DTYPES
@pytest.mark.parametrize("tau", [0.01, 1e-5])
def test_queries_anywhere(tau: float, dtype: torch.dtype) -> None:
    """Queries that are no sources: beyond both ends, amid a gap that is cut, and at its edges just
    within and just out of reach.
    """
    _, width, reach = PRECISIONS[dtype][-1]
    sources = torch.stack([0.1 * FAMILIES["normal"](300, c) for c in range(2)]).to(dtype)
    sources[:, 150:] += 1000
    low, high = sources[0, :150].max(), sources[0, 150:].min()
    steps = width * tau * torch.tensor([0.0, 0.3, 1, reach - 1, reach, reach + 1, reach + 3, 999])
    middle = torch.tensor([500.0, -500.0, 1e9])
    queries = torch.cat((low + steps, low - steps, high - steps, high + steps, middle)).to(dtype)
    weights = torch.rand(2, 300, 2, generator=seeded(0), dtype=torch.float64)
    cotangent = torch.randn(2 * len(queries), 2, generator=seeded(1), dtype=torch.float64)
    problem = torch.arange(2).repeat(len(queries))
    queries = queries.repeat_interleave(2)
    plan = PanelPlan(queries, problem, sources, tau)
    assert _kind(plan.panels.line) != "plain"
    dense = DensePlan(queries.double(), problem, sources.double(), tau)
    bound = 1e-7 if dtype == torch.float32 else 1e-11
    for order in range(3):
        got = plan.both_sums(order, weights.to(dtype), cotangent.to(dtype))
        for ours, exact in zip(got, dense.both_sums(order, weights, cotangent), strict=True):
            assert (ours - exact).abs().max() <= bound * (10 + exact.abs().max())


# Memory -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_panels_are_bounded(family: str) -> None:
    """However far scores are apart, there are no more panels than a few a row."""
    for count in (10, 600, 20_000):
        scores = FAMILIES[family](count, 0)[None]
        for tau in (1e-9, 1e-6, 1e-3, 0.01, 1.0, 1e6):
            assert _line(scores, tau).num_panels <= 4 * count + 1024


@DTYPES
@pytest.mark.parametrize("family", FAMILIES)
def test_no_tensor_of_all_pairs(family: str, dtype: torch.dtype) -> None:
    """A training step and its second derivative make nothing larger than some coefficients a row
    or a panel.
    """
    count = 4000
    scores = FAMILIES[family](count, 0).to(dtype).requires_grad_()
    is_positive = labels(count, 0, 0.5)
    degree = PRECISIONS[dtype][-1].degree
    for tau in (1e-6, 0.01):
        with LargestTensor() as largest:
            ap, _ = smooth_ap(scores, is_positive, tau, backend="panel")
            (gradient,) = torch.autograd.grad(ap, scores, create_graph=True)
            torch.autograd.grad(gradient.sum(), scores)
        # Coefficients of two sums, at most 4 panels a source or query.
        rows = count + int(is_positive.sum())
        assert 0 < largest.elements <= 2 * degree * (4 * rows + 1024)
        assert largest.elements * 4 < int(is_positive.sum()) * count


# Problems apart -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "tau", "kind"),
    [("normal", 0.05, "plain"), ("outlier 1e12", 0.05, "segments"), ("Cauchy", 1e-6, "occupied")],
)
@DTYPES
def test_nan_stays_in_its_problem(dtype: torch.dtype, family: str, tau: float, kind: str) -> None:
    """A NaN makes AP and gradient of its problem NaN and leaves the others as they were."""
    is_positive = torch.stack([labels(200, seed) for seed in range(3)])
    scores = torch.stack([FAMILIES[family](200, seed) for seed in range(3)]).to(dtype)
    assert _kind(_line(scores, tau)) == kind
    ap, _, gradient = solved(scores, is_positive, tau, backend="panel")
    for row in (0, 199):  # a positive and a negative
        bad = scores.clone()
        bad[1, row] = math.nan
        found, _, slopes = solved(bad, is_positive, tau, backend="panel")
        assert _kind(_line(bad, tau)) == kind
        assert found.isnan().tolist() == [False, True, False]
        assert slopes[1].isnan().all()
        for c in (0, 2):
            torch.testing.assert_close(found[c], ap[c], rtol=0, atol=1e-7)
            error = (slopes[c] - gradient[c]).norm()
            assert error <= 2e-6 * gradient[c].norm() + 1e-14 / tau


@DTYPES
def test_small_ranks_keep_their_digits(dtype: torch.dtype) -> None:
    """The rank of a row of little weight above rows of much weight is not lost in their sum."""
    top = torch.tensor([100.0, 101.0, 200.0, 201.0])
    scores = torch.cat((FAMILIES["normal"](396, 0), top)).to(dtype)
    weights = torch.ones(400, dtype=dtype)
    # Transforms, for float32, are exact to 1e-16 of the mass nearby; convolutions at any weight.
    smallest = 1e-6 if dtype == torch.float32 else 1e-12
    weights[396:] = smallest * torch.tensor([1, 3, 2, 5], dtype=dtype)
    problem = torch.zeros(4, dtype=torch.int64)
    plan = PanelPlan(scores[396:], problem, scores[None], 1.0)
    assert _kind(plan.panels.line) == "plain"
    sums = plan.sums(0, weights[None, :, None]).double()
    wide = DensePlan(scores[396:].double(), problem, scores[None].double(), 1.0)
    exact = wide.sums(0, weights[None, :, None].double())
    assert ((sums - exact) / exact).abs().max() <= (2e-7 if dtype == torch.float32 else 1e-12)


# Precision ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "degree"), [(4000, 10), (40_000, 7), (400_000, 4)])
@pytest.mark.parametrize("outlier", [False, True], ids=["compact", "outlier"])
def test_more_rows_take_finer_panels(count: int, degree: int, outlier: bool) -> None:
    """The lower the degree the cheaper a row, where panels are few beside the rows: whatever a
    single outlier makes of the range, from the size on where cutting the line pays.
    """
    scores = FAMILIES["normal"](count, 0).float()
    if outlier:
        scores[7] = 1e12
    panels = _panels(scores[None], 0.01)
    expected = 10 if outlier and count < 65_536 else degree
    assert panels.precision.degree == expected
    assert panels.line.num_panels <= count / 32 or degree == 10


@pytest.mark.parametrize("length", [1, 255, 256, 257, 70_000])
@pytest.mark.parametrize("before", [(2,), (2, 3)], ids=str)
def test_cumulative_sums_by_products(before: tuple[int, ...], length: int) -> None:
    """What CUDA takes where its own cumulative sum is refused as not the same every time."""
    mass = torch.rand(*before, length, generator=seeded(0), dtype=torch.float64)
    found = lines._cumulated_by_products(mass)
    torch.testing.assert_close(found, mass.cumsum(-1), rtol=1e-13, atol=0)


class Alone:
    """The exchange of one process that holds all rows."""

    is_differentiated = False
    sum = max = concatenated = staticmethod(lambda tensor: tensor)


@DTYPES
@pytest.mark.parametrize(("family", "tau"), [(family, tau) for family, tau, _ in KINDS])
def test_one_process_that_exchanges_lays_the_line_of_one_that_does_not(
    family: str, tau: float, dtype: torch.dtype
) -> None:
    scores = FAMILIES[family](3000, 0).to(dtype)[None]
    nothing = torch.zeros(0, dtype=torch.int64)
    given = (scores.new_empty(0), nothing, scores, tau)
    alone = Panels(*given, precisions=PRECISIONS[dtype][-1:]).line
    found = Panels(*given, processes=Alone()).line
    assert _kind(found) == _kind(alone)
    assert found.length == alone.length
    if alone.occupied is not None:
        assert found.occupied is not None
        assert torch.equal(found.occupied, alone.occupied)
