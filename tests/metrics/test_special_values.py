"""Logits at and beyond the edge of a dtype: what each does to the loss, the gradient, the queue."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from imbalanced_losses import SmoothAPLoss
from imbalanced_losses._checks.typing import TemperatureUnit
from imbalanced_losses.functional import Backend, score_spread, smooth_ap
from tests.helpers.cases import IGNORED, random_batch, seeded
from tests.helpers.oracle import OracleLoss, Result

DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
VALUES = ("nan", "inf", "-inf", "max", "-max", "tiny", "-tiny", "-0")
NON_FINITE = ("nan", "inf", "-inf")
ROLES = ("positive", "negative", "ignored")
ROW = {"positive": 0, "negative": 1, "ignored": 2}  # in every batch of _batch


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


def _is_beyond_half(name: str, dtype: torch.dtype) -> bool:
    """Whether a value is outside ±max/2 of the dtype that is computed in. It ranks as an extreme
    like ±inf then, with gradient 0, so that no difference of two scores overflows.
    """
    computed = torch.promote_types(dtype, torch.float32)
    return abs(_value(name, dtype)) > torch.finfo(computed).max / 2


def _is_too_wide_for_its_spread(
    name: str, role: str, dtype: torch.dtype, config: dict[str, Any]
) -> bool:
    """Whether a finite score enters the spread, and so τ, as more than the ranking takes it for:
    what is asked then is a finite loss in range with a finite gradient.
    """
    finite = name not in NON_FINITE and role != "ignored"
    return config["temperature_unit"] == "spread" and finite and _is_beyond_half(name, dtype)


CONFIGURATIONS = [
    pytest.param({"num_classes": classes, "temperature_unit": unit}, id=f"C={classes}-{unit}")
    for classes, unit in itertools.product((1, 3), ("score", "spread"))
]


@pytest.mark.parametrize("config", CONFIGURATIONS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("name", VALUES)
def test_in_a_live_row(name: str, role: str, dtype: torch.dtype, config: dict[str, Any]) -> None:
    """NaN that counts gives a NaN loss and gradient; everything else the loss of the definition,
    in which ±inf is the extreme it is; and an ignored row is not there, whatever it holds.
    """
    logits, targets = _batch(0, config["num_classes"], dtype)
    bad = _with(logits, [ROW[role]], _value(name, dtype))
    arguments = {**config, "temperature": 0.3, "queue_size": 8}
    loss, gradient = _step(SmoothAPLoss(**arguments), bad, targets)
    if name == "nan" and role != "ignored":
        assert loss.isnan()
        assert gradient[:, 0].isnan().any()
        assert gradient[:, 1:].isfinite().all()  # the other classes do not see it
        return
    assert gradient.isfinite().all()
    assert (gradient[ROW["ignored"]] == 0).all()
    if role == "ignored":
        without, gradient_without = _step(SmoothAPLoss(**arguments), logits, targets)
        assert torch.equal(loss, without)
        assert torch.equal(gradient, gradient_without)
    if not _is_too_wide_for_its_spread(name, role, dtype, config):
        _assert_near(loss, gradient, OracleLoss(**arguments).step(bad.double(), targets), dtype)


@pytest.mark.parametrize("unit", ["score", "spread"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", VALUES)
def test_in_an_ignored_label(name: str, dtype: torch.dtype, unit: TemperatureUnit) -> None:
    """Multi-label rows can be ignored for one class and count for another: what the ignored class
    holds there is not seen.
    """
    logits, _, _ = random_batch(seeded(0), 12, 2)
    _, targets, _ = random_batch(seeded(0), 12, 2, multilabel=True)
    targets[0] = torch.tensor([IGNORED, 1])
    bad = _with(logits.to(dtype), [0], _value(name, dtype))
    outputs = [
        _step(SmoothAPLoss(2, 0, 0.3, multilabel=True, temperature_unit=unit), rows, targets)
        for rows in (bad, logits.to(dtype))
    ]
    for got, expected in zip(*outputs, strict=True):
        assert torch.equal(got, expected)
    assert outputs[0][1][0, 1] != 0


@pytest.mark.parametrize("unit", ["score", "spread"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", VALUES)
def test_at_weight_zero(name: str, dtype: torch.dtype, unit: TemperatureUnit) -> None:
    """`smooth_ap` and `score_spread` do not look at scores of weight 0."""
    logits, targets = _batch(0, 1, dtype)
    weights = torch.ones(12)
    weights[[0, 1]] = 0
    outputs = []
    for scores in (_with(logits, [0, 1], _value(name, dtype))[:, 0], logits[:, 0]):
        leaf = scores.clone().requires_grad_()
        tau = 0.3 * score_spread(leaf, weights) if unit == "spread" else 0.3
        ap, valid = smooth_ap(leaf, targets == 1, tau, sample_weight=weights)
        assert valid
        outputs.append((ap.detach(), *torch.autograd.grad(ap, leaf)))
    for got, expected in zip(*outputs, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("role", ["positive", "negative"])
@pytest.mark.parametrize("name", ["inf", "-inf"])
def test_infinity_is_an_extreme(name: str, role: str, dtype: torch.dtype) -> None:
    """±inf ranks where a finite score beyond all others ranks, bit for bit."""
    logits, targets = _batch(0, 1, dtype)
    extreme = math.copysign(1000, _value(name, dtype))
    outputs = [
        _step(SmoothAPLoss(1, 0, 0.3), _with(logits, [ROW[role]], value), targets)
        for value in (_value(name, dtype), extreme)
    ]
    for got, expected in zip(*outputs, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("unit", ["score", "spread"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", ["inf", "-inf", "max", "-max"])
@pytest.mark.parametrize(
    "rows", [[0, 3, 9], [1, 4, 5], [0, 1], [0, 1, 3, 4, 5]], ids=["+++", "---", "+-", "++---"]
)
def test_several_extremes_tie(
    rows: list[int], name: str, dtype: torch.dtype, unit: TemperatureUnit
) -> None:
    """Positives and negatives that share an extreme are tied with each other: no ∞ − ∞, and no
    overflow of a sum over them.
    """
    logits, targets = _batch(0, 1, dtype)
    bad = _with(logits, rows, _value(name, dtype))
    arguments = {"num_classes": 1, "temperature": 0.3, "temperature_unit": unit}
    loss, gradient = _step(SmoothAPLoss(**arguments), bad, targets)
    assert gradient.isfinite().all()
    expected = OracleLoss(**arguments).step(bad.double(), targets)
    if _is_beyond_half(name, dtype):
        expected.gradient[rows] = 0  # tied with slope ¼, but it cannot move
    if not _is_too_wide_for_its_spread(name, "positive", dtype, arguments):
        _assert_near(loss, gradient, expected, dtype)
    assert 0 <= loss.item() <= 1


@pytest.mark.parametrize("unit", ["score", "spread"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_both_infinities(dtype: torch.dtype, unit: TemperatureUnit) -> None:
    """All positives at +inf, all negatives at −inf, and the reverse: the ranking it is."""
    targets = torch.tensor([1, 1, 0, 0, 0, 0])
    # Two tied positives have R⁺ = 1½; and R = 1½ at the top, 5½ at the bottom.
    for sign, ap in ((1, 1.0), (-1, 1.5 / 5.5)):
        logits = torch.where(targets == 1, sign * math.inf, -sign * math.inf).to(dtype)[:, None]
        loss, gradient = _step(SmoothAPLoss(1, 0, temperature_unit=unit), logits, targets)
        assert loss.item() == pytest.approx(1 - ap, abs=1e-6)
        assert (gradient == 0).all()


@pytest.mark.parametrize(
    ("config", "follows"),
    [
        pytest.param({"num_classes": 1, "temperature_unit": "score"}, False, id="C=1-score"),
        pytest.param({"num_classes": 3, "temperature_unit": "score"}, True, id="C=3-following"),
        pytest.param({"num_classes": 3, "temperature_unit": "spread"}, True, id="C=3-spread"),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("name", VALUES)
def test_through_the_queue(
    name: str, role: str, dtype: torch.dtype, config: dict[str, Any], follows: bool
) -> None:
    """After a batch with a special value comes a clean one. A non-finite row has not entered the
    queue: the clean step is bit for bit that of a run that never saw the row. A finite one has,
    and ranks as it is.
    """
    arguments = {
        **config,
        "temperature": 0.3,
        "queue_size": 32,
        "queue_follows_shift": follows,
    }
    loss_fn, other, oracle = (
        kind(**arguments) for kind in (SmoothAPLoss, SmoothAPLoss, OracleLoss)
    )
    row = ROW[role]
    first, targets = _batch(0, config["num_classes"], dtype)
    bad = _with(first, [row], _value(name, dtype))
    clean, _ = _batch(1, config["num_classes"], dtype)

    _step(loss_fn, bad, targets)
    loss, gradient = _step(loss_fn, clean, targets)
    assert loss.isfinite()
    assert gradient.isfinite().all()

    oracle.step(bad.double(), targets)
    if not _is_too_wide_for_its_spread(name, role, dtype, config):
        _assert_near(loss, gradient, oracle.step(clean.double(), targets), dtype)
    if name in NON_FINITE or role == "ignored":
        kept = torch.arange(12) != row
        other(first[kept], targets[kept])
        expected_loss, expected_gradient = _step(other, clean, targets)
        assert torch.equal(loss, expected_loss)
        assert torch.equal(gradient, expected_gradient)


@pytest.mark.parametrize("unit", ["score", "spread"])
@pytest.mark.parametrize("follows", [False, True], ids=["still queue", "following queue"])
def test_a_live_infinity_with_a_following_queue(follows: bool, unit: TemperatureUnit) -> None:
    """The mean that the queue follows is that of the finite rows."""
    arguments = {
        "num_classes": 1,
        "queue_size": 32,
        "temperature": 0.3,
        "temperature_unit": unit,
        "queue_follows_shift": follows,
    }
    loss_fn, oracle = SmoothAPLoss(**arguments), OracleLoss(**arguments)
    logits, targets = _batch(0, 1, torch.float64)
    loss_fn(logits, targets)
    oracle.step(logits, targets)
    for value in (math.inf, -math.inf):
        bad = _with(_batch(1, 1, torch.float64)[0], [ROW["positive"]], value)
        loss, gradient = _step(loss_fn, bad, targets)
        _assert_near(loss, gradient, oracle.step(bad, targets), torch.float64)


@pytest.mark.parametrize("backend", ["dense", "panel"])
@pytest.mark.parametrize("unit", ["score", "spread"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_never_a_finite_loss_with_a_non_finite_gradient(
    dtype: torch.dtype, unit: TemperatureUnit, backend: Backend
) -> None:
    """200 batches strewn with special values, labels, several classes and a queue: where the loss
    is finite so is the gradient, where it is not there is a live NaN.
    """
    generator = seeded(0)
    specials = torch.tensor([_value(name, dtype) for name in VALUES], dtype=torch.float64)
    loss_fn = SmoothAPLoss(3, 16, 0.3, temperature_unit=unit, queue_follows_shift=True)
    loss_fn.backend = backend
    outcomes = set()
    for trial in range(200):
        logits, targets, _ = random_batch(generator, 10, 3)
        choice = torch.randint(len(specials), logits.shape, generator=generator)
        is_special = torch.rand(logits.shape, generator=generator) < (0.02, 0.1, 0.5)[trial % 3]
        logits = torch.where(is_special, specials[choice], logits).to(dtype)
        if trial % 2:
            logits = logits.nan_to_num(nan=0.0, posinf=math.inf, neginf=-math.inf)
        loss, gradient = _step(loss_fn, logits, targets)
        has_nan = bool(logits[targets != IGNORED].isnan().any())
        outcomes.add((bool(loss.isfinite()), has_nan))
        assert loss.isfinite() or has_nan
        assert gradient.isfinite().all() == loss.isfinite()
    assert {(True, False), (False, True)} <= outcomes
