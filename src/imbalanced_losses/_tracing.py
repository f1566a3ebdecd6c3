"""Whether values can be looked at, or only the shapes of tensors are known."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def is_traced(tensor: Tensor) -> bool:
    """Whether the code is being compiled or exported, or the tensor has no values."""
    return torch.compiler.is_compiling() or tensor.is_meta or isinstance(tensor, FakeTensor)
