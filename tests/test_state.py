"""Checkpoints: what is saved, what loads, and that nothing is lost on the way."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from imbalanced_losses import CrossEntropy, MixedLoss, SmoothAPLoss
from tests.rows import (
    Batch,
    assert_same_state,
    make_batch,
    queued_rows,
    rows_of,
    state_of,
)

State = dict[str, Tensor]

CONFIGURATIONS = {
    "binary": {"num_classes": 1},
    "classes": {"num_classes": 3},
    "multilabel": {"num_classes": 3, "multilabel": True},
    "capped": {"num_classes": 3, "max_pool_size": 12},
    "capped-multilabel": {"num_classes": 3, "multilabel": True, "max_pool_size": 12},
    "spread": {"num_classes": 1, "temperature_unit": "spread"},
    "follows-shift": {"num_classes": 3, "queue_follows_shift": True},
    "no-queue": {"num_classes": 1, "queue_size": 0, "max_pool_size": 8},
}


def by_dict(source: SmoothAPLoss, target: SmoothAPLoss) -> SmoothAPLoss:
    target.load_state_dict(source.state_dict())
    return target


def by_assignment(source: SmoothAPLoss, target: SmoothAPLoss) -> SmoothAPLoss:
    target.load_state_dict(state_of(source), assign=True)
    return target


def by_file(source: SmoothAPLoss, target: SmoothAPLoss) -> SmoothAPLoss:
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    target.load_state_dict(torch.load(file, weights_only=True))
    return target


def by_bigger_model(source: SmoothAPLoss, target: SmoothAPLoss) -> SmoothAPLoss:
    saved, loaded = (
        nn.ModuleDict({"head": nn.Linear(2, 1), "loss": it}) for it in (source, target)
    )
    loaded.load_state_dict(saved.state_dict())
    return target


def by_deepcopy(source: SmoothAPLoss, target: SmoothAPLoss) -> SmoothAPLoss:
    del target
    return copy.deepcopy(source)


def by_pickle(source: SmoothAPLoss, target: SmoothAPLoss) -> SmoothAPLoss:
    del target
    copied: SmoothAPLoss = pickle.loads(pickle.dumps(source))
    return copied


WAYS = (by_dict, by_assignment, by_file, by_bigger_model, by_deepcopy, by_pickle)


def new_loss(**options: Any) -> SmoothAPLoss:
    return SmoothAPLoss(**{"queue_size": 10, "temperature": 0.2, **options})


def trained(loss_fn: SmoothAPLoss, seeds: range, num_rows: int = 7) -> list[Tensor]:
    """Losses and gradients of a step for each seed, [1 + N · C] each."""
    steps = []
    for seed in seeds:
        batch = make_batch(
            num_rows, loss_fn.num_classes, seed=seed, multilabel=loss_fn.multilabel
        ).leaf()
        loss = batch.through(loss_fn)
        loss.backward()
        assert batch.logits.grad is not None
        steps.append(torch.cat((loss.detach().reshape(1), batch.logits.grad.flatten())))
    return steps


# --- The same future -----------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("options", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_the_next_ten_steps_are_the_same(
    options: dict[str, Any], way: Callable[[SmoothAPLoss, SmoothAPLoss], SmoothAPLoss]
) -> None:
    loss_fn = new_loss(**options)
    trained(loss_fn, range(2))  # 14 rows: the cursor stands inside the ring
    loss_fn.temperature = 0.07
    trained(loss_fn, range(2, 4), num_rows=3)

    resumed = way(loss_fn, new_loss(**options))
    assert resumed.temperature == 0.07
    assert_same_state(resumed, state_of(loss_fn))
    expected = trained(loss_fn, range(4, 14))
    torch.testing.assert_close(trained(resumed, range(4, 14)), expected, rtol=0, atol=0)
    assert len({float(step[0]) for step in expected}) == 10
    assert_same_state(resumed, state_of(loss_fn))


def test_float64_rows_are_saved_in_full() -> None:
    loss_fn, other = new_loss(num_classes=1), new_loss(num_classes=1)
    batch = make_batch(4, dtype=torch.float64)
    batch.through(loss_fn)
    other.load_state_dict(loss_fn.state_dict())
    assert queued_rows(other) == rows_of(batch)


def test_the_state_is_what_it_says() -> None:
    shapes = {
        name: list(value.shape) for name, value in new_loss(num_classes=3).state_dict().items()
    }
    assert shapes == {
        "temperature": [],
        "num_steps": [],
        "_queue.logits": [10, 3],
        "_queue.is_weighted": [],
        "_queue.targets": [10],
        "_queue.weights": [10],
        "_queue.cursor": [],
    }


@pytest.mark.parametrize("kind", ["alone", "mix"])
def test_a_checkpoint_is_copied_unless_assigned(kind: str) -> None:
    """A captured graph, for one, goes on with the buffers that it knows."""
    ranking = new_loss(num_classes=1)
    loss_fn = MixedLoss(CrossEntropy(1), ranking, main_weight=0.5) if kind == "mix" else ranking
    buffer = ranking._queue.logits
    loss_fn.load_state_dict(state_of(loss_fn))
    assert ranking._queue.logits is buffer
    loss_fn.load_state_dict(state_of(loss_fn), assign=True)
    assert ranking._queue.logits is not buffer


def test_whether_there_were_weights_is_saved() -> None:
    """Rows that all weigh 1 are summed by another way, whose last bit may differ."""
    loss_fn = new_loss(num_classes=1, queue_size=4)
    make_batch(4)._replace(weights=torch.arange(1.0, 5.0)).through(loss_fn)
    make_batch(4, seed=1).through(loss_fn)
    state = state_of(loss_fn)
    assert state["_queue.is_weighted"]
    for saved, is_weighted in ((state, True), ({**state}, False)):
        if not is_weighted:
            del saved["_queue.is_weighted"]  # as of the predecessor: what the weights say
        other = new_loss(num_classes=1, queue_size=4)
        other.load_state_dict(saved)
        assert bool(other.state_dict()["_queue.is_weighted"]) == is_weighted


# --- Another queue size --------------------------------------------------------------------------


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
@pytest.mark.parametrize("num_rows", [0, 40, 64, 100])
@pytest.mark.parametrize(("saved", "loaded"), [(64, 0), (64, 1), (64, 32), (64, 128), (0, 64)])
def test_another_queue_size_keeps_the_newest_rows(
    saved: int, loaded: int, num_rows: int, assign: bool
) -> None:
    loss_fn, other = (new_loss(num_classes=1, queue_size=size) for size in (saved, loaded))
    batch = make_batch(num_rows)
    for part in zip(batch.logits.split(30), batch.targets.split(30), strict=True):
        Batch(*part).through(loss_fn)
    other.load_state_dict(loss_fn.state_dict(), assign=assign)
    expected = rows_of(batch)[max(0, num_rows - min(saved, loaded)) :]
    assert queued_rows(other) == expected
    assert int(other._queue.cursor) < max(1, loaded)

    more = make_batch(50, seed=1)
    more.through(other)
    assert queued_rows(other) == [*expected, *rows_of(more)][-loaded:] * (loaded > 0)


# --- The caller's dictionary ---------------------------------------------------------------------


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
@pytest.mark.parametrize("size", [4, 10, 16])
def test_the_dictionary_loaded_from_stays_as_it_was(size: int, assign: bool) -> None:
    loss_fn, other = new_loss(num_classes=1), new_loss(num_classes=1, queue_size=size)
    trained(loss_fn, range(2))
    state = state_of(loss_fn)
    before = dict(state)
    copies = {name: value.clone() for name, value in state.items()}
    other.load_state_dict(state, assign=assign)
    assert all(state[name] is before[name] for name in before)
    assert list(state) == list(before)

    trained(other, range(2, 5))
    for name, value in copies.items():
        torch.testing.assert_close(state[name], value, rtol=0, atol=0, msg=name)


# --- What is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["temperature", "num_steps", "_queue.logits", "_queue.cursor", "_queue.weights"]
)
def test_a_missing_key_is_reported(name: str) -> None:
    state = state_of(new_loss(num_classes=1))
    del state[name]
    with pytest.raises(RuntimeError, match=rf'Missing key.*"{name}"'):
        new_loss(num_classes=1).load_state_dict(state)


@pytest.mark.parametrize("name", ["temperature", "num_steps"])
def test_only_the_missing_key_is_reported_missing(name: str) -> None:
    state = state_of(new_loss(num_classes=1))
    del state[name]
    missing, unexpected = new_loss(num_classes=1).load_state_dict(state, strict=False)
    assert (missing, unexpected) == ([name], [])


@pytest.mark.parametrize("name", ["extra", "_queue.extra"])
def test_an_unexpected_key_is_reported(name: str) -> None:
    state = {**state_of(new_loss(num_classes=1)), name: torch.zeros(1)}
    with pytest.raises(RuntimeError, match=rf'Unexpected key.*"{name}"'):
        new_loss(num_classes=1).load_state_dict(state)


def test_not_strict_takes_what_is_there() -> None:
    loss_fn, other = new_loss(num_classes=1), new_loss(num_classes=1)
    trained(loss_fn, range(2))
    loss_fn.temperature = 0.5
    state = state_of(loss_fn)
    del state["num_steps"]
    other.load_state_dict({**state, "extra": torch.zeros(1)}, strict=False)
    assert queued_rows(other) == queued_rows(loss_fn)
    assert other.temperature == 0.5


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not-strict"])
@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        ({"num_classes": 3}, {"num_classes": 4}),
        ({"num_classes": 1}, {"num_classes": 3}),
        ({"num_classes": 3}, {"num_classes": 3, "multilabel": True}),
        ({"num_classes": 3, "multilabel": True}, {"num_classes": 3}),
    ],
    ids=["classes", "binary", "into-multilabel", "from-multilabel"],
)
def test_a_queue_of_another_kind_is_refused(
    saved: dict[str, Any], loaded: dict[str, Any], strict: bool
) -> None:
    loss_fn, other = new_loss(**saved), new_loss(**loaded)
    trained(loss_fn, range(2))
    loss_fn.temperature = 0.5
    trained(other, range(1))
    before = state_of(other)
    with pytest.raises(RuntimeError, match=r"num_classes and multilabel of this loss"):
        other.load_state_dict(loss_fn.state_dict(), strict=strict)
    assert_same_state(other, before)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", torch.tensor(0.0)),
        ("temperature", torch.tensor(-1.0)),
        ("temperature", torch.tensor(torch.nan)),
        ("temperature", torch.tensor([0.1, 0.2])),
        ("num_steps", torch.tensor([1, 2])),
        ("num_steps", torch.tensor(torch.nan)),
        ("_queue.weights", torch.ones(9)),
    ],
    ids=["zero", "negative", "nan", "two", "two-counters", "nan-counter", "ragged-queue"],
)
def test_a_bad_value_is_refused_and_nothing_of_it_taken(name: str, value: Tensor) -> None:
    loss_fn, other = new_loss(num_classes=1), new_loss(num_classes=1)
    trained(loss_fn, range(2))
    loss_fn.temperature = 0.5
    before = state_of(other)
    with pytest.raises(RuntimeError, match=name.removeprefix("_queue.")):
        other.load_state_dict({**loss_fn.state_dict(), name: value})
    assert_same_state(other, before)


def test_the_error_of_a_ragged_queue_says_how_many_rows_came() -> None:
    loss_fn = new_loss(num_classes=1, queue_size=8)
    state = {**loss_fn.state_dict(), "_queue.weights": torch.ones(9)}
    with pytest.raises(
        RuntimeError, match=r"must have the same rows, got shapes \[\[8, 1\], \[8\], \[9\]\]"
    ):
        loss_fn.load_state_dict(state)


# --- The predecessor's checkpoints ---------------------------------------------------------------


def predecessor_state(prefix: str = "") -> State:
    """imbalanced-losses 0.6: a ring of 8 with 6 rows written, of which one was ignored."""
    return {
        f"{prefix}_queue._q_logits": torch.tensor([0.5, 1, -1, 2, 0, 3, 0, 0])[:, None],
        f"{prefix}_queue._q_targets": torch.tensor([1, 0, 0, -100, 1, 0, -100, -100]),
        f"{prefix}_queue._q_ptr": torch.tensor([6]),
        f"{prefix}_queue._q_iid": torch.ones(8, dtype=torch.bool),
        f"{prefix}_queue._q_weight": torch.tensor([1.0, 2, 1, 1, 1, 1, 1, 1]),
    }


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
@pytest.mark.parametrize("prefix", ["", "loss."], ids=["alone", "in-a-model"])
@pytest.mark.parametrize("size", [8, 3, 16])
def test_a_checkpoint_of_the_predecessor_loads(size: int, prefix: str, assign: bool) -> None:
    loss_fn = new_loss(num_classes=1, queue_size=size, temperature=0.3)
    module = nn.ModuleDict({"loss": loss_fn}) if prefix else loss_fn
    state = predecessor_state(prefix)
    names = list(state)
    module.load_state_dict(state, assign=assign)
    assert list(state) == names
    assert loss_fn.temperature == 0.3

    live = make_batch(3).leaf()
    stored = Batch(
        torch.tensor([0.5, 1, -1, 0, 3])[:, None],
        torch.tensor([1, 0, 0, 1, 0]),
        torch.tensor([1.0, 2, 1, 1, 1]),
    )
    newest = [field[-min(size, 5) :] for field in stored]
    pool = Batch(
        torch.cat((live.logits.detach(), newest[0])),
        torch.cat((live.targets, newest[1])),
        torch.cat((torch.ones(3), newest[2])),
    )
    loss = live.through(loss_fn.eval())
    torch.testing.assert_close(loss, pool.through(SmoothAPLoss(1, 0, 0.3)), rtol=0, atol=1e-6)

    more = make_batch(20, seed=3)
    more.through(loss_fn.train())
    assert queued_rows(loss_fn) == rows_of(more)[-size:]


@pytest.mark.parametrize("name", ["_q_iid", "_q_weight"])
def test_an_early_checkpoint_of_the_predecessor_loads(name: str) -> None:
    state = predecessor_state()
    state["_queue._q_weight"].fill_(1)
    complete, early = (new_loss(num_classes=1, queue_size=8) for _ in range(2))
    complete.load_state_dict(state)
    del state[f"_queue.{name}"]
    early.load_state_dict(state)
    assert_same_state(early, state_of(complete))


@pytest.mark.parametrize("name", ["_q_targets", "_q_ptr"])
def test_a_checkpoint_of_the_predecessor_without_a_part_is_refused(name: str) -> None:
    state = predecessor_state()
    del state[f"_queue.{name}"]
    with pytest.raises(RuntimeError, match="Missing key"):
        new_loss(num_classes=1, queue_size=8).load_state_dict(state)


def test_a_poisoned_queue_of_the_predecessor_is_cleaned() -> None:
    state = predecessor_state()
    state["_queue._q_logits"][1] = torch.nan
    loss_fn = new_loss(num_classes=1, queue_size=8)
    loss_fn.load_state_dict(state)
    assert [row.logits for row in queued_rows(loss_fn)] == [(0.5,), (-1.0,), (0.0,), (3.0,)]
    assert make_batch(3).through(loss_fn).isfinite()


# --- Devices, dtypes and modes -------------------------------------------------------------------


def reset(loss_fn: SmoothAPLoss, state: State) -> None:
    loss_fn.reset_queue()


def load(loss_fn: SmoothAPLoss, state: State) -> None:
    loss_fn.load_state_dict(state)


def nothing(loss_fn: SmoothAPLoss, state: State) -> None:
    pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("then", [reset, load, nothing])
def test_to_meta_and_back(then: Callable[[SmoothAPLoss, State], None], dtype: torch.dtype) -> None:
    loss_fn = new_loss(num_classes=1)
    make_batch(4, dtype=dtype).through(loss_fn)
    state = state_of(loss_fn)
    rows = queued_rows(loss_fn) if then is load else []
    loss_fn.to("meta")
    assert all(buffer.is_meta for buffer in loss_fn.buffers())
    loss_fn.to_empty(device="cpu")
    then(loss_fn, state)
    assert queued_rows(loss_fn) == rows
    assert make_batch(3, seed=1).through(loss_fn).isfinite()


def test_built_on_meta_and_loaded_by_assignment() -> None:
    loss_fn = new_loss(num_classes=1)
    trained(loss_fn, range(2))
    with torch.device("meta"):
        other = new_loss(num_classes=1)
    other.load_state_dict(state_of(loss_fn), assign=True)
    expected = trained(loss_fn, range(2, 4))
    torch.testing.assert_close(trained(other, range(2, 4)), expected, rtol=0, atol=0)


def test_the_default_device_is_not_asked() -> None:
    """Rows, queue and draws stay where the logits are, whatever `torch.set_default_device` says."""
    loss_fn, other = (new_loss(num_classes=1, max_pool_size=8) for _ in range(2))
    expected = trained(loss_fn, range(3))
    first, second, third = (make_batch(7, seed=seed).leaf() for seed in range(3))
    resized = new_loss(num_classes=1, queue_size=4)
    with torch.device("meta"):
        losses = [batch.through(other).detach() for batch in (first, second, third)]
        resized.load_state_dict(other.state_dict())
    assert losses == [step[0] for step in expected]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inference_mode_and_then_training(dtype: torch.dtype, training: bool) -> None:
    loss_fn, plain = new_loss(num_classes=1), new_loss(num_classes=1)
    warm_up = make_batch(4, dtype=dtype)
    with torch.inference_mode():
        warm_up.through(loss_fn.train(training))
    with torch.no_grad():
        warm_up.through(plain.train(training))
    loss_fn.train()
    expected = trained(plain.train(), range(3))
    torch.testing.assert_close(trained(loss_fn, range(3)), expected, rtol=0, atol=0)


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_checkpoint_in_half_precision_does_not_make_the_queue_so(
    dtype: torch.dtype, assign: bool
) -> None:
    loss_fn = new_loss(num_classes=1)
    make_batch(4).through(loss_fn)
    state = state_of(loss_fn)
    for name in ("_queue.logits", "_queue.weights"):
        state[name] = state[name].to(dtype)
    other = new_loss(num_classes=1)
    other.load_state_dict(state, assign=assign)
    batch = make_batch(10, seed=1)
    batch.through(other)
    assert queued_rows(other) == rows_of(batch)


def test_float32_logits_beside_a_float64_queue_give_a_float32_loss() -> None:
    loss_fn = new_loss(num_classes=1)
    make_batch(4, dtype=torch.float64).through(loss_fn)
    assert make_batch(4).through(loss_fn).dtype == torch.float32


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_saved_tensors_have_a_storage_of_their_own(name: str) -> None:
    """A part of a larger one is refused by safetensors, and so by load_state of Accelerate."""
    loss_fn = SmoothAPLoss(**{"queue_size": 8, **CONFIGURATIONS[name]})
    for key, value in loss_fn.state_dict().items():
        assert value.untyped_storage().nbytes() == value.nbytes, key
