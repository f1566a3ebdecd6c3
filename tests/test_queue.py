"""The memory queue: a ring that behaves as a deque does, whatever happens to the loss."""

from __future__ import annotations

import copy
import io
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
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from imbalanced_losses import SmoothAPLoss, _tracing
from imbalanced_losses._base import _is_same
from imbalanced_losses._pool import Pool
from tests.rows import (
    IGNORED,
    Batch,
    Row,
    assert_same_state,
    make_batch,
    queued_rows,
    rows_of,
    state_of,
)

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def through_checkpoint(loss_fn: SmoothAPLoss, batch: Batch, use_reentrant: bool) -> Tensor:
    """The loss of a batch inside activation checkpointing."""

    def run(logits: Tensor) -> Tensor:
        return batch._replace(logits=logits).through(loss_fn)

    loss: Tensor = checkpoint(run, batch.logits, use_reentrant=use_reentrant)
    return loss


def saved_and_loaded(loss_fn: SmoothAPLoss) -> dict[str, Tensor]:
    file = io.BytesIO()
    torch.save(loss_fn.state_dict(), file)
    file.seek(0)
    state: dict[str, Tensor] = torch.load(file, weights_only=True)
    return state


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


class Interrupted(BaseException):
    """What comes at any moment, such as Ctrl-C."""


def interrupt(*arguments: Any) -> Any:
    raise Interrupted


def load_refused(loss_fn: SmoothAPLoss, name: str, value: Tensor) -> None:
    with pytest.raises(RuntimeError, match=name):
        loss_fn.load_state_dict({**loss_fn.state_dict(), name: value})


BAD_CHECKPOINTS: tuple[Callable[[SmoothAPLoss], Any], ...] = (
    lambda loss_fn: load_refused(loss_fn, "temperature", torch.tensor(-1.0)),
    lambda loss_fn: load_refused(loss_fn, "num_steps", torch.tensor(math.nan)),
    lambda loss_fn: load_refused(loss_fn, "_queue.logits", torch.ones(5, 2)),
    lambda loss_fn: load_refused(loss_fn, "no_such_key", torch.ones(5)),
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
        weights = torch.randint(1, 5, (num_rows,), generator=generator) / 2
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
            self.rows.extend(
                row
                for row in rows_of(batch)
                if all(map(math.isfinite, row.logits))
                and set(row.targets) != {IGNORED}
                and row.weight > 0
            )

    def expected_loss(self, batch: Batch) -> Tensor:
        """The loss, in float64, of the live rows and those of the deque in one batch."""
        rows = [*rows_of(batch), *self.rows]
        shape = (len(rows), self.num_classes)
        targets = torch.tensor([row.targets for row in rows], dtype=torch.int64)
        pool = Batch(
            torch.tensor([row.logits for row in rows], dtype=torch.float64).reshape(shape),
            targets.reshape(shape if self.multilabel else shape[:1]),
            torch.tensor([row.weight for row in rows], dtype=torch.float64),
        )
        alone = SmoothAPLoss(
            self.num_classes, 0, self.loss_fn.temperature, multilabel=self.multilabel
        )
        return pool.through(alone)

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

    @rule(kinds=BATCHES, seed=SEEDS, dtype=st.sampled_from(DTYPES), use_reentrant=st.booleans())
    def forward_recomputed(
        self, kinds: list[str], seed: int, dtype: torch.dtype, use_reentrant: bool
    ) -> None:
        batch = self.new_batch(kinds, seed, dtype)
        twin, plain, recomputed = copy.deepcopy(self.loss_fn), batch.leaf(), batch.leaf()
        plain.through(twin).backward()
        through_checkpoint(self.loss_fn, recomputed, use_reentrant).backward()
        torch.testing.assert_close(
            recomputed.logits.grad, plain.logits.grad, rtol=0, atol=0, equal_nan=True
        )
        assert_same_state(self.loss_fn, state_of(twin))
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
        where=st.sampled_from(("_extended", "_capped", "_per_class")),
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

    @rule(size=SIZES, assign=st.booleans())
    def load_into_size(self, size: int, assign: bool) -> None:
        other = self.new_loss(size).train(self.loss_fn.training)
        other.load_state_dict(saved_and_loaded(self.loss_fn), assign=assign)
        self.loss_fn, self.rows = other, deque(self.rows, maxlen=size)

    @rule(copied=st.sampled_from((copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it)))))
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
            assert self.loss_fn.temperature == self.temperature
            assert self.loss_fn.state_dict()["num_steps"] == self.num_steps


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


