"""Whether code runs with values or only shapes, and what runs it."""

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


def is_in_backward() -> bool:
    """Whether activation checkpointing or a hook runs this; compiled code can't tell."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def is_transformed() -> bool:
    """Whether torch.func is at work, such as `grad` or `vmap`."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
