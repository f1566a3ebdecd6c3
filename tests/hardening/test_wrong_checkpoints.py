"""Checkpoints cut short, flipped, spoiled or of another configuration: no part of them is taken."""

from __future__ import annotations

import copy
import io
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from imbalanced_losses import SmoothAPLoss
from tests.hardening import faulty
from tests.hardening.faulty import make_mix, step_of
from tests.hardening.fuzz.watch import assert_sound, assert_unchanged, state_of
from tests.helpers.rows import Batch, make_batch, saved_by_0_6, saved_by_0_9

State = dict[str, Any]

# --- Checkpoint files ----------------------------------------------------------------------------


def a_training(steps: int = 8) -> faulty.Training:
    training = faulty.Training()
    for _ in range(steps):
        training.step()
    return training


def the_file(training: faulty.Training) -> bytes:
    file = io.BytesIO()
    torch.save(training.loss_fn.state_dict(), file)
    return file.getvalue()


def load_into(loss_fn: nn.Module, file: bytes) -> bool:
    """Whether a file loads; where not, nothing has changed."""
    before = state_of(loss_fn)
    try:
        loss_fn.load_state_dict(torch.load(io.BytesIO(file), weights_only=True))
    except Exception:
        assert_unchanged(loss_fn, before)
        return False
    return True


def test_a_file_cut_short_is_refused() -> None:
    file, loss_fn = the_file(a_training()), a_training(3).loss_fn
    for length in [*range(0, len(file), 97), len(file) - 1]:
        assert not load_into(loss_fn, file[:length])
    assert load_into(loss_fn, file)


def test_a_flipped_bit_is_refused_or_harmless() -> None:
    file = the_file(a_training())
    generator, refused = random.Random(0), 0
    loss_fn = a_training(3).loss_fn
    pristine = state_of(loss_fn)
    for place in range(0, len(file), 41):
        flipped = bytearray(file)
        flipped[place] ^= 1 << generator.randrange(8)
        other = copy.deepcopy(loss_fn)
        if load_into(other, bytes(flipped)):  # warnings are errors here
            assert_sound(other.main_loss)
            assert step_of(other, 1).isfinite()
        else:
            assert state_of(other) == pristine
            refused += 1
    assert refused > 20


# --- Of this version -----------------------------------------------------------------------------

LOSSES: dict[str, Callable[[], Any]] = {
    "one": lambda: SmoothAPLoss(1, 10, 0.3),
    "three": lambda: SmoothAPLoss(3, 10, 0.3),
    "four": lambda: SmoothAPLoss(4, 10, 0.3),
    "labels": lambda: SmoothAPLoss(3, 10, 0.3, multilabel=True),
    "labels, -1 ignored": lambda: SmoothAPLoss(3, 10, 0.3, ignore_index=-1, multilabel=True),
    "mix": lambda: make_mix(warmup_steps=1, blend_steps=4),
}


def used(name: str, seed: int = 0) -> Any:
    """A loss in the middle of training."""
    loss_fn = LOSSES[name]()
    own = getattr(loss_fn, "main_loss", loss_fn)
    for step in range(3):
        batch = make_batch(4, own.num_classes, seed=seed + step, multilabel=own.multilabel)
        if own.multilabel:
            batch.targets[step, step] = own.ignore_index
        batch.through(loss_fn)
    own.temperature = 0.5 + seed
    return loss_fn


def in_a_model(module: nn.Module, state: State) -> tuple[nn.Module, State]:
    return nn.ModuleDict({"loss": module}), {f"loss.{key}": it for key, it in state.items()}


ALONE_AND_NOT = pytest.mark.parametrize("nested", [False, True], ids=["alone", "in-a-model"])
KIND = "num_classes and multilabel of the queue must be {} and {}, as of this loss, got {} and {}"
REFUSED: list[tuple[str, str, Callable[[Tensor], Any], str]] = [
    ("three", "four", torch.clone, KIND.format(4, False, 3, False)),
    ("one", "three", torch.clone, KIND.format(3, False, 1, False)),
    ("three", "labels", torch.clone, KIND.format(3, True, 3, False)),
    ("labels", "three", torch.clone, KIND.format(3, False, 3, True)),
    ("labels", "labels, -1 ignored", torch.clone, "in 0..1, or ignore_index=-1 .* got -100"),
    ("mix", "one", torch.clone, "the same kind of loss"),
    ("one", "mix", torch.clone, "the same kind of loss"),
    ("one", "one", lambda state: state[:-7], "must be bytes in eights, got"),
    ("one", "one", lambda state: state.to("meta"), "must be a dense tensor with values"),
    ("one", "one", lambda state: state.to_sparse(), "must be a dense tensor with values"),
    ("mix", "mix", lambda state: state.to(torch.complex64), "must be real, got torch.complex64"),
]