@pytest.mark.parametrize("num_rows", [0, 1, 5, 6, 7, 12, 13])
def test_the_newest_rows_stay(num_rows: int) -> None:
    loss_fn = SmoothAPLoss(2, queue_size=6)
    first, second = make_batch(4, 2, seed=1), make_batch(num_rows, 2, seed=2)
    first.through(loss_fn)
    second.through(loss_fn)
    assert queued_rows(loss_fn) == [*rows_of(first), *rows_of(second)][-6:]


def test_the_pool_is_the_batch_and_the_queue() -> None:
    loss_fn = SmoothAPLoss(3, 8, 0.2)
    first, second = make_batch(5, 3, seed=1), make_batch(4, 3, seed=2).leaf()
    first.through(loss_fn)
    second.through(loss_fn).backward()

    pool = make_batch(4, 3, seed=2).leaf()
    rows = Batch(torch.cat((pool.logits, first.logits)), torch.cat((pool.targets, first.targets)))
    rows.through(SmoothAPLoss(3, 0, 0.2)).backward()
    torch.testing.assert_close(second.logits.grad, pool.logits.grad, rtol=1e-6, atol=1e-7)


def unusable_batches() -> list[Any]:
    clean = make_batch(2, 2)
    nan, infinite = clean.logits.clone(), clean.logits.clone()
    nan[:, 1], infinite[:, 0] = math.nan, -math.inf
    ignored = torch.full((2,), IGNORED)
    return [
        pytest.param(clean._replace(targets=ignored), id="ignored"),
        pytest.param(clean._replace(logits=nan), id="nan"),
        pytest.param(clean._replace(logits=infinite), id="infinite"),
        pytest.param(clean._replace(weights=torch.zeros(2)), id="weight-zero"),
        pytest.param(Batch(clean.logits[:0], clean.targets[:0]), id="no-rows"),
    ]


@pytest.mark.parametrize("unusable", unusable_batches())
def test_rows_that_take_no_slot(unusable: Batch) -> None:
    loss_fn = SmoothAPLoss(2, queue_size=4)
    kept = make_batch(3, 2, seed=1)
    kept.through(loss_fn)
    before = state_of(loss_fn)
    before["num_steps"] += 1
    unusable.through(loss_fn)
    assert_same_state(loss_fn, before)

    after = make_batch(2, 2, seed=2)
    assert after.through(loss_fn).isfinite()
    assert queued_rows(loss_fn) == [*rows_of(kept), *rows_of(after)][-4:]


def test_rows_between_unusable_ones_are_stored_in_order() -> None:
    loss_fn = SmoothAPLoss(1, queue_size=8)
    batch = make_batch(6)
    batch.logits[1], batch.targets[3] = math.nan, IGNORED
    weights = torch.tensor([1.0, 1, 2, 1, 0, 3])
    batch._replace(weights=weights).through(loss_fn)
    assert queued_rows(loss_fn) == [rows_of(batch._replace(weights=weights))[i] for i in (0, 2, 5)]


@pytest.mark.parametrize("update_queue_in_eval", [False, True])
def test_eval_mode(update_queue_in_eval: bool) -> None:
    loss_fn = SmoothAPLoss(1, 4, update_queue_in_eval=update_queue_in_eval).eval()
    batch = make_batch(3)
    batch.through(loss_fn)
    assert queued_rows(loss_fn) == (rows_of(batch) if update_queue_in_eval else [])
    assert loss_fn.state_dict()["num_steps"] == 0


