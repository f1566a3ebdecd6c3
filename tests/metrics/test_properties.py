"""What no metric and no loss depends on: found false by no random example, whatever the backend.

Scores lie on a grid, so that those which are moved or scaled are exact and a tolerance is about
ranking alone.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers.rows import IGNORED, Batch
from tests.metrics.test_table import EACH_MEMBER, MEMBERS, Case, Member

A_SHARE = settings(max_examples=max(10, settings().max_examples // 4))  # for each metric
BACKENDS = st.sampled_from(("dense", "panel"))
CLOSE = {torch.float32: 2e-5, torch.float64: 1e-9}  # of a number in [0, 1]

# --- The function ---------------------------------------------------------------------------------


@st.composite
def problems(draw: st.DrawFn) -> Case:
    """One of two to ten rows: scores in [-4, 4], ties likely, τ from sharp to flat."""
    score = st.one_of(st.integers(-4, 4), st.integers(-256, 256).map(lambda number: number / 64))
    weight = st.one_of(st.integers(0, 3), st.floats(0.125, 3, width=32))
    row = st.tuples(score, st.sampled_from((0, 0, 0, 1, 3)), weight)
    counting = (
        st.tuples(score, st.just(2), weight.filter(bool)),
        st.tuples(score, st.just(0), weight.filter(bool)),
    )
    rows = [*map(draw, counting), *draw(st.lists(row, max_size=8))]
    scores, grades, weights = zip(*draw(st.permutations(rows)), strict=True)
    tau = draw(st.sampled_from([0.01, 0.1, 0.5, 2.0, 20.0]))
    fields = (torch.tensor(field, dtype=torch.float64)[None] for field in (scores, weights))
    return Case(next(fields), torch.tensor([grades]), torch.tensor([tau]).double(), next(fields))


class Way(NamedTuple):
    """How a metric is computed."""

    member: Member
    backend: str
    dtype: torch.dtype

    def found(self, of: Case) -> tuple[Tensor, Tensor]:
        """The metric [C], and the gradient of its sum [C, M]."""
        given = of.to(torch.empty(0, dtype=self.dtype))
        given.scores.requires_grad_()
        metric = self.member.of(given, backend=self.backend)
        return metric.detach(), torch.autograd.grad(metric.sum(), given.scores)[0]


@EACH_MEMBER
@A_SHARE
@given(
    of=problems(),
    other=problems(),
    backend=BACKENDS,
    dtype=st.sampled_from(list(CLOSE)),
    quarters=st.integers(-112, 112),
    power=st.integers(-6, 6),
    random=st.randoms(use_true_random=False),
)
def test_what_a_metric_does_not_depend_on(
    member: Member,
    of: Case,
    other: Case,
    backend: str,
    dtype: torch.dtype,
    quarters: int,
    power: int,
    random: Any,
) -> None:
    """Where the origin and the unit of scores and weights are, the order of rows, rows of weight 0
    whatever they hold, and other problems; its gradient sums to 0 and lifts no negative.
    """
    way, (tau,) = Way(member, backend, dtype), of.tau.tolist()
    metric, gradient = way.found(of)
    assert 0 <= metric <= 1 + CLOSE[dtype] or member.is_graded
    assert of.weights is not None
    order = list(range(of.scores.shape[1]))
    random.shuffle(order)
    present = of.weights[0] > 0
    absent = torch.where(present, of.scores, torch.nan)

    def assert_same(changed: Case, by: float = 1.0, rows: Any = slice(None)) -> None:
        same, slopes = way.found(changed)
        torch.testing.assert_close(same, metric, rtol=0, atol=CLOSE[dtype])
        atol = CLOSE[dtype] / tau
        torch.testing.assert_close(slopes * by, gradient[:, rows], rtol=0, atol=atol)

    assert_same(of._replace(scores=of.scores + quarters / 4))
    scale = 2.0**power
    assert_same(of._replace(scores=of.scores * scale, tau=of.tau * scale), by=scale)
    if not member.by_rows:
        assert_same(of._replace(weights=of.weights * scale))
    for rows in (order, present):
        assert_same(
            Case(*(field[:, rows] for field in of[:2]), of.tau, of.weights[:, rows]), rows=rows
        )
    assert_same(of._replace(scores=absent))
    assert not gradient[0, ~present].any()
    assert gradient.sum().item() == pytest.approx(0, abs=CLOSE[dtype] / tau)
    if member.loses_by_negatives:
        floor = 0.0 if backend == "dense" else 1e-15 / tau
        assert (gradient[of.grades == 0] <= floor).all()

    stack = [of, other] if quarters % 2 else [other, of]
    width = max(one.scores.shape[1] for one in stack)
    padded = (
        torch.cat([torch.nn.functional.pad(field, (0, width - field.shape[1])) for field in fields])
        for fields in zip(*(one[:2] + one[3:4] for one in stack), strict=True)
    )
    scores, grades, weights = padded
    both, slopes = way.found(Case(scores, grades, torch.cat([one.tau for one in stack]), weights))
    number = next(i for i, one in enumerate(stack) if one is of)
    torch.testing.assert_close(both[number], metric[0], rtol=0, atol=CLOSE[dtype])
    own = slopes[number, : len(order)]
    torch.testing.assert_close(own, gradient[0], rtol=0, atol=CLOSE[dtype] / tau)


# --- The loss -------------------------------------------------------------------------------------


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    """Three to ten rows of three labels with ties, weights, ignored labels and ignored rows."""
    logit = st.integers(-6, 6).map(lambda i: i / 2)
    label = st.sampled_from([0, 0, 1, 2, IGNORED])
    labels = st.one_of(st.tuples(label, label, label), st.just((IGNORED,) * 3))
    weight = st.sampled_from((0.5, 1.0, 2.0))
    row = st.tuples(st.tuples(logit, logit, logit), labels, weight)
    logits, grades, weights = zip(*draw(st.lists(row, min_size=3, max_size=10)), strict=True)
    numbers = (torch.tensor(field, dtype=torch.float64) for field in (logits, weights))
    return Batch(next(numbers), torch.tensor(grades), next(numbers))


class Setting(NamedTuple):
    """A loss of several labels, or of several classes."""

    member: Member
    backend: str
    unit: str
    is_multilabel: bool

    def targets(self, grades: Tensor) -> Tensor:
        """[N, C], or [N]: the first label that is set; a row without one is ignored."""
        if self.is_multilabel:
            return self.member.targets(grades)
        return torch.where((grades > 0).any(1), (grades > 0).byte().argmax(1), IGNORED)

    def kept(self, grades: Tensor) -> Tensor:
        ignored = self.targets(grades) == IGNORED
        return ~(ignored.all(1) if self.is_multilabel else ignored)

    def two_steps(self, first: Batch, second: Batch) -> tuple[Tensor, Tensor]:
        """Losses [C] and gradient of the second of two steps."""
        num_classes = first.logits.shape[1]
        options = {"multilabel": self.is_multilabel, "temperature_unit": self.unit}
        loss_fn = self.member.make(num_classes, queue_size=6, reduction="none", **options)
        loss_fn.backend = self.backend
        leaf = second.logits.clone().requires_grad_()
        loss_fn(first.logits, self.targets(first.targets), sample_weight=first.weights)
        loss = loss_fn(leaf, self.targets(second.targets), sample_weight=second.weights)
        return loss.detach(), torch.autograd.grad(loss.nansum(), leaf)[0]


@EACH_MEMBER
@A_SHARE
@given(
    first=batches(),
    second=batches(),
    backend=BACKENDS,
    unit=st.sampled_from(("score", "spread")),
    is_multilabel=st.booleans(),
    order=st.permutations(range(3)),
)
def test_what_a_loss_does_not_depend_on(
    member: Member,
    first: Batch,
    second: Batch,
    backend: str,
    unit: str,
    is_multilabel: bool,
    order: list[int],
) -> None:
    """Ignored rows, whatever they hold; the order of classes; whether rows are in the queue or in
    the batch; and, for labels, the other labels.
    """
    setting = Setting(member, backend, unit, is_multilabel or member.is_graded)
    if not setting.is_multilabel:  # one label a row, else another may come first
        alone = (batch.targets * ((batch.targets > 0).cumsum(1) == 1) for batch in (first, second))
        first, second = (
            batch._replace(targets=targets)
            for batch, targets in zip((first, second), alone, strict=True)
        )
    loss, gradient = setting.two_steps(first, second)

    def assert_same(steps: list[Batch], columns: Any = slice(None), rows: Any = None) -> None:
        found, slopes = setting.two_steps(*steps)
        torch.testing.assert_close(found, loss[columns], rtol=0, atol=1e-9, equal_nan=True)
        rows = torch.arange(len(second.logits)) if rows is None else rows.nonzero()[:, 0]
        expected = gradient[rows][:, columns]
        torch.testing.assert_close(slopes[: len(rows)], expected, rtol=0, atol=1e-9)

    kept = [setting.kept(batch.targets) for batch in (first, second)]
    steps = (first, second)
    assert_same([Batch(*(f[k] for f in b)) for b, k in zip(steps, kept, strict=True)], rows=kept[1])
    spoilt = [
        b.logits.masked_fill(~k[:, None], torch.nan) for b, k in zip(steps, kept, strict=True)
    ]
    assert_same([b._replace(logits=own) for b, own in zip(steps, spoilt, strict=True)])
    assert_same([Batch(b.logits[:, order], b.targets[:, order], b.weights) for b in steps], order)
    queued = [field[kept[0]][-6:] for field in first]  # the newest rows that fit
    joined = Batch(*(torch.cat(pair) for pair in zip(second, queued, strict=True)))
    nothing = Batch(*(field[:0] for field in first))
    assert_same([nothing, joined])
    if setting.is_multilabel:
        stored = [Batch(*queued), second]
        for c in range(3):
            one = [Batch(b.logits[:, [c]], b.targets[:, [c]], b.weights) for b in stored]
            assert_same(one, [c])


def test_every_metric_is_there() -> None:
    """So that an empty table is no success."""
    assert len(MEMBERS) > 12