@ALONE_AND_NOT
@pytest.mark.parametrize(
    ("saved", "loaded", "change", "message"),
    REFUSED,
    ids=[f"{a}-{m[-24:]}" for a, *_, m in REFUSED],
)
def test_the_state_of_another_loss_is_refused_whole(
    saved: str, loaded: str, change: Callable[[Tensor], Any], message: str, nested: bool
) -> None:
    loss_fn = used(loaded, seed=5)
    given = {"_extra_state": change(used(saved).state_dict()["_extra_state"])}
    module, state = in_a_model(loss_fn, given) if nested else (loss_fn, given)
    before = state_of(module)
    key = "loss._extra_state" if nested else "_extra_state"
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=f"{key}: .*{message}"):
            module.load_state_dict(state, strict=strict)
        assert_unchanged(module, before)


def flipped(state: Tensor) -> Tensor:
    state[len(state) // 2] ^= 4
    return state


CHANGED: dict[str, Callable[[Tensor], Tensor]] = {
    "flipped": flipped,
    "zeroed": torch.zeros_like,
    "scaled": lambda state: state.float() * 0.999,
    "cast": lambda state: state.to(torch.int8),
    "cut": lambda state: state[:-8],
}


@ALONE_AND_NOT
@pytest.mark.parametrize("change", CHANGED.values(), ids=CHANGED)
@pytest.mark.parametrize(
    ("name", "key"),
    [("three", "_extra_state"), ("mix", "_extra_state"), ("mix", "main_loss._extra_state")],
)
def test_a_changed_state_is_not_taken(
    name: str, key: str, change: Callable[[Tensor], Tensor], nested: bool
) -> None:
    """The rest of the checkpoint is; of the loss it belongs to the queue alone changes."""
    given, loss_fn = used(name).state_dict(), used(name, seed=5)
    expected = copy.deepcopy(loss_fn)
    expected.load_state_dict({k: v for k, v in given.items() if k != key}, strict=False)
    if not (name == "mix" and key == "_extra_state"):  # which has no queue
        getattr(expected, "main_loss", expected).reset_queue()
    given[key] = change(given[key].clone())
    module, state = in_a_model(loss_fn, given) if nested else (loss_fn, given)
    prefix = "loss." if nested else ""
    with pytest.warns(UserWarning, match=f"^{prefix}{key}: .* has changed since") as said:
        module.load_state_dict(state)
    assert len(said) == 1
    assert state_of(loss_fn) == state_of(expected)
    assert make_batch(4, 1 if name == "mix" else 3).through(loss_fn).isfinite()


# --- Of older versions ---------------------------------------------------------------------------

Change = Callable[[State], Any]


def to(name: str, value: Any) -> Change:
    return lambda state: state.update({name: value})


def by(name: str, function: Callable[[Tensor], Any]) -> Change:
    return lambda state: state.update({name: function(state[name])})


def without(name: str) -> Change:
    return lambda state: state.pop(name)


def at(place: int, value: float) -> Callable[[Tensor], Tensor]:
    def changed(tensor: Tensor) -> Tensor:
        tensor.view(-1)[place] = value
        return tensor

    return changed


SAME_ROWS = "_queue must hold the same rows in each part"
REFUSED_0_9: list[
    tuple[str, Change, str],
] = [
    ("three", without("_queue.cursor"), r'Missing key.*"_extra_state"'),
    ("three", to("extra", torch.zeros(1)), r'Unexpected key.*"extra"'),
    ("three", to("_queue.cursor", torch.tensor(-1)), r"cursor must be an int in 0..9, got -1"),
    ("three", to("_queue.cursor", torch.tensor([1, 2])), r"cursor must be one number.*\[2\]"),
    ("three", to("_queue.logits", None), r"_queue.logits must be a dense tensor.*got NoneType"),
    ("three", by("_queue.logits", lambda t: t.to_sparse()), r"_queue.logits must be a dense"),
    ("three", by("_queue.logits", lambda t: t[1:]), SAME_ROWS),
    ("three", by("_queue.weights", lambda t: t[:, None]), SAME_ROWS),
    ("three", by("_queue.weights", lambda t: t[1:]), SAME_ROWS +
        r", got \[\[10, 3\], \[10\], \[9\]"),
    ("labels", by("_queue.weights", lambda t: t[1:]), SAME_ROWS),
    ("three", by("_queue.targets", at(2, 3)), r"targets must be in 0..2, or ignore_index.*got 3"),
    ("one", by("_queue.targets", at(2, 2)), r"targets must be in 0..1.*got 2"),
    ("three", by("_queue.targets", lambda t: t + 0.5), r"_queue.targets must be integers"),
    ("three", by("_queue.targets", lambda t: t * math.nan), r"_queue.targets must be integers"),
    ("three", to("_queue.is_weighted", torch.tensor([True, False])), r"is_weighted must be one"),
    ("three", to("num_steps", torch.tensor(-1)), r"num_steps must be an int in 0..\d+, got -1"),
    ("three", to("num_steps", torch.tensor(2**60)), r"num_steps must be an int.*got 1.15292e\+18"),
    ("three", to("temperature", torch.tensor(0.0)), r"temperature must be finite and > 0, got 0"),
    ("three", to("temperature", torch.tensor([0.1, 0.2])), r"temperature must be one number"),
    ("mix", without("num_steps"), r'Missing key.*"_extra_state"'),
    ("mix", to("num_calls", torch.tensor(0.5)), r"num_calls must be an int in 0..\d+, got 0.5"),
    ("mix", to("has_switched", torch.tensor(3)), r"has_switched must be an int in 0..1, got 3"),
    ("mix", to("main_loss.temperature", torch.tensor(0.0)), r"temperature must be finite and > 0"),
    ("0.6", without("_queue._q_targets"), r'Missing key.*"_extra_state"'),
    ("0.6", without("_queue._q_ptr"), r'Missing key.*"_extra_state"'),
    ("0.6", to("_queue._q_logits", torch.tensor(-1)), SAME_ROWS),
]  # fmt: skip


@ALONE_AND_NOT
@pytest.mark.parametrize(
    ("name", "change", "message"),
    REFUSED_0_9,
    ids=[f"{i}-{name}" for i, (name, *_) in enumerate(REFUSED_0_9)],
)
def test_a_wrong_checkpoint_of_an_older_version_is_refused_whole(
    name: str, change: Change, message: str, nested: bool
) -> None:
    """By itself for any reason; within a model, where torch loads part by part, for its values."""
    loss_fn = used("one" if name == "0.6" else name, seed=5)
    given = saved_by_0_6() if name == "0.6" else saved_by_0_9(used(name))
    change(given)
    module, state = in_a_model(loss_fn, given) if nested else (loss_fn, given)
    before = state_of(module)
    with pytest.raises(
        RuntimeError, match=message.replace('"', '"loss.', 1) if nested else message
    ):
        module.load_state_dict(state)
    if not (nested and ("key" in message or name == "mix")):
        assert_unchanged(module, before)
    if "Missing key" in message:
        without_strict = copy.deepcopy(loss_fn)
        missing, _ = without_strict.load_state_dict(given, strict=False)
        assert missing == ["_extra_state"]
        if name != "mix":  # of which the main loss is taken
            assert_unchanged(without_strict, state_of(loss_fn))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int16], ids=str)
