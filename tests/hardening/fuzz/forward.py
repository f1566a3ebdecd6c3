"""Sequences of calls of a loss: constructor, batches good and bad, modes, temperature, queue."""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import torch

from imbalanced_losses import SmoothAPLoss
from tests.hardening.fuzz.choices import FLOATS, Arguments, Choices, arguments, spoiled
from tests.hardening.fuzz.watch import assert_sound, assert_unchanged, has_live_nan, state_of
from tests.helpers.oracle import OracleLoss, rows_of_batch

# Every error of a bad argument names it.
NAMES = re.compile(
    r"(num_classes|queue_size|temperature|reduction|ignore_index|update_queue_in_eval|"
    r"gather_distributed|max_pool_size|multilabel|temperature_unit|queue_follows_shift|"
    r"process_group|grad_reduce|gather|target_prior|logits|targets|sample_weight|backend)\b"
)
WRONG: tuple[tuple[str, Any], ...] = (
    ("num_classes", 0), ("num_classes", True), ("num_classes", 1.0), ("num_classes", -1),
    ("queue_size", -1), ("queue_size", 2.5), ("temperature", 0.0), ("temperature", float("nan")),
    ("temperature", float("inf")), ("temperature", "0.1"), ("reduction", "average"),
    ("reduction", None), ("ignore_index", 1.5), ("ignore_index", 1), ("max_pool_size", 1),
    ("max_pool_size", "all"), ("multilabel", 1), ("temperature_unit", "rank"),
    ("gather_distributed", "yes"), ("process_group", 3), ("grad_reduce", "max"),
    ("target_prior", 1.0), ("target_prior", (0.1,) * 7), ("target_prior", float("nan")),
    ("update_queue_in_eval", 0), ("queue_follows_shift", None), ("gather", "all"),
)  # fmt: skip


def assert_names_argument(error: Exception) -> None:
    assert NAMES.search(str(error)), f"names no argument: {error}"


def options_of(choices: Choices) -> dict[str, Any]:
    num_classes = choices.of((1, 1, 2, 3))
    options: dict[str, Any] = {
        "num_classes": num_classes,
        "queue_size": choices.of((0, 4, 7, 20)),
        "temperature": choices.of((0.3, 0.01, 1.0, 1e-6, 1e6, 1e-300, 1e38)),
        "reduction": choices.of(("mean", "sum", "none")),
        "multilabel": choices.once_in(3),
        "update_queue_in_eval": choices.once_in(4),
        "queue_follows_shift": choices.once_in(4),
        "temperature_unit": "spread" if choices.once_in(3) else "score",
        "max_pool_size": choices.of((2, 5, 9)) if choices.once_in(4) else None,
        "ignore_index": choices.of((-1, 7, 255)) if choices.once_in(4) else -100,
    }
    if choices.once_in(6):
        options["target_prior"] = [choices.of((0.1, 0.5, 1e-6, 0.999))] * num_classes
    return options


def new_loss(options: dict[str, Any], choices: Choices) -> SmoothAPLoss | None:
    """A loss, or None where the constructor refuses, as it should, a wrong argument."""
    if choices.once_in(32):
        name, value = choices.of(WRONG)
        try:
            loss_fn = SmoothAPLoss(**{**options, name: value})
        except (TypeError, ValueError) as error:
            assert_names_argument(error)
            return None
        assert (name, value) == ("ignore_index", 1), f"{name}={value!r} was taken"
        assert loss_fn.num_classes > 1
        assert not loss_fn.multilabel
        return loss_fn
    loss_fn = SmoothAPLoss(**options)
    loss_fn.backend = choices.of(("auto", "dense", "panel"))
    return loss_fn


def one_run(data: bytes) -> None:
    choices = Choices(data)
    loss_fn = new_loss(options_of(choices), choices)
    if loss_fn is None:
        return
    watched = Watched(loss_fn)
    for _ in range(1 + choices.below(3)):
        kind = choices.below(16)
        if kind == 0:
            watched.loss_fn.train(not watched.loss_fn.training)
        elif kind == 1:
            watched.reset_queue()
        elif kind == 2:
            watched.assign_temperature(choices.of((0.2, 3.0, 0.0, -1.0, float("nan"), None)))
        elif kind == 3:
            watched.loss_fn = choices.of((copy.deepcopy, pickled))(watched.loss_fn)
        elif kind == 4:
            watched.loss_fn.to(choices.of(FLOATS))
        elif kind == 5:
            watched.reload()
        watched.call(choices)


def pickled(loss_fn: SmoothAPLoss) -> SmoothAPLoss:
    copied: SmoothAPLoss = pickle.loads(pickle.dumps(loss_fn))
    return copied


