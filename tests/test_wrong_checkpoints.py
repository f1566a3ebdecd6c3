"""Checkpoints cut short, flipped, spoiled or of another configuration: an error, and no change."""

from __future__ import annotations

import copy
import io
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fuzz.watch import assert_sound, assert_unchanged, state_of
from torch import Tensor, nn

from imbalanced_losses import SmoothAPLoss
from tests import faulty
from tests.faulty import make_mix, step_of
from tests.rows import Batch, make_batch

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
        if load_into(other, bytes(flipped)):
            assert_sound(other.main_loss)
            assert step_of(other, 1).isfinite()
        else:
            assert state_of(other) == pristine
            refused += 1
    assert refused > 20


Change = Callable[[dict[str, Any]], Any]


def to(name: str, value: Any) -> Change:
    return lambda state: state.update({name: value})


def by(name: str, function: Callable[[Tensor], Any]) -> Change:
    return lambda state: state.update({name: function(state[name])})


def without(name: str) -> Change:
    return lambda state: state.pop(name)


def at(place: int, value: float) -> Callable[[Tensor], Tensor]:
    def changed(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[place] = value
        return tensor

    return changed


REFUSED: list[tuple[Change, str]] = [
    (without("_queue.cursor"), r'Missing key.*"_queue.cursor"'),
    (without("_queue.weights"), r'Missing key.*"_queue.weights"'),
    (without("temperature"), r'Missing key.*"temperature"'),
    (to("extra", torch.zeros(1)), r'Unexpected key.*"extra"'),
    (to("_queue.extra", "text"), r'Unexpected key.*"_queue.extra"'),
    (to("_queue.cursor", torch.tensor(-1)), r"cursor must be a slot in 0..9, got -1"),
    (to("_queue.cursor", torch.tensor(10)), r"cursor must be a slot in 0..9, got 10"),
    (to("_queue.cursor", torch.tensor(3.0)), r"cursor must be one integer, got torch.float32"),
    (to("_queue.cursor", torch.tensor(math.nan)), r"cursor must be one integer"),
    (to("_queue.cursor", torch.tensor([1, 2])), r"cursor must be one integer, got .* \[2\]"),
    (to("_queue.cursor", 3), r"cursor must be a tensor, got int"),
    (to("_queue.logits", None), r"logits must be a tensor, got NoneType"),
    (to("_queue.logits", torch.tensor(1.0)), r"must have columns \[\[3\], \[\]\].* got \[\[\]"),
    (by("_queue.logits", lambda t: t.long()), r"logits must be floating point, got torch.int64"),
    (by("_queue.logits", lambda t: t.to("meta")), r"logits must be .* got one on the meta device"),
    (by("_queue.logits", lambda t: t.to_sparse()), r"logits must be .* torch.sparse_coo"),
    (by("_queue.logits", lambda t: t[1:]), r"must have the same rows, got shapes"),
    (by("_queue.targets", lambda t: t[1:]), r"must have the same rows, got shapes"),
    (to("_queue.targets", torch.tensor(1)), r"must have the same rows, got shapes"),
    (by("_queue.weights", lambda t: t[:, None]), r"must have the same rows, got shapes"),
    (by("_queue.weights", lambda t: t.long()), r"weights must be floating point, got torch.int64"),
    (by("_queue.targets", at(2, 3)), r"targets must be in 0..2, or ignore_index=-100.*got 3"),
    (by("_queue.targets", at(2, -1)), r"targets must be in 0..2.*got -1"),
    (by("_queue.targets", lambda t: t + 0.5), r"targets must be in 0..2.*got 2.5"),
    (by("_queue.targets", lambda t: at(2, 3)(t.float())), r"targets must be in 0..2.*got 3.0"),
    (by("_queue.targets", lambda t: t.to(torch.complex64)), r"targets must be integers"),
    (to("_queue.is_weighted", torch.tensor([True, False])), r"is_weighted must be one integer"),
    (to("_queue.is_weighted", "yes"), r"is_weighted must be a tensor, got str"),
    (to("num_steps", torch.tensor(-1)), r"num_steps must be an int >= 0, got -1"),
    (to("num_steps", torch.tensor(2**60)), r"num_steps must be an int >= 0, got 1.15292e\+18"),
    (to("num_steps", torch.tensor(1e300, dtype=torch.float64)), r"num_steps must be an int >= 0"),
    (to("num_steps", "many"), r"num_steps must be a number, got str"),
    (to("num_steps", torch.tensor(1).to("meta")), r"num_steps must be a number, got a tensor on"),
    (to("temperature", torch.tensor(math.inf)), r"temperature must be finite and > 0, got inf"),
    (to("temperature", [0.1]), r"temperature must be a number, got list"),
]


@pytest.mark.parametrize("nested", [False, True], ids=["alone", "in-a-model"])
@pytest.mark.parametrize(
    ("change", "message"), REFUSED, ids=[f"{i}-{it[1][:24]}" for i, it in enumerate(REFUSED)]
)
def test_a_wrong_checkpoint_is_refused_whole(change: Change, message: str, nested: bool) -> None:
    """By itself for any reason; within a model, where torch loads part by part, for its values."""
    saved, loss_fn = (SmoothAPLoss(3, 10, 0.3) for _ in range(2))
    for seed in range(3):
        make_batch(4, 3, seed=seed).through(saved)
    make_batch(5, 3, seed=5).through(loss_fn)
    state = dict(saved.state_dict())
    change(state)
    module: nn.Module = loss_fn
    if nested:
        module = nn.ModuleDict({"loss": loss_fn})
        state = {f"loss.{name}": value for name, value in state.items()}
        message = message.replace('"', '"loss.', 1)
    before = state_of(module)
    with pytest.raises(RuntimeError, match=message):
        module.load_state_dict(state)
    if not (nested and "key" in message):
        assert state_of(module) == before
    assert make_batch(4, 3, seed=9).through(loss_fn).isfinite()


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        ({"num_classes": 1}, by("_queue.targets", at(2, 2)), r"targets must be in 0..1.*got 2"),
        (
            {"num_classes": 3, "multilabel": True},
            by("_queue.targets", at(2, 2)),
            r"targets must be in 0..1.*got 2",
        ),
        (
            {"num_classes": 1, "queue_size": 1},
            to("_queue.cursor", torch.tensor(1)),
            r"cursor must be a slot in 0..0, got 1",
        ),
    ],
    ids=["binary", "multi-label", "one slot"],
)
def test_what_a_checkpoint_may_hold_depends_on_the_loss(
    options: dict[str, Any], change: Change, message: str
) -> None:
    options = {"queue_size": 4, **options}
    saved, loss_fn = (SmoothAPLoss(**options) for _ in range(2))
    is_multilabel = options.get("multilabel", False)
    make_batch(4, options["num_classes"], multilabel=is_multilabel).through(saved)
    state = dict(saved.state_dict())
    change(state)
    before = state_of(loss_fn)
    with pytest.raises(RuntimeError, match=message):
        loss_fn.load_state_dict(state)
    assert state_of(loss_fn) == before


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int16], ids=str)
def test_labels_of_any_integers_load(dtype: torch.dtype) -> None:
    """156 is what −100 would be in a byte; PyTorch compares no uint16."""
    saved, loss_fn = (SmoothAPLoss(200, 4) for _ in range(2))
    Batch(torch.randn(3, 200), torch.tensor([156, 0, 199])).through(saved)
    state = dict(saved.state_dict())
    state["_queue.targets"] = state["_queue.targets"].to(dtype)  # of a free slot any
    loss_fn.load_state_dict(state)
    assert loss_fn._queue.targets[:4].tolist() == [156, 0, 199, -100]


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
def test_rows_that_are_not_finite_are_left_in_the_file(assign: bool) -> None:
    saved, loss_fn = (SmoothAPLoss(1, 10, 0.3) for _ in range(2))
    batch = make_batch(6)
    weights = torch.arange(1.0, 7.0)
    batch._replace(weights=weights).through(saved)
    state = {name: value.clone() for name, value in saved.state_dict().items()}
    state["_queue.logits"][1] = math.nan
    state["_queue.weights"][3] = math.inf
    state["_queue.weights"][4] = -1.0
    state["_queue.is_weighted"] = torch.tensor(False)  # as they are not all 1, it is
    loss_fn.load_state_dict(state, assign=assign)
    assert_sound(loss_fn)
    expected = SmoothAPLoss(1, 10, 0.3)
    kept = torch.tensor([0, 2, 5])
    Batch(batch.logits[kept], batch.targets[kept], weights[kept]).through(expected)
    more = make_batch(5, seed=1)
    assert torch.equal(more.through(loss_fn.eval()), more.through(expected.eval()))


