"""Sums over ranked rows: every metric, on every backend, against all pairs in float64.

A new metric is a row of METRICS.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from imbalanced_losses._ranking import Backend, Problems, Rows, average_precision, tiles
from imbalanced_losses._ranking.ranked_sum import Slopes
from tests.helpers import oracle
from tests.helpers.cases import seeded

# Triton's interpreter computes with numpy, which says where an infinity comes up.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered.*:RuntimeWarning")

AP, AP_SLOPES = average_precision._precision, average_precision._slopes


class Constants(NamedTuple):
    """What metrics take from elsewhere."""

    budget: Tensor  # [C]
    gain: Tensor  # [C, M]


class Metric(NamedTuple):
    worth: Callable[[Any, Constants], Tensor]  # of ranks
    among: tuple[Rows, ...] = ("all",)
    queries: Rows = "positives"
    slopes: Slopes | None = None

    def of(self, problems: Problems, constants: Constants) -> Tensor:
        return problems.ranked_sum(
            lambda ranks: self.worth(ranks, constants),
            queries=self.queries,
            among=self.among,
            slopes=self.slopes,
        )


def _within(ranks: Any, constants: Constants, rows: Rows) -> Tensor:
    """A soft step at the budget."""
    budget = ranks.of_problem(constants.budget)
    return torch.sigmoid((budget - ranks.among(rows)) / (0.25 * budget))


METRICS = {
    "average precision": Metric(lambda r, _: AP(r), ("all", "positives"), slopes=AP_SLOPES),
    "recall within a budget": Metric(partial(_within, rows="all")),
    "partial AUC": Metric(
        lambda r, c: r.among("positives") * _within(r, c, "negatives"),
        ("positives", "negatives"),
        "negatives",
    ),
    "discounted gain": Metric(lambda r, c: r.of_row(c.gain) / torch.log2(1 + r.among("all"))),
    "every row among every set": Metric(
        lambda r, _: r.among("positives") * torch.log1p(r.among("negatives")) / r.among("all"),
        ("negatives", "all", "positives"),
        "all",
    ),
}


class Way(NamedTuple):
    """A backend, and problems for it: of several, those with odd numbers are not valid."""

    shape: tuple[int, int]
    backend: Backend
    tau: float = 0.1
    has_kernels: bool = False


WAYS = {
    "dense, one problem": Way((1, 41), "dense"),
    "dense": Way((5, 41), "dense"),
    "panels": Way((5, 41), "panel"),
    "panels, one problem": Way((1, 41), "panel"),
    "kernels, dense": Way((3, 21), "dense", has_kernels=True),
    "kernels, panels": Way((3, 21), "panel", tau=0.7, has_kernels=True),
}


class Given(NamedTuple):
    """What problems are made of, float64 on the host."""

    scores: Tensor
    temperature: Tensor
    is_positive: Tensor
    weights: Tensor | None
    constants: Constants

    def problems(self, way: Way, like: Tensor, **options: Any) -> Problems:
        weights = None if self.weights is None else self.weights.to(like)
        is_positive = self.is_positive.to(like.device)
        options = {"temperature": self.temperature.to(like), "backend": way.backend} | options
        return Problems(is_positive=is_positive, weights=weights, **options)

    def expected(self, metric: Metric) -> tuple[Tensor, Tensor, Tensor]:
        """The sums, and their slopes in scores and temperature."""
        scores, tau = (t.clone().requires_grad_() for t in (self.scores, self.temperature))
        weights = torch.ones_like(scores) if self.weights is None else self.weights
        total = oracle.ranked_sum(
            scores,
            self.is_positive,
            tau,
            weights,
            lambda ranks: metric.worth(ranks, self.constants),
            metric.queries,
            metric.among,
        )
        by_scores, by_temperature = torch.autograd.grad(total.sum(), (scores, tau))
        return total.detach(), by_scores, by_temperature


def given(way: Way, weighted: bool) -> Given:
    """Numbers that float32 holds too; ties, and weights of which a fifth are zero."""
    generator, shape = seeded(0), way.shape
    num_problems, num_rows = shape

    def uniform(*size: int) -> Tensor:
        return torch.rand(size, generator=generator).double()

    scores = torch.randn(shape, generator=generator).double()
    scores[:, 3:6] = scores[:, :1]
    is_positive = uniform(*shape) < 0.4
    is_positive[:, 0], is_positive[:, 1] = True, False
    is_positive[1:2], is_positive[3:4] = False, True
    weights = uniform(*shape) * (uniform(*shape) < 0.8)
    weights[:, :2] = 0.5
    constants = Constants((0.3 + uniform(num_problems)) * num_rows / 3, uniform(*shape))
    tau = way.tau * torch.linspace(1, 3, num_problems)
    return Given(scores, tau.double(), is_positive, weights if weighted else None, constants)


def like(way: Way, request: pytest.FixtureRequest, dtype: torch.dtype) -> Tensor:
    """An example of the tensors of a way."""
    device = request.getfixturevalue("device") if way.has_kernels else "cpu"
    return torch.empty(0, dtype=dtype, device=device)


def assert_close(found: Tensor, expected: Tensor, scale: Tensor | None = None) -> None:
    """To the rounding of what is summed, which is as large as the expected or the scale."""
    largest = (expected if scale is None else scale).abs().max().item()
    bound = {torch.float32: 3e-6, torch.float64: 3e-11}[found.dtype] * largest
    torch.testing.assert_close(found.detach().cpu().double(), expected, rtol=0, atol=bound)


EACH_METRIC = pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
EACH_WAY = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
WEIGHTED = pytest.mark.parametrize("weighted", [False, True], ids=["unweighted", "weighted"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])


@DTYPES
@WEIGHTED
@EACH_WAY
@EACH_METRIC
def test_sums_and_slopes(
    metric: Metric, way: Way, weighted: bool, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    """Sums, slopes in scores and in temperature; exact zeros of problems that are not valid."""
    of, example = given(way, weighted), like(way, request, dtype)
    constants = Constants(*(constant.to(example) for constant in of.constants))
    scores, tau = (t.to(example).clone().requires_grad_() for t in (of.scores, of.temperature))
    problems = of.problems(way, example, scores=scores, temperature=tau)
    total = metric.of(problems, constants)
    found = total, *torch.autograd.grad(total.sum(), (scores, tau))

    expected = of.expected(metric)
    is_valid = torch.arange(way.shape[0]) % 2 == 0
    assert problems.valid.cpu().equal(is_valid)
    summed = of.scores * expected[1] / of.temperature[:, None]  # up to its sign, the last
    for own, right, scale in zip(found, expected, (None, None, summed.abs().sum(1)), strict=True):
        assert own.dtype == dtype
        assert right[is_valid].count_nonzero() >= is_valid.sum()  # else this proves nothing
        assert not own[~is_valid].any()
        assert_close(own, right, scale)


@EACH_WAY
@EACH_METRIC
def test_constants_have_no_slope(
    metric: Metric, way: Way, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the live rows beside them are as if all were."""
    monkeypatch.setattr(tiles, "_PAIRS_NOT_TO_SORT_OUT", 0)
    of, example = given(way, weighted=True), like(way, request, torch.float64)
    constants = Constants(*(constant.to(example) for constant in of.constants))
    scores, num_live = of.scores.to(example).requires_grad_(), way.shape[1] // 3
    total = metric.of(of.problems(way, example, scores=scores, num_live=num_live), constants)
    (slope,) = torch.autograd.grad(total.sum(), scores)
    expected, by_scores, _ = of.expected(metric)
    assert_close(total, expected)
    assert_close(slope[:, :num_live], by_scores[:, :num_live])
    assert by_scores[:, num_live:].any()
    assert not slope[:, num_live:].any()


