"""`functional`: Smooth-AP and the spread of scores, against the definition and known answers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score
from torch import Tensor

from imbalanced_losses.functional import score_spread, smooth_ap
from tests import oracle
from tests.cases import Case, all_equal, cases, random_batch, seeded

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
    ap = oracle.smooth_ap(case.scores.tolist(), case.is_positive.tolist(), case.temperature)
    assert ap == pytest.approx(case.ap, rel=0, abs=1e-15, nan_ok=True)


def test_oracle_gradient_is_the_slope_of_the_oracle() -> None:
    """The closed-form derivatives of the oracle agree with its own central differences."""
    logits, targets, weights = random_batch(seeded(1), 9, 1, weights="real")
    scores, is_positive, weights = logits[:, 0].tolist(), (targets == 1).tolist(), weights.tolist()
    tau, step = 0.4, 1e-6

    def slope(ap_at: Callable[[float], float]) -> float:
        return (ap_at(step) - ap_at(-step)) / (2 * step)

    def moved(index: int, by: float) -> list[float]:
        return [s + by if m == index else s for m, s in enumerate(scores)]

    gradient = oracle.smooth_ap_gradient(scores, is_positive, tau, weights)
    assert gradient.tau == pytest.approx(
        slope(lambda by: oracle.smooth_ap(scores, is_positive, tau + by, weights)), abs=1e-8
    )
    for index, derivative in enumerate(gradient.scores):
        assert derivative == pytest.approx(
            slope(lambda by, m=index: oracle.smooth_ap(moved(m, by), is_positive, tau, weights)),
            abs=1e-8,
        )
    for index, derivative in enumerate(oracle.spread_gradient(scores, weights)):
        assert derivative == pytest.approx(
            slope(lambda by, m=index: oracle.spread(moved(m, by), weights)), abs=1e-8
        )


# The definition -----------------------------------------------------------------------------------


@pytest.mark.parametrize("ties", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("weights", ["none", "real", "counts"])
@pytest.mark.parametrize("num_classes", [1, 2, 5])
def test_definition_with_one_temperature_a_class(
    num_classes: int, weights: str, ties: bool
) -> None:
    """[C, M] problems with a tensor temperature equal the loops: value and all derivatives."""
    for seed in range(5):
        batch = random_batch(seeded(seed), 25, num_classes, weights=weights, ties=ties)
        scores = batch.logits.T.contiguous().requires_grad_()
        is_positive = torch.rand(scores.shape, generator=seeded(seed)) < 0.3
        taus = torch.tensor([0.01, 0.1, 0.3, 1, 10.0], dtype=torch.float64)[:num_classes]
        taus.requires_grad_()
        ap, valid = smooth_ap(scores, is_positive, taus, sample_weight=batch.sample_weight)
        gradient, tau_gradient = torch.autograd.grad(ap.sum(), (scores, taus))

        row_weights = None if batch.sample_weight is None else batch.sample_weight.tolist()
        for c in range(num_classes):
            problem = (scores[c].tolist(), is_positive[c].tolist(), taus[c].item(), row_weights)
            expected = oracle.smooth_ap(*problem)
            assert valid[c].item() == (not math.isnan(expected))
            if not valid[c]:
                continue
            by_score, by_tau = oracle.smooth_ap_gradient(*problem)
            assert ap[c].item() == pytest.approx(expected, rel=0, abs=1e-12)
            scale = np.abs(by_score).max()
            assert gradient[c].tolist() == pytest.approx(by_score, rel=0, abs=1e-10 * scale)
            assert tau_gradient[c].item() == pytest.approx(by_tau, rel=1e-10, abs=1e-12)


def test_one_problem_is_the_same_as_a_stack_of_one() -> None:
    """[M] and [1, M] agree bit for bit, also with weights and a tensor temperature."""
    logits, targets, weights = random_batch(seeded(0), 30, 1, weights="real")
    scores, is_positive, tau = logits[:, 0], targets == 1, torch.tensor(0.2, dtype=torch.float64)
    ap, valid = smooth_ap(scores, is_positive, tau, sample_weight=weights)
    stacked = smooth_ap(scores[None], is_positive[None], tau[None], sample_weight=weights[None])
    assert ap.shape == valid.shape == ()
    assert torch.equal(ap, stacked.ap[0])
    assert valid == stacked.valid[0]


def test_weights_of_each_class_of_their_own() -> None:
    """sample_weight [C, M] weighs every problem separately."""
    scores = torch.randn(3, 20, dtype=torch.float64)
    is_positive = torch.rand(3, 20) < 0.4
    weights = torch.rand(3, 20, dtype=torch.float64)
    ap, _ = smooth_ap(scores, is_positive, 0.3, sample_weight=weights)
    for c in range(3):
        expected = oracle.smooth_ap(scores[c], is_positive[c], 0.3, weights[c])
        assert ap[c].item() == pytest.approx(expected, rel=0, abs=1e-12)


@pytest.mark.parametrize("tau", [1e-300, 1e-45, 1e-30, 1e-5, 1e30, 1e300])
def test_any_temperature_that_is_accepted(tau: float) -> None:
    """float32 scores with a τ far outside of float32's range: finite, and equal to the loops."""
    logits, targets, _ = random_batch(seeded(3), 20, 1)
    scores, is_positive = logits[:, 0].float().requires_grad_(), targets == 1
    ap, _ = smooth_ap(scores, is_positive, tau)
    (gradient,) = torch.autograd.grad(ap, scores)
    expected = oracle.smooth_ap(scores.tolist(), is_positive.tolist(), tau)
    assert ap.item() == pytest.approx(expected, rel=0, abs=1e-6)
    assert gradient.isfinite().all()


