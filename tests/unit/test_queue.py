"""The memory queue: a ring that behaves as a deque does, whatever happens to the loss."""

from __future__ import annotations

import copy
import math
import pickle
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from torch import Tensor

from imbalanced_losses import SmoothAPLoss
from imbalanced_losses._checks import tracing as _tracing
from imbalanced_losses._rows.checkpoint import pack_ranking
from imbalanced_losses._rows.pool import Pool
from tests.helpers.rows import (
    IGNORED,
    Batch,
    Row,
    assert_same_state,
    make_batch,
    queued_rows,
    rows_of,
    saved_and_loaded,
    saved_by_0_9,
    state_of,
)

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


# --- A state machine against collections.deque ---------------------------------------------------

# Plain rows are drawn more often than the others, or queues would hardly fill.
BATCHES = st.lists(
    st.sampled_from(
        ("row", "row", "row", "row", "ignored", "partly", "weightless", "nan", "inf", "-inf")
    ),
    max_size=9,
)
SIZES = st.integers(0, 6)
SEEDS = st.integers(0, 2**16)

BAD_CALLS: tuple[Callable[[SmoothAPLoss, Batch], Any], ...] = (
    lambda loss_fn, batch: loss_fn(batch.logits[:, :0], batch.targets),
    lambda loss_fn, batch: loss_fn(batch.logits, batch.targets + 7),
    lambda loss_fn, batch: loss_fn(batch.logits.double(), batch.targets - 9),
    lambda loss_fn, batch: loss_fn(batch.logits, batch.targets[1:]),
    lambda loss_fn, batch: loss_fn(
        batch.logits, batch.targets, sample_weight=torch.full((len(batch.logits),), math.nan)
    ),
)


COPIES = (copy.deepcopy, copy.copy, lambda it: pickle.loads(pickle.dumps(it)))


class Interrupted(BaseException):
    """What comes at any moment, such as Ctrl-C."""


def interrupt(*arguments: Any) -> Any:
    raise Interrupted


