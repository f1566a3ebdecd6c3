"""Batches for ranks that rank their rows together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from imbalanced_losses._gather import Group, ProcessGroup

__all__ = ["even_steps"]

Batch = TypeVar("Batch")


def even_steps(
    batches: Iterable[Batch],
    process_group: ProcessGroup | None = None,
    *,
    device: torch.device | str | None = None,
) -> Iterator[Batch]:
    """This rank's batches, then empty ones until every rank has had its last.

    A loss that ranks the rows of all ranks, and a trainer that averages their
    gradients, need every rank in every step. A rank whose batches run out takes
    part with zero rows, which leave loss and gradient as those of the rows that
    there are. `torch.distributed`'s `Join` can't do that: it repeats the
    collectives of the trainer, not those within a forward pass.

    One all-reduce of one number a step. Without torch.distributed, or alone,
    the batches as they are.

    Args:
        batches: tensors, or nested tuples, lists, named tuples and dicts of
            them; the first dimension of every tensor is the batch's. Other
            values are repeated as they were.
        process_group: the ranks; None: all.
        device: of the all-reduce; None: the current CUDA device for NCCL, else
            the CPU.

    Yields:
        The batches; then, while other ranks have more, the last one with its
        tensors cut to zero rows.

    Raises:
        RuntimeError: on every rank, where one has no batch at all: there is
            nothing to cut.

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
    last: Any = none_left
    while True:
        batch: Any = next(source, none_left)
        has_batch = batch is not none_left
        if has_batch:
            last = batch
        # How many ranks have a batch, and how many never had one.
        num_with, num_without = group.summed([has_batch, last is none_left], device)
        if num_with == 0:
            return
        if num_without > 0:
            raise RuntimeError(
                f"{num_without} of {group.size()} ranks have no batch at all: give each at least "
                "one, which may have zero rows"
            )
        yield batch if has_batch else _without_rows(last)


def _without_rows(batch: Any) -> Any:
    """The batch with every tensor cut to zero rows."""
    if isinstance(batch, Tensor):
        return batch[:0]
    if isinstance(batch, Mapping):
        return {name: _without_rows(value) for name, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_without_rows(value) for value in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(_without_rows(value) for value in batch)
    return batch
