"""What type checkers are told beyond the annotations: nothing here runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


def typed_as(function: Function) -> Callable[[Callable[..., Any]], Function]:
    """A decorator that gives what it decorates the types of `function`, overloads included.

    For `__call__` of a module, which `nn.Module` declares to take and return anything.
    """
    raise NotImplementedError(f"{function.__name__} is for type checkers alone")
