"""Which tensors kernels serve, and how these are launched."""

from __future__ import annotations

import importlib
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from imbalanced_losses._ranking.layout import Layout

# Where the kernels run.
DEVICES = ("cuda",)
_OLDEST_TRITON = (3, 2)
# From which on a compiled kernel takes all arguments in the order of its signature.
_OLDEST_DIRECT = (3, 3)
# Rows that one program prepares or sums up, at most.
_BLOCK = 1 << 12
# The last two dimensions of a grid.
_MOST_PROBLEMS = (1 << 16) - 1
# Rows of all problems of unequal length, of which the longest is not known.
MOST_UNREAD = 1 << 18
# Rows that a program looks at together, which goes through all of a problem.
_THROUGH = 1 << 10
# Compiled kernels, and the constants that they take, by what they were compiled for.
_COMPILED: dict[tuple[object, ...], tuple[Any, list[object]]] = {}


def has_kernels(scores: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether scores of a shape [C, M] can be ranked by kernels."""
    return (
        scores.device.type in DEVICES
        and 0 < shape[0] <= _MOST_PROBLEMS
        and shape[1] > 0
        and _has_triton()
    )


@cache
def _has_triton() -> bool:
    """Whether there is a Triton that the kernels have been tested on."""
    return _version_of_triton() >= _OLDEST_TRITON


@cache
def _version_of_triton() -> tuple[int, ...]:
    try:
        triton = importlib.import_module("triton")
    except ImportError:
        return ()
    return tuple(map(int, triton.__version__.split(".")[:2]))


def blocks_of(num_rows: int) -> tuple[int, int]:
    """Rows of a block, a power of two, and how many blocks there are."""
    block = min(_BLOCK, max(256, 1 << (num_rows - 1).bit_length()))
    return block, ceil(num_rows, block)


def expanded(values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`Tensor.expand`, which takes its time, where it is needed."""
    return values if values.shape == shape else values.expand(shape)


def ceil(number: int, step: int) -> int:
    return -(-number // step)


def launch(name: str, grid: tuple[int, int], *arguments: Any, **constants: Any) -> None:
    """Launch a kernel on the device of the first argument, a tensor."""
    device = arguments[0].device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):  # Triton launches on the current one
            _launch(name, device, grid, arguments, constants)
    else:
        _launch(name, device, grid, arguments, constants)


def _launch(
    name: str,
    device: torch.device,
    grid: tuple[int, int],
    arguments: tuple[Any, ...],
    constants: dict[str, Any],
) -> None:
    """With fused multiply-adds, whatever the default of this Triton is.

    What Triton finds out anew for each launch takes longer than all else in it: what it compiled is
    called again by itself.
    """
    kind = (name, device, *constants.items(), *map(specialized, arguments))
    if kind in _COMPILED:
        compiled, values = _COMPILED[kind]
        compiled[grid[0], grid[1], 1](*arguments, *values)
        return
    kernel = getattr(_kernels(name), name)
    compiled = kernel[grid](*arguments, **constants, enable_fp_fusion=True)
    if compiled is not None and _goes_direct():  # None: interpreted
        names = kernel.arg_names[len(arguments) :]
        _COMPILED[kind] = compiled, [constants[name] for name in names]


@cache
def _goes_direct() -> bool:
    """Whether `specialized` is all that a kernel is compiled for: on ROCm it is not."""
    return _version_of_triton() >= _OLDEST_DIRECT and torch.version.hip is None


def specialized(argument: Tensor | int) -> object:
    """What of an argument a kernel is compiled for, or more of it."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16
    if argument < 2:
        return argument
    return argument % 16 == 0, argument < 1 << 31


def launch_through(name: str, layout: Layout, *arguments: object, **constants: Any) -> None:
    """Launch a kernel of `whole`, a program a problem; last it is told the number of rows."""
    launch(
        name,
        (layout.num_problems, 1),
        *(*arguments, layout.num_rows),
        SEGMENTED=layout.lengths is not None,
        BLOCK=_THROUGH,
        **constants,
    )


def stretches(layout: Layout, like: Tensor) -> tuple[Tensor, Tensor]:
    """Lengths and ends [C] of problems of unequal length, or anything."""
    if layout.lengths is None or layout.ends is None:
        return like, like
    return layout.lengths, layout.ends


def strides(rows: Tensor, layout: Layout) -> tuple[int, int]:
    """From a problem to the next, and from a row to the next."""
    return rows.stride(0) if layout.lengths is None else 0, rows.stride(1)


def _kernels(name: str) -> Any:
    """The module of a kernel, which imports Triton."""
    from imbalanced_losses._ranking.cuda import kernels, segments, whole

    return {"segment": segments, "whole": whole}.get(name.partition("_")[0], kernels)
