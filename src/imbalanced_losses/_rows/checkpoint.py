"""The state of a loss in a checkpoint: packed in one tensor, and read again in every older form."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from imbalanced_losses._checks.arguments import number_above_zero, saved_count
from imbalanced_losses._rows.pool import Pool

_FORMAT = 1.0
# Keys up to version 0.9, those that begin with _q up to 0.6, and what each holds.
_OLDER = {
    "_queue.logits": "logits",
    "_queue.targets": "targets",
    "_queue.weights": "weights",
    "_queue.cursor": "cursor",
    "_queue.is_weighted": "is_weighted",
    "temperature": "temperature",
    "num_steps": "num_steps",
    "_queue._q_logits": "logits",
    "_queue._q_targets": "targets",
    "_queue._q_weight": "weights",
    "_queue._q_ptr": "cursor",
    "_queue._q_iid": "",  # of no use
}


class AveragedState(ValueError):
    """A packed state whose bytes are not those that were packed."""


class Saved(NamedTuple):
    """The state of a ranking loss."""

    temperature: float
    num_steps: int
    cursor: int
    is_weighted: bool
    is_valued: bool
    is_grouped: bool
    slots: Pool  # [size] as they stand; weight 0 and ignore_index at those that are free


def pack(numbers: Sequence[float], rows: Tensor | None = None) -> Tensor:
    """Numbers, and rows [n, k], as bytes [8 · (3 + len(numbers) + n · k)] uint8 on the CPU.

    Integers up to 2⁵³ and floats of every dtype come back exactly. A checksum goes first, so that
    bytes which somebody averaged, or took for weights in another way, are recognised.
    """
    head = torch.tensor((_FORMAT, len(numbers), *numbers), dtype=torch.float64, device="cpu")
    values = head if rows is None else torch.cat((head, rows.double().flatten().cpu()))
    words = values.view(torch.int64)
    return torch.cat((_checksum(words), words)).view(torch.uint8)


def unpack(state: Any, num_numbers: int) -> tuple[list[float], Tensor]:
    """The numbers that were packed, and the rows [n · k] float64.

    Raises:
        AveragedState: the bytes have changed.
        TypeError, ValueError: it is no packed state, or one of another kind of loss.
    """
    given = _dense("the state of a loss", state).flatten()
    if given.numel() % 8 or given.numel() < 24:
        raise ValueError(f"the state of a loss must be bytes in eights, got {given.numel()}")
    # Tools cast what they save; bytes survive that in every dtype, unless they were averaged.
    given = given.double() if given.is_floating_point() else given.to(torch.int64)
    words = given.to(torch.uint8).contiguous().view(torch.int64)
    if not given.eq(given.to(torch.uint8)).all() or words[:1].ne(_checksum(words[1:])):
        raise AveragedState("the state of a loss has changed since it was saved")
    version, count, *_ = values = words[1:].view(torch.float64)
    if version != _FORMAT or count != num_numbers:
        raise ValueError(
            "the state must be that of the same kind of loss, saved by this version or an older one"
        )
    return values[2 : 2 + num_numbers].tolist(), values[2 + num_numbers :]


def _checksum(words: Tensor) -> Tensor:
    """[1] int64, which depends on each word and its place."""
    odd = torch.arange(1, 2 * len(words), 2, device="cpu")
    return (words * odd * 0x9E3779B97F4A7C1).sum(0, keepdim=True) + len(words)


def pack_ranking(saved: Saved) -> Tensor:
    """The state of a ranking loss as bytes, as many for every state of it."""
    slots = saved.slots.whole()
    is_wide = slots.logits.dtype == torch.float64
    form = (slots.logits.shape[1], slots.targets.dim() - 1, is_wide)
    return pack((*form, *saved[:-1]), slots.packed())


def unpack_ranking(state: Any, now: Saved, ignore_index: int, num_labels: int) -> Saved:
    """The state that was packed, if a loss whose state is `now` can take it; raises as `unpack`."""
    numbers, values = unpack(state, 9)
    form, (is_wide, temperature, num_steps, cursor, *flags) = numbers[:2], numbers[2:]
    num_classes, is_multilabel = now.slots.logits.shape[1], now.slots.targets.dim() - 1
    if form != [num_classes, is_multilabel]:
        raise ValueError(
            f"num_classes and multilabel of the queue must be {num_classes} and "
            f"{bool(is_multilabel)}, as of this loss, got {form[0]:g} and {bool(form[1])}; to "
            "begin with an empty queue leave the key out and load with strict=False"
        )
    rows = values.view(-1, now.slots.packed().shape[1])
    slots = now.slots.unpacked(rows, torch.float64 if is_wide else torch.float32)
    number_above_zero("temperature", temperature)
    saved_count("num_steps", num_steps)
    saved_count("cursor", cursor, max(0, slots.logits.shape[0] - 1))
    targets = slots.targets[slots.is_storable(ignore_index)]
    is_bad = ((targets < 0) | (targets >= num_labels)) & (targets != ignore_index)
    if bool(is_bad.any()):
        raise ValueError(
            f"targets must be in 0..{num_labels - 1}, or ignore_index={ignore_index} "
            f"(num_classes and ignore_index of this loss), got {int(targets[is_bad][0])}"
        )
    is_weighted, is_valued, is_grouped = map(bool, flags)
    counts = int(num_steps), int(cursor)
    return Saved(temperature, *counts, is_weighted, is_valued, is_grouped, slots)


def in_current_form(state_dict: dict[str, Any], prefix: str, now: Saved) -> dict[str, Any]:
    """A copy in which a ranking loss saved by a version up to 0.9 has the form of this one.

    What a version did not save is as `now`, in the loss. Where the queue lacks a part the keys
    stay as they are, for `strict` to judge.

    Raises:
        TypeError, ValueError: values that no version has saved.
    """
    keys = {prefix + key: part for key, part in _OLDER.items() if prefix + key in state_dict}
    found = {part: _dense(key, state_dict[key]) for key, part in keys.items()}
    if not {"logits", "targets", "cursor"} <= found.keys():
        return state_dict
    logits, targets = found["logits"], found["targets"]
    weights = found.get("weights", logits.new_ones(logits.shape[:1]))
    shapes = [list(part.shape) for part in (logits, targets, weights)]
    rows, columns = logits.shape if logits.dim() == 2 else (-1, -1)
    if shapes[1:] not in ([[rows], [rows]], [[rows, columns], [rows]]):
        raise ValueError(f"{prefix}_queue must hold the same rows in each part, got {shapes}")
    if targets.dim() == 2:
        weights = weights[:, None].expand(targets.shape)
    if targets.is_floating_point() and bool((targets != targets.trunc()).any()):
        raise ValueError(f"{prefix}_queue.targets must be integers, as they were saved")
    numbers = {"temperature": now.temperature, "num_steps": now.num_steps}
    numbers |= {"is_weighted": False, "is_valued": False, "is_grouped": False}
    numbers |= {name: _number(name, found[name]) for name in (*numbers, "cursor") if name in found}
    saved = Saved(**numbers, slots=Pool(logits, targets, weights))  # type: ignore[arg-type]
    return _with_state(state_dict, prefix, keys, pack_ranking(saved))


def older_numbers(state_dict: dict[str, Any], prefix: str, names: Sequence[str]) -> dict[str, Any]:
    """A copy in which numbers that a version up to 0.9 saved one by one are packed."""
    keys = [prefix + name for name in names]
    if not all(key in state_dict for key in keys):
        return state_dict
    saved = pack([_number(key, _dense(key, state_dict[key])) for key in keys])
    return _with_state(state_dict, prefix, keys, saved)


def _with_state(
    state_dict: dict[str, Any], prefix: str, without: Container[str], state: Tensor
) -> dict[str, Any]:
    rest = {key: value for key, value in state_dict.items() if key not in without}
    return {**rest, prefix + "_extra_state": state}


def _dense(key: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.is_meta or value.layout != torch.strided:
        is_tensor = isinstance(value, Tensor)
        got = f"{value.device}, {value.layout}" if is_tensor else type(value).__name__
        raise TypeError(f"{key} must be a dense tensor with values, got {got}")
    if value.is_complex():
        raise TypeError(f"{key} must be real, got {value.dtype}")
    return value.detach().cpu()


def _number(name: str, value: Tensor) -> float:
    if value.numel() != 1:
        raise ValueError(f"{name} must be one number, got shape {list(value.shape)}")
    return float(value)


@contextmanager
def unchanged_on_error(
    *attributes: MutableMapping[str, Any],
    writes: Iterable[tuple[Tensor, Any]] = (),
    unless: Callable[[], bool] = lambda: False,
) -> Iterator[None]:
    """Put things back as they were, bit for bit, if the block raises, be it by Ctrl-C.

    Args:
        attributes: such as the `vars` of objects.
        writes: tensors, and the places in them that the block writes to.
        unless: whether the block had done its work before it raised.
    """
    before = [(mapping, dict(mapping)) for mapping in attributes]
    values = [(tensor, where, tensor.detach()[where]) for tensor, where in writes]
    values = [(t, w, v if isinstance(w, Tensor) else v.clone()) for t, w, v in values]
    try:
        yield
    except BaseException:
        if not unless():
            for mapping, old in before:
                mapping.clear()
                mapping.update(old)
            with torch.no_grad():
                for tensor, where, value in values:
                    tensor[where] = value
        raise


def change_tensors(owner: object, change: Callable[[Tensor], Tensor]) -> None:
    """Put another tensor in the place of each that is an attribute."""
    with torch.inference_mode(False):  # they outlive it
        tensors = {k: change(v) for k, v in vars(owner).items() if isinstance(v, Tensor)}
        vars(owner).update(tensors)