class Watched:
    """A loss, beside what its queue should hold by the definition."""

    def __init__(self, loss_fn: SmoothAPLoss) -> None:
        self.loss_fn = loss_fn
        self.model = OracleLoss(
            loss_fn.num_classes,
            loss_fn.queue_size,
            loss_fn.temperature,
            loss_fn.reduction,
            loss_fn.ignore_index,
            multilabel=loss_fn.multilabel,
            temperature_unit=loss_fn.temperature_unit,
            queue_follows_shift=loss_fn.queue_follows_shift,
        )

    def reset_queue(self) -> None:
        self.loss_fn.reset_queue()
        self.model.queue.clear()

    def assign_temperature(self, value: Any) -> None:
        before = state_of(self.loss_fn)
        try:
            self.loss_fn.temperature = value
        except (TypeError, ValueError) as error:
            assert_names_argument(error)
            assert_unchanged(self.loss_fn, before)
        else:
            assert value is not None
            assert value > 0
            self.model.temperature = value

    def reload(self) -> None:
        """Through a checkpoint, which is the same loss."""
        state = self.loss_fn.state_dict()
        self.loss_fn.reset_queue()
        self.loss_fn.load_state_dict(state)
        (before,), (found,) = state.values(), self.loss_fn.state_dict().values()
        assert found.equal(before), "a checkpoint of its own changed the state"

    def call(self, choices: Choices) -> None:
        loss_fn = self.loss_fn
        batch = arguments(choices, loss_fn.num_classes, loss_fn.multilabel, loss_fn.ignore_index)
        is_spoiled = choices.once_in(4)
        if is_spoiled:
            batch = spoiled(choices, batch)
        per_class = choices.once_in(3)
        is_compared = choices.once_in(4)
        before = state_of(loss_fn)
        logits, targets, weight = batch
        if logits.is_floating_point():
            logits = logits.detach().clone().requires_grad_()
        try:
            found = loss_fn(logits, targets, per_class, sample_weight=weight)
        except (TypeError, ValueError) as error:
            if not (is_spoiled or weight is not None):
                raise AssertionError("a good batch was refused") from error
            assert_names_argument(error)
            assert_unchanged(loss_fn, before)
            return
        self.check_outcome(batch, logits, found if per_class else (found, None, None))
        self.remember(batch, is_compared, logits.grad, found[0] if per_class else found)
        assert_sound(loss_fn)

    def check_outcome(self, batch: Arguments, logits: Any, found: tuple[Any, Any, Any]) -> None:
        """Dtypes, shapes, ranges, and no finite loss with a gradient that is not."""
        loss, per_class, valid = found
        loss_fn = self.loss_fn
        assert loss.dtype == torch.promote_types(logits.dtype, torch.float32)
        assert loss.shape == ((loss_fn.num_classes,) if loss_fn.reduction == "none" else ())
        total = loss.nansum() if loss_fn.reduction == "none" else loss
        total.backward()
        gradient = logits.grad
        assert gradient is not None
        has_nan = has_live_nan(loss_fn, *batch)
        # What float16 cannot hold is inf there, as GradScaler expects it.
        is_good = ~gradient.isnan() if logits.dtype == torch.float16 else gradient.isfinite()
        if not has_nan:
            assert bool(is_good.all()), f"gradient {gradient} of loss {loss}"
            upper = loss_fn.num_classes if loss_fn.reduction == "sum" else 1
            values = loss.nan_to_num(0.0) if loss_fn.reduction == "none" else loss
            assert bool(((values >= -1e-5) & (values <= upper * (1 + 1e-5))).all()), f"loss {loss}"
        elif bool(total.isfinite()) and loss_fn.reduction != "none":
            assert bool(is_good.all()), f"gradient {gradient} of loss {loss}"
        if valid is not None and not has_nan:
            assert bool((per_class.isnan() == ~valid).all()), f"{per_class} where {valid}"

    def remember(self, batch: Arguments, is_compared: bool, gradient: Any, loss: Any) -> None:
        """Store the batch by the definition; now and then compare loss and gradient with it."""
        loss_fn, model = self.loss_fn, self.model
        wide = torch.promote_types(batch.logits.dtype, torch.float32)
        targets = batch.targets.reshape(
            len(batch.logits), *((loss_fn.num_classes,) if loss_fn.multilabel else ())
        )
        weight = None if batch.sample_weight is None else batch.sample_weight.to(wide).double()
        rows = (batch.logits.double(), targets.long(), weight)
        if is_compared and self.is_comparable(batch, weight):
            expected = model.step(*rows, store=False)
            atol = 1e-9 if wide == torch.float64 else 1e-4
            wanted = torch.tensor(expected.loss, dtype=torch.float64)
            torch.testing.assert_close(loss.double(), wanted, rtol=0, atol=atol, equal_nan=True)
            wanted = torch.tensor(expected.gradient).reshape(gradient.shape)
            if loss_fn.reduction == "none":
                wanted = torch.tensor(expected.per_class_gradient).reshape(gradient.shape)
            scale = float(wanted.abs().max()) if wanted.numel() else 0.0
            rounding = torch.finfo(batch.logits.dtype)
            atol = scale * (10 * atol + rounding.eps) + rounding.smallest_normal
            atol += 10 * torch.finfo(wide).eps / min(1.0, loss_fn.temperature)
            torch.testing.assert_close(gradient.double(), wanted, rtol=0, atol=atol)
        if loss_fn.training or loss_fn.update_queue_in_eval:
            stored = rows_of_batch(*rows)
            model.queue.extend(row for row in stored if model._is_worth_storing(row))
        self.compare_queue()

    def is_comparable(self, batch: Arguments, weight: Any) -> bool:
        """Whether the definition, in float64 loops, says what is to come out to many digits."""
        loss_fn, queue = self.loss_fn, self.model.queue
        numbers = [number for row in queue for number in (*row.logits, row.weight)]
        numbers += [*batch.logits.flatten().tolist(), *([] if weight is None else weight.tolist())]
        return (
            all(number == 0 or 1e-3 < abs(number) < 100 for number in numbers)
            and loss_fn.max_pool_size is None
            and loss_fn.target_prior is None
            and 1e-3 < loss_fn.temperature < 1e3
        )

    def compare_queue(self) -> None:
        queue = self.loss_fn._queue
        slots, cursor = queue.slots(), int(queue.cursor)
        present = slots.is_present(self.loss_fn.ignore_index)
        order = [i for i in [*range(cursor, queue.size), *range(cursor)] if present[i]]
        found = slots.logits[order].tolist()
        assert found == [row.logits for row in self.model.queue], "the queue holds other rows"
        labels = [row.target for row in self.model.queue]
        assert slots.targets[order].tolist() == labels, "the queue holds other labels"
