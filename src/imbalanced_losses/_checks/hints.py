"""Hints at what was probably meant: the last part of an error message, "" if there is none.

Only called on the way to an error, so that values may be read here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def of_type(name: str, value: Any) -> str:
    """A hint for a value that should be a tensor."""
    if isinstance(getattr(value, "logits", None), Tensor):
        return f"; a model's output has them as an attribute: use {name}.logits"
    if isinstance(value, (list, tuple)) and any(isinstance(part, Tensor) for part in value):
        return f"; it holds tensors: pick one, or join them by torch.cat({name})"
    if isinstance(value, (list, tuple)) and any(isinstance(part, str) for part in value):
        return f"; number the words: torch.as_tensor(np.unique({name}, return_inverse=True)[1])"
    if isinstance(value, (list, tuple)) or hasattr(value, "__array__"):
        return f"; use torch.as_tensor({name})"
    return ""


def of_number(value: Any) -> str:
    """A hint for a value that should be a float."""
    return "; use its .item()" if isinstance(value, Tensor) and value.numel() == 1 else ""


def of_layout(name: str, value: Tensor) -> str:
    """What kind of tensor it is, and the call that makes it dense."""
    if hasattr(value, "full_tensor"):
        return f"a DTensor; use {name}.full_tensor()"
    if value.is_nested:
        return f"a nested one; use torch.cat({name}.unbind())"
    if value.is_quantized:
        return f"quantized {value.dtype}; use {name}.dequantize()"
    return f"layout {value.layout}; use {name}.to_dense()"


def of_dtype(name: str, value: Tensor) -> str:
    """A hint for a value that should be floating point."""
    if name == "logits" and value.dim() == 1 and not value.is_complex():
        return "; pass the scores themselves, not their argmax"
    return "" if value.is_complex() else f"; use {name}.float()"


def of_swapped(logits: Tensor, targets: Any, num_classes: int) -> str:
    """A hint for logits that would fit as targets."""
    is_swapped = (
        isinstance(targets, Tensor)
        and targets.is_floating_point()
        and targets.shape == (*logits.shape[:1], num_classes)
    )
    return "; logits come first, then targets: they seem to be swapped" if is_swapped else ""


def of_logits(value: Tensor, num_classes: int, targets: Any) -> str:
    """A hint for logits that are not [N, num_classes]."""
    shape = list(value.shape)
    if len(shape) == 1 and num_classes == 1:
        return "; use logits.unsqueeze(1)"
    if len(shape) < 2:
        return "; for one row use logits.unsqueeze(0)" if shape == [num_classes] else ""
    if len(shape) > 2:
        is_channels_first = shape[1] == num_classes != shape[-1]
        flat = ("movedim(1, -1)." if is_channels_first else "") + "reshape(-1, num_classes)"
        return f"; flatten sequences first: logits.{flat}, and targets in the same order"
    num_rows = len(targets) if isinstance(targets, Tensor) and targets.dim() > 0 else None
    if shape == [num_classes, num_rows]:
        return "; one row an example: use logits.T"
    if num_classes == 1 and shape[1] == 2:
        return (
            "; for two outputs, negative and positive, use logits[:, 1:] - logits[:, :1], "
            "or num_classes=2"
        )
    return f"; for {shape[1]} outputs construct the loss with num_classes={shape[1]}"


def of_labels(targets: Tensor, num_labels: int, ignore_index: int) -> str:
    """A hint for targets with values that are no labels."""
    if targets.is_floating_point() and bool(targets.isnan().any()):
        return f"; NaN as 'not annotated': use targets.nan_to_num({ignore_index})"
    labels = set(targets.unique().tolist()) - {ignore_index}
    if num_labels == 2 and labels <= {-1, 1}:
        return "; for labels -1 and 1 use targets > 0"
    if not all(float(label).is_integer() for label in labels):
        is_soft = num_labels == 2 and all(0 <= label <= 1 for label in labels)
        return "; labels are not probabilities: use targets > 0.5" if is_soft else ""
    low, high = int(min(labels)), int(max(labels))
    others = labels.difference(range(num_labels))
    if not targets.dtype.is_signed and others == {ignore_index % 256 ** targets.element_size()}:
        return f"; {targets.dtype} cannot hold {ignore_index}: use targets.long() before filling in"
    if len(others) == 1 and (255 in others or low < 0):
        other = int(others.pop())
        return f"; to leave such rows out construct the loss with ignore_index={other}"
    if low == 1 and high == num_labels:
        return "; for labels that begin at 1 use targets - 1"
    if num_labels == 2 and low >= 0:
        return "; for one class c against the others use targets == c"
    if low >= 0 and high < 2 * num_labels:
        return f"; for labels up to {high} construct the loss with num_classes={high + 1}"
    return ""


def of_share(number: float) -> str:
    """A hint for a value that should be between 0 and 1."""
    return f"; a share, not per cent: {number / 100:g}" if 1 <= number < 100 else ""


def of_shape(name: str, value: Tensor, shapes: tuple[Any, ...], beside: tuple[str, Tensor]) -> str:
    """A hint for a tensor that has none of the shapes that fit the argument `beside` it."""
    other, tensor = beside
    if other == "logits":
        if name == "targets":
            return _of_targets(value, tensor.shape, tensor.shape in shapes)
        return _of_rows(name, value, tensor.shape, tensor.shape in shapes)
    is_transposed = value.dim() == 2 and value.T.shape in shapes
    return f"; one row a class: use {name}.T" if is_transposed else ""


def _of_targets(value: Tensor, logits: torch.Size, is_multilabel: bool) -> str:
    """A hint for targets that are not [N], or [N, C] for multi-label."""
    num_rows, num_classes = logits
    if is_multilabel and value.shape == (num_rows,):
        return "; for the number of one class a row leave out multilabel=True"
    if not is_multilabel and value.shape == logits:
        return "; for 0/1 labels per class use multilabel=True, for one-hot rows targets.argmax(1)"
    if not is_multilabel and num_classes == 1 and value.shape == (num_rows, 2):
        return "; for one-hot rows use targets.argmax(1)"
    if value.numel() == (num_rows * num_classes if is_multilabel else num_rows) > 0:
        return f"; use targets.reshape({'-1, num_classes' if is_multilabel else '-1'})"
    return ""


def _of_rows(name: str, value: Tensor, logits: torch.Size, is_multilabel: bool) -> str:
    """A hint for weights, values or ids that are not [N], nor [N, C]."""
    num_rows, num_classes = logits
    if name == "sample_weight" and value.shape == (num_classes,) and num_classes > 1:
        fix = ".expand(len(logits), -1)" if is_multilabel else "[targets]"
        return f"; for weights of classes use sample_weight{fix}"
    return f"; use {name}.reshape(-1)" if value.numel() == num_rows > 0 else ""
