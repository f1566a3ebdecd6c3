"""In which circumstances code runs: with values or only shapes, for the first time or again."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

# Devices whose values cost nothing to look at: elsewhere a read waits for the device.
HOSTS = ("cpu",)


def is_on_host(tensor: Tensor) -> bool:
    """Whether the values are known and at hand."""
    return tensor.device.type in HOSTS and not is_traced(tensor)


def is_traced(tensor: Tensor) -> bool:
    """Whether the code is being compiled or exported, or the tensor has no values."""
    return torch.compiler.is_compiling() or tensor.is_meta or isinstance(tensor, FakeTensor)


def is_recomputed() -> bool:
    """Whether activation checkpointing is computing a forward pass again.

    Only that happens inside a backward pass. Compiled code recomputes what it chooses, but never
    a forward pass that changes state.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