@EACH_WAY
def test_slopes_that_are_handed_in_are_those_of_autograd(
    way: Way, request: pytest.FixtureRequest
) -> None:
    of, example = given(way, weighted=True), like(way, request, torch.float64)
    found = []
    for slopes in (AP_SLOPES, None):
        scores = of.scores.to(example).requires_grad_()
        problems = of.problems(way, example, scores=scores)
        total = problems.ranked_sum(AP, among=("all", "positives"), slopes=slopes)
        found.append(torch.autograd.grad(total.sum(), scores)[0])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-13)


@WEIGHTED
@EACH_WAY
def test_mass(way: Way, weighted: bool, request: pytest.FixtureRequest) -> None:
    """The weight of each set of rows, in units of the heaviest; 1 where a problem is not valid."""
    of, example = given(way, weighted), like(way, request, torch.float64)
    weights = torch.ones_like(of.scores) if of.weights is None else of.weights
    problems = of.problems(way, example, scores=of.scores.to(example))
    for rows in ("all", "positives", "negatives"):
        expected = [
            1 if c % 2 == 1 else float((own[oracle.rows_of(p, own)[rows]] / own.max()).sum())
            for c, (p, own) in enumerate(zip(of.is_positive, weights, strict=True))
        ]
        assert problems.mass(rows).tolist() == pytest.approx(expected, rel=1e-12)


