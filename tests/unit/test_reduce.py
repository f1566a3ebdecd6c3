"""`_reduce`: from per-class losses to one loss."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from imbalanced_losses._rows.reduce import Reduction, mark_invalid, reduce_valid

LOSSES = [0.5, 0.25, 1.0]
MASKS = [
    pytest.param([True, True, True], id="all valid"),
    pytest.param([True, False, True], id="one invalid"),
    pytest.param([False, False, True], id="one valid"),
    pytest.param([False, False, False], id="none valid"),
]


def _leaf(losses: list[float], dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(losses, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("mask", MASKS)
def test_sum_and_mean_take_valid_classes_only(mask: list[bool], dtype: torch.dtype) -> None:
    """Value and gradient; exactly 0, attached and positive in sign, where no class is valid."""
    count = sum(mask)
    expected = sum(loss for loss, ok in zip(LOSSES, mask, strict=True) if ok)
    for reduction, divisor in (("sum", 1), ("mean", max(1, count))):
        losses = _leaf(LOSSES, dtype)
        out = reduce_valid(losses, torch.tensor(mask), reduction)
        (gradient,) = torch.autograd.grad(out, losses)
        assert out.shape == ()
        assert out.dtype == dtype
        assert out.item() == pytest.approx(expected / divisor)
        assert not out.signbit()
        assert gradient.tolist() == pytest.approx([ok / divisor for ok in mask])


@pytest.mark.parametrize("mask", MASKS)
def test_none_marks_invalid_classes(mask: list[bool]) -> None:
    """NaN exactly at the invalid classes, and no gradient to them."""
    losses = _leaf(LOSSES)
    out = reduce_valid(losses, torch.tensor(mask), "none")
    (gradient,) = torch.autograd.grad(out.nansum(), losses)
    assert out.isnan().tolist() == [not ok for ok in mask]
    assert out[torch.tensor(mask)].tolist() == [x for x, ok in zip(LOSSES, mask, strict=True) if ok]
    assert gradient.tolist() == [float(ok) for ok in mask]
    assert mark_invalid(losses, torch.tensor(mask)).isnan().tolist() == [not ok for ok in mask]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf], ids=["nan", "inf", "-inf"])
def test_what_stands_at_an_invalid_class_does_not_matter(junk: float, reduction: Reduction) -> None:
    """A non-finite entry at an invalid class reaches neither the value nor the gradient."""
    losses = _leaf([0.5, junk])
    out = reduce_valid(losses, torch.tensor([True, False]), reduction)
    (gradient,) = torch.autograd.grad(out.nansum(), losses)
    assert out.nansum().item() == 0.5
    assert gradient.tolist() == [1, 0]


def test_a_valid_nan_is_not_hidden() -> None:
    """NaN at a valid class comes out as NaN, so that it can be seen."""
    losses = _leaf([0.5, math.nan])
    for reduction in ("mean", "sum"):
        assert reduce_valid(losses, torch.tensor([True, True]), reduction).isnan()
