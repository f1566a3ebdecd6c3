"""What the losses share as modules: settings that stay, and state that is no weight of a model."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from imbalanced_losses._checks.tracing import is_in_backward, is_transformed
from imbalanced_losses._rows.checkpoint import AveragedState, change_tensors, unchanged_on_error
from imbalanced_losses._rows.queue import MemoryQueue


class LossModule(nn.Module):
    """A module that no tool which handles weights can spoil.

    What averages, casts, shares or initialises weights walks over parameters and buffers. A loss
    has neither: its tensors are plain attributes, which follow the module's device alone, and its
    state is saved by `get_extra_state`, PyTorch's hook for what is no weight.
    """

    _settings: Mapping[str, Any] = {}  # once constructed: its arguments and their defaults
    _attributes: Mapping[str, str] = {}  # of arguments whose attributes have other names
    _anchor = ""  # the attribute that is a tensor, if it has any: they are on one device
    __jit_unused_properties__: ClassVar[list[str]]
    __jit_ignored_attributes__: ClassVar[list[str]]

    def __init_subclass__(cls, **keywords: Any) -> None:
        """Have `torch.jit.script` pass over the loss in a model that merely holds it."""
        super().__init_subclass__(**keywords)
        torch.jit.unused(cls.forward)
        cls.__jit_unused_properties__ = [
            n for n in dir(cls) if isinstance(getattr(cls, n), property)
        ]
        cls.__jit_ignored_attributes__ = [
            n for c in cls.__mro__ for n in inspect.get_annotations(c)
        ]

    def __setattr__(self, name: str, value: Any) -> None:
        is_fixed = name in self._settings or (self._settings and name in self._attributes.values())
        if is_fixed and getattr(getattr(type(self), name, None), "fset", None) is None:
            raise AttributeError(
                f"{name} of {type(self).__name__} can't be changed after construction: construct "
                "a new loss"
            )
        super().__setattr__(name, value)

    def extra_repr(self) -> str:
        """The constructor's arguments, without those that have their default."""
        values = {name: getattr(self, self._attributes.get(name, name)) for name in self._settings}
        return ", ".join(
            f"{name}={getattr(value, '__qualname__', repr(value))}"
            for name, value in values.items()
            if not isinstance(value, nn.Module) and value != self._settings[name]
        )

    def _follow(self, device: torch.device) -> None:
        """Take the tensors to a device, one with values: beside `meta` they stay where they are."""
        if device not in (self._device(), torch.device("meta")):
            change_tensors(self, lambda tensor: tensor.to(device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LossModule:
        super()._apply(fn, recurse)
        self._follow(fn(torch.empty(0, device=self._device())).device)
        return self

    def _device(self) -> torch.device:
        anchor = getattr(self, self._anchor, None)
        return torch.device("cpu") if anchor is None else anchor.device

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy, or of what another process sent: its tensors are its own."""
        super().__setstate__(state)
        change_tensors(self, torch.clone)


def arguments_of(loss: type) -> dict[str, Any]:
    """The constructor's arguments and their defaults."""
    return {one.name: one.default for one in inspect.signature(loss).parameters.values()}


class StatefulLoss(LossModule):
    """A loss whose state is in every checkpoint, and in nobody's way."""

    _queue: MemoryQueue | None = None
    _key = "_extra_state"  # of the state in the state_dict that is being loaded

    def _depends_on_state(self) -> bool:
        """Whether a forward pass has another outcome after others."""
        raise NotImplementedError(f"{type(self).__name__} must implement _depends_on_state")

    def _require_step(self) -> None:
        """Raise where a forward pass that changes the state is no step."""
        if not self._depends_on_state():
            return
        if is_in_backward():
            raise RuntimeError(
                "the loss was called inside a backward pass, where its queue, max_pool_size or "
                "schedule would take that for another step: with activation checkpointing keep "
                "the loss outside the checkpointed function; in a hook call it in eval()"
            )
        if is_transformed():
            raise RuntimeError(
                "under torch.func the loss can't move its queue, max_pool_size or schedule on: "
                "call it in eval()"
            )

    def _replicate_for_data_parallel(self) -> nn.Module:
        if self._depends_on_state():
            raise RuntimeError(
                "DataParallel would have a thread for each device share one queue or schedule: "
                "keep the loss outside the wrapped module, or use DistributedDataParallel"
            )
        replica: nn.Module = super()._replicate_for_data_parallel()
        return replica

    def _take(self, state: Tensor) -> None:
        """Take what `get_extra_state` gave, or raise and change nothing."""
        raise NotImplementedError(f"{type(self).__name__} must implement _take")

    def _in_current_form(self, state_dict: dict[str, Any], prefix: str) -> dict[str, Any]:
        """A state_dict in which the state that an older version saved has the form of this one."""
        raise NotImplementedError(f"{type(self).__name__} must implement _in_current_form")

    def set_extra_state(self, state: Any) -> None:
        """Take a state as `load_state_dict` does.

        Args:
            state: of `get_extra_state`; what is no tensor, as DCP's mark for a
                missing state, is left alone.
        """
        if not isinstance(state, Tensor):
            return
        try:
            self._take(state)
        except AveragedState as error:
            if self._queue is not None:
                self._queue.reset()
            warnings.warn(
                f"{self._key}: {error}, as by averaging checkpoints: a queue that it has is empty "
                "now, and all else stays as it was before loading",
                stacklevel=2,
            )

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Take a checkpoint, or change nothing, as in `torch.nn.Module`.

        Args:
            state_dict: of a loss for the same targets, also of version 0.9 and
                before. Of a queue of another size the newest rows are kept;
                averaged, it is left empty, with a warning that names the key.
            strict: whether missing and unexpected keys are an error.
            assign: of no effect on the state, which is copied.

        Returns:
            The names of the missing and the unexpected keys.

        Raises:
            RuntimeError: keys or values that do not fit; the loss is as it was.
        """
        parts = [*self.modules()]
        attributes = [
            mapping for part in parts for mapping in (part._parameters, part._buffers, vars(part))
        ]
        tensors = [(tensor, ...) for tensor in (*self.parameters(), *self.buffers())]
        with contextlib.ExitStack() as stack:
            for part in parts:
                if isinstance(part, StatefulLoss) and part._queue is not None:
                    stack.enter_context(part._queue.unchanged_on_error())
            stack.enter_context(unchanged_on_error(*attributes, writes=tensors))
            return super().load_state_dict(state_dict, strict, assign)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any
    ) -> None:
        *_, error_msgs = arguments
        self._key = prefix + "_extra_state"
        try:
            if not isinstance(state_dict.get(self._key), Tensor):
                state_dict = self._in_current_form(state_dict, prefix)
            super()._load_from_state_dict(state_dict, prefix, *arguments)
        except (TypeError, ValueError) as error:
            error_msgs.append(f"{self._key}: {error}")
        finally:
            del self._key
