"""Sums of sigmoids against their definition, and what they cost in memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from imbalanced_losses._ranking import Backend, Problems, Rows, dense, sigmoid_sums, tiles
from imbalanced_losses._ranking.backends import rank_plan
from imbalanced_losses.functional import smooth_ap
from tests.helpers.answers import Answer, solved
from tests.helpers.cases import seeded
from tests.helpers.memory import LargestTensor


class Problem(NamedTuple):
    """Arguments of sigmoid_sums."""

    queries: Tensor  # [Q]
    problem: Tensor  # [Q]
    sources: Tensor  # [C, M]
    weights: Tensor  # [C, M, K]
    temperature: float | Tensor


def _problem(
    num_queries: int,
    num_sources: int,
    num_problems: int = 1,
    num_columns: int = 1,
    *,
    temperature: float | Tensor = 0.5,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Problem:
    generator = seeded(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    problem = torch.randint(num_problems, (num_queries,), generator=generator)
    return Problem(
        normal(num_queries),
        problem,
        normal(num_problems, num_sources),
        normal(num_problems, num_sources, num_columns),
        temperature,
    )


def _formula(
    queries: Tensor, problem: Tensor, sources: Tensor, weights: Tensor, temperature: float | Tensor
) -> Tensor:
    """The definition in four lines of differentiable torch."""
    tau = temperature[problem, None] if isinstance(temperature, Tensor) else temperature
    x = (sources[problem] - queries[:, None]) / tau  # [Q, M]
    return (torch.sigmoid(x)[:, :, None] * weights[problem]).sum(1)


def _leaves(problem: Problem) -> list[Tensor]:
    """The floating tensors among the arguments, each made to ask for its gradient."""
    return [
        field.requires_grad_()
        for field in problem
        if isinstance(field, Tensor) and field.is_floating_point()
    ]


def _as_columns(out: Tensor) -> Tensor:
    """A scalar in which every output has a weight of its own."""
    return (out * torch.arange(1, out.numel() + 1, dtype=out.dtype).view_as(out).sin()).sum()


def _derivatives(function: Callable[..., Tensor], problem: Problem, order: int) -> list[Tensor]:
    """[value, gradients, gradients of a functional of the gradients, …] up to an order."""
    leaves = _leaves(problem)
    out = function(*problem)
    collected = [out.detach()]
    for _ in range(order):
        gradients = torch.autograd.grad(_as_columns(out), leaves, create_graph=True)
        out = torch.cat([gradient.flatten() for gradient in gradients])
        collected.append(out.detach())
    return collected


# Values -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_columns", [1, 2, 3])
@pytest.mark.parametrize("num_problems", [1, 3])
@pytest.mark.parametrize(("num_queries", "num_sources"), [(1, 1), (1, 31), (2, 1), (17, 31)])
def test_sums_are_their_definition(
    num_queries: int, num_sources: int, num_problems: int, num_columns: int
) -> None:
    """For odd sizes and K columns."""
    for tensor_temperature in (False, True):
        tau = torch.linspace(0.1, 2, num_problems).double() if tensor_temperature else 0.3
        given = _problem(num_queries, num_sources, num_problems, num_columns, temperature=tau)
        out = sigmoid_sums(*given)
        assert out.shape == (num_queries, num_columns)
        torch.testing.assert_close(out, _formula(*given), rtol=0, atol=1e-12)


@pytest.mark.parametrize("tensor_temperature", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("num_problems", [1, 3])
@pytest.mark.parametrize(("num_queries", "num_sources"), [(0, 0), (0, 5), (4, 0)])
def test_nothing_to_sum(
    num_queries: int, num_sources: int, num_problems: int, tensor_temperature: bool
) -> None:
    """No queries or no sources: sums of the right shape, exactly 0, and so are all gradients."""
    tau = torch.ones(num_problems).double() if tensor_temperature else 1.0
    given = _problem(num_queries, num_sources, num_problems, 2, temperature=tau)
    leaves = _leaves(given)
    out = sigmoid_sums(*given)
    assert out.shape == (num_queries, 2)
    assert (out == 0).all()
    for leaf, gradient in zip(leaves, torch.autograd.grad(out.sum(), leaves), strict=True):
        assert gradient.shape == leaf.shape
        assert (gradient == 0).all()


def test_arguments_that_are_not_contiguous() -> None:
    """Strided and expanded views give the same sums and gradients as their copies."""
    given = _problem(12, 10, 3, 2)
    strided = given._replace(
        queries=given.queries.repeat_interleave(2)[::2],
        problem=given.problem.repeat_interleave(2)[::2],
        sources=given.sources.T.contiguous().T,
        weights=given.weights.permute(2, 1, 0).contiguous().permute(2, 1, 0),
    )
    assert not any(field.is_contiguous() for field in strided[:4])
    found, expected = (_derivatives(sigmoid_sums, one, 2) for one in (strided, given))
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)

    expanded = given._replace(weights=torch.ones((), dtype=torch.float64).expand(3, 10, 2))
    ones = given._replace(weights=torch.ones(3, 10, 2, dtype=torch.float64))
    assert torch.equal(sigmoid_sums(*expanded), sigmoid_sums(*ones))


@pytest.mark.of_dense
@pytest.mark.parametrize("tile", [1, 7, 64, 1000])
@pytest.mark.parametrize("num_problems", [1, 3])
def test_tiles_do_not_show(monkeypatch: pytest.MonkeyPatch, num_problems: int, tile: int) -> None:
    """However the queries are cut into tiles, sums and two derivatives stay the same."""
    given = _problem(23, 11, num_problems, 2)
    whole = _derivatives(sigmoid_sums, given, 2)
    monkeypatch.setattr(dense, "TILE", tile)
    found = _derivatives(sigmoid_sums, given, 2)
    torch.testing.assert_close(found, whole, rtol=1e-12, atol=1e-12)  # in another order


# Ranks --------------------------------------------------------------------------------------------


ASKED: tuple[tuple[Rows, tuple[Rows, ...]], ...] = (
    ("positives", ("all", "positives")),
    ("negatives", ("positives", "negatives")),
    ("all", ("negatives", "all", "positives")),
)


@pytest.mark.of_dense
@pytest.mark.parametrize(
    "tile",
    [None, 1, 50, 300],
    ids=["one tile", "a row a tile", "some rows a tile", "two tiles"],
)
@pytest.mark.parametrize("tensor_temperature", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("weighted", [False, True], ids=["unweighted", "weighted"])
@pytest.mark.parametrize("num_problems", [1, 2, 3])
@pytest.mark.parametrize(
    "num_live", [None, 22, 9, 0], ids=["all live", "22 live", "9 live", "none live"]
)
@pytest.mark.parametrize("backend", ["dense", "panel"])
def test_rank_plan_is_the_same_sums(
    monkeypatch: pytest.MonkeyPatch,
    backend: Backend,
    num_live: int | None,
    num_problems: int,
    weighted: bool,
    tensor_temperature: bool,
    tile: int | None,
) -> None:
    """`rank_plan` gives ½ω and the sums of the formula for rows of the pool, and τ times their
    gradient as source and as query at once, however it is cut into tiles; 0 for constants.
    """
    if tile is not None:
        monkeypatch.setattr(dense, "TILE", tile)
    monkeypatch.setattr(tiles, "_PAIRS_NOT_TO_SORT_OUT", 0)
    generator = seeded(0)
    scores = torch.randn(num_problems, 23, generator=generator, dtype=torch.float64)
    scores[:, 5:9] = scores[:, :1]  # ties
    is_positive = torch.rand(scores.shape, generator=generator) < 0.4
    if num_problems > 1:
        is_positive[-1] = False  # a problem without a query
    weights = torch.rand(scores.shape, generator=generator, dtype=torch.float64)
    weights /= weights.amax(1, keepdim=True)
    tau = torch.linspace(0.2, 0.9, num_problems).double() if tensor_temperature else 0.4
    own = weights if weighted else None
    problems = Problems(scores, tau, is_positive, own, num_live=num_live)
    row_weights = weights if weighted else torch.ones_like(scores)
    members = {
        "all": torch.ones_like(is_positive),
        "positives": is_positive,
        "negatives": ~is_positive,
    }
    exact = 1e-13 if backend == "dense" else 1e-11
    for rows, among in ASKED:
        queries = problems.listed(rows)
        problem, row = queries.problem, queries.row
        assert torch.equal(
            torch.stack((problem, row), dim=1),
            (members[rows] & is_positive.any(1, keepdim=True)).nonzero(),
        )
        cotangent = torch.randn(len(among), len(row), generator=generator, dtype=torch.float64)

        plan = rank_plan(problems.canonical(), queries, among, backend)
        ranks, gradient = plan.ranks_and_gradient(lambda _, index: cotangent[:, index].unbind())  # noqa: B023
        torch.testing.assert_close(plan.ranks(), tuple(ranks), rtol=0, atol=0)

        leaf = scores.clone().requires_grad_()
        columns = torch.stack([row_weights * members[name] for name in among], dim=-1)
        expected = _formula(leaf[problem, row], problem, leaf, columns, tau)
        (expected_gradient,) = torch.autograd.grad(expected, leaf, cotangent.T)
        expected = expected + 0.5 * columns[problem, row]
        torch.testing.assert_close(torch.stack(ranks, dim=1), expected, rtol=exact, atol=exact)
        expected_gradient *= tau[:, None] if isinstance(tau, Tensor) else tau
        if num_live is not None:
            expected_gradient[:, num_live:] = 0
        torch.testing.assert_close(gradient, expected_gradient, rtol=10 * exact, atol=exact)


@pytest.mark.of_dense
@pytest.mark.parametrize("tile", [None, 1, 100, 700])
@pytest.mark.parametrize("weighted", [False, True], ids=["unweighted", "weighted"])
def test_problems_of_unequal_size(
    monkeypatch: pytest.MonkeyPatch, weighted: bool, tile: int | None
) -> None:
    """Problems that share tiles, with any number of positives each, are what they are alone."""
    if tile is not None:
        monkeypatch.setattr(dense, "TILE", tile)
    sizes = torch.tensor([9, 2, 0, 13, 8, 1, 7, 12])
    generator = seeded(0)
    scores = torch.randn(8, 30, generator=generator, dtype=torch.float64)
    is_positive = torch.rand(8, 30, generator=generator).argsort(1) < sizes[:, None]
    weights = torch.rand(8, 30, generator=generator, dtype=torch.float64) if weighted else None

    def answer(c: slice) -> Answer:
        own = None if weights is None else weights[c]
        return solved(scores[c], is_positive[c], 0.3, own, "dense")

    together = answer(slice(None))
    singles = [answer(slice(c, c + 1)) for c in range(8)]
    alone = (torch.cat(parts) for parts in zip(*singles, strict=True))
    torch.testing.assert_close(tuple(together), tuple(alone), rtol=1e-13, atol=1e-14)


# Derivatives --------------------------------------------------------------------------------------


@pytest.mark.parametrize("tensor_temperature", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("num_columns", [1, 2])
@pytest.mark.parametrize("num_problems", [1, 2])
def test_gradcheck(num_problems: int, num_columns: int, tensor_temperature: bool) -> None:
    """First and second derivatives in every argument against finite differences, also batched."""
    tau = torch.linspace(0.6, 1, num_problems).double() if tensor_temperature else 0.7
    given = _problem(3, 4, num_problems, num_columns, temperature=tau)

    def sums(queries: Tensor, sources: Tensor, weights: Tensor, *temperature: Tensor) -> Tensor:
        return sigmoid_sums(queries, given.problem, sources, weights, *(temperature or (tau,)))

    leaves = _leaves(given)
    assert torch.autograd.gradcheck(sums, leaves, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(sums, leaves, check_batched_grad=True)


@pytest.mark.parametrize("tensor_temperature", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("num_problems", [1, 3])
def test_four_derivatives(num_problems: int, tensor_temperature: bool) -> None:
    """Derivatives up to the fourth, mixed over all arguments, equal autograd of the formula."""
    tau = torch.linspace(0.6, 1.1, num_problems).double() if tensor_temperature else 0.7
    given = _problem(5, 6, num_problems, 2, temperature=tau)
    for got, expected in zip(
        _derivatives(sigmoid_sums, given, 4), _derivatives(_formula, given, 4), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10 * expected.abs().max())


@pytest.mark.parametrize("asked", ["queries", "sources", "weights", "temperature"])
def test_gradient_of_one_argument_alone(asked: str) -> None:
    """Each argument may be the only one that asks for a gradient, and gets the same one."""
    given = _problem(5, 6, 2, 2, temperature=torch.tensor([0.5, 0.9], dtype=torch.float64))
    leaf = getattr(given, asked).requires_grad_()
    order = 1 if asked == "weights" else 2  # linear in the weights: nothing to derive twice

    def derivatives(function: Callable[..., Tensor]) -> list[Tensor]:
        collected = [function(*given)]
        for _ in range(order):
            out = _as_columns(collected[-1])
            collected += torch.autograd.grad(out, leaf, create_graph=True)
        return collected

    torch.testing.assert_close(derivatives(sigmoid_sums), derivatives(_formula))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("distance", [5.0, 15.0, 40.0, 80.0])
def test_derivatives_of_far_pairs(distance: float, dtype: torch.dtype) -> None:
    """σ′ and σ″ of a pair τ·distance apart, on either side, keep their *relative* accuracy, where
    1 − σ would have lost every digit.
    """
    # σ′(x) = e⁻ˣ / (1 + e⁻ˣ)², σ″ = σ′ (1 − 2σ); relative error of exp grows with its argument.
    tail = math.exp(-distance)
    slope = tail / (1 + tail) ** 2
    curvature = -slope * (1 - tail) / (1 + tail)
    tolerance = 4 * distance * torch.finfo(dtype).eps
    for side in (1, -1):
        source = torch.tensor([[side * distance]], dtype=dtype, requires_grad=True)
        query, one = torch.zeros(1, dtype=dtype), torch.ones(1, 1, 1, dtype=dtype)
        out = sigmoid_sums(query, torch.zeros(1, dtype=torch.int64), source, one, 1.0)
        (first,) = torch.autograd.grad(out.sum(), source, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), source)
        assert first.item() == pytest.approx(slope, rel=tolerance, abs=0)
        assert second.item() == pytest.approx(side * curvature, rel=tolerance, abs=0)


def test_temperature_gradient_far_from_zero() -> None:
    """∂/∂τ does not depend on where the origin of the scores is."""
    tau = torch.tensor([0.5], dtype=torch.float64, requires_grad=True)
    given = _problem(5, 6, temperature=tau)
    moved = given._replace(queries=given.queries + 2.0**20, sources=given.sources + 2.0**20)
    gradients = [torch.autograd.grad(_as_columns(sigmoid_sums(*p)), tau)[0] for p in (given, moved)]
    # Scores of 10⁶ are rounded by 10⁻¹⁰.
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-8, atol=0)


@pytest.mark.parametrize("backend", ["dense", "panel"])
def test_vmap_over_cotangents(backend: Backend) -> None:
    """`torch.func.vmap` of a pullback gives what one cotangent after the other gives."""
    given = _problem(5, 6, 3, 2)

    def sums(weights: Tensor) -> Tensor:
        return sigmoid_sums(*given._replace(weights=weights), backend=backend)

    _, pullback = torch.func.vjp(sums, given.weights)
    cotangents = torch.randn(4, 5, 2, dtype=torch.float64)
    (batched,) = torch.func.vmap(pullback)(cotangents)
    expected = torch.stack([pullback(cotangent)[0] for cotangent in cotangents])
    torch.testing.assert_close(batched, expected)


@pytest.mark.parametrize("batched", ["queries", "sources", "temperature"])
def test_vmap_over_the_geometry_is_refused(batched: str) -> None:
    """Scores and τ cannot be batched: an error that says what to do instead."""
    given = _problem(5, 6, 2, 1, temperature=torch.ones(2, dtype=torch.float64))
    stacked = torch.stack([getattr(given, batched)] * 3)
    with pytest.raises(NotImplementedError, match="stack the problems along its dimension C"):
        torch.func.vmap(lambda t: sigmoid_sums(*given._replace(**{batched: t})))(stacked)


# Memory -------------------------------------------------------------------------------------------


@pytest.fixture
def small_tile(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(dense, "TILE", 1024)
    return 1024


@pytest.mark.of_dense
@pytest.mark.parametrize("num_problems", [1, 4])
def test_no_tensor_of_all_pairs(small_tile: int, num_problems: int) -> None:
    """Forward, backward and double backward make nothing larger than a tile a weight column."""
    num_queries, num_sources, num_columns = 256, 128, 2
    given = _problem(num_queries, num_sources, num_problems, num_columns)
    leaves = _leaves(given)
    with LargestTensor() as largest:
        out = sigmoid_sums(*given)
        gradients = torch.autograd.grad(_as_columns(out), leaves, create_graph=True)
        torch.autograd.grad(sum(g.square().sum() for g in gradients), leaves)
    assert num_queries * num_sources > 10 * small_tile  # else this proves nothing
    assert 0 < largest.elements <= num_columns * small_tile


@pytest.mark.of_dense
@pytest.mark.parametrize("order", [1, 2], ids=["first", "second"])
@pytest.mark.parametrize("weighted", [False, True], ids=["unweighted", "weighted"])
@pytest.mark.parametrize("num_problems", [1, 4])
def test_memory_of_smooth_ap(
    small_tile: int, num_problems: int, weighted: bool, order: int
) -> None:
    """The same for a loss on top: no tensor of all pairs in a training step, nor when its gradient
    is differentiated, and what waits for backward is a few tensors of the size of the scores.
    """
    scores = torch.randn(num_problems, 400, dtype=torch.float64, requires_grad=True)
    is_positive = torch.arange(400).expand(num_problems, 400) % 3 == 0
    weights = torch.rand(scores.shape, dtype=torch.float64) if weighted else None
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with LargestTensor() as largest:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            ap, _ = smooth_ap(scores, is_positive, 0.3, sample_weight=weights)
        kept = sum(saved)
        (gradient,) = torch.autograd.grad(ap.sum(), scores, create_graph=order == 2)
        if order == 2:
            torch.autograd.grad(gradient.square().sum(), scores)
    pairs = int(is_positive.sum()) * 400
    assert pairs > 10 * 2 * max(small_tile, scores.numel())  # else this proves nothing
    assert 0 < largest.elements <= 2 * max(small_tile, scores.numel())
    assert 0 < kept <= 6 * scores.numel()
