"""Every check of an argument and the wording of its error.

One style: the argument, what was expected, what came; and the fix where it is not obvious.
A check returns nothing or the argument in its canonical form, and changes no state.
"""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

REDUCTIONS = ("mean", "sum", "none")
TEMPERATURE_UNITS = ("score", "spread")


def integer(name: str, value: Any, minimum: int | None = None) -> int:
    """An int, at least `minimum`; bool is not one."""
    expected = "an int" if minimum is None else f"an int >= {minimum}"
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be {expected}, got {value!r} ({_kind(value)})")
    if minimum is not None and value < minimum:
        raise ValueError(f"{name} must be {expected}, got {value!r}")
    return int(value)


def boolean(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r} ({_kind(value)})")
    return value


def choice(name: str, value: Any, options: tuple[str, ...]) -> Any:
    if value not in options:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, options))}, got {value!r}")
    return value


def temperature(value: Any) -> float:
    """A finite number above zero."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"temperature must be a float > 0, got {value!r} ({_kind(value)})")
    number = float(value)
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"temperature must be finite and > 0, got {value!r}")
    return number


def ignore_index(value: Any, binary_labels: bool) -> int:
    """An int that is not one of the labels 0 and 1 where those are all there is."""
    index = integer("ignore_index", value)
    if binary_labels and index in (0, 1):
        raise ValueError(
            f"ignore_index must not be a label: with num_classes=1 or multilabel=True targets are "
            f"0 and 1, and ignoring one of them leaves nothing to rank; got {index}"
        )
    return index


def logits(value: Any, num_classes: int) -> Tensor:
    """Floating [N, num_classes]."""
    if not isinstance(value, Tensor):
        raise TypeError(f"logits must be a torch.Tensor, got {_kind(value)}")
    if not value.is_floating_point():
        raise TypeError(f"logits must be floating point, got {value.dtype}")
    if value.dim() != 2 or value.shape[1] != num_classes:
        fix = ""
        if value.dim() == 1 and num_classes == 1:
            fix = "; use logits.unsqueeze(1)"
        elif value.dim() > 2:
            fix = "; flatten sequences first: logits.reshape(-1, num_classes)"
        raise ValueError(
            f"logits must be [N, {num_classes}] (num_classes={num_classes}), "
            f"got {list(value.shape)}{fix}"
        )
    return value


def targets(value: Tensor, logits: Tensor, multilabel: bool) -> Tensor:
    """Real [N], or [N, C] for multi-label; [N, 1] becomes [N] for one class."""
    if not isinstance(value, Tensor):
        raise TypeError(f"targets must be a torch.Tensor, got {_kind(value)}")
    if value.is_complex():
        raise TypeError(f"targets must be integers (or integral floats), got {value.dtype}")
    num_rows, num_classes = logits.shape
    expected = [num_rows, num_classes] if multilabel else [num_rows]
    if not multilabel and num_classes == 1 and value.shape == (num_rows, 1):
        value = value.squeeze(1)
    if list(value.shape) != expected:
        fix = ""
        if not multilabel and value.shape == logits.shape:
            fix = "; for 0/1 labels per class use multilabel=True"
        raise ValueError(
            f"targets must be {expected} to fit logits {list(logits.shape)}, "
            f"got {list(value.shape)}{fix}"
        )
    if value.device != logits.device:
        raise ValueError(
            f"targets must be on the device of logits ({logits.device}), got {value.device}"
        )
    return value


def sample_weight(value: Any, logits: Tensor) -> Tensor:
    """Real [N]."""
    if not isinstance(value, Tensor):
        raise TypeError(f"sample_weight must be a torch.Tensor, got {_kind(value)}")
    if value.is_complex():
        raise TypeError(f"sample_weight must be real, got {value.dtype}")
    if value.shape != logits.shape[:1]:
        raise ValueError(
            f"sample_weight must be [{len(logits)}], one weight a row of logits, "
            f"got {list(value.shape)}"
        )
    if value.device != logits.device:
        raise ValueError(
            f"sample_weight must be on the device of logits ({logits.device}), got {value.device}"
        )
    return value


def row_values(
    targets: Tensor, sample_weight: Tensor | None, num_labels: int, ignore_index: int
) -> None:
    """Targets are labels or ignore_index, weights finite and ≥ 0: one read of the device."""
    wide = targets if targets.is_floating_point() else targets.to(torch.int64)
    good_targets = (wide >= 0) & (wide < num_labels)
    if targets.is_floating_point():
        good_targets &= wide == wide.trunc()
    good_targets |= wide == ignore_index
    all_good = good_targets.all()
    if sample_weight is not None:
        good_weights = (sample_weight >= 0) & sample_weight.isfinite()
        all_good &= good_weights.all()
    if bool(all_good):
        return
    if not bool(good_targets.all()):
        labels = "0 or 1" if num_labels == 2 else f"integers in 0..{num_labels - 1}"
        first = targets[~good_targets][0].item()
        raise ValueError(f"targets must be {labels}, or ignore_index={ignore_index}, got {first}")
    if sample_weight is not None:
        first = sample_weight[~good_weights][0].item()
        raise ValueError(f"sample_weight must be finite and >= 0, got {first}")


def check_smooth_ap(scores: Any, is_positive: Any, temperature_: Any, sample_weight: Any) -> None:
    """The arguments of `functional.smooth_ap`."""
    for name, value in (("scores", scores), ("is_positive", is_positive)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {_kind(value)}")
    if not scores.is_floating_point():
        raise TypeError(f"scores must be floating point, got {scores.dtype}")
    if is_positive.dtype != torch.bool:
        raise TypeError(f"is_positive must be bool, got {is_positive.dtype}; use targets == 1")
    if scores.dim() not in (1, 2):
        raise ValueError(f"scores must be [M] or [C, M], got {list(scores.shape)}")
    if is_positive.shape != scores.shape:
        raise ValueError(
            f"is_positive must have the shape of scores {list(scores.shape)}, "
            f"got {list(is_positive.shape)}"
        )
    if isinstance(temperature_, Tensor):
        if temperature_.dim() > 1 or temperature_.numel() not in (1, scores.shape[0]):
            raise ValueError(
                f"temperature must be a float, [] or [C], got shape {list(temperature_.shape)}"
            )
    else:
        temperature(temperature_)
    if sample_weight is not None:
        if not isinstance(sample_weight, Tensor):
            raise TypeError(f"sample_weight must be a torch.Tensor, got {_kind(sample_weight)}")
        if sample_weight.shape not in (scores.shape, scores.shape[-1:]):
            raise ValueError(
                f"sample_weight must be {list(scores.shape[-1:])} or {list(scores.shape)}, "
                f"got {list(sample_weight.shape)}"
            )


def _kind(value: Any) -> str:
    return type(value).__name__
