"""Checkpoints: what is saved, what loads, and that nothing is lost on the way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from imbalanced_losses import CrossEntropy, MixedLoss, SmoothAPLoss
from tests.helpers.rows import (
    Batch,
    assert_same_state,
    make_batch,
    queued_rows,
    rows_of,
    saved_and_loaded,
    saved_by_0_6,
    saved_by_0_9,
    state_of,
)

State = dict[str, Any]

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


FORMS: dict[str, Callable[[SmoothAPLoss], State]] = {"now": saved_and_loaded, "0.9": saved_by_0_9}
EACH_FORM = pytest.mark.parametrize("saved_by", FORMS.values(), ids=FORMS)


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


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
@EACH_FORM
@pytest.mark.parametrize("options", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_the_next_ten_steps_are_the_same(
    options: dict[str, Any], saved_by: Callable[[SmoothAPLoss], State], assign: bool
) -> None:
    """And the dictionary that was loaded stays as it is, whatever the loss does with it."""
    loss_fn, resumed = new_loss(**options), new_loss(**options)
    trained(loss_fn, range(2))  # 14 rows: the cursor stands inside the ring
    loss_fn.temperature = 0.07
    trained(loss_fn, range(2, 4), num_rows=3)

    state = saved_by(loss_fn)
    given, values = dict(state), {name: value.clone() for name, value in state.items()}
    assert resumed.load_state_dict(state, assign=assign) == ([], [])
    assert resumed.temperature == 0.07
    assert_same_state(resumed, state_of(loss_fn))
    expected = trained(loss_fn, range(4, 14))
    torch.testing.assert_close(trained(resumed, range(4, 14)), expected, rtol=0, atol=0)
    assert len({float(step[0]) for step in expected}) == 10
    assert_same_state(resumed, state_of(loss_fn))
    assert all(state[name] is given[name] for name in [*given, *state])
    torch.testing.assert_close(state, values, rtol=0, atol=0)


def test_whether_there_were_weights_is_saved() -> None:
    """Rows that all weigh 1 are summed by another way, whose last bit may differ."""
    loss_fn = new_loss(num_classes=1, queue_size=4)
    make_batch(4)._replace(weights=torch.arange(1.0, 5.0)).through(loss_fn)
    make_batch(4, seed=1).through(loss_fn)
    older = saved_by_0_9(loss_fn)
    for state, expected in (
        (loss_fn.state_dict(), True),
        (older, True),
        ({**older, "_queue.is_weighted": torch.tensor(False)}, False),
        ({key: older[key] for key in older if key != "_queue.is_weighted"}, False),  # up to 0.6
        (
            {
                **older,
                "_queue.is_weighted": torch.tensor(False),
                "_queue.weights": 2 * older["_queue.weights"],
            },
            True,
        ),
    ):
        other = new_loss(num_classes=1, queue_size=4)
        other.load_state_dict(state)
        assert other._queue.is_weighted is expected


# --- Another queue size --------------------------------------------------------------------------


@EACH_FORM
@pytest.mark.parametrize("num_rows", [0, 40, 64, 100])
@pytest.mark.parametrize(("saved", "loaded"), [(64, 0), (64, 1), (64, 32), (64, 128), (0, 64)])
def test_another_queue_size_keeps_the_newest_rows(
    saved: int, loaded: int, num_rows: int, saved_by: Callable[[SmoothAPLoss], State]
) -> None:
    loss_fn, other = (new_loss(num_classes=1, queue_size=size) for size in (saved, loaded))
    batch = make_batch(num_rows)
    for part in zip(batch.logits.split(30), batch.targets.split(30), strict=True):
        Batch(*part).through(loss_fn)
    other.load_state_dict(saved_by(loss_fn))
    expected = rows_of(batch)[max(0, num_rows - min(saved, loaded)) :]
    assert queued_rows(other) == expected
    assert int(other._queue.cursor) < max(1, loaded)

    more = make_batch(50, seed=1)
    more.through(other)
    assert queued_rows(other) == [*expected, *rows_of(more)][-loaded:] * (loaded > 0)


# --- Keys ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("absent", [{}, {"_extra_state": None}, {"_extra_state": 3}], ids=str)
def test_a_state_that_is_not_there_is_not_taken(absent: State) -> None:
    loss_fn = new_loss(num_classes=1)
    trained(loss_fn, range(2))
    before = state_of(loss_fn)
    missing, unexpected = loss_fn.load_state_dict({**absent, "extra": torch.zeros(1)}, strict=False)
    assert (missing, unexpected) == ([] if absent else ["_extra_state"], ["extra"])
    assert_same_state(loss_fn, before)
    if not absent:
        with pytest.raises(RuntimeError, match=r'Missing key.*"_extra_state"'):
            loss_fn.load_state_dict({})


@pytest.mark.parametrize("kind", ["alone", "mix"])
def test_an_unexpected_key_is_reported_and_nothing_taken(kind: str) -> None:
    loss_fn: Any = new_loss(num_classes=1)
    if kind == "mix":
        loss_fn = MixedLoss(CrossEntropy(1), loss_fn, main_weight=0.5, warmup_steps=1)
    state = state_of(loss_fn)
    for seed in range(3):
        make_batch(5, seed=seed).through(loss_fn)
    before = state_of(loss_fn)
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"extra"'):
        loss_fn.load_state_dict({**state, "extra": torch.zeros(1)})
    assert_same_state(loss_fn, before)
    loss_fn.load_state_dict({**state, "extra": torch.zeros(1)}, strict=False)
    assert_same_state(loss_fn, state)


# --- The predecessor's checkpoints ---------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "loss."], ids=["alone", "in-a-model"])
@pytest.mark.parametrize("size", [8, 3, 16])
def test_a_checkpoint_of_the_predecessor_loads(size: int, prefix: str) -> None:
    loss_fn = new_loss(num_classes=1, queue_size=size, temperature=0.3)
    module = nn.ModuleDict({"loss": loss_fn}) if prefix else loss_fn
    module.load_state_dict(saved_by_0_6(prefix))
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
    state = saved_by_0_6()
    state["_queue._q_weight"].fill_(1)
    complete, early = (new_loss(num_classes=1, queue_size=8) for _ in range(2))
    complete.load_state_dict(state)
    assert len(queued_rows(complete)) == 5
    del state[f"_queue.{name}"]
    early.load_state_dict(state)
    assert_same_state(early, state_of(complete))


# --- Devices, dtypes and modes -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_to_meta_and_back(dtype: torch.dtype) -> None:
    """Whoever fills a model's memory later does not know of the queue: it does not go."""
    loss_fn = new_loss(num_classes=1, target_prior=0.1)
    batch = make_batch(4, dtype=dtype)
    batch.through(loss_fn)
    expected = make_batch(3, seed=1).through(loss_fn.eval())
    loss_fn.to("meta")
    assert queued_rows(loss_fn) == rows_of(batch)
    shapes_only = Batch(batch.logits.to("meta"), batch.targets.to("meta"))
    assert shapes_only.through(loss_fn.train()).is_meta
    loss_fn.to_empty(device="cpu")
    assert queued_rows(loss_fn) == rows_of(batch)
    assert make_batch(3, seed=1).through(loss_fn.eval()) == expected


def test_the_default_device_is_not_asked() -> None:
    """Rows, queue and draws stay where the logits are, whatever `torch.set_default_device` says."""
    loss_fn, other = (new_loss(num_classes=1, max_pool_size=8) for _ in range(2))
    expected = trained(loss_fn, range(3))
    first, second, third = (make_batch(7, seed=seed).leaf() for seed in range(3))
    resized = [new_loss(num_classes=1, queue_size=4) for _ in FORMS]
    with torch.device("meta"):
        losses = [batch.through(other).detach() for batch in (first, second, third)]
        resized[0].load_state_dict(other.state_dict())
    resized[1].load_state_dict(saved_by_0_9(other))
    assert losses == [step[0] for step in expected]
    assert queued_rows(resized[0]) == queued_rows(resized[1]) == queued_rows(other)[-4:]


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
