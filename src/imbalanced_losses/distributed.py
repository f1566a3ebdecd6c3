"""Batches for processes that rank their rows together."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch

from imbalanced_losses._rows.gather import Group, ProcessGroup, _raise_first_error

__all__ = ["even_steps"]

Batch = TypeVar("Batch")


def even_steps(
    batches: Iterable[Batch],
    process_group: ProcessGroup | None = None,
    *,
    device: torch.device | str | None = None,
) -> Iterator[Batch]:
    """The batches of this process, then empty ones until every process is done.

    A loss that ranks the rows of all processes, and a trainer that averages
    their gradients, need every process in every step. One whose batches run out
    takes part with zero rows, which change neither. `torch.distributed`'s
    `Join` can't do that: it knows no collectives within a forward pass.

    One all-reduce of three numbers a step. Without torch.distributed, or
    alone, the batches as they are.

    Args:
        batches: tensors and other arrays (NumPy, a DataFrame) whose first
            dimension is the batch's, or nested tuples, lists, named tuples,
            mappings (`dict`, `BatchEncoding`) and dataclasses of them. All
            keep their type. Tensors without a dimension and other values
            (strings, numbers, lists of them) are repeated as they were.
        process_group: the processes; None: all.
        device: of the all-reduce; None: the current CUDA device for NCCL, else
            the CPU.

    Yields:
        The batches; then, while others have more, the last one with its
        arrays cut to zero rows.

    Raises:
        RuntimeError: on every process, if one has no batch at all, and so
            nothing to cut.
        TypeError: on every process, in the step of a batch that holds no array
            with rows, or one of a type that cannot be cut.

    Example:
        >>> batches = [torch.zeros(3, 2), torch.zeros(1, 2)]
        >>> sum(len(batch) for batch in even_steps(batches))
        4
    """
    group = Group(process_group)
    if group.size() == 1:
        yield from batches
        return
    source = iter(batches)
    none_left = object()
    empty: Any = none_left  # the last batch without its rows
    while True:
        batch: Any = next(source, none_left)
        has_batch = batch is not none_left
        error = None
        if has_batch:
            try:
                empty, num_cut = _cut(batch)
                if num_cut == 0:
                    raise TypeError("nothing in it has rows that could be cut")
            except Exception as raised:  # other processes wait to hear of it
                error = TypeError(
                    "every batch must hold tensors or other arrays of rows, in tuples, lists, "
                    f"mappings or dataclasses, got {type(batch).__name__}: {raised}"
                )
        # How many processes have a batch, never had one, and cannot cut theirs.
        num_with, num_without, num_failed = group.summed(
            [has_batch, empty is none_left, error is not None], device
        )
        if num_with == 0:
            return
        if num_failed > 0:
            _raise_first_error(error, group)
        if num_without > 0:
            raise RuntimeError(
                f"{num_without} of {group.size()} processes have no batch at all: give each at "
                "least one, which may have zero rows"
            )
        yield batch if has_batch else empty


def _cut(value: Any) -> tuple[Any, int]:
    """The value without rows, of its own type, and how many arrays were cut."""
    if hasattr(value, "shape"):
        return (value[:0], 1) if len(value.shape) > 0 else (value, 0)
    if isinstance(value, Mapping):
        parts = dict(value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    elif isinstance(value, (tuple, list)):
        parts = dict(enumerate(value))
    else:
        return value, 0
    cut = {name: _cut(part) for name, part in parts.items()}
    num_cut = sum(number for _, number in cut.values())
    if isinstance(value, tuple):
        fields = [part for part, _ in cut.values()]
        return (type(value)(*fields) if hasattr(value, "_fields") else type(value)(fields)), num_cut
    copied = copy.copy(value)
    for name, (part, _) in cut.items():
        if isinstance(value, (Mapping, list)):
            copied[name] = part
        else:
            object.__setattr__(copied, name, part)  # of a frozen one too
    return copied, num_cut
