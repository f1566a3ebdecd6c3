"""`MixedLoss`: weights, schedules, the switch, and runs that resume."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from imbalanced_losses import CrossEntropy, MixedLoss, SmoothAPLoss
from imbalanced_losses.functional import score_spread
from tests.helpers.ranks import WORLD_SIZE, Failure, Ranks
from tests.helpers.rows import assert_same_state, make_batch, saved_by_0_9, state_of


def make_mix(**options: Any) -> MixedLoss:
    main = {"queue_size": 8, "temperature": 0.3, **options.pop("main", {})}
    options = {"main_weight": 0.75, **options}
    return MixedLoss(CrossEntropy(1), SmoothAPLoss(1, **main), **options)


def run(loss_fn: MixedLoss, steps: int, start: int = 0) -> list[float]:
    """The loss of each step of a model that learns."""
    losses = []
    for step in range(start, start + steps):
        batch = make_batch(6, seed=step)
        losses.append(loss_fn(batch.logits, batch.targets).item())
    return losses


def weights_of(loss_fn: MixedLoss, calls: int) -> list[float]:
    """w of each call, as the property said before it and as the loss had it."""
    weights = []
    for step in range(calls):
        weights.append(loss_fn.main_weight)
        batch = make_batch(6, seed=step)
        main, auxiliary = copy.deepcopy(loss_fn.main_loss), loss_fn.auxiliary_loss
        if not loss_fn._has_switched and weights[-1] > 0:
            main.reset_queue()
        expected = (1 - weights[-1]) * auxiliary(batch.logits, batch.targets)
        if weights[-1] > 0:
            expected = expected + weights[-1] * main(batch.logits, batch.targets)
        torch.testing.assert_close(loss_fn(batch.logits, batch.targets), expected)
    return weights


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.75] * 4),
        ({"warmup_steps": 2}, [0, 0, 0.75, 0.75]),
        ({"blend_steps": 2}, [0.25, 0.5, 0.75, 0.75]),
        ({"warmup_steps": 1, "blend_steps": 2}, [0, 0.25, 0.5, 0.75]),
        ({"warmup_steps": 1, "main_weight": 1}, [0, 1, 1, 1]),
        ({"warmup_steps": 1, "blend_steps": 1, "calls_per_step": 2}, [0, 0, 0.375, 0.375, 0.75]),
        ({"warmup_steps": 1, "calls_per_step": None}, [0] * 4),
    ],
)
def test_the_weight_of_each_call(options: dict[str, Any], expected: list[float]) -> None:
    assert weights_of(make_mix(**options), len(expected)) == expected


def test_steps_of_ones_own() -> None:
    loss_fn = make_mix(warmup_steps=1, calls_per_step=None)
    run(loss_fn, 3)
    assert loss_fn.in_warmup
    loss_fn.step()
    assert loss_fn.main_weight == 0.75
    with pytest.raises(RuntimeError, match=r"steps are counted by calls \(calls_per_step=1\)"):
        make_mix().step()


def test_a_loss_of_weight_zero_is_not_computed() -> None:
    loss_fn = make_mix(main_weight=1, warmup_steps=1)
    calls = []
    for name in ("auxiliary_loss", "main_loss"):
        getattr(loss_fn, name).register_forward_hook(lambda *_, name=name: calls.append(name))
    run(loss_fn, 3)
    assert calls == ["auxiliary_loss", "main_loss", "main_loss"]


def test_evaluation_counts_nothing() -> None:
    loss_fn = make_mix(warmup_steps=2).eval()
    before = state_of(loss_fn)
    run(loss_fn, 3)
    assert_same_state(loss_fn, before)


def test_an_error_counts_nothing() -> None:
    for options in ({}, {"warmup_steps": 2}):
        loss_fn = make_mix(**options)
        before = state_of(loss_fn)
        with pytest.raises(ValueError, match="targets must be"):
            loss_fn(torch.zeros(2, 1), torch.tensor([0, 5]))
        assert_same_state(loss_fn, before)


def test_an_error_in_the_warm_up_is_no_business_of_the_main_loss(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Other ranks do not rank yet: none of them waits for this one."""
    refused: list[Exception] = []
    loss_fn = make_mix(warmup_steps=1)
    monkeypatch.setattr(loss_fn.main_loss, "_batch", lambda *_, error: refused.append(error))
    for _ in range(2):
        with pytest.raises(ValueError, match="targets must be"):
            loss_fn(torch.zeros(2, 1), torch.tensor([0, 5]))
        loss_fn._num_steps = 1
    assert len(refused) == 1


# --- The switch -----------------------------------------------------------------------------------


def test_the_queue_is_emptied_where_the_main_loss_begins() -> None:
    loss_fn = make_mix(warmup_steps=2, main={"queue_size": 50})
    loss_fn.main_loss(*make_batch(30, seed=9)[:2])  # rows from before
    run(loss_fn, 2)
    assert int((loss_fn.main_loss._queue.targets >= 0).sum()) == 30
    run(loss_fn, 1, 2)
    assert int((loss_fn.main_loss._queue.targets >= 0).sum()) == 6
    run(loss_fn, 1, 3)
    assert int((loss_fn.main_loss._queue.targets >= 0).sum()) == 12


@pytest.mark.parametrize("schedule", [None, (0.3, 0.3, 1)])
def test_the_temperature_is_refitted_once(schedule: Any) -> None:
    loss_fn = make_mix(warmup_steps=2, refit_temperature=True, temperature=schedule)
    run(loss_fn, 2)
    assert loss_fn.current_temperature == 0.3
    batch = make_batch(6, seed=2)
    loss_fn(10 * batch.logits, batch.targets)
    expected = 0.3 * float(score_spread(10 * batch.logits.flatten()))
    assert loss_fn.main_loss.temperature == pytest.approx(expected, rel=1e-6)
    run(loss_fn, 2, 3)
    assert loss_fn.main_loss.temperature == pytest.approx(expected, rel=1e-6)
    assert loss_fn.current_temperature == loss_fn.main_loss.temperature


