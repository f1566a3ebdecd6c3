"""`functional`: Smooth-AP and the spread of scores, against the definition and known answers."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor

from imbalanced_losses._ranking import Problems
from imbalanced_losses._ranking.plan import Masked
from imbalanced_losses.functional import Backend, score_spread, smooth_ap
from tests.helpers import oracle
from tests.helpers.cases import Case, cases, random_batch, seeded

CASES = [pytest.param(case, id=case.name) for case in cases()]


# Known answers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("case", CASES)
def test_known_answer(case: Case, dtype: torch.dtype) -> None:
    """Rankings that can be scored by hand come out as that score, invalid ones as exactly 0."""
    scores = case.scores.to(dtype).requires_grad_()
    ap, valid = smooth_ap(scores, case.is_positive, case.temperature)
    (gradient,) = torch.autograd.grad(ap, scores)
    assert ap.dtype == dtype
    assert gradient.isfinite().all()
    assert valid.item() == (not math.isnan(case.ap))
    if valid:
        assert ap.item() == pytest.approx(case.ap, rel=0, abs=4 * torch.finfo(dtype).eps)
    else:
        assert ap.item() == 0
        assert (gradient == 0).all()


@pytest.mark.parametrize("case", CASES)
def test_oracle_knows_the_answer_too(case: Case) -> None:
    """The oracle that all other tests lean on is right where the answer is known."""
    problem = oracle.Problem(case.scores.tolist(), case.is_positive.tolist(), case.temperature)
    assert oracle.smooth_ap(problem) == pytest.approx(case.ap, rel=0, abs=1e-15, nan_ok=True)


def test_the_default_temperature() -> None:
    scores, is_positive = torch.randn(20), torch.arange(20) < 6
    assert smooth_ap(scores, is_positive).ap.equal(smooth_ap(scores, is_positive, 0.01).ap)


def test_below_the_smallest_temperature_the_gradient_is_that_of_the_smallest() -> None:
    """float32 has none below 2⁻⁶³: a lower one is taken for it, and moving it changes nothing."""
    smallest = torch.finfo(torch.float32).tiny ** 0.5
    scores = (smallest * torch.tensor([0.5, 0.0, 1.0, -1.0])).requires_grad_()
    is_positive = torch.tensor([True, False, False, True])
    found = []
    for tau in (smallest, 1e-30):
        temperature = torch.tensor(tau, requires_grad=True)
        ap = smooth_ap(scores, is_positive, temperature).ap
        found.append(torch.autograd.grad(ap, (scores, temperature)))
    assert found[0][0].abs().max() * smallest > 0.01
    assert found[0][0].equal(found[1][0])
    assert found[1][1].item() == 0


@pytest.mark.parametrize("tau", [1e-300, 1e-45, 1e-30, 1e-5, 1e30, 1e300])
def test_any_temperature_that_is_accepted(tau: float) -> None:
    """float32 scores with a τ far outside of float32's range: finite, and equal to the loops."""
    logits, targets, _ = random_batch(seeded(3), 20, 1)
    scores, is_positive = logits[:, 0].float().requires_grad_(), targets == 1
    ap, _ = smooth_ap(scores, is_positive, tau)
    (gradient,) = torch.autograd.grad(ap, scores)
    expected = oracle.smooth_ap(oracle.Problem(scores.tolist(), is_positive.tolist(), tau))
    assert ap.item() == pytest.approx(expected, rel=0, abs=1e-6)
    assert gradient.isfinite().all()


# τ → 0 --------------------------------------------------------------------------------------------


def _untied_scores(generator: torch.Generator, count: int) -> Tensor:
    return torch.randperm(count, generator=generator).double() / 7 - 3


@pytest.mark.parametrize("backend", ["dense", "panel"])
@pytest.mark.parametrize("weights", ["none", "counts", "real"])
@pytest.mark.parametrize(
    ("count", "positives"), [(2, 1), (5, 4), (20, 1), (20, 8), (100, 3), (300, 30), (300, 290)]
)
def test_small_temperature_is_average_precision(
    count: int,
    positives: int,
    weights: str,
    backend: Backend,
    record_property: Callable[[str, object], None],
) -> None:
    """Without ties and with τ far below every gap, AP is scikit-learn's, weights included."""
    generator = seeded(1000 * count + positives)
    record_property("cases", 17)
    for _ in range(17):
        scores = _untied_scores(generator, count)
        is_positive = torch.arange(count) < positives
        sample_weight = random_batch(generator, count, 1, weights=weights).weights
        if sample_weight is not None:
            sample_weight[[0, -1]] = 1  # a positive and a negative that count
        ap, valid = smooth_ap(
            scores, is_positive, 1e-9, sample_weight=sample_weight, backend=backend
        )
        expected = average_precision_score(is_positive, scores, sample_weight=sample_weight)
        assert valid
        assert ap.item() == pytest.approx(expected, rel=0, abs=1e-12)


