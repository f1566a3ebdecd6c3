"""The arguments of what trains with a loss: the mix of two, and accumulation."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from imbalanced_losses._checks.arguments import integer, number_above_zero
from imbalanced_losses._checks.tensors import kind, text


def temperature_schedule(name: str, value: Any) -> tuple[float, float, int]:
    """(start, end, steps) of an annealed temperature."""
    if not (isinstance(value, (tuple, list)) and len(value) == 3):
        raise TypeError(text(name, "(start, end, steps) or None", repr(value)))
    start, end, steps = value
    return (
        number_above_zero(f"{name}'s start", start),
        number_above_zero(f"{name}'s end", end),
        integer(f"{name}'s steps", steps, minimum=1),
    )


def losses_to_mix(auxiliary_loss: Any, main_loss: Any, ranking: type) -> None:
    """A loss that gives one number, and a ranking loss that does."""
    losses = {"auxiliary_loss": auxiliary_loss, "main_loss": main_loss}
    for name, value in losses.items():
        if isinstance(value, type):
            own = value.__name__
            raise TypeError(text(name, "a loss", f"the class {own}", f"; construct it: {own}(...)"))
    if not callable(auxiliary_loss):
        raise TypeError(text("auxiliary_loss", "callable", repr(auxiliary_loss)))
    if not isinstance(main_loss, ranking):
        is_swapped = isinstance(auxiliary_loss, ranking)
        fix = "; auxiliary_loss comes first, then main_loss" if is_swapped else ""
        raise TypeError(text("main_loss", "a ranking loss of this library", kind(main_loss), fix))
    for name, value in losses.items():
        if getattr(value, "reduction", None) == "none":
            raise ValueError(f'{name} must have reduction "mean" or "sum", got "none"')


def called_module(model: Any, module: Any) -> nn.Module:
    """The module behind a model: itself, or what came beside a function."""
    found = model if isinstance(model, nn.Module) else module
    if not isinstance(found, nn.Module):
        raise TypeError(
            f"module must be the network that the function calls, got {kind(found)}: its running "
            "statistics would move twice, since every micro-batch goes through it twice"
        )
    return found


def micro_batches(value: Any) -> None:
    """A sequence of at least one."""
    expected = "a sequence of micro-batches"
    if isinstance(value, Tensor):
        raise TypeError(text("inputs", expected, "one Tensor", "; use inputs.split(rows)"))
    if not hasattr(value, "__len__"):
        expected = "a sequence, since it is gone through twice"
        raise TypeError(text("inputs", expected, kind(value), "; use list(inputs)"))
    if len(value) == 0:
        raise ValueError("inputs must hold at least one micro-batch, got none")


def one_number(name: str, value: Tensor) -> None:
    """What a loss returns where one number is needed."""
    if not isinstance(value, Tensor) or value.dim() > 0:
        got = list(value.shape) if isinstance(value, Tensor) else kind(value)
        fix = '; use reduction "mean" or "sum"'
        raise ValueError(f"{name} must return one number [], got {got}{fix}")