def test_weights_whose_sum_overflows() -> None:
    """Only ratios of weights matter: float32 weights near the largest number are as good as 1."""
    scores, is_positive = torch.randn(50), torch.arange(50) < 5
    weights = 1 + torch.rand(50)
    expected, _ = smooth_ap(scores, is_positive, 0.3, sample_weight=weights)
    huge, valid = smooth_ap(scores, is_positive, 0.3, sample_weight=weights * 2.0**126)
    assert valid
    assert huge.item() == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize("absent", [True, False], ids=["positives", "negatives"])
def test_validity_asks_for_weight(absent: bool) -> None:
    """Positives or negatives that all have weight 0 are not there."""
    scores, is_positive = torch.randn(10, requires_grad=True), torch.arange(10) < 4
    ap, valid = smooth_ap(scores, is_positive, sample_weight=(is_positive != absent).float())
    (gradient,) = torch.autograd.grad(ap, scores)
    assert not valid
    assert ap.item() == 0
    assert (gradient == 0).all()


def test_inputs_are_left_as_they_are() -> None:
    """Nothing is written into an argument."""
    scores, is_positive, weights = torch.randn(2, 9), torch.rand(2, 9) < 0.5, torch.rand(2, 9)
    scores[0, 0], weights[0, 1] = torch.inf, 0
    copies = scores.clone(), is_positive.clone(), weights.clone()
    scores.requires_grad_()
    smooth_ap(scores, is_positive, sample_weight=weights).ap.sum().backward()
    assert torch.equal(scores.detach(), copies[0])
    assert torch.equal(is_positive, copies[1])
    assert torch.equal(weights, copies[2])


# τ → 0 --------------------------------------------------------------------------------------------


def _untied_scores(generator: torch.Generator, count: int) -> Tensor:
    return torch.randperm(count, generator=generator).double() / 7 - 3


@pytest.mark.parametrize("weights", ["none", "counts", "real"])
@pytest.mark.parametrize(
    ("count", "positives"), [(2, 1), (5, 4), (20, 1), (20, 8), (100, 3), (300, 30), (300, 290)]
)
def test_small_temperature_is_average_precision(count: int, positives: int, weights: str) -> None:
    """Without ties and with τ far below every gap, AP is scikit-learn's, weights included."""
    generator = seeded(1000 * count + positives)
    for _ in range(17):  # 7 sizes × 3 kinds of weights × 17 = 357 rankings
        scores = _untied_scores(generator, count)
        is_positive = torch.arange(count) < positives
        sample_weight = random_batch(generator, count, 1, weights=weights).sample_weight
        if sample_weight is not None:
            sample_weight[[0, -1]] = 1  # a positive and a negative that count
        ap, valid = smooth_ap(scores, is_positive, 1e-9, sample_weight=sample_weight)
        expected = average_precision_score(is_positive, scores, sample_weight=sample_weight)
        assert valid
        assert ap.item() == pytest.approx(expected, rel=0, abs=1e-12)


