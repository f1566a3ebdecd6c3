"""A ring buffer of past rows, every bit of its state in buffers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from imbalanced_losses._pool import Pool


class _Undo(NamedTuple):
    """What the last push overwrote, for a forward pass that is computed a second time."""

    slots: Tensor  # [N], `size` for rows that took no slot
    rows: Pool  # [N] as they stood in the slots


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

    def __init__(self, size: int, num_classes: int, ignore_index: int, multilabel: bool) -> None:
        super().__init__()
        self.size = size
        self.ignore_index = ignore_index
        target_shape = (size + 1, num_classes) if multilabel else (size + 1,)
        self.register_buffer("logits", torch.zeros(size + 1, num_classes))
        self.register_buffer("targets", torch.full(target_shape, ignore_index))
        self.register_buffer("weights", torch.zeros(size + 1))
        self.register_buffer("cursor", torch.zeros((), dtype=torch.int64))
        self._undo: _Undo | None = None

    def rows(self) -> Pool:
        """All slots [size], free ones included, as they stand."""
        return Pool(*(field[: self.size] for field in self._stored()))

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
        stored = (field.clone() for field in self._stored())
        restored = (f.index_copy(0, slots, old) for f, old in zip(stored, old_rows, strict=True))
        return Pool(*(field[: self.size] for field in restored))

    @torch.no_grad()
    def push(self, rows: Pool) -> None:
        """Store the rows that are present and finite, over the oldest ones.

        Rows that are ignored or non-finite take no slot. No value is read back to the host.
        """
        keep = rows.is_present(self.ignore_index) & rows.logits.isfinite().all(1)
        number = keep.cumsum(0)  # [N], 1 for the first row kept
        count = keep.sum()
        newest = keep & (number > count - self.size)
        if self.size == 0:
            return
        slots = torch.where(newest, (self.cursor + number - 1) % self.size, self.size)
        self._undo = _Undo(slots, self._stored().select(slots))
        for field, new in zip(self._stored(), rows, strict=True):
            field.index_copy_(0, slots, new.detach().to(field.dtype))
        self.cursor.copy_((self.cursor + count) % self.size)

    def reset(self) -> None:
        """Free every slot."""
        self.logits.zero_()
        self.targets.fill_(self.ignore_index)
        self.weights.zero_()
        self.cursor.zero_()
        self._undo = None

    def fit(self, rows: Pool) -> None:
        """Take on the device of the rows, and float64 if that is their dtype."""
        if rows.logits.device != self.logits.device:
            self.to(rows.logits.device)
        if rows.logits.dtype == torch.float64 != self.logits.dtype:
            self._widen()

    def _stored(self) -> Pool:
        return Pool(self.logits, self.targets, self.weights)

    def _widen(self) -> None:
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
        for name in Pool._fields:  # without the row that is no slot
            destination[prefix + name] = destination[prefix + name][: self.size]

    def mismatch(self, state_dict: dict[str, Any], prefix: str) -> str | None:
        """What keeps the queue saved in a state_dict from being loaded here, if anything."""
        saved = _saved_pool(state_dict, prefix)
        if saved is None:
            return None  # missing keys are for the caller's `strict` to judge
        got = [list(saved.logits.shape[1:]), list(saved.targets.shape[1:])]
        expected = [list(self.logits.shape[1:]), list(self.targets.shape[1:])]
        if got != expected:
            return (
                f"{prefix}logits and {prefix}targets must have columns {expected} "
                f"(num_classes and multilabel of this loss), got {got}"
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
        saved = _saved_pool(state_dict, prefix)
        if saved is not None:
            if saved.logits.dtype == torch.float64 != self.logits.dtype:
                self._widen()
            stored, cursor = self._laid_out(saved, state_dict[prefix + "cursor"])
            state_dict.update({prefix + k: v for k, v in stored._asdict().items()})
            state_dict[prefix + "cursor"] = cursor
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._undo = None

    def _laid_out(self, saved: Pool, cursor: Tensor) -> tuple[Pool, Tensor]:
        """A saved queue as this one stores it; of another size, the newest rows from slot 0 on."""
        size = len(saved.targets)
        if size != self.size:
            age_order = (int(cursor) + torch.arange(size)) % max(1, size)  # oldest first
            saved = saved.select(age_order.to(saved.targets.device))
            saved = saved.select(saved.is_present(self.ignore_index))
            kept = min(self.size, len(saved.targets))
            saved = Pool(*(field[len(field) - kept :] for field in saved))
            cursor = torch.full_like(cursor, kept % max(1, self.size))
        free = self.size + 1 - len(saved.targets)  # the row that is no slot is one of them
        padding = Pool(
            saved.logits.new_zeros(free, *saved.logits.shape[1:]),
            saved.targets.new_full((free, *saved.targets.shape[1:]), self.ignore_index),
            saved.weights.new_zeros(free),
        )
        return saved.extend(padding), cursor


def _saved_pool(state_dict: dict[str, Any], prefix: str) -> Pool | None:
    """The queue in a state_dict, None where a part of it is missing."""
    names = [prefix + name for name in (*Pool._fields, "cursor")]
    fields = [field for name in names if isinstance(field := state_dict.get(name), Tensor)]
    return Pool(*fields[:-1]) if len(fields) == len(names) else None


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