# Derivatives --------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.0, 2.0**12])
def test_the_slope_in_temperature_is_that_of_float64(offset: float) -> None:
    """Also far from zero, where a float32 product of score and slope would leave few digits."""
    scores = torch.randint(-64, 65, (30,), generator=seeded(0)) / 64
    is_positive = torch.arange(30) < 8
    slopes = []
    for dtype in (torch.float32, torch.float64):
        temperature = torch.tensor(0.25, dtype=dtype, requires_grad=True)
        ap = smooth_ap(scores.to(dtype) + offset, is_positive, temperature).ap
        slopes.append(torch.autograd.grad(ap, temperature)[0].item())
    assert abs(slopes[1]) > 0.01
    assert slopes[0] == pytest.approx(slopes[1], rel=1e-5)


@pytest.mark.parametrize("score", [1e300, -1e300])
def test_the_slope_in_temperature_where_scores_over_it_overflow(score: float) -> None:
    scores = torch.tensor([score, score, 0.0, 1.0], dtype=torch.float64, requires_grad=True)
    is_positive = torch.tensor([True, False, False, True])
    temperature = torch.tensor(1e-140, dtype=torch.float64, requires_grad=True)
    ap = smooth_ap(scores, is_positive, temperature).ap
    by_score, by_temperature = torch.autograd.grad(ap, (scores, temperature))
    assert by_score[0].abs() > 1e138
    assert by_temperature.isfinite()


def test_a_nan_in_a_class_without_positives_leaves_its_temperature_alone() -> None:
    scores = torch.tensor([[0.0, 1.0, 0.5], [0.0, math.nan, 1.0]])
    is_positive = torch.tensor([[True, False, False], [False, False, False]])
    temperature = torch.tensor([0.5, 0.5], requires_grad=True)
    ap, valid = smooth_ap(scores, is_positive, temperature)
    (slope,) = torch.autograd.grad(ap.sum(), temperature)
    assert valid.tolist() == [True, False]
    assert slope[0].abs() > 0.01
    assert slope[1].item() == 0


