"""`CrossEntropy`: PyTorch's own losses on the rows that count."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from imbalanced_losses import CrossEntropy
from tests.helpers.rows import IGNORED, make_batch

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def gradient_of(loss: Tensor, logits: Tensor) -> Tensor:
    return torch.autograd.grad(loss, logits)[0]


@DTYPES
@pytest.mark.parametrize("weight", [None, [4.0]])
def test_binary_is_bce(dtype: torch.dtype, weight: Any) -> None:
    batch = make_batch(9, dtype=dtype).leaf()
    weight = None if weight is None else torch.tensor(weight)
    loss = CrossEntropy(1, weight)(batch.logits, batch.targets)
    labels = batch.targets[:, None].to(dtype)
    pos_weight = None if weight is None else weight.to(dtype)
    expected = binary_cross_entropy_with_logits(batch.logits, labels, pos_weight=pos_weight)
    assert loss.dtype == dtype
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient_of(loss, batch.logits), gradient_of(expected, batch.logits))


@DTYPES
@pytest.mark.parametrize("weight", [None, [4.0, 1.0, 0.5]])
def test_classes_are_softmax_cross_entropy(dtype: torch.dtype, weight: Any) -> None:
    batch = make_batch(9, 3, dtype=dtype).leaf()
    weight = None if weight is None else torch.tensor(weight, dtype=dtype)
    batch.targets[4] = IGNORED
    loss = CrossEntropy(3, weight)(batch.logits, batch.targets)
    expected = cross_entropy(batch.logits, batch.targets, weight=weight)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient_of(loss, batch.logits), gradient_of(expected, batch.logits))


def test_labels_are_a_mean_over_cells() -> None:
    batch = make_batch(9, 3, multilabel=True).leaf()
    batch.targets[4, 1] = batch.targets[0, 0] = IGNORED
    counts = batch.targets != IGNORED
    weight = torch.tensor([2.0, 3.0, 4.0])
    loss = CrossEntropy(3, weight, multilabel=True)(batch.logits, batch.targets)
    cells = binary_cross_entropy_with_logits(
        batch.logits, batch.targets.clamp(min=0).float(), pos_weight=weight, reduction="none"
    )
    torch.testing.assert_close(loss, cells[counts].mean())


KINDS = {
    "binary": {"num_classes": 1},
    "classes": {"num_classes": 3},
    "labels": {"num_classes": 3, "multilabel": True},
}
EACH_KIND = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


@EACH_KIND
def test_ignored_rows_and_rows_of_weight_zero_are_as_if_left_out(kind: dict[str, Any]) -> None:
    batch = make_batch(9, **kind).leaf()
    loss_fn = CrossEntropy(**kind)
    expected = loss_fn(batch.logits[2:], batch.targets[2:])
    weights = torch.ones(9)
    weights[0] = 0
    targets = batch.targets.clone()
    targets[1] = IGNORED
    logits = batch.logits.detach().clone()
    logits[:2] = math.nan
    logits.requires_grad_()
    loss = loss_fn(logits, targets, sample_weight=weights)
    torch.testing.assert_close(loss, expected)
    gradient = gradient_of(loss, logits)
    assert not gradient[:2].any()
    torch.testing.assert_close(gradient[2:], gradient_of(expected, batch.logits)[2:])


@EACH_KIND
@pytest.mark.parametrize("what", ["no rows", "all ignored", "no weight"])
def test_nothing_to_learn_is_zero(kind: dict[str, Any], what: str) -> None:
    batch = make_batch(0 if what == "no rows" else 4, **kind).leaf()
    targets = torch.full_like(batch.targets, IGNORED) if what == "all ignored" else batch.targets
    weights = torch.zeros(4) if what == "no weight" else None
    loss = CrossEntropy(**kind)(batch.logits, targets, sample_weight=weights)
    assert loss.item() == 0
    assert not gradient_of(loss, batch.logits).any()


@EACH_KIND
@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_gamma_is_the_focal_loss(kind: dict[str, Any], gamma: float) -> None:
    """By its definition, through probabilities."""
    batch = make_batch(9, **kind, dtype=torch.float64).leaf()
    factors = torch.tensor([4.0, 1.0, 0.5], dtype=torch.float64)[: kind["num_classes"]]
    loss = CrossEntropy(**kind, class_weight=factors, gamma=gamma)(batch.logits, batch.targets)
    if kind["num_classes"] > 1 and not kind.get("multilabel"):
        right = batch.logits.softmax(1)[torch.arange(9), batch.targets]
        factor = factors[batch.targets]
        mass = factor.sum()
    else:
        labels = batch.targets.view(batch.logits.shape)
        right = torch.where(labels == 1, batch.logits.sigmoid(), 1 - batch.logits.sigmoid())
        factor = torch.where(labels == 1, factors, 1.0)
        mass = torch.tensor(labels.numel())
    expected = (factor * (1 - right) ** gamma * -right.log()).sum() / mass
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient_of(loss, batch.logits), gradient_of(expected, batch.logits))


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_gamma_where_nothing_is_left_to_learn(gamma: float) -> None:
    logits = torch.tensor([[-1e4], [1e4], [-1e4]], requires_grad=True)
    loss = CrossEntropy(1, gamma=gamma)(logits, torch.tensor([0, 1, 1]))
    assert loss.item() == pytest.approx(1e4 / 3)
    assert gradient_of(loss, logits).flatten().tolist() == pytest.approx([0, 0, -1 / 3])


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        ("2.0", TypeError, "class_weight must be a torch.Tensor, got str"),
        (torch.ones(1, device="meta"), TypeError, "class_weight must have values, got a tensor on"),
        (torch.tensor([2]), TypeError, "class_weight must be floating point, got torch.int64"),
        (torch.ones(2), ValueError, r"class_weight must be \[num_classes\] = \[1\], got \[2\]"),
        (torch.zeros(1), ValueError, r"class_weight must be finite and > 0, got \[0.0\]"),
        (torch.tensor([math.inf]), ValueError, "class_weight must be finite"),
    ],
)
def test_bad_class_weights(weight: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        CrossEntropy(1, weight)


@pytest.mark.parametrize("num_classes", [2, 3])
def test_a_class_of_several_may_be_ignored(num_classes: int) -> None:
    logits, targets = make_batch(9, num_classes)[:2]
    loss = CrossEntropy(num_classes, ignore_index=1)(logits, targets)
    torch.testing.assert_close(loss, cross_entropy(logits, targets, ignore_index=1))


def test_tensors_without_values() -> None:
    assert CrossEntropy(1)(*(torch.zeros(*n, device="meta") for n in ((2, 1), (2,)))).is_meta


def test_repr_and_state() -> None:
    loss_fn = CrossEntropy(2, torch.tensor([1.0, 2.0]))
    assert repr(loss_fn) == "CrossEntropy(num_classes=2, class_weight=tensor([1., 2.]))"
    assert loss_fn.state_dict() == {}
    assert repr(CrossEntropy(1, gamma=2.0)).endswith("gamma=2.0)")
