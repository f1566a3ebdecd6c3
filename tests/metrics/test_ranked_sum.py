"""Sums over ranked rows, of which metrics are made: every backend against all pairs in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from imbalanced_losses._ranking import Backend, Problems, Rows, tiles
from imbalanced_losses._ranking.partial_auc import highest_negatives, partial_auc
from tests.helpers import oracle
from tests.helpers.cases import seeded

# Triton's interpreter computes with numpy, which says where an infinity comes up.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered.*:RuntimeWarning")


class Sum(NamedTuple):
    """What no metric of the library asks for: the table of metrics has what they do."""

    worth: Callable[[Any, Tensor, Tensor], Tensor]  # of ranks, a constant [C], and one [C, M]
    queries: Rows
    among: tuple[Rows, ...]


SUMS = {
    "positives": Sum(
        lambda r, limit, gain: r.of_row(gain) * torch.sigmoid(r.of_problem(limit) - r.among("all")),
        "positives",
        ("all",),
    ),
    "every row among every set": Sum(
        lambda r, *_: r.among("positives") * torch.log1p(r.among("negatives")) / r.among("all"),
        "all",
        ("negatives", "all", "positives"),
    ),
}


class Way(NamedTuple):
    """A backend, and problems for it: of several, those with odd numbers are not valid."""

    shape: tuple[int, int]
    backend: Backend
    has_kernels: bool = False


WAYS = {
    "dense, one problem": Way((1, 41), "dense"),
    "dense": Way((5, 41), "dense"),
    "panels": Way((5, 41), "panel"),
    "panels, one problem": Way((1, 41), "panel"),
    "kernels, dense": Way((4, 21), "dense", has_kernels=True),
    "kernels, panels": Way((4, 21), "panel", has_kernels=True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("asked", SUMS.values(), ids=SUMS)
def test_sums_and_slopes(
    asked: Sum,
    way: Way,
    dtype: torch.dtype,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sums, slopes in scores and in temperature, and those in the live rows beside constants;
    exact zeros of problems that are not valid. Weights are there in float64, a fifth of them 0.
    """
    monkeypatch.setattr(tiles, "_PAIRS_NOT_TO_SORT_OUT", 0)
    generator, (num_problems, num_rows) = seeded(0), way.shape
    scores = torch.randn(way.shape, generator=generator).double()
    scores[:, 3:6] = scores[:, :1]
    is_positive = torch.rand(way.shape, generator=generator) < 0.4
    is_positive[:, 0], is_positive[:, 1] = True, False
    is_positive[1:2], is_positive[3:4] = False, True
    weights, gain = torch.rand(2, *way.shape, generator=generator).double()
    weights *= torch.rand(way.shape, generator=generator) < 0.8
    weights[:, :2] = 0.5
    if dtype == torch.float32:
        weights = torch.ones_like(weights)
    limit = torch.linspace(2, 9, num_problems).double()
    tau = (0.7 if way.has_kernels else 0.1) * torch.linspace(1, 3, num_problems).double()

    inputs = scores.clone().requires_grad_(), tau.clone().requires_grad_()
    total = oracle.ranked_sum(
        *(inputs[0], is_positive, inputs[1], weights),
        lambda ranks: asked.worth(ranks, limit, gain),
        *(asked.queries, asked.among),
    )
    slopes = torch.autograd.grad(total.sum(), inputs)
    example = torch.empty(
        0, dtype=dtype, device=request.getfixturevalue("device") if way.has_kernels else "cpu"
    )
    is_valid = torch.arange(num_problems) % 2 == 0
    bound = {torch.float32: 3e-6, torch.float64: 3e-11}[dtype]
    for num_live in (num_rows, num_rows // 3):
        given = [one.to(example).requires_grad_() for one in (scores, tau)]
        problems = Problems(
            given[0],
            given[1] if num_live == num_rows else given[1].detach(),
            is_positive.to(example.device),
            weights.to(example) if dtype == torch.float64 else None,
            num_live=num_live,
            backend=way.backend,
        )
        constants = limit.to(example), gain.to(example)
        found = problems.ranked_sum(
            lambda ranks: asked.worth(ranks, *constants),  # noqa: B023
            queries=asked.queries,
            among=asked.among,
        )
        own = torch.autograd.grad(found.sum(), given, allow_unused=True)
        expected = slopes[0].clone()
        expected[:, num_live:] = 0
        assert problems.valid.cpu().equal(is_valid)
        summed = (scores * slopes[0] / tau[:, None]).abs().sum(1)  # up to its sign, ∂/∂τ
        compared = [(found, total.detach(), total), (own[0], expected, expected)]
        compared += [(own[1], slopes[1], summed)] if num_live == num_rows else []
        for one, right, scale in compared:
            assert one is not None
            assert one.dtype == dtype
            assert not one[~is_valid].any()
            assert right[is_valid].any()
            atol = bound * scale.abs().max().item()
            torch.testing.assert_close(one.detach().cpu().double(), right, rtol=0, atol=atol)


def test_names_that_ranked_sum_does_not_know() -> None:
    problems = Problems(torch.randn(1, 6), 0.1, torch.arange(6) < 2)
    for queries, among in (("negatives", ("all",)), ("positives", ("positives",))):
        with pytest.raises(ValueError, match='by_value=True is for queries="negatives"'):
            problems.ranked_sum(torch.exp, queries=queries, among=among, by_value=True)  # type: ignore[arg-type]


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_an_average_is_that_of_the_metric_that_is_one(
    way: Way, request: pytest.FixtureRequest
) -> None:
    """With derivatives by autograd, which metrics of the library do without; compiled, too."""
    device = request.getfixturevalue("device") if way.has_kernels else "cpu"
    scores = torch.randn(way.shape, generator=seeded(0), dtype=torch.float64)
    is_positive = torch.rand(way.shape, generator=seeded(1)) < 0.3
    weights, values = torch.rand(2, *way.shape, generator=seeded(2), dtype=torch.float64)
    fields = [one.to(device) for one in (is_positive, weights, values)]

    def average(scores: Tensor) -> Tensor:
        problems = Problems(scores, 0.3, *fields[:2], value=fields[2], backend=way.backend)
        last = highest_negatives(problems, 0.5, 0.25)
        found = problems.ranked_average(
            lambda ranks: ranks.among("positives"),
            last.holds,
            last.number,
            queries="negatives",
            among=("positives", "negatives"),
            by_value=True,
        )
        return found / problems.mass("positives", by_value=True)

    def known(scores: Tensor) -> Tensor:
        problems = Problems(scores, 0.3, *fields[:2], value=fields[2], backend=way.backend)
        return partial_auc(problems, 0.5, 0.0, 0.25)

    metrics = [known, average]
    if not way.has_kernels:
        torch._dynamo.reset()
        metrics.append(torch.compile(average, fullgraph=True, backend="aot_eager"))
    results = []
    for metric in metrics:
        leaf = scores.to(device).requires_grad_()
        found = metric(leaf)
        results.append((found.detach(), *torch.autograd.grad(found @ found, leaf)))
    expected, *others = results
    assert expected[1].any()
    for other in others:
        torch.testing.assert_close(other, expected, rtol=1e-10, atol=1e-12)