@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize("num_problems", [1, 4])
def test_rows_as_a_mask_are_those_listed(
    num_problems: int, is_weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The form that needs no value read, for devices, holds the same."""
    shape = (num_problems, 12)
    is_positive = torch.rand(shape, generator=seeded(0)) < 0.4
    if num_problems > 1:
        is_positive[1], is_positive[2], is_positive[3] = False, True, torch.arange(12) == 5
    weights = torch.rand(shape, generator=seeded(1)) if is_weighted else None
    if weights is not None:
        weights[:, :3] = 0
    listed = Problems(torch.randn(shape), 0.1, is_positive, weights)
    masked = Problems(torch.randn(shape), 0.1, is_positive, weights)
    monkeypatch.setattr(masked, "_is_masked", lambda: True)
    values = torch.randn(shape)
    for rows in ("positives", "negatives", "all"):
        torch.testing.assert_close(masked.mass(rows), listed.mass(rows))
        assert masked.valid.equal(listed.valid)
        mask, places = masked.queries(rows), listed.queries(rows)
        assert isinstance(mask, Masked)
        assert mask.mask.nonzero().equal(torch.stack((places.problem, places.row), dim=1))
        torch.testing.assert_close(mask.total(values), places.total(places.of_row(values)))
        by_problem = mask.of_problem(values[:, 0]) + mask.of_row(values)
        listed_by_problem = places.of_problem(values[:, 0]) + places.of_row(values)
        assert by_problem[mask.mask].equal(listed_by_problem)


@pytest.mark.filterwarnings("ignore:.torch.jit.script")  # torch's own import
def test_forward_mode_is_refused() -> None:
    """Forward-mode differentiation is not provided: it raises rather than being silently wrong."""
    scores, is_positive = torch.randn(8), torch.arange(8) < 3
    with pytest.raises(RuntimeError, match=r"forward mode|forward AD|jvp"):
        torch.func.jvp(lambda s: smooth_ap(s, is_positive).ap, (scores,), (scores,))


# The spread ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["none", "real", "counts"])
def test_spread_is_the_population_deviation(weights: str) -> None:
    """Value and gradient, one class and several."""
    for seed in range(5):
        batch = random_batch(seeded(seed), 12, 3, weights=weights)
        scores = batch.logits.T.contiguous().requires_grad_()
        spread = score_spread(scores, batch.weights)
        (gradient,) = torch.autograd.grad(spread.sum(), scores)
        row_weights = torch.ones(12).double() if weights == "none" else batch.weights
        expected = torch.stack([oracle.spread(own, row_weights) for own in scores])
        torch.testing.assert_close(spread, expected, rtol=1e-13, atol=0)
        (slopes,) = torch.autograd.grad(expected.sum(), scores)
        torch.testing.assert_close(gradient, slopes, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    "scores",
    [[], [5.0], [0.1, 0.1, 0.1], [1e7 + 1] * 7, [math.inf, 2.0, math.nan], [math.inf, -math.inf]],
    ids=["none", "one", "equal", "equal and large", "one finite", "none finite"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_spread_of_constant_scores(scores: list[float], dtype: torch.dtype) -> None:
    """Scores that do not vary have no unit: 1, with a gradient of exactly 0."""
    leaf = torch.tensor(scores, dtype=dtype, requires_grad=True)
    spread = score_spread(leaf)
    (gradient,) = torch.autograd.grad(spread, leaf)
    assert spread.item() == 1
    assert (gradient == 0).all()


@pytest.mark.parametrize("scale", [1e-100, 1e-18, 1e18, 1e200])
def test_spread_of_huge_and_tiny_scores(scale: float) -> None:
    """The unit is free of scale as far as the dtype reaches."""
    dtype = torch.float32 if 1e-30 < scale < 1e30 else torch.float64
    scores = torch.tensor([1.0, 2.0, 4.0, -3.0], dtype=dtype)
    expected = scale * score_spread(scores).item()
    assert score_spread(scores * scale).item() == pytest.approx(expected, rel=1e-6, abs=0)


def test_each_class_has_a_unit_of_its_own() -> None:
    scores = torch.tensor([[1.0, 2.0, 4.0], [-3.0, 2.0, 0.0]], dtype=torch.float64)
    scale = torch.tensor([1e200, 1e-150], dtype=torch.float64)
    found = score_spread(scores * scale[:, None])
    torch.testing.assert_close(found, score_spread(scores) * scale, rtol=1e-12, atol=0)


@pytest.mark.parametrize("scores", [[0.0, 1e-25], [0.0, 1e-20]])
def test_scores_that_differ_by_next_to_nothing_have_no_spread(scores: list[float]) -> None:
    assert score_spread(torch.tensor(scores)).item() == 1


@pytest.mark.parametrize("backend", ["dense", "panel"])
def test_a_temperature_alone_has_derivatives_of_both_orders(backend: Backend) -> None:
    """By autograd and by torch.func, where the scores need none: as differences tell."""
    scores = torch.randn(30, generator=seeded(0), dtype=torch.float64)
    is_positive = torch.rand(30, generator=seeded(1)) < 0.3

    def ap(tau: Tensor) -> Tensor:
        return smooth_ap(scores, is_positive, tau, backend=backend).ap

    tau = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ap, tau)
    assert torch.autograd.gradgradcheck(ap, tau)
    (slope,) = torch.autograd.grad(ap(tau), tau)
    assert slope.abs() > 1e-3
    torch.testing.assert_close(torch.func.grad(ap)(tau.detach()), slope)


def test_a_temperature_that_follows_the_scores_is_counted_once() -> None:
    """By either route to the gradient; and its derivative is that of finite differences."""
    leaf = torch.randn(12, generator=seeded(5), dtype=torch.float64).requires_grad_()
    is_positive = torch.arange(12) % 4 == 0

    def ap(scores: Tensor) -> Tensor:
        return smooth_ap(scores, is_positive, 0.3 * score_spread(scores)).ap

    slopes = [torch.autograd.grad(ap(leaf), leaf, create_graph=graph)[0] for graph in (False, True)]
    torch.testing.assert_close(slopes[1].detach(), slopes[0], rtol=1e-10, atol=1e-13)
    assert torch.autograd.gradgradcheck(ap, leaf)


@pytest.mark.parametrize("backend", ["dense", "panel"])
def test_a_row_of_weight_zero_may_hold_anything(backend: Backend) -> None:
    scores = torch.randn(40, generator=seeded(0), dtype=torch.float64)
    is_positive = torch.arange(40) % 4 == 0
    weights = torch.rand(40, generator=seeded(1), dtype=torch.float64)
    expected = smooth_ap(scores[1:], is_positive[1:], 0.1, sample_weight=weights[1:])
    for junk in (math.nan, math.inf):
        scores[0], weights[0] = junk, 0
        leaf = scores.clone().requires_grad_()
        found = smooth_ap(leaf, is_positive, 0.1, sample_weight=weights, backend=backend)
        torch.testing.assert_close(found.ap.detach(), expected.ap)
        found.ap.backward()
        assert leaf.grad is not None
        assert leaf.grad[0] == 0
        assert leaf.grad.isfinite().all()


def test_a_weight_that_underflows_is_present_all_the_same() -> None:
    """Beside the heaviest row it is 0 in float32."""
    weights = torch.tensor([1e-60, 1.0], dtype=torch.float64)
    found = smooth_ap(torch.tensor([1.0, 0.0]), torch.tensor([True, False]), sample_weight=weights)
    assert found.valid
    assert found.ap > 0.9
