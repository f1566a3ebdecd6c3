"""Errors show the fix: each of these is a mistake that is made often, and what to write instead.

That a fix is the right one is tested too, where it is code: with it the call is accepted.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from imbalanced_losses import CrossEntropy, MixedLoss, SmoothAPLoss
from imbalanced_losses.accumulation import backward_in_micro_batches
from imbalanced_losses.functional import smooth_ap


class Mistake(NamedTuple):
    """Arguments of a loss and of its call, and what the end of their error advises."""

    num_classes: int
    logits: Any
    targets: Any
    mended: dict[str, str]  # argument -> expression of the call that is right
    advice: str = ""  # where it is not these expressions and options to the letter
    options: dict[str, Any] = {}  # noqa: RUF012, of the loss that is right
    sample_weight: Any = None
    multilabel: bool = False
    ignore_index: int = -100


ROWS = torch.linspace(-1, 1, 6)
BINARY, ONE = torch.tensor([0, 1, 0, 1, 0, 1]), ROWS.unsqueeze(1)  # [N], [N, 1]
CLASSES, THREE = torch.arange(6) % 3, torch.stack((ROWS, -ROWS, ROWS**2), dim=1)  # [N], [N, 3]
ONE_HOT = torch.nn.functional.one_hot(CLASSES)  # [N, 3]
NAN = torch.nan

MISTAKES = {
    "logits-list": Mistake(1, ONE.tolist(), BINARY, {"logits": "torch.as_tensor(logits)"}),
    "logits-model-output": Mistake(1, SimpleNamespace(logits=ONE), BINARY,
        {"logits": "logits.logits"}),
    "logits-tuple": Mistake(1, (ONE[:3], ONE[3:]), BINARY, {"logits": "torch.cat(logits)"}),
    "logits-integer": Mistake(1, ONE.long(), BINARY, {"logits": "logits.float()"}),
    "logits-argmax": Mistake(3, THREE.argmax(1), CLASSES, {"logits": "torch.zeros(6, 3)"},
        "not their argmax"),
    "logits-vector": Mistake(1, ROWS, BINARY, {"logits": "logits.unsqueeze(1)"}),
    "logits-one-row": Mistake(3, torch.zeros(3), BINARY[1:2], {"logits": "logits.unsqueeze(0)"}),
    "logits-two-outputs": Mistake(1, THREE[:, :2], BINARY,
        {"logits": "logits[:, 1:] - logits[:, :1]"}),
    "logits-more-classes": Mistake(2, THREE, BINARY, {}, options={"num_classes": 3}),
    "logits-transposed": Mistake(3, THREE.T, CLASSES, {"logits": "logits.T"}),
    "logits-sequences": Mistake(3, THREE.reshape(2, 3, 3), CLASSES.reshape(2, 3),
        {"logits": "logits.reshape(-1, num_classes)", "targets": "targets.reshape(-1)"},
        "logits.reshape(-1, num_classes), and targets in the same order"),
    "logits-images": Mistake(3, torch.zeros(1, 3, 2, 4), (torch.arange(8) % 3).reshape(1, 2, 4),
        {"logits": "logits.movedim(1, -1).reshape(-1, num_classes)",
        "targets": "targets.flatten()"}, "logits.movedim(1, -1).reshape(-1, num_classes), and "),
    "swapped": Mistake(3, CLASSES, THREE, {"logits": "targets", "targets": "logits"}, "swapped"),
    "targets-minus-one": Mistake(1, ONE, 2 * BINARY - 1, {"targets": "targets > 0"}),
    "targets-from-one": Mistake(1, ONE, BINARY + 1, {"targets": "targets - 1"}),
    "targets-soft": Mistake(1, ONE, BINARY * 0.8 + 0.1, {"targets": "targets > 0.5"}),
    "targets-of-classes": Mistake(1, ONE, CLASSES, {"targets": "targets == 2"}, "targets == c"),
    "targets-one-hot": Mistake(3, THREE, ONE_HOT, {"targets": "targets.argmax(1)"}),
    "targets-of-labels": Mistake(3, THREE, ONE_HOT, {}, options={"multilabel": True}),
    "targets-one-hot-binary": Mistake(1, ONE, torch.nn.functional.one_hot(BINARY),
        {"targets": "targets.argmax(1)"}),
    "targets-column": Mistake(3, THREE, CLASSES[:, None], {"targets": "targets.reshape(-1)"}),
    "targets-numbers-in-multilabel": Mistake(3, THREE, CLASSES, {}, "leave out multilabel=True",
        multilabel=True, options={"multilabel": False}),
    "targets-flat-in-multilabel": Mistake(3, THREE, ONE_HOT.flatten(),
        {"targets": "targets.reshape(-1, num_classes)"}, multilabel=True),
    "targets-void": Mistake(3, THREE, torch.where(CLASSES == 2, 255, CLASSES), {},
        options={"ignore_index": 255}),
    "targets-void-minus-one": Mistake(3, THREE, CLASSES - 1, {}, options={"ignore_index": -1}),
    "targets-wrapped": Mistake(1, ONE, torch.tensor([156, 1, 0, 1, 0, 1], dtype=torch.uint8),
        {"targets": "targets.long().masked_fill(targets == 156, -100)"}, "use targets.long()"),
    "targets-wrapped-in-64-bits": Mistake(3, THREE, torch.tensor([2**64 - 100, 1, 2, 0, 1, 2],
        dtype=torch.uint64), {"targets": "targets.long()"}),
    "targets-not-annotated": Mistake(3, THREE, torch.where(CLASSES == 2, NAN, CLASSES),
        {"targets": "targets.nan_to_num(-7)"}, ignore_index=-7),
    "labels-not-annotated": Mistake(3, THREE, torch.where(THREE > 0.5, NAN, ONE_HOT.float()),
        {"targets": "targets.nan_to_num(-100)"}, multilabel=True),
    "targets-more-classes": Mistake(3, THREE, torch.arange(6) % 5,
        {"logits": "torch.cat((logits, logits[:, :2]), dim=1)"}, "num_classes=5",
        {"num_classes": 5}),
    "targets-like-wrapped-in-int64": Mistake(1, ONE, torch.tensor([156, 1, 0, 1, 0, 1]),
        {"targets": "targets == 156"}, "targets == c"),
    "weights-column": Mistake(1, ONE, BINARY, {"sample_weight": "sample_weight.reshape(-1)"},
        sample_weight=torch.ones(6, 1)),
    "weights-of-classes": Mistake(3, THREE, CLASSES, {"sample_weight": "sample_weight[targets]"},
        sample_weight=torch.ones(3)),
}  # fmt: skip


@pytest.mark.parametrize("loss_class", [SmoothAPLoss, CrossEntropy])
@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_a_call(mistake: Mistake, loss_class: Any) -> None:
    arguments = {name: getattr(mistake, name) for name in ("logits", "targets", "sample_weight")}
    settings = {
        name: getattr(mistake, name) for name in ("num_classes", "multilabel", "ignore_index")
    }
    with pytest.raises((TypeError, ValueError)) as caught:
        loss_class(**settings)(**arguments)
    said = str(caught.value).partition("; ")[2]
    to_the_letter = [f"{name}={value}" for name, value in mistake.options.items()]
    for advice in (
        [mistake.advice] if mistake.advice else [*mistake.mended.values(), *to_the_letter]
    ):
        assert advice in said

    names = {"torch": torch, **arguments, "num_classes": mistake.num_classes}
    right = {name: eval(code, dict(names)) for name, code in mistake.mended.items()}
    loss = loss_class(**(settings | mistake.options))(**(arguments | right))
    assert loss.isfinite()


NO_FIX = {
    "fractions-of-classes": (3, THREE, CLASSES + 0.25, None, "got 0.25"),
    "beyond-one": (1, ONE, BINARY * 1.5, None, "got 1.5"),
    "far-beyond": (3, THREE, CLASSES * 1000, None, "got 1000"),
    "twice-as-many-classes": (3, THREE, torch.tensor([0, 1, 2, 0, 1, 6]), None, "got 6"),
    "wrong-length": (1, ONE, BINARY[:4], None, "got [4]"),
    "no-rows": (1, ONE[:0], torch.zeros(0, 3), None, "got [0, 3]"),
    "no-logits": (1, None, BINARY, None, "got NoneType"),
    "one-logit": (1, ROWS[0], BINARY, None, "got []"),
    "wrong-length-of-weights": (1, ONE, BINARY, torch.ones(4), "got [4]"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("num_classes", "logits", "targets", "sample_weight", "end"), NO_FIX.values(), ids=NO_FIX.keys()
)
def test_no_guess_where_nothing_suggests_itself(
    num_classes: int, logits: Any, targets: Tensor, sample_weight: Tensor | None, end: str
) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        SmoothAPLoss(num_classes)(logits, targets, sample_weight=sample_weight)
    assert str(caught.value).endswith(end)
    assert ";" not in str(caught.value)


@pytest.mark.parametrize("targets", [None, 5, torch.tensor(1)], ids=["none", "int", "scalar"])
def test_logits_are_told_whatever_the_targets_are(targets: Any) -> None:
    with pytest.raises(ValueError, match=r"got \[6, 3\]; for 3 outputs construct the loss with"):
        SmoothAPLoss(2)(THREE, targets)


@pytest.mark.parametrize(
    ("prior", "end"),
    [
        (1, "got 1; a share, not per cent: 0.01"),
        (1.5, "got 1.5; a share, not per cent: 0.015"),
        (99.5, "got 99.5; a share, not per cent: 0.995"),
        (100, "got 100"),
    ],
)
def test_a_prior_in_per_cent(prior: float, end: str) -> None:
    with pytest.raises(ValueError, match=r"^target_prior must be between 0 and 1, ") as caught:
        SmoothAPLoss(1, target_prior=prior)
    assert str(caught.value).endswith(end)


@pytest.mark.parametrize("name", ["targets", "sample_weight"])
def test_another_device(name: str) -> None:
    arguments = {"logits": ONE, "targets": BINARY, name: torch.ones(6, device="meta")}
    with pytest.raises(ValueError, match=rf"; use {name}\.to\(logits\.device\)$"):
        SmoothAPLoss(1)(**arguments)


@pytest.mark.parametrize("name", ["group", "value"])
def test_a_column_of_what_only_ranking_losses_take(name: str) -> None:
    with pytest.raises(ValueError, match=rf"; use {name}\.reshape\(-1\)$"):
        SmoothAPLoss(1)(ONE, BINARY, **{name: torch.arange(6)[:, None]})


RANKING, AUXILIARY = SmoothAPLoss(1), CrossEntropy(1)
ELSEWHERE = {
    "auxiliary-class": (lambda: MixedLoss(CrossEntropy, RANKING, main_weight=0.5),
        "construct it: CrossEntropy(...)"),
    "mixed-swapped": (lambda: MixedLoss(RANKING, AUXILIARY, main_weight=0.5),
        "auxiliary_loss comes first, then main_loss"),
    "is-positive-transposed": (lambda: smooth_ap(THREE.T, ONE_HOT == 1),
        "one row a class: use is_positive.T"),
    "inputs-tensor": (lambda: backward_in_micro_batches(nn.Linear(1, 1), RANKING, ONE, BINARY),
        "use inputs.split(rows)"),
    "inputs-generator": (lambda: backward_in_micro_batches(nn.Linear(1, 1), RANKING, (rows for rows
        in [ONE]), BINARY), "use list(inputs)"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "fix"), ELSEWHERE.values(), ids=ELSEWHERE.keys())
def test_elsewhere(call: Any, fix: str) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    assert str(caught.value).endswith(f"; {fix}"), str(caught.value)


def test_a_queue_of_other_classes_says_how_to_go_on() -> None:
    saved = SmoothAPLoss(2, 4).state_dict()
    loss_fn = SmoothAPLoss(3, 4)
    with pytest.raises(RuntimeError, match=r"leave the key out and load with strict=False"):
        loss_fn.load_state_dict(saved)
    loss_fn.load_state_dict({}, strict=False)
