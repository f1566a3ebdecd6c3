"""A ring buffer of past rows, every bit of its state in buffers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from imbalanced_losses._pool import Pool
from imbalanced_losses._tracing import is_on_host


class _Stored(NamedTuple):
    """The buffers that hold the rows, or as many rows in their form."""

    logits: Tensor
    targets: Tensor
    weights: Tensor


class _Undo(NamedTuple):
    """What the last push overwrote, for a forward pass that is computed a second time."""

    slots: Tensor | slice  # [N], `size` for rows that took no slot
    rows: _Stored  # [N] as they stood in the slots


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
        restored = _Stored(*(field.clone() for field in self._stored()))
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
        if rows.weights is not None and not self.is_weighted:
            self.is_weighted = not on_host or bool((rows.weights != 1).any())
        new_rows = _Stored(rows.logits.detach(), rows.targets, rows.row_weights())
        old_rows = (field[slots].clone() for field in self._stored())
        self._undo = _Undo(slots, _Stored(*old_rows))
        for field, new in zip(self._stored(), new_rows, strict=True):
            field[slots] = new.to(field.dtype)
        number = self.born[self.size] + 1
        self.born[slots] = number
        self.born[self.size] = number
        self.cursor.add_(count).remainder_(self.size)

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
    def can_undo(self) -> bool:
        """Whether the last push is the last thing that happened."""
        return self._undo is not None

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

    def _stored(self) -> _Stored:
        return _Stored(self.logits, self.targets, self.weights)

    def _slots(self, stored: _Stored) -> Pool:
        logits, targets, weights = (field[: self.size] for field in stored)
        return Pool(logits, targets, weights if self.is_weighted else None)

    def _widen(self) -> None:
        with torch.inference_mode(False):  # the buffers outlive it
            self.logits, self.weights = self.logits.double(), self.weights.double()
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
        for name in _Stored._fields:  # without the row that is no slot
            # A part of a larger storage would be refused by safetensors.
            destination[prefix + name] = destination[prefix + name][: self.size].clone()
        destination[prefix + "is_weighted"] = torch.tensor(self.is_weighted, device="cpu")

    def mismatch(self, state_dict: dict[str, Any], prefix: str) -> str | None:
        """What keeps the queue saved in a state_dict from being loaded here, if anything."""
        saved = _saved_rows(state_dict, prefix)
        if saved is None:
            return None  # missing keys are for the caller's `strict` to judge
        got = [list(saved.logits.shape[1:]), list(saved.targets.shape[1:])]
        expected = [list(self.logits.shape[1:]), list(self.targets.shape[1:])]
        if got != expected:
            return (
                f"{prefix}logits and {prefix}targets must have columns {expected} "
                f"(num_classes and multilabel of this loss), got {got}; to begin with an empty "
                "queue leave its keys out and load with strict=False"
            )
        if not len(saved.logits) == len(saved.targets) == len(saved.weights):
            lengths = [len(field) for field in saved]
            return f"{prefix}logits, targets and weights must have the same rows, got {lengths}"
        return None

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
        state_dict = _with_current_names(state_dict, prefix)
        wrong = self.mismatch(state_dict, prefix)
        if wrong is not None:
            error_msgs.append(wrong)
            return
        saved = _saved_rows(state_dict, prefix)
        is_weighted = state_dict.pop(prefix + "is_weighted", True)
        if saved is not None:
            if saved.logits.dtype == torch.float64 != self.logits.dtype:
                self._widen()
            stored, cursor = self._laid_out(saved, state_dict[prefix + "cursor"])
            state_dict.update({prefix + k: v for k, v in stored._asdict().items()})
            state_dict[prefix + "cursor"] = cursor
            self.is_weighted = bool(is_weighted)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._undo = None

    def _is_filled(self, saved: _Stored) -> Tensor:
        """[n] bool: saved slots that hold a row, and a finite one.

        An older version may have stored others.
        """
        return Pool(*saved).is_present(self.ignore_index) & saved.logits.isfinite().all(1)

    def _laid_out(self, saved: _Stored, cursor: Tensor) -> tuple[_Stored, Tensor]:
        """A saved queue as this one stores it; of another size, the newest rows from slot 0 on."""
        size, slot = len(saved.targets), torch.arange(self.size, device=cursor.device)
        is_filled = self._is_filled(saved)
        if size != self.size:
            oldest_first = (cursor + torch.arange(size, device=cursor.device)) % max(1, size)
            kept = oldest_first[is_filled[oldest_first]]
            slot = kept[max(0, len(kept) - self.size) :]
            cursor = torch.full_like(cursor, len(slot) % max(1, self.size))
            is_filled = torch.ones_like(slot, dtype=torch.bool)
        blank = _Stored(self.logits, self.targets, self.weights)
        laid_out = []
        for own, old, free in zip(blank, saved, (0, self.ignore_index, 0), strict=True):
            field = torch.full_like(own, free, device=old.device)
            field[: len(slot)][is_filled] = old[slot][is_filled].to(own.dtype)
            laid_out.append(field)
        return _Stored(*laid_out), cursor.clone()


def _saved_rows(state_dict: dict[str, Any], prefix: str) -> _Stored | None:
    """The queue in a state_dict, None where a part of it is missing."""
    names = [prefix + name for name in (*_Stored._fields, "cursor")]
    fields = [field for name in names if isinstance(field := state_dict.get(name), Tensor)]
    return _Stored(*fields[:-1]) if len(fields) == len(names) else None


def is_saved_by_predecessor(state_dict: dict[str, Any], prefix: str) -> bool:
    """Whether the queue in a state_dict is one of imbalanced-losses ≤ 0.6."""
    return prefix + "_q_logits" in state_dict


def _with_current_names(state_dict: dict[str, Any], prefix: str) -> dict[str, Any]:
    """A copy in which a queue of imbalanced-losses ≤ 0.6 has the names and shapes of this one."""
    state_dict = dict(state_dict)
    if not is_saved_by_predecessor(state_dict, prefix):
        return state_dict
    logits = state_dict.pop(prefix + "_q_logits")
    state_dict[prefix + "logits"] = logits
    state_dict[prefix + "targets"] = state_dict.pop(prefix + "_q_targets")
    state_dict[prefix + "cursor"] = state_dict.pop(prefix + "_q_ptr").reshape(())
    state_dict[prefix + "weights"] = state_dict.pop(
        prefix + "_q_weight", logits.new_ones(len(logits))
    )
    state_dict.pop(prefix + "_q_iid", None)
    return state_dict