def load_refused(loss_fn: SmoothAPLoss, state: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        loss_fn.load_state_dict(state)


def with_state(loss_fn: SmoothAPLoss, **changes: Any) -> dict[str, Any]:
    return {"_extra_state": pack_ranking(loss_fn._saved()._replace(**changes))}


BAD_CHECKPOINTS: tuple[Callable[[SmoothAPLoss], Any], ...] = (
    lambda it: load_refused(it, with_state(it, temperature=-1.0), "temperature"),
    lambda it: load_refused(it, with_state(it, num_steps=math.nan), "num_steps"),
    lambda it: load_refused(it, {**saved_by_0_9(it), "_queue.logits": torch.ones(9, 2)}, "_queue"),
    lambda it: load_refused(it, {**it.state_dict(), "no_such_key": torch.ones(5)}, "no_such_key"),
)


class QueueMachine(RuleBasedStateMachine):
    """SmoothAPLoss beside a deque of the rows that its queue should hold."""

    @initialize(
        size=SIZES,
        num_classes=st.sampled_from((1, 3)),
        multilabel=st.booleans(),
        update_queue_in_eval=st.booleans(),
        max_pool_size=st.sampled_from((None, None, 4)),
    )
    def start(
        self,
        size: int,
        num_classes: int,
        multilabel: bool,
        update_queue_in_eval: bool,
        max_pool_size: int | None,
    ) -> None:
        self.num_classes, self.multilabel = num_classes, multilabel
        self.update_queue_in_eval = update_queue_in_eval
        self.max_pool_size = max_pool_size
        self.loss_fn = self.new_loss(size)
        self.rows: deque[Row] = deque(maxlen=size)
        self.ages: deque[int] = deque(maxlen=size)  # pushes since each of them came
        self.temperature, self.num_steps = 0.3, 0

    def new_loss(self, size: int) -> SmoothAPLoss:
        return SmoothAPLoss(
            self.num_classes,
            size,
            0.3,
            update_queue_in_eval=self.update_queue_in_eval,
            max_pool_size=self.max_pool_size,
            multilabel=self.multilabel,
        )

    def new_batch(self, kinds: list[str], seed: int, dtype: torch.dtype) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        num_rows, num_classes = len(kinds), self.num_classes
        logits = torch.randn(num_rows, num_classes, generator=generator, dtype=torch.float64)
        num_labels = 2 if self.multilabel or num_classes == 1 else num_classes
        shape = (num_rows, num_classes) if self.multilabel else (num_rows,)
        targets = torch.randint(num_labels, shape, generator=generator)
        each = self.multilabel and seed % 3 == 0  # label has a weight of its own
        weights = torch.randint(1, 5, shape if each else shape[:1], generator=generator) / 2
        for i, kind in enumerate(kinds):
            if kind == "ignored":
                targets[i] = IGNORED
            elif kind == "partly" and self.multilabel:
                targets[i, 0] = IGNORED
            elif kind == "weightless":
                weights[i] = 0
            elif kind in ("nan", "inf", "-inf"):
                logits[i, seed % num_classes] = float(kind)
        weighted = "weightless" in kinds or seed % 2 == 0
        return Batch(logits.to(dtype), targets, weights if weighted else None)

    def remember(self, batch: Batch) -> None:
        self.num_steps += self.loss_fn.training
        if self.loss_fn.training or self.update_queue_in_eval:
            new = [
                row
                for row in rows_of(batch)
                if all(map(math.isfinite, row.logits))
                and set(row.targets) != {IGNORED}
                and row.weight != 0
            ]
            self.rows.extend(new)
            self.ages = deque((age + 1 for age in self.ages), self.ages.maxlen)
            self.ages.extend(0 for _ in new)

    def expected_loss(self, batch: Batch) -> Tensor:
        """The loss, in float64, of the live rows and those of the deque in one batch."""
        rows = [*rows_of(batch), *self.rows]
        shape = (len(rows), self.num_classes)
        targets = torch.tensor([row.targets for row in rows], dtype=torch.int64)
        pool = Batch(
            torch.tensor([row.logits for row in rows], dtype=torch.float64).reshape(shape),
            targets.reshape(shape if self.multilabel else shape[:1]),
            self.weights_of(rows),
        )
        alone = SmoothAPLoss(
            self.num_classes, 0, self.loss_fn.temperature, multilabel=self.multilabel
        )
        return pool.through(alone)

    def weights_of(self, rows: list[Row]) -> Tensor:
        if not self.multilabel:
            return torch.tensor([row.weight for row in rows], dtype=torch.float64)
        each = [torch.tensor(row.weight).expand(self.num_classes) for row in rows]
        return torch.stack(each).double() if rows else torch.ones(0, self.num_classes)

    @rule(
        kinds=BATCHES,
        seed=SEEDS,
        dtype=st.sampled_from(DTYPES),
        mode=st.sampled_from((torch.enable_grad, torch.no_grad, torch.inference_mode)),
    )
    def forward(
        self, kinds: list[str], seed: int, dtype: torch.dtype, mode: Callable[[], Any]
    ) -> None:
        batch = self.new_batch(kinds, seed, dtype)
        with mode():
            loss = batch.through(self.loss_fn)
        if self.max_pool_size is None:
            expected = self.expected_loss(batch)
            torch.testing.assert_close(loss.double(), expected, rtol=0, atol=2e-5, equal_nan=True)
        self.remember(batch)

    @rule(call=st.sampled_from(BAD_CALLS), kinds=BATCHES, seed=SEEDS)
    def forward_refused(
        self, call: Callable[[SmoothAPLoss, Batch], Any], kinds: list[str], seed: int
    ) -> None:
        batch = self.new_batch(["row", *kinds], seed, torch.float32)
        before = state_of(self.loss_fn)
        with pytest.raises(ValueError, match=r"^(logits|targets|sample_weight) must be"):
            call(self.loss_fn, batch)
        assert_same_state(self.loss_fn, before)

    @rule(
        kinds=BATCHES,
        seed=SEEDS,
        dtype=st.sampled_from(DTYPES),
        where=st.sampled_from(("_pool", "_problems", "_per_class")),
    )
    def forward_interrupted(
        self, kinds: list[str], seed: int, dtype: torch.dtype, where: str
    ) -> None:
        before = state_of(self.loss_fn)
        setattr(self.loss_fn, where, interrupt)
        with pytest.raises(Interrupted):
            self.new_batch(kinds, seed, dtype).through(self.loss_fn)
        delattr(self.loss_fn, where)
        assert_same_state(self.loss_fn, before)

    @rule(kinds=BATCHES, seed=SEEDS, dtype=st.sampled_from(DTYPES))
    def diagnose(self, kinds: list[str], seed: int, dtype: torch.dtype) -> None:
        before = state_of(self.loss_fn)
        self.loss_fn.diagnose(*self.new_batch(kinds, seed, dtype)[:2])
        assert_same_state(self.loss_fn, before)

    @rule(load=st.sampled_from(BAD_CHECKPOINTS))
    def load_refused(self, load: Callable[[SmoothAPLoss], Any]) -> None:
        before = state_of(self.loss_fn)
        load(self.loss_fn)
        assert_same_state(self.loss_fn, before)

    @rule(training=st.booleans())
    def train(self, training: bool) -> None:
        self.loss_fn.train(training)

    @rule(temperature=st.sampled_from((0.05, 0.3, 2.0)))
    def assign_temperature(self, temperature: float) -> None:
        self.loss_fn.temperature = self.temperature = temperature

    @rule()
    def reset_queue(self) -> None:
        self.loss_fn.reset_queue()
        self.rows.clear()
        self.ages.clear()

    @rule(size=SIZES, assign=st.booleans(), is_new=st.booleans())
    def load_into_size(self, size: int, assign: bool, is_new: bool) -> None:
        """Of this version, or of 0.9, which had no weights of labels."""
        other = self.new_loss(size)
        for num_rows in (4, 1):
            self.new_batch(["row"] * num_rows, 1, torch.float32).through(other)
        other.train(self.loss_fn.training)
        state = saved_and_loaded(self.loss_fn)
        if not (is_new or any(isinstance(row.weight, tuple) for row in self.rows)):
            state = saved_by_0_9(self.loss_fn)
        other.load_state_dict(state, assign=assign)
        self.loss_fn, self.rows = other, deque(self.rows, maxlen=size)
        self.ages = deque((0 for _ in self.rows), maxlen=size)

    @rule(copied=st.sampled_from(COPIES))
    def copy_and_spoil_the_original(self, copied: Callable[[SmoothAPLoss], SmoothAPLoss]) -> None:
        original, self.loss_fn = self.loss_fn, copied(self.loss_fn)
        self.new_batch(["row"] * 9, 0, torch.float32).through(original.train())
        original.reset_queue()

    @rule(dtype=st.sampled_from(DTYPES))
    def cast(self, dtype: torch.dtype) -> None:
        self.loss_fn.to(dtype)

    @invariant()
    def queue_holds_the_rows_of_the_deque(self) -> None:
        if hasattr(self, "rows"):
            assert queued_rows(self.loss_fn) == list(self.rows)
            assert sorted(self.loss_fn._queue.ages().tolist()) == sorted(self.ages)
            assert self.loss_fn.temperature == self.temperature
            assert self.loss_fn._queue.num_steps == self.num_steps


TestQueueMachine = QueueMachine.TestCase
TestQueueMachine.settings = settings(
    max_examples=2 * settings().max_examples,
    stateful_step_count=30,
    derandomize=True,
    deadline=None,
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)


# --- The same, one fact at a time ----------------------------------------------------------------


def test_the_queue_keeps_copies_without_graph() -> None:
    loss_fn = SmoothAPLoss(1, 4)
    batch = make_batch(3).leaf()
    expected = rows_of(make_batch(3))
    batch.through(loss_fn)
    with torch.no_grad():
        batch.logits.zero_()
    batch.targets.zero_()
    assert queued_rows(loss_fn) == expected
    assert not loss_fn._queue.logits.requires_grad


def test_float64_rows_that_come_later_lose_no_digit() -> None:
    loss_fn = SmoothAPLoss(1, 8)
    single, double = make_batch(3), make_batch(3, seed=1, dtype=torch.float64)
    single.through(loss_fn)
    double.through(loss_fn)
    assert queued_rows(loss_fn) == [*rows_of(single), *rows_of(double)]
    assert rows_of(double) != rows_of(double._replace(logits=double.logits.float()))


# --- Where nothing is read back to the host ------------------------------------------------------


def with_unusable_rows(batch: Batch) -> Batch:
    """Every fourth row is ignored, or infinite, or of weight zero."""
    batch.targets[::4] = IGNORED
    batch.logits[1::8] = math.inf
    weights = torch.arange(len(batch.logits)).add(2).remainder(5).float()
    return batch._replace(weights=weights)


@pytest.mark.parametrize("multilabel", [False, True], ids=["one label", "multilabel"])
@pytest.mark.parametrize("num_rows", [6, 8, 9, 13, 40])
def test_rows_on_a_device_are_stored_alike(
    num_rows: int, multilabel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = [
        make_batch(4, 2, seed=1, multilabel=multilabel),
        with_unusable_rows(make_batch(num_rows, 2, seed=2, multilabel=multilabel)),
        make_batch(3, 2, seed=3, multilabel=multilabel),
    ]
    on_host, on_device = (SmoothAPLoss(2, 6, 0.3, multilabel=multilabel) for _ in range(2))
    expected = [batch.through(on_host) for batch in batches]
    monkeypatch.setattr(_tracing, "HOSTS", ())
    found = [batch.through(on_device) for batch in batches]
    torch.testing.assert_close(found, expected)
    assert_same_state(on_device, on_host.state_dict())


@pytest.mark.parametrize("num_rows", [3, 6, 7, 15])
def test_no_two_rows_on_a_device_take_the_same_slot(num_rows: int) -> None:
    """Which of two would stay is not defined there."""
    queue = SmoothAPLoss(2, queue_size=6)._queue
    batch = make_batch(num_rows, 2)
    _, slots, count = queue._placed(Pool(batch.logits, batch.targets, None))
    taken = slots[slots < 6].tolist()
    assert len(set(taken)) == len(taken) == int(count) == min(num_rows, 6)


# --- What is ranked with a batch -----------------------------------------------------------------


def test_rows_have_weights_from_the_first_weighted_one_on() -> None:
    loss_fn = SmoothAPLoss(1, queue_size=8)
    batch = Pool(torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64), None)
    make_batch(3).through(loss_fn)
    make_batch(3)._replace(weights=torch.ones(3)).through(loss_fn)
    assert loss_fn._queue.rows_beside(batch).weights is None
    make_batch(3)._replace(weights=torch.full((3,), 2.0)).through(loss_fn)
    weights = loss_fn._queue.rows_beside(batch).weights
    assert weights is not None
    assert weights.tolist() == [2, 1, 1, 1, 1, 1, 2, 2]
