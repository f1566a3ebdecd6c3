"""The arguments of a batch sampler."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from imbalanced_losses._checks.arguments import integer
from imbalanced_losses._checks.tensors import fits, of_bools, of_integers, with_values


def groups(ids_given: Any, is_positive: Any) -> tuple[Tensor, Tensor]:
    """What a sampler of groups is made of: [N] int64 and [N] bool, on the CPU."""
    ids = with_values("group", of_integers("group", ids_given))
    if ids.dim() != 1 or len(ids) == 0:
        raise ValueError(f"group must be [N] with N > 0, got {list(ids.shape)}")
    if is_positive is None:
        return ids.cpu().long(), torch.zeros(len(ids), dtype=torch.bool, device="cpu")
    positive = fits("is_positive", of_bools("is_positive", is_positive), ("group", ids), ids.shape)
    return ids.cpu().long(), positive.cpu()


def place(num_replicas: Any, rank: Any) -> tuple[int, int] | None:
    """How many processes there are and which one this is, where that was said."""
    if num_replicas is None and rank is None:
        return None
    if num_replicas is None or rank is None:
        raise ValueError(
            f"num_replicas and rank must be given together, got {num_replicas!r} and {rank!r}"
        )
    if integer("rank", rank, minimum=0) >= integer("num_replicas", num_replicas, minimum=1):
        raise ValueError(f"rank must be in 0..{num_replicas - 1} (num_replicas), got {rank}")
    return int(num_replicas), int(rank)


def num_batches(num_groups: int, in_step: int, drop_last: bool) -> int:
    """How many batches each process gets if all together take `in_step` groups a step; ≥ 1."""
    if drop_last and num_groups < in_step:
        raise ValueError(
            f"group must hold >= {in_step} groups, groups_per_batch for every process, or "
            f"drop_last=True leaves no batch; got {num_groups}"
        )
    return num_groups // in_step if drop_last else -(-num_groups // in_step)


def num_consumed(value: Any, num_batches: int) -> int:
    """A number of batches of one epoch."""
    if integer("num_consumed", value, minimum=0) > num_batches:
        raise ValueError(
            f"num_consumed must be in 0..{num_batches}, batches of one epoch, got {value}"
        )
    return int(value)


def saved_sampler(state_dict: Mapping[str, int], **own: int) -> None:
    """The state of a sampler with the same batches."""
    for name, value in own.items():
        if state_dict[name] != value:
            raise ValueError(
                f"state_dict must be of a sampler with {name}={value}, as this one, got "
                f"{name}={state_dict[name]}: give it the same arguments on as many processes"
            )
