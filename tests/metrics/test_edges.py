"""Logits at and beyond the edge of a dtype, and batches with next to nothing to rank, of AP."""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from imbalanced_losses import SmoothAPLoss
from imbalanced_losses.functional import smooth_ap
from tests.helpers.cases import random_batch, seeded
from tests.helpers.oracle import OracleLoss, Result
from tests.helpers.rows import IGNORED

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
VALUES = ("nan", "inf", "-inf", "max", "-max", "tiny", "-tiny", "-0")
NON_FINITE = ("nan", "inf", "-inf")
ROW = {"positive": 0, "negative": 1, "ignored": 2}  # in every batch of _batch
EACH_VALUE = pytest.mark.parametrize("name", VALUES)


class Setting(NamedTuple):
    """What a special value meets."""

    dtype: torch.dtype
    num_classes: int
    unit: str

    def arguments(self, **more: Any) -> dict[str, Any]:
        own = {"num_classes": self.num_classes, "temperature": 0.3, "temperature_unit": self.unit}
        return own | more

    def is_too_wide(self, name: str, role: str = "positive") -> bool:
        """Whether a finite score enters the spread, and so τ, as more than the ranking takes it
        for: what is asked then is a finite loss in range with a finite gradient.
        """
        is_finite = name not in NON_FINITE and role != "ignored"
        return self.unit == "spread" and is_finite and _is_beyond_half(name, self.dtype)


SETTINGS = [Setting(*each) for each in itertools.product(DTYPES, (1, 3), ("score", "spread"))]


def _value(name: str, dtype: torch.dtype) -> float:
    limits = torch.finfo(dtype)
    magnitude = {
        "nan": math.nan,
        "inf": math.inf,
        "max": limits.max,
        "tiny": limits.smallest_normal,
        "0": 0.0,
    }[name.removeprefix("-")]
    return -magnitude if name.startswith("-") else magnitude


def _is_beyond_half(name: str, dtype: torch.dtype) -> bool:
    """Whether a value is outside ±max/2 of the dtype that is computed in. It ranks as an extreme
    like ±inf then, with gradient 0, so that no difference of two scores overflows.
    """
    computed = torch.promote_types(dtype, torch.float32)
    return abs(_value(name, dtype)) > torch.finfo(computed).max / 2


