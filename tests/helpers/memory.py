"""What tests of memory measure with."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from imbalanced_losses._ranking import scratch


class LargestTensor(TorchDispatchMode):
    """Remembers the storage, in elements, behind the largest tensor that any operation made."""

    def __init__(self) -> None:
        super().__init__()
        vars(scratch._kept).clear()  # what larger problems of the past have left
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                elements = tensor.untyped_storage().nbytes() // tensor.element_size()
                self.elements = max(self.elements, elements)
        return out
