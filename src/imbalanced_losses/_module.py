"""What the losses share as modules: settings that stay, and state that is no weight of a model."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from imbalanced_losses._checkpoint import AveragedState, unchanged_on_error
from imbalanced_losses._queue import MemoryQueue


class LossModule(nn.Module):
    """A module that no tool which handles weights can spoil.

    What averages, broadcasts, casts, shares or initialises weights walks over parameters and
    buffers. A loss has neither: its tensors are plain attributes, which follow the module's device
    alone, and its state is saved by `get_extra_state`, PyTorch's hook for what is no weight.
    """

    _queue: MemoryQueue | None = None
    _fixed: frozenset[str] = frozenset()  # attributes that can't be assigned any more

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._fixed:
            raise AttributeError(
                f"{name} of {type(self).__name__} can't be changed after construction: construct "
                "a new loss"
            )
        super().__setattr__(name, value)

    def _follow(self, device: torch.device) -> None:
        """Take the tensors to a device."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LossModule:
        super()._apply(fn, recurse)
        with torch.inference_mode(False):  # the tensors outlive it
            self._follow(fn(torch.empty(0, device=self._device())).device)
        return self

    def _device(self) -> torch.device:
        return torch.device("cpu") if self._queue is None else self._queue.cursor.device

    def _in_current_form(self, state_dict: dict[str, Any], prefix: str) -> dict[str, Any]:
        """A state_dict in which this module's state has the form of this version."""
        return state_dict

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Take a checkpoint, or change nothing, as in `torch.nn.Module`.

        Args:
            state_dict: of a loss with the same settings, also of imbalanced-losses
                0.9 and before. Of a queue of another size the newest rows are
                kept.
            strict: whether missing and unexpected keys are an error.
            assign: of no effect on the state, which is always copied.

        Returns:
            The names of the missing and the unexpected keys.

        Raises:
            RuntimeError: keys or values that do not fit; the loss is as it was.

        Warns:
            UserWarning: a state that was averaged, or changed in another way,
                since it was saved: the queue is empty then, all else stays.
        """
        parts = [*self.modules()]
        attributes = [
            mapping for part in parts for mapping in (part._parameters, part._buffers, vars(part))
        ]
        tensors = [*self.parameters(), *self.buffers()]
        with contextlib.ExitStack() as stack:
            for part in parts:
                if isinstance(part, LossModule) and part._queue is not None:
                    stack.enter_context(part._queue.unchanged_on_error())
            stack.enter_context(
                unchanged_on_error(*attributes, writes=[(tensor, ...) for tensor in tensors])
            )
            return super().load_state_dict(state_dict, strict, assign)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        try:
            super()._load_from_state_dict(
                self._in_current_form(state_dict, prefix),
                prefix,
                local_metadata,
                strict,
                missing_keys,
                unexpected_keys,
                error_msgs,
            )
        except AveragedState as error:
            if self._queue is not None:
                self._queue.reset()
            warnings.warn(
                f"{prefix}_extra_state: {error}, as by averaging checkpoints: the queue is empty "
                "now, and all else stays as it was before loading",
                stacklevel=2,
            )
        except (TypeError, ValueError) as error:
            error_msgs.append(f"{prefix}_extra_state: {error}")