def test_what_is_worth_nothing_is_not_valid() -> None:
    scores, is_positive = torch.randn(2, 6), torch.arange(6) < 2
    problems = Problems(
        scores.requires_grad_(), 0.1, is_positive.expand(2, 6), value=torch.eye(2, 6) * 1e-40
    )
    assert problems.valid.tolist() == [True, True]
    problems = Problems(scores, 0.1, is_positive.expand(2, 6), value=torch.eye(2, 6)[:1] - 0)
    assert problems.valid.tolist() == [True, True]
    nothing = Problems(scores, 0.1, is_positive.expand(2, 6), value=(~is_positive).float())
    mean = nothing.ranked_mean(AP, among=("all", "positives"))
    assert (nothing.valid.tolist(), mean.tolist()) == ([False, False], [0, 0])
    assert not torch.autograd.grad(mean.sum(), scores)[0].any()


@pytest.mark.parametrize("among", [("all", "positives"), ("positives",)])
def test_only_beside_negatives_does_a_positive_count_its_value(among: tuple[Rows, ...]) -> None:
    problems = Problems(torch.randn(1, 6), 0.1, torch.arange(6) < 2)
    queries = "negatives" if "all" in among else "positives"
    with pytest.raises(ValueError, match='by_value=True is for queries="negatives"'):
        problems.ranked_sum(AP, queries=queries, among=among, by_value=True)


@EACH_WAY
def test_units(way: Way, request: pytest.FixtureRequest) -> None:
    """The heaviest weight, and the mean of those above 0; of rows drawn for others, of all."""
    of, example = given(way, weighted=True), like(way, request, torch.float64)
    draws = torch.arange(1.0, way.shape[1] + 1, dtype=torch.float64)
    problems = of.problems(way, example, scores=of.scores.to(example), draws=draws.to(example))
    assert of.weights is not None
    assert problems.unit.cpu().equal(of.weights.amax(1))
    for rows in ("all", "positives", "negatives"):
        for c in range(0, way.shape[0], 2):
            own = oracle.rows_of(of.is_positive[c], of.weights[c])[rows]
            mean = of.weights[c, own].sum() / draws[own].sum() / of.weights[c].max()
            assert problems.mean_weight(rows)[c].item() == pytest.approx(mean.item(), rel=1e-12)


@pytest.mark.filterwarnings("ignore:.torch.jit.script")  # torch's own import
def test_vmap_over_scores_is_refused() -> None:
    """With what to do instead; problems are stacked as they are."""
    way = WAYS["dense"]
    of = given(way, weighted=False)

    def total(scores: Tensor) -> Tensor:
        problems = of.problems(way, of.scores, scores=scores)
        return problems.ranked_sum(AP, among=("all", "positives"))

    with pytest.raises(NotImplementedError, match="stack the problems along the dimension C"):
        torch.func.vmap(total)(of.scores.expand(2, *way.shape))