def _batch(seed: int, num_classes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Twelve rows of which the first three are a positive of class 0 (or the only class), a
    negative of it, and an ignored one.
    """
    logits, _, _ = random_batch(seeded(seed), 12, num_classes)
    if num_classes == 1:
        targets = torch.tensor([1, 0, IGNORED, 1, 0, 0, 0, 0, 0, 1, 0, 0])
    else:
        targets = torch.tensor([0, 1, IGNORED, 0, 1, 2, 2, 1, 0, 2, 1, 1])
    return logits.to(dtype), targets


def _with(logits: Tensor, rows: list[int], value: float) -> Tensor:
    changed = logits.clone()
    changed[rows, 0] = value
    return changed


def _step(loss_fn: SmoothAPLoss, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, gradient in the logits) of one training step."""
    leaf = logits.clone().requires_grad_()
    loss = loss_fn(leaf, targets)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient


def _assert_near(loss: Tensor, gradient: Tensor, expected: Result, dtype: torch.dtype) -> None:
    """Computed in float32 or better, the gradient then rounded to the dtype of the logits."""
    wide = 1e-12 if dtype == torch.float64 else 2e-6
    assert loss.item() == pytest.approx(expected.loss, rel=0, abs=wide)
    limits = torch.finfo(dtype)
    largest = np.abs(expected.gradient).max()
    atol = largest * (limits.eps + 10 * wide) + limits.smallest_normal * limits.eps
    np.testing.assert_allclose(gradient.double(), expected.gradient, rtol=0, atol=atol)


@EACH_VALUE
def test_in_a_live_row(name: str) -> None:
    """NaN that counts gives a NaN loss and gradient; everything else the loss of the definition,
    in which ±inf is the extreme it is; and an ignored row is not there, whatever it holds.
    """
    for setting, role in itertools.product(SETTINGS, ROW):
        dtype, arguments = setting.dtype, setting.arguments(queue_size=8)
        logits, targets = _batch(0, setting.num_classes, dtype)
        bad = _with(logits, [ROW[role]], _value(name, dtype))
        loss, gradient = _step(SmoothAPLoss(**arguments), bad, targets)
        if name == "nan" and role != "ignored":
            assert loss.isnan()
            assert gradient[:, 0].isnan().any()
            assert gradient[:, 1:].isfinite().all()  # the other classes do not see it
            continue
        assert gradient.isfinite().all()
        assert (gradient[ROW["ignored"]] == 0).all()
        if role == "ignored":
            without, gradient_without = _step(SmoothAPLoss(**arguments), logits, targets)
            assert torch.equal(loss, without)
            assert torch.equal(gradient, gradient_without)
        if not setting.is_too_wide(name, role):
            expected = OracleLoss(**arguments).step(bad.double(), targets)
            _assert_near(loss, gradient, expected, dtype)


@pytest.mark.parametrize("name", ["inf", "-inf", "max", "-max"])
def test_several_extremes_tie(name: str) -> None:
    """Positives and negatives that share an extreme are tied with each other: no ∞ − ∞, and no
    overflow of a sum over them.
    """
    several = ([0, 3, 9], [1, 4, 5], [0, 1], [0, 1, 3, 4, 5])
    for (dtype, num_classes, unit), rows in itertools.product(SETTINGS[::2], several):
        setting = Setting(dtype, 1, "score" if num_classes == 1 else "spread")
        logits, targets = _batch(0, 1, dtype)
        bad = _with(logits, rows, _value(name, dtype))
        loss, gradient = _step(SmoothAPLoss(**setting.arguments()), bad, targets)
        assert gradient.isfinite().all(), unit
        expected = OracleLoss(**setting.arguments()).step(bad.double(), targets)
        if _is_beyond_half(name, dtype):
            expected.gradient[rows] = 0  # tied with slope ¼, but it cannot move
        if not setting.is_too_wide(name):
            _assert_near(loss, gradient, expected, dtype)
        assert 0 <= loss.item() <= 1


@EACH_VALUE
def test_through_the_queue(name: str) -> None:
    """After a batch with a special value comes a clean one. A non-finite row has not entered the
    queue: the clean step is bit for bit that of a run that never saw the row. A finite one has,
    and ranks as it is.
    """
    for setting, role in itertools.product(SETTINGS, ROW):
        dtype, follows = setting.dtype, setting.num_classes == 3
        arguments = setting.arguments(queue_size=32, queue_follows_shift=follows)
        loss_fn, other, oracle = (
            kind(**arguments) for kind in (SmoothAPLoss, SmoothAPLoss, OracleLoss)
        )
        first, targets = _batch(0, setting.num_classes, dtype)
        bad = _with(first, [ROW[role]], _value(name, dtype))
        clean, _ = _batch(1, setting.num_classes, dtype)
        _step(loss_fn, bad, targets)
        loss, gradient = _step(loss_fn, clean, targets)
        assert loss.isfinite()
        assert gradient.isfinite().all()
        oracle.step(bad.double(), targets)
        if not setting.is_too_wide(name, role):
            _assert_near(loss, gradient, oracle.step(clean.double(), targets), dtype)
        if name in NON_FINITE or role == "ignored":
            kept = torch.arange(12) != ROW[role]
            other(first[kept], targets[kept])
            for got, expected in zip((loss, gradient), _step(other, clean, targets), strict=True):
                assert torch.equal(got, expected)


@pytest.mark.parametrize("unit", ["score", "spread"])
def test_a_live_infinity_with_a_following_queue(unit: str) -> None:
    """The mean that the queue follows is that of the finite rows."""
    arguments = Setting(torch.float64, 1, unit).arguments(queue_size=32, queue_follows_shift=True)
    loss_fn, oracle = SmoothAPLoss(**arguments), OracleLoss(**arguments)
    logits, targets = _batch(0, 1, torch.float64)
    loss_fn(logits, targets)
    oracle.step(logits, targets)
    for value in (math.inf, -math.inf):
        bad = _with(_batch(1, 1, torch.float64)[0], [ROW["positive"]], value)
        loss, gradient = _step(loss_fn, bad, targets)
        _assert_near(loss, gradient, oracle.step(bad, targets), torch.float64)


@pytest.mark.parametrize("backend", ["dense", "panel"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_never_a_finite_loss_with_a_non_finite_gradient(dtype: torch.dtype, backend: str) -> None:
    """Batches strewn with special values, labels, several classes and a queue: where the loss is
    finite so is the gradient, where it is not there is a live NaN.
    """
    generator = seeded(0)
    specials = torch.tensor([_value(name, dtype) for name in VALUES], dtype=torch.float64)
    loss_fns = [
        SmoothAPLoss(3, 16, 0.3, temperature_unit=unit, queue_follows_shift=True)  # type: ignore[arg-type]
        for unit in ("score", "spread")
    ]
    outcomes = set()
    for trial in range(120):
        loss_fn = loss_fns[trial % 2]
        loss_fn.backend = backend  # type: ignore[assignment]
        logits, targets, _ = random_batch(generator, 10, 3)
        choice = torch.randint(len(specials), logits.shape, generator=generator)
        is_special = torch.rand(logits.shape, generator=generator) < (0.02, 0.1, 0.5)[trial % 3]
        logits = torch.where(is_special, specials[choice], logits).to(dtype)
        if trial % 4 < 2:
            logits = logits.nan_to_num(nan=0.0, posinf=math.inf, neginf=-math.inf)
        loss, gradient = _step(loss_fn, logits, targets)
        has_nan = bool(logits[targets != IGNORED].isnan().any())
        outcomes.add((bool(loss.isfinite()), has_nan))
        assert loss.isfinite() or has_nan
        assert gradient.isfinite().all() == loss.isfinite()
    assert {(True, False), (False, True)} <= outcomes


# --- Next to nothing to rank ----------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["dense", "panel"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("unit", ["score", "spread"])
def test_an_undefined_class_leaves_the_others_alone(
    unit: str, reduction: str, backend: Any
) -> None:
    """Class 2 has no positive and a non-finite logit: the loss is that of classes 0 and 1, and
    column 2 has a gradient of exactly 0.
    """
    logits, _, _ = random_batch(seeded(0), 12, 3)
    targets = torch.tensor([0, 1, 1] * 4)
    arguments = Setting(torch.float64, 3, unit).arguments(queue_size=0, reduction=reduction)
    expected = OracleLoss(**arguments).step(_with(logits.flip(1), [3], 0).flip(1), targets)
    for junk in (math.nan, math.inf, -math.inf):
        logits[3, 2] = junk
        leaf = logits.clone().requires_grad_()
        loss_fn = SmoothAPLoss(**arguments)
        loss_fn.backend = backend
        loss = loss_fn(leaf, targets)
        (gradient,) = torch.autograd.grad(loss.nansum(), leaf)
        assert loss.tolist() == pytest.approx(expected.loss, rel=0, abs=1e-12, nan_ok=True)
        np.testing.assert_allclose(gradient, expected.gradient, rtol=0, atol=1e-12)
        assert (gradient[:, 2] == 0).all()


@pytest.mark.parametrize("follows", [False, True], ids=["still queue", "following queue"])
@pytest.mark.parametrize("num_rows", [0, 1])
def test_hardly_a_row_with_a_filled_queue(num_rows: int, follows: bool) -> None:
    """No row still ranks the queue; a queue that follows the only row leaves nothing to learn."""
    logits, targets, _ = random_batch(seeded(0), 12, 1)
    arguments = {"temperature": 0.3, "queue_follows_shift": follows}
    loss_fn, oracle = SmoothAPLoss(1, 16, **arguments), OracleLoss(1, 16, **arguments)
    loss_fn(logits, targets)
    oracle.step(logits, targets)
    for _ in range(2):
        rows = torch.zeros(num_rows, 1, dtype=torch.float64, requires_grad=True)
        loss = loss_fn(rows, torch.ones(num_rows))
        (gradient,) = torch.autograd.grad(loss, rows)
        expected = oracle.step([[0.0]] * num_rows, [1] * num_rows)
        assert loss.item() == pytest.approx(expected.loss, rel=0, abs=1e-12)
        np.testing.assert_allclose(gradient, expected.gradient, rtol=0, atol=1e-12)
        assert num_rows == 0 or (gradient.abs().item() < 1e-12) == follows


def test_a_function_without_a_ranking() -> None:
    """0 rather than NaN, so that masking the result is safe for the gradient."""
    for dtype, labels in itertools.product(DTYPES, ([], [True], [False], [True] * 5, [False] * 5)):
        scores = torch.full((len(labels),), torch.inf, dtype=dtype, requires_grad=True)
        ap, valid = smooth_ap(scores, torch.tensor(labels, dtype=torch.bool))
        assert (valid.item(), ap.item(), ap.signbit().item()) == (False, 0, False)
        assert (torch.autograd.grad(ap, scores)[0] == 0).all()
    empty = smooth_ap(torch.empty(0, 5), torch.empty(0, 5, dtype=torch.bool))
    assert empty.ap.shape == empty.valid.shape == (0,)
