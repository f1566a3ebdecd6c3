"""Batches to feed a loss, and views of its state: what the tests of the row side share."""

from __future__ import annotations

import io
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from imbalanced_losses import MixedLoss, SmoothAPLoss

IGNORED = -100


class Batch(NamedTuple):
    """The arguments of one forward pass."""

    logits: Tensor  # [N, C]
    targets: Tensor  # [N], or [N, C] for multi-label
    weights: Tensor | None = None  # [N], or [N, C] for multi-label

    def through(self, loss_fn: SmoothAPLoss) -> Tensor:
        return loss_fn(self.logits, self.targets, sample_weight=self.weights)

    def leaf(self) -> Batch:
        """The same batch with logits that collect a gradient of their own."""
        return self._replace(logits=self.logits.detach().clone().requires_grad_())


class Row(NamedTuple):
    """One row of the queue in exact Python numbers."""

    logits: tuple[float, ...]
    targets: tuple[int, ...]
    weight: float | tuple[float, ...]


def make_batch(
    num_rows: int,
    num_classes: int = 1,
    *,
    seed: int = 0,
    multilabel: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Batch:
    """Random rows in which every class has a positive and a negative, for three rows and more."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_rows, num_classes, generator=generator, dtype=torch.float64).to(dtype)
    position = torch.arange(num_rows)
    if multilabel:
        offset = torch.arange(num_classes)
        targets = ((position[:, None] + offset) % 3 == 0).to(torch.int64)
    elif num_classes == 1:
        targets = (position % 3 == 0).to(torch.int64)
    else:
        targets = position % num_classes
    return Batch(logits, targets)


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """A copy of the whole state, detached from what comes."""
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same_state(module: nn.Module, expected: dict[str, Tensor]) -> None:
    """Every bit, every dtype and every key."""
    found = module.state_dict()
    assert list(found) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, msg=name)


def numbers_of(state: dict[str, Tensor]) -> Tensor:
    """Every number [k] of the state of losses, for where rounding may make them differ a little."""
    return torch.cat([packed.view(torch.float64)[1:] for packed in state.values()])


def queued_rows(loss_fn: SmoothAPLoss) -> list[Row]:
    """The rows in the queue, oldest first."""
    queue = loss_fn._queue
    slots = queue.slots()
    by_age = [(int(queue.cursor) + i) % queue.size for i in range(queue.size)]
    present = slots.is_present(loss_fn.ignore_index)
    return [
        as_row(slots.logits[i], slots.targets[i], slots.weights[i]) for i in by_age if present[i]
    ]


def as_row(logits: Tensor, targets: Tensor, weight: Tensor) -> Row:
    labels, weights = (tuple(field.reshape(-1).tolist()) for field in (targets, weight))
    one = weights[0] if len(set(weights)) == 1 else weights
    return Row(tuple(logits.double().tolist()), tuple(map(int, labels)), one)


def rows_of(batch: Batch) -> list[Row]:
    """The rows of a batch as the queue should hold them."""
    weights = torch.ones(len(batch.logits)) if batch.weights is None else batch.weights
    return [as_row(*row) for row in zip(batch.logits, batch.targets, weights, strict=True)]


def saved_and_loaded(loss_fn: SmoothAPLoss) -> dict[str, Any]:
    """The state by way of a file."""
    file = io.BytesIO()
    torch.save(loss_fn.state_dict(), file)
    file.seek(0)
    state: dict[str, Any] = torch.load(file, weights_only=True)
    return state


def saved_by_0_9(loss_fn: SmoothAPLoss | MixedLoss, prefix: str = "") -> dict[str, Any]:
    """The state as version 0.9 saved it, in a key for each part; a row had one weight."""
    if isinstance(loss_fn, MixedLoss):
        names = ("num_calls", "num_steps", "has_switched")
        own = {f"{prefix}{name}": torch.tensor(getattr(loss_fn, f"_{name}")) for name in names}
        scale = torch.tensor(loss_fn._temperature_scale, dtype=torch.float64)
        own[f"{prefix}temperature_scale"] = scale
        return {**own, **saved_by_0_9(loss_fn.main_loss, f"{prefix}main_loss.")}
    queue, slots = loss_fn._queue, loss_fn._queue.slots()
    assert slots.weights is not None
    state = {
        "temperature": torch.tensor(loss_fn.temperature, dtype=torch.float64),
        "num_steps": torch.tensor(queue.num_steps),
        "_queue.logits": slots.logits,
        "_queue.targets": slots.targets,
        "_queue.weights": slots.weights if slots.weights.dim() == 1 else slots.weights[:, 0],
        "_queue.cursor": queue.cursor,
        "_queue.is_weighted": torch.tensor(queue.is_weighted),
    }
    return {prefix + name: value.clone() for name, value in state.items()}


def saved_by_0_6(prefix: str = "") -> dict[str, Tensor]:
    """imbalanced-losses 0.6: a ring of 8 with 6 rows written, of which one was ignored."""
    return {
        f"{prefix}_queue._q_logits": torch.tensor([0.5, 1, -1, 2, 0, 3, 0, 0])[:, None],
        f"{prefix}_queue._q_targets": torch.tensor([1, 0, 0, -100, 1, 0, -100, -100]),
        f"{prefix}_queue._q_ptr": torch.tensor([6]),
        f"{prefix}_queue._q_iid": torch.ones(8, dtype=torch.bool),
        f"{prefix}_queue._q_weight": torch.tensor([1.0, 2, 1, 1, 1, 1, 1, 1]),
    }
