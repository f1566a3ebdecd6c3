"""A ring buffer of past rows, every bit of its state in buffers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from imbalanced_losses._pool import Pool
from imbalanced_losses._saved import PARTS, Saved, Stored, saved_queue, with_current_names
from imbalanced_losses._tracing import is_on_host


class _Undo(NamedTuple):
    """What the last push overwrote, for a forward pass that is computed a second time."""

    slots: Tensor | slice  # [N], `size` for rows that took no slot
    rows: Stored  # [N] as they stood in the slots


class MemoryQueue(nn.Module):
    """The newest `size` rows pushed, in a ring; free slots hold `ignore_index` as their target.

    Scores are kept raw, in float32 and, once float64 rows come, in float64; casting the module
    (`.half()`) leaves them so. The device follows the module's, and the rows' where they differ.

    Args:
        size: rows kept; 0 keeps none.
        num_classes: columns of the logits.
        ignore_index: the target that marks a free slot.
        multilabel: whether targets are [N, C] rather than [N].
    """

    logits: Tensor  # [size + 1, C]; the row at `size` is where rows go that take no slot
    targets: Tensor  # [size + 1] or [size + 1, C]
    weights: Tensor  # [size + 1]
    cursor: Tensor  # [] int64, the slot that the next row takes
    born: Tensor  # [size + 1] int64, the push that wrote each slot; the last: how many; not saved

    def __init__(self, size: int, num_classes: int, ignore_index: int, multilabel: bool) -> None:
        super().__init__()
        self.size = size
        self.ignore_index = ignore_index
        target_shape = (size + 1, num_classes) if multilabel else (size + 1,)
        self.register_buffer("logits", torch.zeros(size + 1, num_classes))
        self.register_buffer("targets", torch.full(target_shape, ignore_index))
        self.register_buffer("weights", torch.zeros(size + 1))
        self.register_buffer("cursor", torch.zeros((), dtype=torch.int64))
        self.register_buffer("born", torch.zeros(size + 1, dtype=torch.int64), persistent=False)
        self.is_weighted = False  # whether rows with weights were ever pushed
        self._undo: _Undo | None = None

    def extra_repr(self) -> str:
        return f"{self.size} rows"

    def rows(self) -> Pool:
        """All slots [size], free ones included, as they stand."""
        return self._slots(self._stored())

    def rows_before_last_push(self) -> Pool:
        """All slots [size] as they stood before the last push.

        Raises:
            RuntimeError: when there was no push, or the queue changed in another way since.
        """
        if self._undo is None:
            raise RuntimeError(
                "a forward pass of the loss is being recomputed (activation checkpointing), but "
                "its queue has changed since: call backward before anything that changes the "
                "queue, or keep the loss outside the checkpointed function"
            )
        slots, old_rows = self._undo
        restored = Stored(*(field.clone() for field in self._stored()))
        for field, old in zip(restored, old_rows, strict=True):
            field[slots] = old
        return self._slots(restored)

    @torch.no_grad()
    def push(self, rows: Pool) -> None:
        """Store the rows that are present and finite, over the oldest ones; others take no slot."""
        if self.size == 0:
            return
        if rows.logits.dtype == torch.float64 != self.logits.dtype:
            self._widen()
        # On the CPU values cost nothing to look at; elsewhere nothing is read back to the host.
        on_host = is_on_host(rows.logits)
        slots: Tensor | slice
        rows, slots, count = self._placed_on_host(rows) if on_host else self._placed(rows)
        is_weighted = self.is_weighted
        if rows.weights is not None and not is_weighted:
            is_weighted = not on_host or bool((rows.weights != 1).any())
        new_rows = Stored(rows.logits.detach(), rows.targets, rows.row_weights())
        old_rows = Stored(*(field[slots].clone() for field in self._stored()))
        cursor = (self.cursor + count).remainder_(self.size)
        number = self.born[self.size] + 1
        self.born[slots] = number
        self.born[self.size] = number
        before = self._undo, self.is_weighted
        try:
            self._undo, self.is_weighted = _Undo(slots, old_rows), is_weighted
            for field, new in zip(self._stored(), new_rows, strict=True):
                field[slots] = new.to(field.dtype)
            self.cursor.copy_(cursor)
        except BaseException:  # Ctrl-C, for one: half a row is no row
            self._undo, self.is_weighted = before
            for field, old in zip(self._stored(), old_rows, strict=True):
                field[slots] = old
            raise

    def _placed_on_host(self, rows: Pool) -> tuple[Pool, Tensor | slice, int]:
        """The rows to store, the newest `size` at most, their slots, and how many there are."""
        present = rows.is_present(self.ignore_index)
        if not (bool(present.all()) and math.isfinite(float(rows.logits.sum()))):
            keep = present & rows.logits.isfinite().all(1)
            rows = rows.select(keep.nonzero().squeeze(1))
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
        keep = rows.is_present(self.ignore_index) & rows.logits.isfinite().all(1)
        number = keep.cumsum(0)  # [N], 1 for the first row kept
        count = keep.sum()
        surplus = (count - self.size).clamp(min=0)
        is_newest = keep & (number > surplus)
        slots = (self.cursor + number - 1 - surplus).remainder_(self.size)
        return rows, torch.where(is_newest, slots, self.size), count - surplus

    @property
    def last_push(self) -> object | None:
        """What tells the last push from others; None where something else happened since."""
        return self._undo

    def ages(self) -> Tensor:
        """[rows held] int64: how many pushes ago each row came, 0 for the last one.

        Rows of a checkpoint count from the moment when it was loaded.
        """
        taken = self.targets[: self.size] != self.ignore_index
        if taken.dim() == 2:
            taken = taken.any(1)
        return self.born[self.size] - self.born[: self.size][taken]

    def reset(self) -> None:
        """Free every slot."""
        self.logits.zero_()
        self.targets.fill_(self.ignore_index)
        self.weights.zero_()
        self.cursor.zero_()
        self._undo = None

    def fit(self, rows: Pool) -> None:
        """Take on the device of the rows."""
        if rows.logits.device != self.logits.device:
            with torch.inference_mode(False):  # the buffers outlive it
                self.to(rows.logits.device)

    def _stored(self) -> Stored:
        return Stored(self.logits, self.targets, self.weights)

    def _slots(self, stored: Stored) -> Pool:
        logits, targets, weights = (field[: self.size] for field in stored)
        return Pool(logits, targets, weights if self.is_weighted else None)

    def _widen(self) -> None:
        with torch.inference_mode(False):  # the buffers outlive it
            self.weights = self.weights.double()
            self.logits = self.logits.double()  # last: its dtype tells whether this has been done
        self._undo = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MemoryQueue:
        was_meta = self.logits.is_meta

        def move(tensor: Tensor) -> Tensor:
            like = fn(tensor.new_empty(0))
            dtype = torch.float64 if like.dtype == torch.float64 else tensor.dtype
            if tensor.is_meta or like.is_meta:
                return torch.empty_like(tensor, device=like.device, dtype=dtype)
            return tensor.to(device=like.device, dtype=dtype)

        super()._apply(move, recurse)
        self._undo = None
        if was_meta and not self.logits.is_meta:
            self.reset()
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in Stored._fields:  # without the row that is no slot
            # A part of a larger storage would be refused by safetensors.
            destination[prefix + name] = destination[prefix + name][: self.size].clone()
        destination[prefix + "is_weighted"] = torch.tensor(self.is_weighted, device="cpu")

    def fits(self, state_dict: dict[str, Any], prefix: str) -> bool:
        """Whether the queue saved in a state_dict, if there is one, can be loaded here."""
        try:
            self._saved(with_current_names(state_dict, prefix), prefix)
        except ValueError:
            return False
        return True

    def _saved(self, state_dict: dict[str, Any], prefix: str) -> Saved | None:
        return saved_queue(state_dict, prefix, self._stored(), self.ignore_index)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Accept a queue of another size, keeping its newest rows, and one of float64 rows."""
        state_dict = with_current_names(state_dict, prefix)
        try:
            saved = self._saved(state_dict, prefix)
        except ValueError as error:
            error_msgs.append(str(error))
            return
        is_weighted = state_dict.pop(prefix + "is_weighted", False)
        if saved is None:  # a part of a queue means nothing: what is there stays out too
            own = {prefix + name: getattr(self, name) for name in PARTS}
            state_dict.update({name: own[name] for name in own if name in state_dict})
        else:
            if saved.rows.logits.dtype == torch.float64 != self.logits.dtype:
                self._widen()
            stored, cursor = self._laid_out(*saved)
            state_dict.update({prefix + k: v for k, v in stored._asdict().items()})
            state_dict[prefix + "cursor"] = self.cursor.new_tensor(
                cursor, device=stored.logits.device
            )
            has_weights = (stored.weights != 0) & (stored.weights != 1)
            self.is_weighted = bool(is_weighted) or bool(has_weights.any())
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._undo = None

    def _laid_out(self, saved: Stored, cursor: int) -> tuple[Stored, int]:
        """A saved queue as this one stores it; of another size, the newest rows from slot 0 on."""
        size, device = len(saved.targets), saved.logits.device
        slot = torch.arange(self.size, device=device)
        is_filled = saved.is_filled(self.ignore_index)
        if size != self.size:
            oldest_first = (cursor + torch.arange(size, device=device)) % max(1, size)
            kept = oldest_first[is_filled[oldest_first]]
            slot = kept[max(0, len(kept) - self.size) :]
            cursor = len(slot) % max(1, self.size)
            is_filled = torch.ones_like(slot, dtype=torch.bool)
        laid_out = []
        for own, old, free in zip(self._stored(), saved, (0, self.ignore_index, 0), strict=True):
            field = torch.full_like(own, free, device=device)
            field[: len(slot)][is_filled] = old[slot][is_filled]
            laid_out.append(field)
        return Stored(*laid_out), cursor