def test_labels_of_any_integers_load(dtype: torch.dtype) -> None:
    """156 is what −100 would be in a byte; PyTorch compares no uint16."""
    saved, loss_fn = (SmoothAPLoss(200, 4) for _ in range(2))
    Batch(torch.randn(3, 200), torch.tensor([156, 0, 199])).through(saved)
    state = saved_by_0_9(saved)
    state["_queue.targets"] = state["_queue.targets"].to(dtype)  # of a free slot any
    loss_fn.load_state_dict(state)
    assert loss_fn._queue.targets[:4].tolist() == [156, 0, 199, -100]


def test_rows_that_are_not_finite_are_left_in_the_file() -> None:
    saved, loss_fn = (SmoothAPLoss(1, 10, 0.3) for _ in range(2))
    batch = make_batch(6)
    weights = torch.arange(1.0, 7.0)
    batch._replace(weights=weights).through(saved)
    state = saved_by_0_9(saved)
    state["_queue.logits"][1] = math.nan
    state["_queue.weights"][3] = math.inf
    state["_queue.weights"][4] = -1.0
    state["_queue.is_weighted"] = torch.tensor(False)  # as they are not all 1, it is
    loss_fn.load_state_dict(state)
    assert_sound(loss_fn)
    expected = SmoothAPLoss(1, 10, 0.3)
    kept = torch.tensor([0, 2, 5])
    Batch(batch.logits[kept], batch.targets[kept], weights[kept]).through(expected)
    more = make_batch(5, seed=1)
    assert torch.equal(more.through(loss_fn.eval()), more.through(expected.eval()))
