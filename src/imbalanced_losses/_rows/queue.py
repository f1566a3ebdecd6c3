"""A ring buffer of past rows."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from imbalanced_losses._checks.tracing import is_on_host
from imbalanced_losses._ranking.cuda import rows as kernels
from imbalanced_losses._rows.checkpoint import Saved, change_tensors, unchanged_on_error
from imbalanced_losses._rows.pool import Pool


class MemoryQueue:
    """The newest `size` rows pushed, in a ring; free slots hold `ignore_index` as their target.

    Scores are kept raw, in float32 and, once float64 rows come, in float64. It is no module and
    has no buffers: what handles the weights of a model does not see it.

    Args:
        size: rows kept; 0 keeps none.
        num_classes: columns of the logits.
        ignore_index: the target that marks a free slot.
        multilabel: whether targets, and weights, are [N, C] rather than [N].
    """

    logits: Tensor  # [size + 1, C]; the row at `size` is where rows go that take no slot
    targets: Tensor  # [size + 1] or [size + 1, C]
    weights: Tensor  # as targets
    value: Tensor  # as targets, below 0 = the default
    group: Tensor  # [size + 1] int64
    cursor: Tensor  # [] int64, the slot that the next row takes
    pushed_at: Tensor  # [size + 1] int64, the push that wrote each slot; the last: how many

    def __init__(self, size: int, num_classes: int, ignore_index: int, multilabel: bool) -> None:
        self.size = size
        self.ignore_index = ignore_index
        # Whether rows with weights, with values, with groups, and whether any were ever pushed.
        self.is_weighted = self.is_valued = self.is_grouped = self.is_used = False
        self.num_steps = 0  # training-mode forward passes, the counter of the draws
        shape = (size + 1, num_classes) if multilabel else (size + 1,)
        device = torch.empty(0).device
        if device.type == "meta":  # whoever initialises weights later does not know of the queue
            device = torch.device("cpu")
        with torch.inference_mode(False):  # the queue outlives it
            self.logits = torch.zeros(size + 1, num_classes, dtype=torch.float32, device=device)
            self.targets = torch.full(shape, ignore_index, dtype=torch.int64, device=device)
            self.weights = torch.zeros(shape, dtype=torch.float32, device=device)
            self.value = torch.full(shape, -1.0, dtype=torch.float32, device=device)
            self.group = torch.zeros(size + 1, dtype=torch.int64, device=device)
            self.cursor = torch.zeros((), dtype=torch.int64, device=device)
            self.pushed_at = torch.zeros(size + 1, dtype=torch.int64, device=device)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy, or of what another process sent: no memory is shared."""
        vars(self).update(state)
        change_tensors(self, torch.clone)

    def slots(self) -> Pool:
        """All slots [size], free ones included, as they stand."""
        return Pool.of(field[: self.size] for field in self._stored())

    def rows_beside(self, batch: Pool) -> Pool:
        """All slots as constants to rank with a batch, in its dtype; without values as it is."""
        used = True, True, self.is_weighted, self.is_valued, batch.group is not None
        fields = [
            field.narrow(0, 0, self.size) if is_used else None
            for field, is_used in zip(self._stored(), used, strict=True)
        ]
        dtype = batch.logits.dtype
        if dtype != self.logits.dtype:  # what a narrower dtype can't hold is not infinite
            logits, targets, *floats, group = fields
            assert logits is not None
            largest = torch.finfo(dtype).max
            floats = [f if f is None else f.to(dtype).clamp(max=largest) for f in floats]
            fields = [logits.to(dtype), targets, *floats, group]
        if batch.logits.is_meta:
            fields = [field if field is None else field.to("meta") for field in fields]
        return Pool.of(fields)

    def require_same_grouping(self, is_grouped: bool) -> None:
        """Raise where rows with groups would be ranked with rows without."""
        # What changes with the first rows comes last, since compilers guard what they have read.
        if self.size > 0 and self.is_grouped != is_grouped and self.is_used:
            held, given = ("with", "without") if self.is_grouped else ("without", "with")
            raise ValueError(
                f"group must be given in every call or in none: the queue holds rows {held} group, "
                f"and this call comes {given}; to change that call reset_queue() first"
            )

    def push(self, rows: Pool, *, is_step: bool = False) -> None:
        """Store the rows that are present and finite, over the oldest ones; others take no slot.

        Args:
            is_step: count a step together with it.
        """
        if self.size == 0 or rows.logits.is_meta:
            self.num_steps += is_step
            return
        rows = rows.with_logits(rows.logits.detach())
        if rows.logits.dtype == torch.float64 != self.logits.dtype:
            self._widen()
        if kernels.serves(rows.logits):
            kernels.push(
                rows.fields(), self._stored(), self.cursor, self.pushed_at, self.ignore_index
            )
            self.num_steps += is_step
            self.is_weighted |= rows.weights is not None
            self.is_valued |= rows.value is not None
            self.is_grouped, self.is_used = rows.group is not None, True
            return
        # On the CPU values cost nothing to look at; elsewhere nothing is read back to the host.
        on_host = is_on_host(rows.logits)
        slots: Tensor | slice
        rows, slots, count = self._placed_on_host(rows) if on_host else self._placed(rows)
        is_weighted = self.is_weighted
        if rows.weights is not None and not is_weighted:
            is_weighted = not on_host or bool((rows.weights != 1).any())
        is_valued, is_grouped = self.is_valued or rows.value is not None, rows.group is not None
        new_rows = rows.whole().fields()
        cursor = (self.cursor + count).remainder_(self.size)
        with self.unchanged_on_error(slots):
            self.num_steps += is_step
            self.is_weighted, self.is_valued = is_weighted, is_valued
            self.is_grouped = is_grouped
            self.is_used = not on_host or self.is_used or int(count) > 0
            number = self.pushed_at[self.size] + 1
            self.pushed_at[slots] = number
            self.pushed_at[self.size] = number
            for field, new in zip(self._stored(), new_rows, strict=True):
                field[slots] = new.to(field.dtype)  # type: ignore[union-attr]
            self.cursor.copy_(cursor)

    def _placed_on_host(self, rows: Pool) -> tuple[Pool, Tensor | slice, int]:
        """The rows to store, the newest `size` at most, their slots, and how many there are."""
        present = rows.is_present(self.ignore_index)
        if not (bool(present.all()) and math.isfinite(float(rows.logits.sum()))):
            rows = rows.select(rows.is_storable(self.ignore_index).nonzero().squeeze(1))
        count = min(len(rows.targets), self.size)
        if count < len(rows.targets):
            newest = torch.arange(len(rows.targets) - count, len(rows.targets), device="cpu")
            rows = rows.select(newest)
        start = int(self.cursor)
        if start + count <= self.size:
            return rows, slice(start, start + count), count
        slots = torch.arange(start, start + count, device="cpu").remainder_(self.size)
        return rows, slots, count

    def _placed(self, rows: Pool) -> tuple[Pool, Tensor, Tensor]:
        """All rows, their slots (`size` for those that take none), and how many take one."""
        keep = rows.is_storable(self.ignore_index)
        number = keep.cumsum(0)  # [N], 1 for the first row kept
        count = keep.sum()
        surplus = (count - self.size).clamp(min=0)
        is_newest = keep & (number > surplus)
        slots = (self.cursor + number - 1 - surplus).remainder_(self.size)
        return rows, torch.where(is_newest, slots, self.size), count - surplus

    def ages(self) -> Tensor:
        """[rows held] int64: how many pushes ago each row came, 0 for the last one.

        Rows of a checkpoint count from the moment when it was loaded.
        """
        taken = self.slots().is_present(self.ignore_index)
        return self.pushed_at[self.size] - self.pushed_at[: self.size][taken]

    def reset(self) -> None:
        """Free every slot."""
        with self.unchanged_on_error():
            self.logits.zero_()
            self.targets.fill_(self.ignore_index)
            self.weights.zero_()
            self.value.fill_(-1)
            self.group.zero_()
            self.cursor.zero_()
            self.is_used = False

    def to(self, device: torch.device) -> None:
        """Take on a device, one with values: the queue stays where it is beside `meta`."""
        if device not in (self.logits.device, torch.device("meta")):
            change_tensors(self, lambda tensor: tensor.to(device))

    def saved(self, temperature: float) -> Saved:
        """What goes into a checkpoint, with the temperature of the loss."""
        flags = self.is_weighted, self.is_valued, self.is_grouped
        return Saved(temperature, self.num_steps, int(self.cursor), *flags, self.slots())

    def restore(self, saved: Saved) -> None:
        """Take the state of a queue of any size as it stood; of more rows the newest."""
        rows, cursor = saved.slots, saved.cursor
        if rows.logits.dtype == torch.float64 != self.logits.dtype:
            self._widen()
        place = source = rows.is_storable(self.ignore_index).nonzero().squeeze(1)
        if (size := rows.logits.shape[0]) != self.size:
            source = source[((source - cursor) % max(1, size)).argsort()]  # oldest first
            source = source[max(0, len(source) - self.size) :]
            place = torch.arange(len(source), device="cpu")
            cursor = len(source) % max(1, self.size)
        rows = rows.select(source)
        self.reset()
        for field, kept in zip(self._stored(), rows.fields(), strict=True):
            field[place.to(field.device)] = kept.to(field)  # type: ignore[union-attr]
        self.cursor.fill_(cursor)
        self.pushed_at.fill_(self.pushed_at[self.size])
        self.is_weighted = saved.is_weighted or bool((self.weights[place] != 1).any())
        self.is_valued, self.is_grouped = saved.is_valued, saved.is_grouped
        self.num_steps, self.is_used = saved.num_steps, len(place) > 0

    def _stored(self) -> tuple[Tensor, ...]:
        """In the order of a pool's."""
        return self.logits, self.targets, self.weights, self.value, self.group

    def _widen(self) -> None:
        with torch.inference_mode(False):  # the queue outlives it
            self.weights, self.value = self.weights.double(), self.value.double()
            self.logits = self.logits.double()  # last: its dtype tells whether this has been done

    def unchanged_on_error(self, slots: Any = ...) -> AbstractContextManager[None]:
        """Put the queue back as it was if the block, which writes to some slots, raises."""
        if torch.compiler.is_compiling():
            return nullcontext()
        writes = [(field, slots) for field in (*self._stored(), self.pushed_at)]
        writes += [(self.cursor, ...), (self.pushed_at, self.size)]
        return unchanged_on_error(vars(self), writes=writes)
