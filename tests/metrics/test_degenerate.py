"""Batches on which AP is not defined: exactly 0, attached to the graph, whatever the logits are."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from imbalanced_losses import SmoothAPLoss
from imbalanced_losses._rows.reduce import Reduction
from imbalanced_losses.functional import Backend, smooth_ap
from tests.helpers.cases import IGNORED, random_batch, seeded
from tests.helpers.oracle import OracleLoss

DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
# Targets for C classes; for C = 1 the class 0 is "no positive" and 1 is "all positive".
TARGETS: dict[str, Callable[[int], Tensor]] = {
    "no rows": lambda _: torch.empty(0, dtype=torch.int64),
    "one row": lambda _: torch.zeros(1, dtype=torch.int64),
    "one positive row": lambda _: torch.ones(1, dtype=torch.int64),
    "one ignored row": lambda _: torch.full((1,), IGNORED),
    "all ignored": lambda _: torch.full((9,), IGNORED),
    "one class": lambda _: torch.zeros(9, dtype=torch.int64),
    "all positive": lambda _: torch.ones(9, dtype=torch.int64),
    "one class and ignored": lambda _: torch.tensor([0, IGNORED] * 5),
}


def _assert_exactly_nothing(output: Any, logits: Tensor, reduction: Reduction) -> None:
    """Zero with a positive sign, or NaN slots for "none"; a zero gradient that is really there."""
    loss, *rest = output if isinstance(output, tuple) else (output,)
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    assert loss.dtype == wide
    assert loss.requires_grad
    if reduction == "none":
        assert loss.shape == (logits.shape[1],)
        assert loss.isnan().all()
    else:
        assert loss.shape == ()
        assert loss.item() == 0
        assert not loss.signbit()
    for per_class, valid in [rest] if rest else []:
        assert per_class.isnan().all()
        assert not valid.any()
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert gradient.shape == logits.shape
    assert gradient.dtype == logits.dtype
    assert (gradient == 0).all()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("queue_size", [0, 16], ids=["no queue", "queue"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kind", TARGETS)
def test_loss_is_exactly_zero(
    kind: str, reduction: Reduction, queue_size: int, dtype: torch.dtype
) -> None:
    """Every undefined batch × one class, several, multi-label × both forms of return × a queue that
    holds nothing, then more of the same: loss 0, gradient 0.
    """
    forms = itertools.product(((1, False), (1, True), (3, True)), (False, True))
    for (num_classes, multilabel), return_per_class in forms:
        loss_fn = SmoothAPLoss(num_classes, queue_size, reduction=reduction, multilabel=multilabel)
        targets = TARGETS[kind](num_classes)
        if multilabel:
            targets = targets[:, None].expand(-1, num_classes)
        for _ in range(2):
            logits = torch.randn(len(targets), num_classes).to(dtype).requires_grad_()
            output = loss_fn(logits, targets, return_per_class)
            _assert_exactly_nothing(output, logits, reduction)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("target", [IGNORED, 0], ids=["all ignored", "one class of two"])
def test_several_classes_without_a_ranking(
    target: int, reduction: Reduction, dtype: torch.dtype
) -> None:
    """Rows of one class only: that class has no negative, the others have no positive."""
    loss_fn = SmoothAPLoss(num_classes=3, queue_size=8, reduction=reduction)
    for _ in range(2):
        logits = torch.randn(5, 3).to(dtype).requires_grad_()
        output = loss_fn(logits, torch.full((5,), target), True)
        _assert_exactly_nothing(output, logits, reduction)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("unit", ["score", "spread"])
@pytest.mark.parametrize(
    ("num_rows", "value"),
    [(8192, 10.0), (256, 300.0), (9, math.inf), (9, -math.inf), (9, math.nan), (9, 60000.0)],
    ids=["8192 of 10", "256 of 300", "inf", "-inf", "nan", "60000"],
)
@pytest.mark.parametrize("target", [IGNORED, 0, 1], ids=["ignored", "negative", "positive"])
def test_zero_is_not_made_of_the_logits(
    target: int, num_rows: int, value: float, unit: Any, dtype: torch.dtype
) -> None:
    """Logits whose sum overflows, or that are not finite: still exactly 0 with gradient 0."""
    arguments = {"temperature_unit": unit, "queue_follows_shift": True}
    targets = torch.full((num_rows,), target)
    for reduction in ("mean", "none"):
        loss_fn = SmoothAPLoss(1, reduction=reduction, **arguments)
        logits = torch.full((num_rows, 1), value, dtype=dtype, requires_grad=True)
        _assert_exactly_nothing(loss_fn(logits, targets, True), logits, loss_fn.reduction)


@pytest.mark.parametrize("weights", [[0, 0, 0, 0], [0, 0, 1, 1], [1, 1, 0, 0]])
def test_weight_zero_can_leave_nothing(weights: list[float]) -> None:
    """Positives or negatives that all have weight 0 are not there."""
    logits = torch.randn(4, 1, requires_grad=True)
    output = SmoothAPLoss(num_classes=1)(
        logits, torch.tensor([1, 1, 0, 0]), True, sample_weight=torch.tensor(weights)
    )
    _assert_exactly_nothing(output, logits, "mean")


@pytest.mark.parametrize("backend", ["dense", "panel"])
@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf], ids=["nan", "inf", "-inf"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("unit", ["score", "spread"])
def test_an_undefined_class_leaves_the_others_alone(
    unit: Any, reduction: Reduction, junk: float, backend: Backend
) -> None:
    """Class 2 has no positive and a non-finite logit: the loss is that of classes 0 and 1, and
    column 2 has a gradient of exactly 0.
    """
    logits, _, _ = random_batch(seeded(0), 12, 3)
    targets = torch.tensor([0, 1, 1] * 4)
    logits[3, 2] = junk
    logits.requires_grad_()
    arguments = {"temperature": 0.3, "temperature_unit": unit, "reduction": reduction}
    loss_fn = SmoothAPLoss(3, 0, **arguments)
    loss_fn.backend = backend
    loss = loss_fn(logits, targets)
    (gradient,) = torch.autograd.grad(loss.nansum(), logits)

    clean = logits.detach().clone()
    clean[3, 2] = 0
    expected = OracleLoss(3, 0, **arguments).step(clean, targets)
    assert loss.tolist() == pytest.approx(expected.loss, rel=0, abs=1e-12, nan_ok=True)
    np.testing.assert_allclose(gradient, expected.gradient, rtol=0, atol=1e-12)
    assert (gradient[:, 2] == 0).all()


@pytest.mark.parametrize("follows", [False, True], ids=["still queue", "following queue"])
def test_no_rows_with_a_filled_queue(follows: bool) -> None:
    """N = 0 still ranks the queue: its loss, and an empty gradient."""
    logits, targets, _ = random_batch(seeded(0), 12, 1)
    loss_fn = SmoothAPLoss(1, 16, 0.3, queue_follows_shift=follows)
    loss_fn(logits, targets)
    oracle = OracleLoss(1, 16, 0.3)
    oracle.step(logits, targets)
    for _ in range(2):
        empty = torch.empty(0, 1, dtype=torch.float64, requires_grad=True)
        loss = loss_fn(empty, torch.empty(0, dtype=torch.int64))
        assert loss.item() == pytest.approx(oracle.step([], []).loss, rel=0, abs=1e-12)
        assert loss.requires_grad
        (gradient,) = torch.autograd.grad(loss, empty)
        assert gradient.shape == (0, 1)


@pytest.mark.parametrize("follows", [False, True], ids=["still queue", "following queue"])
def test_one_row_with_a_filled_queue(follows: bool) -> None:
    """N = 1 is ranked against the queue; a queue that follows it leaves nothing to learn."""
    logits, targets, _ = random_batch(seeded(0), 12, 1)
    arguments = {"temperature": 0.3, "queue_follows_shift": follows}
    loss_fn, oracle = SmoothAPLoss(1, 16, **arguments), OracleLoss(1, 16, **arguments)
    loss_fn(logits, targets)
    oracle.step(logits, targets)
    row = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)
    loss = loss_fn(row, torch.ones(1))
    (gradient,) = torch.autograd.grad(loss, row)
    expected = oracle.step([[0.0]], [1])
    assert loss.item() == pytest.approx(expected.loss, rel=0, abs=1e-12)
    assert gradient.item() == pytest.approx(expected.gradient.item(), rel=0, abs=1e-12)
    assert (abs(gradient.item()) < 1e-12) == follows


def test_a_batch_without_positives_learns_from_those_in_the_queue() -> None:
    """Live negatives are pushed down by the queue's positives."""
    loss_fn = SmoothAPLoss(num_classes=1, queue_size=4, temperature=0.5)
    loss_fn(torch.zeros(2, 1), torch.ones(2))
    logits = torch.zeros(3, 1, requires_grad=True)
    loss = loss_fn(logits, torch.zeros(3))
    loss.backward()
    assert loss.item() == pytest.approx(1 - 3 / 6)  # constant scores: (n + 1) / (n + N + 1)
    assert logits.grad is not None
    assert (logits.grad > 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["float16", "float32"])
def test_functional_without_a_ranking(dtype: torch.dtype) -> None:
    """`smooth_ap` gives 0 rather than NaN, so that masking the result is safe for the gradient."""
    for labels in ([], [True], [False], [True] * 5, [False] * 5):
        scores = torch.full((len(labels),), torch.inf, dtype=dtype, requires_grad=True)
        ap, valid = smooth_ap(scores, torch.tensor(labels, dtype=torch.bool))
        assert not valid
        assert ap.item() == 0
        assert not ap.signbit()
        (gradient,) = torch.autograd.grad(ap, scores)
        assert (gradient == 0).all()
    empty = smooth_ap(torch.empty(0, 5), torch.empty(0, 5, dtype=torch.bool))
    assert empty.ap.shape == empty.valid.shape == (0,)
