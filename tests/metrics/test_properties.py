"""What AP does not depend on: found false by no random example, for both backends and every dtype.

Scores other than float64 lie on a grid, so that those which are moved or scaled are exact and a
tolerance is about ranking alone.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from imbalanced_losses import SmoothAPLoss
from imbalanced_losses.functional import Backend, score_spread, smooth_ap
from tests.helpers.cases import IGNORED

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Way(NamedTuple):
    """How to compute."""

    backend: Backend
    dtype: torch.dtype  # of the scores

    @property
    def computed(self) -> torch.dtype:
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def close(self) -> float:
        """Of a number in [0, 1], computed twice from scores that differ by rounding in float64:
        1e-15 in a score is 1e-13 in score / τ at τ = 0.01, and sums of a dozen of them.
        """
        return 1e-11 if self.dtype == torch.float64 else 2e-6

    def assert_same(self, got: Tensor, expected: Tensor, tau: float) -> None:
        """Gradients: sums of terms of up to 1 / 4τ, rounded to the dtype of the scores."""
        atol = self.close / (4 * tau) + torch.finfo(self.dtype).tiny
        torch.testing.assert_close(got, expected, rtol=self.rounding, atol=atol)

    @property
    def rounding(self) -> float:
        """From the dtype that is computed in to that of the scores, on either side."""
        return 0 if self.dtype == self.computed else torch.finfo(self.dtype).eps


WAYS = [Way(backend, dtype) for backend in ("dense", "panel") for dtype in DTYPES]
EACH_WAY = pytest.mark.parametrize(
    "way", WAYS, ids=[f"{backend}-{str(dtype).removeprefix('torch.')}" for backend, dtype in WAYS]
)
A_SHARE = settings(max_examples=settings().max_examples // 4)  # of the examples, in each way
BOTH_BACKENDS = pytest.mark.parametrize("backend", ["dense", "panel"])


# smooth_ap ----------------------------------------------------------------------------------------


class Ranking(NamedTuple):
    scores: Tensor  # [M] float64
    is_positive: Tensor  # [M], both kinds present with weight > 0
    weights: Tensor  # [M]
    tau: float

    def within(self, way: Way) -> Ranking:
        """With scores that stay exact when they are moved by quarters or scaled by powers of 2."""
        if way.dtype == torch.float64:
            return self
        return self._replace(scores=(4 * self.scores).round() / 4, weights=self.weights.float())

    def ap(self, way: Way, **changed: object) -> float:
        new = self._replace(**changed)
        scores = new.scores.to(way.dtype)
        assert torch.equal(scores.double(), new.scores)
        ap, valid = smooth_ap(
            scores, new.is_positive, new.tau, sample_weight=new.weights, backend=way.backend
        )
        assert valid
        assert ap.dtype == way.computed
        return ap.item()

    def loss_gradient(self, way: Way) -> Tensor:
        scores = self.scores.to(way.dtype).requires_grad_()
        ap, _ = smooth_ap(
            scores, self.is_positive, self.tau, sample_weight=self.weights, backend=way.backend
        )
        (gradient,) = torch.autograd.grad(1 - ap, scores)
        return gradient

    def rows(self, index: Tensor | list[int]) -> Ranking:
        return Ranking(*(field[index] for field in self[:3]), self.tau)


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


@EACH_WAY
@A_SHARE
@given(ranking=rankings())
def test_range(way: Way, ranking: Ranking) -> None:
    """AP is in (0, 1]; rounding may add its last digits."""
    assert 0 < ranking.within(way).ap(way) <= 1 + way.close / 10


@EACH_WAY
@A_SHARE
@given(ranking=rankings(), quarters=st.integers(-112, 112), by=st.floats(-100, 100))
def test_shift(way: Way, ranking: Ranking, quarters: int, by: float) -> None:
    """Moving all scores together changes neither AP nor its gradient."""
    ranking = ranking.within(way)
    by = by if way.dtype == torch.float64 else quarters / 4
    moved = ranking._replace(scores=ranking.scores + by)
    assert moved.ap(way) == pytest.approx(ranking.ap(way), rel=0, abs=way.close)
    way.assert_same(moved.loss_gradient(way), ranking.loss_gradient(way), ranking.tau)


@EACH_WAY
@A_SHARE
@given(ranking=rankings(), power=st.integers(-6, 6), by=st.floats(0.01, 100))
def test_scale_of_scores_and_temperature(way: Way, ranking: Ranking, power: int, by: float) -> None:
    """Scores and τ matter through their quotient alone."""
    ranking = ranking.within(way)
    by = by if way.dtype == torch.float64 else 2.0**power
    scaled = ranking.ap(way, scores=ranking.scores * by, tau=ranking.tau * by)
    assert scaled == pytest.approx(ranking.ap(way), rel=0, abs=way.close)


@BOTH_BACKENDS
@given(ranking=rankings(), scale=st.floats(0.01, 100), shift=st.floats(-10, 10))
def test_spread_unit_is_free_of_scale(
    backend: Backend, ranking: Ranking, scale: float, shift: float
) -> None:
    """With τ in units of the spread, an affine map of the scores changes nothing."""
    way = Way(backend, torch.float64)

    def ap(scores: Tensor) -> float:
        tau = 0.2 * score_spread(scores, ranking.weights)
        return ranking.ap(way, scores=scores, tau=tau)

    if ranking.scores[ranking.weights > 0].std(correction=0) < 1e-3:
        return  # what is left of such a spread after a shift is rounding
    # 1e-15 in the scores over a spread of 1e-3, times 0.2⁻¹
    assert ap(ranking.scores * scale + shift) == pytest.approx(
        ap(ranking.scores), rel=0, abs=1e-8 / min(1, scale)
    )


@EACH_WAY
@A_SHARE
@given(ranking=rankings(), random=st.randoms(use_true_random=False))
def test_order_of_rows(way: Way, ranking: Ranking, random: object) -> None:
    """Rows may come in any order: same AP, and the gradient moves with its row."""
    ranking = ranking.within(way)
    order = list(range(len(ranking.scores)))
    random.shuffle(order)  # type: ignore[attr-defined]
    permuted = ranking.rows(order)
    assert permuted.ap(way) == pytest.approx(ranking.ap(way), rel=0, abs=way.close)
    way.assert_same(permuted.loss_gradient(way), ranking.loss_gradient(way)[order], ranking.tau)


@EACH_WAY
@A_SHARE
@given(stack=st.lists(rankings(), min_size=2, max_size=4), shift=st.integers(0, 3))
def test_problems_do_not_see_each_other(way: Way, stack: list[Ranking], shift: int) -> None:
    """Each of C stacked problems has the AP that it has alone, wherever it stands."""
    stack = [ranking.within(way) for ranking in stack]
    stack = stack[shift % len(stack) :] + stack[: shift % len(stack)]
    rows = max(len(ranking.scores) for ranking in stack)

    def stacked(field: str) -> Tensor:  # padded with rows of weight 0
        parts = [getattr(ranking, field) for ranking in stack]
        return torch.stack([torch.cat((p, p.new_zeros(rows - len(p)))) for p in parts])

    taus = torch.tensor([ranking.tau for ranking in stack], dtype=torch.float64)
    ap, valid = smooth_ap(
        stacked("scores").to(way.dtype),
        stacked("is_positive"),
        taus,
        sample_weight=stacked("weights"),
        backend=way.backend,
    )
    assert valid.all()
    expected = [ranking.ap(way) for ranking in stack]
    assert ap.tolist() == pytest.approx(expected, rel=0, abs=way.close)


@EACH_WAY
@A_SHARE
@given(ranking=rankings())
def test_gradient_never_raises_a_negative(way: Way, ranking: Ranking) -> None:
    """The loss never falls by raising a negative: no tolerance, the sign is exact. The panels sum
    over all rows at once, and leave the rounding of the largest where a sum is 0.
    """
    ranking = ranking.within(way)
    floor = 0.0 if way.backend == "dense" else -1e-15 / ranking.tau
    assert (ranking.loss_gradient(way)[~ranking.is_positive] >= floor).all()


@EACH_WAY
@A_SHARE
@given(ranking=rankings())
def test_gradient_sums_to_zero(way: Way, ranking: Ranking) -> None:
    """Follows from the invariance to shifts."""
    gradient = ranking.within(way).loss_gradient(way).double()
    rounding = way.rounding * gradient.abs().sum().item()
    assert gradient.sum().item() == pytest.approx(0, abs=way.close / ranking.tau + rounding)


@EACH_WAY
@A_SHARE
@given(ranking=rankings())
def test_weight_one_is_no_weight(way: Way, ranking: Ranking) -> None:
    """All weights 1, and all weights equal, are the same as none."""
    ranking = ranking.within(way)
    ones = torch.ones_like(ranking.weights)
    unweighted = pytest.approx(ranking.ap(way, weights=None), rel=0, abs=way.close)
    assert ranking.ap(way, weights=ones) == unweighted
    assert ranking.ap(way, weights=3 * ones) == unweighted


@EACH_WAY
@A_SHARE
@given(ranking=rankings())
def test_weight_zero_leaves_the_row_out(way: Way, ranking: Ranking) -> None:
    """A row of weight 0 is no row: same AP, gradient 0 there and unchanged elsewhere."""
    ranking = ranking.within(way)
    kept = ranking.weights > 0
    without = ranking.rows(kept)
    assert ranking.ap(way) == pytest.approx(without.ap(way), rel=0, abs=way.close)
    gradient = ranking.loss_gradient(way)
    assert (gradient[~kept] == 0).all()
    way.assert_same(gradient[kept], without.loss_gradient(way), ranking.tau)


@EACH_WAY
@A_SHARE
@given(ranking=rankings(), times=st.integers(1, 4))
def test_weight_of_a_negative_counts_rows(way: Way, ranking: Ranking, times: int) -> None:
    """A negative of weight k is k copies of it. (Copies of a positive tie with each other, and a
    tie counts half, so for positives this holds in the rank of others but not in their own.)
    """
    ranking = ranking.within(way)
    repeats = torch.where(ranking.is_positive, 1, times)
    repeated = Ranking(*(field.repeat_interleave(repeats) for field in ranking[:3]), ranking.tau)
    weighted = ranking.ap(way, weights=ranking.weights * repeats)
    assert weighted == pytest.approx(repeated.ap(way), rel=0, abs=way.close)


@EACH_WAY
@A_SHARE
@given(ranking=rankings(), by=st.floats(1e-3, 1e3))
def test_scale_of_weights(way: Way, ranking: Ranking, by: float) -> None:
    """Only the ratios of weights matter."""
    ranking = ranking.within(way)
    scaled = ranking.ap(way, weights=ranking.weights * by)
    assert scaled == pytest.approx(ranking.ap(way), rel=0, abs=way.close)


# SmoothAPLoss -------------------------------------------------------------------------------------

KINDS = pytest.mark.parametrize("multilabel", [False, True], ids=["classes", "labels"])
TAU = 0.5


class Batch(NamedTuple):
    logits: Tensor  # [N, 3] float64, exact in every dtype
    labels: Tensor  # [N, 3] int64 in {0, 1, IGNORED}

    def targets(self, multilabel: bool) -> Tensor:
        """[N, 3], or [N]: the first label that is set; a row without one is ignored."""
        if multilabel:
            return self.labels
        is_set = self.labels == 1
        return torch.where(is_set.any(1), is_set.byte().argmax(1), IGNORED)


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    """Three to ten rows with ties, ignored labels and ignored rows."""
    logit = st.integers(-6, 6).map(lambda i: i / 2)
    label = st.sampled_from([0, 0, 1, 1, IGNORED])
    labels = st.one_of(st.tuples(label, label, label), st.just((IGNORED,) * 3))
    rows = draw(st.lists(st.tuples(logit, logit, logit, labels), min_size=3, max_size=10))
    return Batch(
        torch.tensor([row[:3] for row in rows], dtype=torch.float64),
        torch.tensor([row[3] for row in rows]),
    )


def _two_steps(way: Way, multilabel: bool, first: Batch, second: Batch) -> tuple[Tensor, Tensor]:
    """(per-class losses [3], gradient) of the second of two steps."""
    loss_fn = SmoothAPLoss(3, 6, TAU, reduction="none", multilabel=multilabel)
    loss_fn.backend = way.backend
    loss_fn(first.logits.to(way.dtype), first.targets(multilabel))
    logits = second.logits.to(way.dtype, copy=True).requires_grad_()
    loss = loss_fn(logits, second.targets(multilabel))
    (gradient,) = torch.autograd.grad(loss.nansum(), logits)
    return loss.detach(), gradient


def _assert_close(way: Way, got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=way.close, equal_nan=True)


@EACH_WAY
@KINDS
@A_SHARE
@given(first=batches(), second=batches())
def test_ignored_rows_are_no_rows(way: Way, multilabel: bool, first: Batch, second: Batch) -> None:
    """Taking ignored rows out of both batches changes neither loss nor gradient, and the queue
    holds the same rows.
    """

    def kept(batch: Batch) -> Tensor:
        ignored = batch.targets(multilabel) == IGNORED
        return ~(ignored.all(1) if multilabel else ignored)

    loss, gradient = _two_steps(way, multilabel, first, second)
    without = [Batch(*(field[kept(batch)] for field in batch)) for batch in (first, second)]
    expected_loss, expected_gradient = _two_steps(way, multilabel, *without)
    _assert_close(way, loss, expected_loss)
    way.assert_same(gradient[kept(second)], expected_gradient, TAU)
    assert (gradient[~kept(second)] == 0).all()


@EACH_WAY
@KINDS
@A_SHARE
@given(first=batches(), second=batches(), order=st.permutations(range(3)))
def test_order_of_classes(
    way: Way, multilabel: bool, first: Batch, second: Batch, order: list[int]
) -> None:
    """Renaming the classes renames the losses."""
    if not multilabel:  # one label a row, else another may come first
        first, second = (
            batch._replace(labels=torch.where(batch.labels.cumsum(1) == 1, batch.labels, 0))
            for batch in (first, second)
        )
    renamed = [Batch(*(field[:, order] for field in batch)) for batch in (first, second)]
    loss, gradient = _two_steps(way, multilabel, first, second)
    new_loss, new_gradient = _two_steps(way, multilabel, *renamed)
    _assert_close(way, new_loss, loss[order])
    way.assert_same(new_gradient, gradient[:, order], TAU)


@EACH_WAY
@KINDS
@A_SHARE
@given(first=batches(), second=batches())
def test_queue_is_a_longer_batch(way: Way, multilabel: bool, first: Batch, second: Batch) -> None:
    """Ranking with the queue is ranking the concatenated batch: same loss, and the gradient is the
    concatenated one's live part.
    """
    ignored = first.targets(multilabel) == IGNORED
    kept = ~(ignored.all(1) if multilabel else ignored)
    queued = [field[kept][-6:] for field in first]  # the newest rows that fit
    loss, gradient = _two_steps(way, multilabel, first, second)
    joined = Batch(*(torch.cat(pair) for pair in zip(second, queued, strict=True)))
    nothing = Batch(*(field[:0] for field in first))
    expected_loss, expected_gradient = _two_steps(way, multilabel, nothing, joined)
    _assert_close(way, loss, expected_loss)
    way.assert_same(gradient, expected_gradient[: len(second.labels)], TAU)


@EACH_WAY
@A_SHARE
@given(first=batches(), second=batches())
def test_each_label_is_a_loss_of_its_own(way: Way, first: Batch, second: Batch) -> None:
    """A multi-label loss of three classes is three binary ones, queues included."""
    loss, gradient = _two_steps(way, True, first, second)
    for c in range(3):
        binary = SmoothAPLoss(1, 10, TAU, reduction="none")
        binary.backend = way.backend
        # Of the rows that the queue of all classes keeps, those of this class
        stored = (first.labels != IGNORED).any(1)
        binary(first.logits[stored, c : c + 1][-6:].to(way.dtype), first.labels[stored, c][-6:])
        leaf = second.logits[:, c : c + 1].to(way.dtype, copy=True).requires_grad_()
        own_loss = binary(leaf, second.labels[:, c])
        _assert_close(way, loss[c : c + 1], own_loss.detach())
        (own_gradient,) = torch.autograd.grad(own_loss.nansum(), leaf)
        way.assert_same(gradient[:, c : c + 1], own_gradient, TAU)