@pytest.mark.parametrize("seed", range(10))
def test_a_tie_counts_half(seed: int) -> None:
    """At τ → 0 a row tied with a positive takes half a place before it, whatever its label."""
    batch = random_batch(seeded(seed), 30, 1, weights="real", ties=True)
    scores, is_positive, weights = batch.logits[:, 0], batch.targets == 1, batch.sample_weight
    places = (scores > scores[:, None]).double() + 0.5 * (scores == scores[:, None])  # [i, j]
    rank = 0.5 * weights + places @ weights
    rank_among_positives = 0.5 * weights + places @ (weights * is_positive)
    share = weights * is_positive / (weights * is_positive).sum()
    ap, _ = smooth_ap(scores, is_positive, 1e-9, sample_weight=weights)
    assert ap.item() == pytest.approx(
        (share * rank_among_positives / rank).sum().item(), rel=0, abs=1e-12
    )


def test_sharper_is_nearer_to_average_precision() -> None:
    """The distance to the true AP falls with τ."""
    scores, is_positive = _untied_scores(seeded(0), 200), torch.arange(200) < 20
    truth = average_precision_score(is_positive, scores)
    errors = [abs(smooth_ap(scores, is_positive, tau).ap.item() - truth) for tau in (1, 0.1, 0.02)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-3


# Invariants ---------------------------------------------------------------------------------------


class Ranking(NamedTuple):
    scores: Tensor  # [M] float64
    is_positive: Tensor  # [M], both kinds present with weight > 0
    weights: Tensor  # [M]
    tau: float

    def ap(self, **changed: object) -> float:
        new = self._replace(**changed)
        return smooth_ap(new.scores, new.is_positive, new.tau, sample_weight=new.weights).ap.item()

    def loss_gradient(self) -> Tensor:
        scores = self.scores.clone().requires_grad_()
        ap, _ = smooth_ap(scores, self.is_positive, self.tau, sample_weight=self.weights)
        (gradient,) = torch.autograd.grad(1 - ap, scores)
        return gradient


@st.composite
def rankings(draw: st.DrawFn) -> Ranking:
    """Two to ten rows: scores in [-4, 4], ties likely, τ from sharp to flat."""
    score = st.one_of(
        st.integers(-4, 4).map(float), st.floats(-4, 4, allow_subnormal=False, width=32)
    )
    weight = st.one_of(st.integers(0, 3).map(float), st.floats(0.125, 3, width=32))
    row = st.tuples(score, st.booleans(), weight)
    counting = st.tuples(score, weight.filter(bool))
    rows = [(*draw(counting), True), (*draw(counting), False)]
    rows = [(s, p, w) for s, w, p in rows] + draw(st.lists(row, max_size=8))
    scores, is_positive, weights = zip(*draw(st.permutations(rows)), strict=True)
    return Ranking(
        torch.tensor(scores, dtype=torch.float64),
        torch.tensor(is_positive),
        torch.tensor(weights, dtype=torch.float64),
        draw(st.sampled_from([0.01, 0.1, 0.5, 2.0, 20.0])),
    )


# Of a number in [0, 1] computed from scores that a change of unit or origin has rounded anew:
# 1e-15 in a score is 1e-13 in score / τ at τ = 0.01, and sums of a dozen of them.
CLOSE = {"rel": 0, "abs": 1e-11}


@given(rankings())
def test_range(ranking: Ranking) -> None:
    """AP is in (0, 1]; rounding may add its last digit."""
    assert 0 < ranking.ap() <= 1 + 1e-15


@given(rankings(), st.floats(-100, 100))
def test_shift(ranking: Ranking, by: float) -> None:
    """Moving all scores together changes nothing."""
    assert ranking.ap(scores=ranking.scores + by) == pytest.approx(ranking.ap(), **CLOSE)


@given(rankings(), st.floats(0.01, 100))
def test_scale_of_scores_and_temperature(ranking: Ranking, by: float) -> None:
    """Scores and τ matter through their quotient alone."""
    scaled = ranking.ap(scores=ranking.scores * by, tau=ranking.tau * by)
    assert scaled == pytest.approx(ranking.ap(), **CLOSE)


@given(rankings(), st.floats(0.01, 100), st.floats(-10, 10))
def test_spread_unit_is_free_of_scale(ranking: Ranking, scale: float, shift: float) -> None:
    """With τ in units of the spread, an affine map of the scores changes nothing."""

    def ap(scores: Tensor) -> float:
        return ranking.ap(scores=scores, tau=0.2 * score_spread(scores, ranking.weights))

    if ranking.scores[ranking.weights > 0].std(correction=0) < 1e-3:
        return  # what is left of such a spread after a shift is rounding
    # 1e-15 in the scores over a spread of 1e-3, times 0.2⁻¹
    assert ap(ranking.scores * scale + shift) == pytest.approx(
        ap(ranking.scores), rel=0, abs=1e-8 / min(1, scale)
    )


@given(rankings(), st.randoms(use_true_random=False))
def test_order_of_rows(ranking: Ranking, random: object) -> None:
    """Rows may come in any order: same AP, and the gradient moves with its row."""
    order = list(range(len(ranking.scores)))
    random.shuffle(order)  # type: ignore[attr-defined]
    permuted = Ranking(*(field[order] for field in ranking[:3]), ranking.tau)
    assert permuted.ap() == pytest.approx(ranking.ap(), **CLOSE)
    gradient = ranking.loss_gradient()
    torch.testing.assert_close(permuted.loss_gradient(), gradient[order], rtol=0, atol=1e-10)


@given(st.lists(rankings(), min_size=2, max_size=4), st.integers(0, 3))
def test_problems_do_not_see_each_other(stack: list[Ranking], shift: int) -> None:
    """Each of C stacked problems has the AP that it has alone, wherever it stands."""
    stack = stack[shift % len(stack) :] + stack[: shift % len(stack)]
    rows = max(len(ranking.scores) for ranking in stack)

    def stacked(field: str) -> Tensor:  # padded with rows of weight 0
        parts = [getattr(ranking, field) for ranking in stack]
        return torch.stack([torch.cat((p, p.new_zeros(rows - len(p)))) for p in parts])

    taus = torch.tensor([ranking.tau for ranking in stack], dtype=torch.float64)
    weights = stacked("weights")
    ap, valid = smooth_ap(stacked("scores"), stacked("is_positive"), taus, sample_weight=weights)
    assert valid.all()
    assert ap.tolist() == pytest.approx([ranking.ap() for ranking in stack], **CLOSE)


@given(rankings())
def test_gradient_never_raises_a_negative(ranking: Ranking) -> None:
    """The loss never falls by raising a negative: no tolerance, the sign is exact."""
    assert (ranking.loss_gradient()[~ranking.is_positive] >= 0).all()


@given(rankings())
def test_gradient_sums_to_zero(ranking: Ranking) -> None:
    """Follows from the invariance to shifts."""
    gradient = ranking.loss_gradient()
    assert gradient.sum().item() == pytest.approx(0, abs=1e-13 * (1 + gradient.abs().sum().item()))


@given(rankings())
def test_weight_one_is_no_weight(ranking: Ranking) -> None:
    """All weights 1, and all weights equal, are the same as none."""
    ones = torch.ones_like(ranking.weights)
    unweighted = ranking.ap(weights=None)
    assert ranking.ap(weights=ones) == pytest.approx(unweighted, **CLOSE)
    assert ranking.ap(weights=3 * ones) == pytest.approx(unweighted, **CLOSE)


@given(rankings())
def test_weight_zero_leaves_the_row_out(ranking: Ranking) -> None:
    """A row of weight 0 is no row: same AP, gradient 0 there and unchanged elsewhere."""
    kept = ranking.weights > 0
    without = Ranking(*(field[kept] for field in ranking[:3]), ranking.tau)
    assert ranking.ap() == pytest.approx(without.ap(), **CLOSE)
    gradient = ranking.loss_gradient()
    assert (gradient[~kept] == 0).all()
    torch.testing.assert_close(gradient[kept], without.loss_gradient(), rtol=0, atol=1e-10)


@given(rankings(), st.integers(1, 4))
def test_weight_of_a_negative_counts_rows(ranking: Ranking, times: int) -> None:
    """A negative of weight k is k copies of it. (Copies of a positive tie with each other, and a
    tie counts half, so for positives this holds in the rank of others but not in their own.)
    """
    repeats = torch.where(ranking.is_positive, 1, times)
    repeated = Ranking(*(field.repeat_interleave(repeats) for field in ranking[:3]), ranking.tau)
    weights = ranking.weights * repeats
    assert ranking.ap(weights=weights) == pytest.approx(repeated.ap(), **CLOSE)


@given(rankings(), st.floats(1e-3, 1e3))
def test_scale_of_weights(ranking: Ranking, by: float) -> None:
    """Only the ratios of weights matter."""
    scaled = ranking.ap(weights=ranking.weights * by)
    assert scaled == pytest.approx(ranking.ap(), **CLOSE)


# Derivatives --------------------------------------------------------------------------------------


@pytest.mark.parametrize("tensor_temperature", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("weighted", [False, True], ids=["unweighted", "weighted"])
@pytest.mark.parametrize("num_classes", [1, 3])
def test_gradcheck(num_classes: int, weighted: bool, tensor_temperature: bool) -> None:
    """First and second derivatives against finite differences, also batched over cotangents."""
    scores = torch.randn(num_classes, 6, dtype=torch.float64, requires_grad=True)
    is_positive = torch.tensor([True, False, False, True, False, True]).expand(scores.shape)
    weights = torch.rand(6, dtype=torch.float64) if weighted else None
    inputs: tuple[Tensor, ...] = (scores,)
    if tensor_temperature:
        inputs += (torch.linspace(0.5, 1, num_classes, dtype=torch.float64).requires_grad_(),)

    def ap(scores: Tensor, temperature: float | Tensor = 0.7) -> Tensor:
        return smooth_ap(scores, is_positive, temperature, sample_weight=weights).ap

    assert torch.autograd.gradcheck(ap, inputs, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(ap, inputs, check_batched_grad=True)


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # torch's own import
def test_forward_mode_is_refused() -> None:
    """Forward-mode differentiation is not provided: it raises rather than being silently wrong."""
    scores, is_positive = torch.randn(8), torch.arange(8) < 3
    with pytest.raises(RuntimeError, match=r"forward mode|jvp"):
        torch.func.jvp(lambda s: smooth_ap(s, is_positive).ap, (scores,), (scores,))


def test_torch_func_gradient() -> None:
    """`torch.func.grad` and a reverse-mode Hessian agree with autograd."""
    scores, is_positive = torch.randn(8, dtype=torch.float64), torch.arange(8) < 3

    def ap(scores: Tensor) -> Tensor:
        return smooth_ap(scores, is_positive, 0.5).ap

    leaf = scores.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(ap(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(ap)(scores), gradient)
    hessian = torch.autograd.functional.hessian(ap, scores)
    twice = torch.stack(
        [torch.func.grad(lambda s, m=m: torch.func.grad(ap)(s)[m])(scores) for m in range(8)]
    )
    torch.testing.assert_close(twice, hessian)


# The spread ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["none", "real", "counts"])
def test_spread_is_the_population_deviation(weights: str) -> None:
    """Value and gradient against the loops, one class and several."""
    for seed in range(5):
        batch = random_batch(seeded(seed), 12, 3, weights=weights)
        scores = batch.logits.T.contiguous().requires_grad_()
        spread = score_spread(scores, batch.sample_weight)
        (gradient,) = torch.autograd.grad(spread.sum(), scores)
        row_weights = None if batch.sample_weight is None else batch.sample_weight.tolist()
        for c in range(3):
            assert spread[c].item() == pytest.approx(
                oracle.spread(scores[c].tolist(), row_weights), rel=1e-13
            )
            assert gradient[c].tolist() == pytest.approx(
                oracle.spread_gradient(scores[c].tolist(), row_weights), rel=0, abs=1e-13
            )


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


def test_spread_of_scores_with_a_large_offset() -> None:
    """float32 scores far from zero: their differences are exact, and so is their deviation."""
    scores = torch.tensor([0.0, 1.0, 2.0, 5.0])
    assert score_spread(scores + 2.0**20).item() == pytest.approx(score_spread(scores).item())


def test_known_answer_needs_a_plus_one() -> None:
    """Constant scores give (n + 1) / (n + N + 1): the case that other readings of the formula
    (n / (n + N), or 1 / (1 + …) without the row's own half) miss.
    """
    case = all_equal(3, 4)
    assert smooth_ap(case.scores, case.is_positive).ap.item() == pytest.approx(4 / 8)
