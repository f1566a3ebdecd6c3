"""What a tensor has to be before its values matter; and the form of every error."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from imbalanced_losses._checks import hints as _fixes


def text(name: str, expected: str, got: Any, fix: str = "") -> str:
    return f"{name} must be {expected}, got {got}{fix}"


def fits(name: str, value: Tensor, beside: tuple[str, Tensor], *shapes: torch.Size) -> Tensor:
    """A tensor of one of the shapes, on the device of the argument `beside` it."""
    other_name, other = beside
    # Of as many dimensions: else a compiler would tell the lengths of different ones apart.
    if value.shape not in [shape for shape in shapes if len(shape) == value.dim()]:
        expected = " or ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
        expected += f" to fit {other_name} {list(other.shape)}"
        fix = _fixes.of_shape(name, value, shapes, beside)
        raise ValueError(text(name, expected, list(value.shape), fix))
    if value.dim() > 0 and value.device != other.device:
        expected = f"on the device of {other_name} ({other.device})"
        fix = f"; use {name}.to({other_name}.device)"
        raise ValueError(text(name, expected, value.device, fix))
    return value


def one_or_two_dimensions(name: str, value: Tensor) -> None:
    if value.dim() not in (1, 2):
        raise ValueError(text(name, "[M] or [C, M]", list(value.shape)))


def with_values(name: str, value: Tensor) -> Tensor:
    if value.is_meta:
        raise TypeError(f"{name} must have values, got a tensor on meta; use a list of floats")
    return value


def of_bools(name: str, given: Any) -> Tensor:
    value = tensor(name, given)
    if value.dtype != torch.bool:
        raise TypeError(text(name, "bool", value.dtype, "; use targets == 1"))
    return value


def of_integers(name: str, given: Any) -> Tensor:
    value = tensor(name, given)
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(text(name, "integers", value.dtype))
    return value


def floating(name: str, given: Any) -> Tensor:
    value = tensor(name, given)
    if not value.is_floating_point():
        raise TypeError(text(name, "floating point", value.dtype, _fixes.of_dtype(name, value)))
    return value


def real(name: str, given: Any) -> Tensor:
    value = tensor(name, given)
    if value.is_complex():
        raise TypeError(text(name, "real", value.dtype))
    return value


def tensor(name: str, given: Any) -> Tensor:
    """A dense tensor that can be calculated with: float8 becomes float32."""
    if not isinstance(given, Tensor):
        raise TypeError(text(name, "a torch.Tensor", kind(given), _fixes.of_type(name, given)))
    value: Tensor = plain(given)
    is_dense = value.layout == torch.strided and not (value.is_nested or value.is_quantized)
    if not is_dense or kind(value) == "DTensor":
        raise TypeError(text(name, "a dense tensor", _fixes.of_layout(name, value)))
    is_float8 = value.dtype.itemsize == 1 and value.is_floating_point()
    return value.float() if is_float8 else value


def plain(value: Any) -> Any:
    """A tensor of a subclass that acts by `__torch_function__` (MONAI's, fastai's) as a plain one.

    Those that act by `__torch_dispatch__`, such as compilers' own, are left alone.
    """
    own = type(value)
    if own in (Tensor, Parameter) or torch.compiler.is_compiling() or not issubclass(own, Tensor):
        return value
    is_passive = own.__torch_dispatch__ is Tensor.__torch_dispatch__
    return value.as_subclass(Tensor) if is_passive else value


def kind(value: Any) -> str:
    return type(value).__name__


def shown(value: Any) -> str:
    return f"{value!r} ({kind(value)})"