def test_without_gradient_the_queue_still_fills() -> None:
    loss_fn = SmoothAPLoss(1, 4)
    batch = make_batch(3)
    with torch.no_grad():
        batch.through(loss_fn)
    assert queued_rows(loss_fn) == rows_of(batch)


def test_the_queue_keeps_copies_without_graph() -> None:
    loss_fn = SmoothAPLoss(1, 4)
    batch = make_batch(3).leaf()
    expected = rows_of(make_batch(3))
    batch.through(loss_fn)
    with torch.no_grad():
        batch.logits.zero_()
    batch.targets.zero_()
    assert queued_rows(loss_fn) == expected
    assert not any(value.requires_grad for value in loss_fn.state_dict().values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_casting_the_module_loses_no_digit(dtype: torch.dtype) -> None:
    loss_fn = SmoothAPLoss(1, 4)
    batch = make_batch(3)
    batch.through(loss_fn)
    nn.ModuleList([loss_fn]).to(dtype)
    assert queued_rows(loss_fn) == rows_of(batch)


def test_float64_rows_that_come_later_lose_no_digit() -> None:
    loss_fn = SmoothAPLoss(1, 8)
    single, double = make_batch(3), make_batch(3, seed=1, dtype=torch.float64)
    single.through(loss_fn)
    double.through(loss_fn)
    assert queued_rows(loss_fn) == [*rows_of(single), *rows_of(double)]
    assert rows_of(double) != rows_of(double._replace(logits=double.logits.float()))


def test_reset_queue() -> None:
    loss_fn = SmoothAPLoss(3, 8, 0.2)
    fresh = state_of(loss_fn)
    make_batch(5, 3).through(loss_fn)
    loss_fn.reset_queue()
    fresh["num_steps"] += 1  # the draws of max_pool_size do not start again
    assert_same_state(loss_fn, fresh)


# --- Activation checkpointing --------------------------------------------------------------------

BOTH_KINDS = pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "hooks"])
Step = Callable[[Tensor, Tensor], Tensor]