@pytest.mark.parametrize("name", ["cursor", "logits", "targets", "weights"])
def test_part_of_a_queue_is_not_taken(name: str) -> None:
    saved, loss_fn = (SmoothAPLoss(1, 10, 0.3) for _ in range(2))
    make_batch(4).through(saved)
    make_batch(6, seed=1).through(loss_fn)
    state = saved.state_dict()
    del state[f"_queue.{name}"]
    before = state_of(loss_fn._queue)
    missing, _ = loss_fn.load_state_dict(state, strict=False)
    assert missing == [f"_queue.{name}"]
    assert state_of(loss_fn._queue) == before


def test_where_a_part_is_missing_the_others_are_checked() -> None:
    state = dict(SmoothAPLoss(1, 10).state_dict())
    del state["_queue.targets"]
    state["_queue.is_weighted"] = "yes"
    with pytest.raises(RuntimeError, match="is_weighted must be a tensor, got str"):
        SmoothAPLoss(1, 10).load_state_dict(state, strict=False)


@pytest.mark.parametrize("name", ["_queue._q_logits", "temperature"])
def test_a_bad_checkpoint_of_the_predecessor_is_refused_whole(name: str) -> None:
    loss_fn = SmoothAPLoss(1, 4, 0.3)
    make_batch(3).through(loss_fn)
    state = {
        "_queue._q_logits": torch.tensor([[0.5], [1.0]]),
        "_queue._q_targets": torch.tensor([1, 0]),
        "_queue._q_ptr": torch.tensor([0]),
    }
    SmoothAPLoss(1, 4).load_state_dict(state)
    before = state_of(loss_fn)
    with pytest.raises(RuntimeError, match=r"must be"):
        loss_fn.load_state_dict({**state, name: torch.tensor(-1)})
    assert state_of(loss_fn) == before


def test_a_schedule_resumes_with_fewer_calls_per_step() -> None:
    saved, loss_fn = (make_mix(blend_steps=4, calls_per_step=calls) for calls in (8, 2))
    for seed in range(5):
        step_of(saved, seed)
    loss_fn.load_state_dict(saved.state_dict())
    for seed in range(4):
        step_of(loss_fn, seed)
    assert loss_fn.num_steps == 2  # the step that was under way, and one of two calls
