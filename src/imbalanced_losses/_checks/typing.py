"""The types of arguments, and what type checkers are told beyond the annotations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol, TypeVar

Gather = Literal["rows", "sums"]
GradReduce = Literal["mean", "sum"]
Reduction = Literal["mean", "sum", "none"]
TemperatureUnit = Literal["score", "spread"]
Function = TypeVar("Function", bound=Callable[..., Any])


class Labelled(Protocol):
    """A loss of classes, or of labels that are 0 or 1."""

    num_classes: int
    multilabel: bool
    ignore_index: int
    check_values: bool


def typed_as(function: Function) -> Callable[[Callable[..., Any]], Function]:
    """A decorator that gives what it decorates the types of `function`, overloads included.

    For `__call__` of a module, which `nn.Module` declares to take and return anything.
    """
    raise NotImplementedError(f"{function.__name__} is for type checkers alone")