def test_the_temperature_goes_geometrically_from_start_to_end() -> None:
    loss_fn = make_mix(warmup_steps=1, temperature=(1.0, 0.01, 4))
    found = []
    for step in range(7):
        found.append(loss_fn.current_temperature)
        run(loss_fn, 1, step)
        if step > 0:
            assert loss_fn.main_loss.temperature == found[-1]
    root = 0.01**0.25
    assert found == pytest.approx([1, 1, root, root**2, root**3, 0.01, 0.01])


# --- Resuming -------------------------------------------------------------------------------------

SCHEDULES = {
    "constant": {},
    "warm-up": {"warmup_steps": 4, "blend_steps": 3},
    "annealed": {"temperature": (1.0, 0.05, 9), "warmup_steps": 2},
    "refitted": {"warmup_steps": 3, "refit_temperature": True},
    "refitted-annealed": {
        "warmup_steps": 3,
        "refit_temperature": True,
        "temperature": (1.0, 0.1, 4),
    },
    "accumulated": {"warmup_steps": 2, "blend_steps": 2, "calls_per_step": 2},
    "capped": {"warmup_steps": 2, "main": {"max_pool_size": 8}},
}


@pytest.mark.parametrize("saved_by", [state_of, saved_by_0_9], ids=["now", "0.9"])
@pytest.mark.parametrize("options", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("stop", range(9))
def test_a_resumed_run_goes_on_exactly(
    options: dict[str, Any], stop: int, saved_by: Callable[[MixedLoss], dict[str, Any]]
) -> None:
    loss_fn, resumed = (make_mix(**copy.deepcopy(options)) for _ in range(2))
    run(loss_fn, stop)
    run(resumed, 2)
    resumed.load_state_dict(saved_by(loss_fn))
    assert run(resumed, 9 - stop, stop) == run(loss_fn, 9 - stop, stop)
    assert_same_state(resumed, state_of(loss_fn))


# --- Ranks ----------------------------------------------------------------------------------------


def train(rank: int | None, options: dict[str, Any]) -> list[Tensor]:
    """Gradients by the scores of a rank's rows, or of all rows in one process."""
    loss_fn = make_mix(**options)
    sizes = [6] * WORLD_SIZE
    found = []
    for step in range(4):
        batch = make_batch(sum(sizes), seed=step, dtype=torch.float64).leaf()
        rows = slice(None) if rank is None else slice(6 * rank, 6 * rank + 6)
        loss_fn(batch.logits[rows], batch.targets[rows]).backward()
        found.append(batch.logits.grad)
    return found


@pytest.mark.parametrize("main", [{}, {"gather": "sums", "queue_size": 0}], ids=["rows", "sums"])
def test_ranks_switch_together(ranks: Ranks, main: dict[str, Any]) -> None:
    options = {"warmup_steps": 1, "blend_steps": 1, "refit_temperature": True, "main": main}
    by_rank = ranks.run(train, options)
    assert not isinstance(by_rank[0], Failure), by_rank[0]
    alone = train(None, options)
    for step, expected in enumerate(alone):
        mean = sum(found[step] for found in by_rank) / WORLD_SIZE
        torch.testing.assert_close(mean, expected, rtol=1e-10, atol=1e-12)


def bad_at_the_switch(rank: int) -> None:
    loss_fn = make_mix(warmup_steps=1, refit_temperature=True)
    run(loss_fn, 1)
    batch = make_batch(6)
    loss_fn(batch.logits, batch.targets + (9 if rank else 0))


def test_bad_input_at_the_switch_is_an_error_on_every_rank(ranks: Ranks) -> None:
    for found in ranks.run(bad_at_the_switch):
        assert isinstance(found, Failure)
        assert found.error == "ValueError"
        assert "on rank 1: targets must be" in found.message


# --- Arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "error", "name"), [
    ({"main_weight": 0}, ValueError, "main_weight must be finite and > 0"),
    ({"main_weight": 1.5}, ValueError, "main_weight"),
    ({"main_weight": 1}, ValueError, "main_weight must be below 1 without warmup_steps"),
    ({"main_weight": "1"}, TypeError, "main_weight"),
    ({"warmup_steps": -1}, ValueError, "warmup_steps"),
    ({"blend_steps": 1.0}, TypeError, "blend_steps"),
    ({"temperature": 0.1}, TypeError, "temperature"),
    ({"temperature": (0.0, 1.0, 3)}, ValueError, "temperature's start"),
    ({"temperature": (1.0, 0.0, 3)}, ValueError, "temperature's end"),
    ({"temperature": (1.0, 1.0, 0)}, ValueError, "temperature's steps"),
    ({"calls_per_step": 0}, ValueError, "calls_per_step"),
    ({"refit_temperature": 1}, TypeError, "refit_temperature"),
    ({"refit_temperature": True}, ValueError, "refit_temperature=True needs warmup_steps"),
    ({"refit_temperature": True, "warmup_steps": 1, "main": {"temperature_unit": "spread"}},
        ValueError, "refit_temperature"),
    ({"main": {"reduction": "none"}}, ValueError, "main_loss must have reduction"),
])  # fmt: skip
def test_bad_arguments(options: dict[str, Any], error: type[Exception], name: str) -> None:
    with pytest.raises(error, match=f"^{name}"):
        make_mix(**options)