def four_steps(
    loss_fn: SmoothAPLoss, run: Callable[[Step, Tensor, Tensor], Tensor]
) -> list[Tensor]:
    """Gradients of a small model over four steps of `loss_fn(model(x), y)`."""
    model = nn.Linear(5, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(make_batch(2, 5, seed=9).logits)

    def step(features: Tensor, targets: Tensor) -> Tensor:
        return loss_fn(model(features), targets)

    gradients = []
    for seed in range(4):
        model.zero_grad()
        features = make_batch(7, 5, seed=seed).leaf().logits
        run(step, features, make_batch(7, 2).targets.roll(seed)).backward()
        assert model.weight.grad is not None
        gradients.append(model.weight.grad.clone())
    return gradients


@BOTH_KINDS
@pytest.mark.parametrize("queue_size", [0, 4, 16])
@pytest.mark.parametrize(
    "options",
    [{}, {"max_pool_size": 6}, {"queue_follows_shift": True}, {"temperature_unit": "spread"}],
    ids=["plain", "max_pool_size", "queue_follows_shift", "spread"],
)
def test_recomputed_training_is_the_same_training(
    options: dict[str, Any], queue_size: int, use_reentrant: bool
) -> None:
    plain, recomputed = (SmoothAPLoss(2, queue_size, 0.3, **options) for _ in range(2))
    expected = four_steps(plain, lambda step, x, y: step(x, y))
    found = four_steps(
        recomputed, lambda step, x, y: checkpoint(step, x, y, use_reentrant=use_reentrant)
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert all(gradient.any() for gradient in expected)
    assert_same_state(recomputed, state_of(plain))


@BOTH_KINDS
def test_an_eval_forward_between_forward_and_backward_changes_nothing(use_reentrant: bool) -> None:
    loss_fn = SmoothAPLoss(1, 4, 0.3)
    make_batch(4).through(loss_fn)
    twin, plain, recomputed = copy.deepcopy(loss_fn), make_batch(3, seed=1), make_batch(3, seed=1)
    (plain := plain.leaf()).through(twin).backward()

    loss = through_checkpoint(loss_fn, recomputed := recomputed.leaf(), use_reentrant)
    make_batch(5, seed=2).through(loss_fn.eval())
    loss_fn.train()
    loss.backward()
    torch.testing.assert_close(recomputed.logits.grad, plain.logits.grad, rtol=0, atol=0)


def test_backward_twice_recomputes_the_same() -> None:
    loss_fn = SmoothAPLoss(1, 4, 0.3)
    make_batch(4).through(loss_fn)
    batch = make_batch(3, seed=1).leaf()
    loss = through_checkpoint(loss_fn, batch, use_reentrant=False)
    (first,) = torch.autograd.grad(loss, batch.logits, retain_graph=True)
    (second,) = torch.autograd.grad(loss, batch.logits)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert first.any()


@BOTH_KINDS
@pytest.mark.parametrize(
    "targets",
    [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]],
    ids=["the-same-targets", "other-targets", "no-positive"],
)
def test_recomputing_an_older_forward_is_refused(targets: list[int], use_reentrant: bool) -> None:
    loss_fn = SmoothAPLoss(1, 4, 0.3)
    make_batch(4).through(loss_fn)
    older = Batch(make_batch(4, seed=1).logits, torch.tensor([1, 0, 0, 0])).leaf()
    newer = Batch(make_batch(4, seed=2).logits, torch.tensor(targets))
    loss = through_checkpoint(loss_fn, older, use_reentrant)
    newer.through(loss_fn)
    before = state_of(loss_fn)
    with pytest.raises(RuntimeError, match="is being recomputed"):
        loss.backward()
    assert_same_state(loss_fn, before)


@BOTH_KINDS
def test_an_older_forward_without_a_queue_can_be_recomputed(use_reentrant: bool) -> None:
    """Two micro-batches summed before backward; the loss keeps nothing that they could disturb."""
    loss_fn = SmoothAPLoss(1, 0, 0.3)
    batches = [make_batch(4, seed=1).leaf(), make_batch(5, seed=2).leaf()]
    sum(through_checkpoint(loss_fn, batch, use_reentrant) for batch in batches).backward()
    for batch in batches:
        plain = batch.leaf()
        plain.through(loss_fn).backward()
        torch.testing.assert_close(batch.logits.grad, plain.logits.grad, rtol=0, atol=0)


@BOTH_KINDS
@pytest.mark.parametrize(
    "change",
    [
        lambda loss_fn: loss_fn.reset_queue(),
        lambda loss_fn: loss_fn.load_state_dict(loss_fn.state_dict()),
    ],
    ids=["reset_queue", "load_state_dict"],
)
def test_recomputing_over_a_changed_queue_is_refused(
    change: Callable[[SmoothAPLoss], Any], use_reentrant: bool
) -> None:
    loss_fn = SmoothAPLoss(1, 4, 0.3)
    loss = through_checkpoint(loss_fn, make_batch(4).leaf(), use_reentrant)
    change(loss_fn)
    with pytest.raises(RuntimeError, match="is being recomputed"):
        loss.backward()


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


# --- How old the rows are ------------------------------------------------------------------------


@pytest.mark.parametrize("multilabel", [False, True], ids=["one label", "multilabel"])
def test_ages_are_of_the_rows_held(multilabel: bool) -> None:
    loss_fn = SmoothAPLoss(2, queue_size=8, multilabel=multilabel)
    for num_rows, expected in ((3, [0, 0, 0]), (4, [1, 1, 1, 0, 0, 0, 0])):
        make_batch(num_rows, 2, multilabel=multilabel).through(loss_fn)
        assert loss_fn._queue.ages().tolist() == expected


@pytest.mark.parametrize("num_rows", [3, 6, 7, 15])
def test_no_two_rows_on_a_device_take_the_same_slot(num_rows: int) -> None:
    """Which of two would stay is not defined there."""
    queue = SmoothAPLoss(2, queue_size=6)._queue
    batch = make_batch(num_rows, 2)
    _, slots, count = queue._placed(Pool(batch.logits, batch.targets, None))
    taken = slots[slots < 6].tolist()
    assert len(set(taken)) == len(taken) == int(count) == min(num_rows, 6)


# --- What it is made of --------------------------------------------------------------------------


@pytest.mark.parametrize("multilabel", [False, True], ids=["one label", "multilabel"])
def test_there_is_one_row_more_than_slots(multilabel: bool) -> None:
    queue = SmoothAPLoss(2, queue_size=8, multilabel=multilabel)._queue
    rows = (queue.logits, queue.targets, queue.weights, queue.born)
    assert [len(field) for field in rows] == [9] * 4
    assert queue.logits.shape[1:] == (2,)
    assert queue.targets.shape[1:] == ((2,) if multilabel else ())
    assert queue.born.dtype == queue.cursor.dtype == torch.int64


def test_rows_have_weights_from_the_first_weighted_one_on() -> None:
    loss_fn = SmoothAPLoss(1, queue_size=8)
    make_batch(3).through(loss_fn)
    make_batch(3)._replace(weights=torch.ones(3)).through(loss_fn)
    assert loss_fn._queue.rows().weights is None
    make_batch(3)._replace(weights=torch.full((3,), 2.0)).through(loss_fn)
    weights = loss_fn._queue.rows().weights
    assert weights is not None
    assert weights.tolist() == [2, 1, 1, 1, 1, 1, 2, 2]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_module_of_float64_has_a_queue_of_float64(device: str) -> None:
    with torch.device(device):
        loss_fn = SmoothAPLoss(2, queue_size=8)
    for cast, expected in ((nn.Module.half, torch.float32), (nn.Module.double, torch.float64)):
        queue = cast(loss_fn)._queue
        assert queue.logits.dtype == queue.weights.dtype == expected
        assert queue.targets.dtype == queue.cursor.dtype == torch.int64
        assert queue.logits.device.type == device


def test_weighted_float64_rows_beside_a_float32_batch() -> None:
    loss_fn = SmoothAPLoss(2, 8, 0.3)
    first = make_batch(5, 2, dtype=torch.float64)._replace(weights=torch.arange(1.0, 6))
    first.through(loss_fn)
    second = make_batch(4, 2, seed=1)
    rows = Batch(
        torch.cat((second.logits, first.logits.float())),
        torch.cat((second.targets, first.targets)),
        torch.cat((torch.ones(4), torch.arange(1.0, 6))),
    )
    pool = loss_fn._extended(loss_fn._checked(*second), again=False)
    assert pool.weights is not None
    assert pool.logits.dtype == pool.weights.dtype == torch.float32
    loss = second.through(loss_fn)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, rows.through(SmoothAPLoss(2, 0, 0.3)))
    unweighted = rows._replace(weights=None).through(SmoothAPLoss(2, 0, 0.3))
    assert abs(float(loss - unweighted)) > 1e-3


def test_targets_become_int64() -> None:
    batch = make_batch(3, 2)
    pool = SmoothAPLoss(2)._checked(batch.logits, batch.targets.to(torch.uint8), None)
    assert pool.targets.dtype == torch.int64


def test_a_recomputed_batch_is_told_bit_by_bit() -> None:
    batch = Pool(torch.tensor([[0.0], [math.nan], [2.0]]), torch.tensor([1, 0, 1]), None)
    assert _is_same(batch, batch._replace(logits=batch.logits.clone()))
    assert not _is_same(None, batch)
    assert not _is_same(batch._replace(weights=torch.ones(3)), batch)
    assert not _is_same(batch._replace(logits=batch.logits.double()), batch)
    assert not _is_same(batch, batch._replace(logits=batch.logits.double()))
    assert not _is_same(batch._replace(logits=-batch.logits), batch)
    assert not _is_same(batch._replace(targets=1 - batch.targets), batch)
