"""The queue in a checkpoint: what keeps it from being loaded, before anything of it is taken."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from imbalanced_losses._pool import Pool


class Stored(NamedTuple):
    """The buffers that hold the rows of a queue, or as many rows in their form."""

    logits: Tensor
    targets: Tensor
    weights: Tensor

    def is_filled(self, ignore_index: int) -> Tensor:
        """[n] bool: slots that hold a row, and a finite one.

        An older version may have stored others.
        """
        is_finite = self.logits.isfinite().all(1) & self.weights.isfinite()
        return Pool(*self).is_present(ignore_index) & is_finite


PARTS = (*Stored._fields, "cursor")


class Saved(NamedTuple):
    """A queue as it was saved, in the dtypes of one that is to take it."""

    rows: Stored
    cursor: int


def saved_queue(
    state_dict: dict[str, Any], prefix: str, own: Stored, ignore_index: int
) -> Saved | None:
    """The queue in a state_dict; None where a part is missing, for `strict` to judge.

    Args:
        own: the buffers of the queue that is to take it.

    Raises:
        ValueError: it does not fit, or is not what a queue can have saved.
    """
    _check_forms(state_dict, prefix)
    if any(prefix + name not in state_dict for name in PARTS):
        return None
    logits, targets, weights, cursor = (state_dict[prefix + name].detach() for name in PARTS)
    got = [list(logits.shape[1:]), list(targets.shape[1:])]
    expected = [list(own.logits.shape[1:]), list(own.targets.shape[1:])]
    if got != expected:
        raise ValueError(
            f"{prefix}logits and {prefix}targets must have columns {expected} "
            f"(num_classes and multilabel of this loss), got {got}; to begin with an empty queue "
            "leave its keys out and load with strict=False"
        )
    shapes = [list(part.shape) for part in (logits, targets, weights)]
    if weights.dim() != 1 or not shapes[0][0] == shapes[2][0] or shapes[1][:1] != shapes[2]:
        raise ValueError(
            f"{prefix}logits, targets and weights must have the same rows, got shapes {shapes}"
        )
    wide = torch.float64 in (own.logits.dtype, logits.dtype)
    dtype = torch.float64 if wide else torch.float32
    device = logits.device
    rows = Stored(logits.to(dtype), targets.to(device), weights.to(device, dtype))
    _check_labels(rows, prefix, ignore_index)
    rows = rows._replace(targets=rows.targets.to(torch.int64))
    return Saved(rows, _position(cursor, len(weights), prefix))


def _check_forms(state_dict: dict[str, Any], prefix: str) -> None:
    """What is there are tensors with values, of a dtype that can be meant."""
    for name in (*PARTS, "is_weighted"):
        if prefix + name not in state_dict:
            continue
        value = state_dict[prefix + name]
        if not isinstance(value, Tensor):
            raise ValueError(f"{prefix}{name} must be a tensor, got {type(value).__name__}")
        if value.is_meta or value.layout != torch.strided:
            where = "on the meta device" if value.is_meta else value.layout
            raise ValueError(f"{prefix}{name} must be a dense tensor with values, got one {where}")
        if name in ("logits", "weights") and not value.is_floating_point():
            raise ValueError(f"{prefix}{name} must be floating point, got {value.dtype}")
        is_integer = not (value.is_floating_point() or value.is_complex())
        if name == "targets" and value.is_complex():
            raise ValueError(f"{prefix}{name} must be integers, got {value.dtype}")
        if name in ("cursor", "is_weighted") and not (value.numel() == 1 and is_integer):
            raise ValueError(
                f"{prefix}{name} must be one integer, got {value.dtype} {list(value.shape)}"
            )


def _check_labels(rows: Stored, prefix: str, ignore_index: int) -> None:
    """Rows that will take a slot have targets that forward would have taken."""
    num_classes = rows.logits.shape[1]
    num_labels = 2 if rows.targets.dim() == 2 or num_classes == 1 else num_classes
    targets = rows.targets
    if not targets.is_floating_point():
        targets = targets.to(torch.int64)
    targets = targets[rows._replace(targets=targets).is_filled(ignore_index)]
    is_good = (targets >= 0) & (targets < num_labels) | (targets == ignore_index)
    if targets.is_floating_point():
        is_good &= targets == targets.trunc()
    if not bool(is_good.all()):
        first = targets[~is_good][0].item()
        raise ValueError(
            f"{prefix}targets must be in 0..{num_labels - 1}, or ignore_index={ignore_index} "
            f"(num_classes and ignore_index of this loss), got {first}"
        )


def _position(cursor: Tensor, num_slots: int, prefix: str) -> int:
    position = int(cursor)
    if not 0 <= position < max(1, num_slots):
        raise ValueError(f"{prefix}cursor must be a slot in 0..{num_slots - 1}, got {position}")
    return position


def is_saved_by_predecessor(state_dict: dict[str, Any], prefix: str) -> bool:
    """Whether the queue in a state_dict is one of imbalanced-losses ≤ 0.6."""
    return prefix + "_q_logits" in state_dict


def with_current_names(state_dict: dict[str, Any], prefix: str) -> dict[str, Any]:
    """A copy in which a queue of imbalanced-losses ≤ 0.6 has the names of this one."""
    state_dict = dict(state_dict)
    if not is_saved_by_predecessor(state_dict, prefix):
        return state_dict
    logits = state_dict[prefix + "_q_logits"]
    for name, old in zip(PARTS, ("_q_logits", "_q_targets", "_q_weight", "_q_ptr"), strict=True):
        if prefix + old in state_dict:
            state_dict[prefix + name] = state_dict.pop(prefix + old)
        elif name == "weights" and isinstance(logits, Tensor):
            state_dict[prefix + name] = logits.new_ones(logits.shape[:1])
    state_dict.pop(prefix + "_q_iid", None)
    return state_dict


@contextmanager
def unchanged_on_error(module: nn.Module) -> Iterator[None]:
    """Put a module and those in it back as they were, bit for bit, if the block raises."""
    before = []
    for part in module.modules():
        tensors = [
            (tensor, tensor.detach().clone())
            for tensor in (*part.parameters(recurse=False), *part.buffers(recurse=False))
        ]
        before.append(
            (part, vars(part).copy(), dict(part._parameters), dict(part._buffers), tensors)
        )
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for part, attributes, parameters, buffers, tensors in before:
                vars(part).clear()
                vars(part).update(attributes)
                part._parameters.update(parameters)
                part._buffers.update(buffers)
                for tensor, value in tensors:
                    tensor.copy_(value)
        raise
