"""Memory for intermediate results that every thread keeps.

Fresh memory of more than some kilobytes costs as much as the arithmetic done in it: the operating
system maps and clears it page by page, and takes it back when it is freed.
"""

from __future__ import annotations

import math
import threading
from enum import Enum, auto
from typing import Any

import torch
from torch import Tensor

from imbalanced_losses._checks import tracing as _tracing

# Elements from which memory is kept, and up to which: 16 MiB of float64.
_FEWEST, _MOST = 1 << 14, 1 << 21

_kept = threading.local()


class Place(Enum):
    """What is kept: each name of a dtype is one piece of memory."""

    PAIRS = auto()
    MORE_PAIRS = auto()
    STILL_MORE_PAIRS = auto()
    LAST_PAIRS = auto()
    COORDINATES = auto()
    POWERS = auto()
    WEIGHTED_POWERS = auto()
    COEFFICIENTS = auto()


def scratch(
    place: Place, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None
) -> Tensor | None:
    """A tensor with any content, on the device of `like` and of its dtype or the one given.

    For `out=`: None where PyTorch shall make one itself.

    The next call for the same place and dtype hands the same memory out again: what was written
    there is lost then, and must not be returned to a caller. Kept on the CPU alone;
    other devices have an allocator that does this.
    """
    size = math.prod(shape)
    if not _FEWEST <= size <= _MOST or like.device.type not in _tracing.HOSTS:
        return None
    if torch._C._are_functorch_transforms_active():
        return None  # vmap knows no `out=`
    dtype = like.dtype if dtype is None else dtype
    kept: dict[Any, Tensor] = vars(_kept)
    memory = kept.get((place, dtype))
    if memory is None or len(memory) < size:
        with torch.inference_mode(False):  # it outlives it
            memory = kept[place, dtype] = torch.empty(size, dtype=dtype)
    return memory[:size].view(shape)
