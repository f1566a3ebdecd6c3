"""What a ranking loss carries from one step to the next: queue, counter and temperature."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
from torch import Tensor

from imbalanced_losses._checks import arguments as _checks
from imbalanced_losses._checks.tracing import is_in_backward, is_on_host
from imbalanced_losses._module import StatefulLoss
from imbalanced_losses._rows.checkpoint import Saved, in_current_form, pack_ranking, unpack_ranking
from imbalanced_losses._rows.pool import Pool
from imbalanced_losses._rows.queue import MemoryQueue
from imbalanced_losses._rows.subsample import capped


class RankingState(StatefulLoss):
    """The part of a ranking loss that reads its state, changes it and saves it."""

    num_classes: int
    queue_size: int
    ignore_index: int
    multilabel: bool
    update_queue_in_eval: bool
    max_pool_size: int | None
    queue_follows_shift: bool
    sampling_seed: int

    _num_grades: ClassVar[int] = 0  # of targets that are grades from 0 on, not labels
    _queue: MemoryQueue
    _anchor = "_temperature_now"

    def _begin(self, temperature: float, prior: tuple[float, ...] | None) -> None:
        """An empty queue, and the settings that are tensors beside it: in float64, and never
        copied to the device in a step, which would wait for it.
        """
        self._queue = MemoryQueue(
            self.queue_size, self.num_classes, self.ignore_index, self.multilabel
        )
        self.temperature = temperature
        with torch.inference_mode(False):  # it outlives it
            self._prior = None if prior is None else self._temperature_now.new_tensor(prior)

    @property
    def temperature(self) -> float:
        """τ, in units of `temperature_unit`; can be assigned between steps."""
        return self._temperature

    @temperature.setter
    def temperature(self, value: float) -> None:
        number = _checks.number_above_zero("temperature", value)
        # Compiled code takes a float for a constant, so that a new one would compile it anew. It
        # would turn a tensor [] into a float as well.
        with torch.inference_mode(False):  # it outlives it
            now = self._queue.cursor.new_full((1,), number, dtype=torch.float64)  # no copy
        self._temperature, self._temperature_now = number, now

    def reset_queue(self) -> None:
        """Empty the queue: the next batch is ranked by itself."""
        self._queue.reset()

    def _num_labels(self) -> int:
        """How many values targets have."""
        return self._num_grades or (2 if self._is_binary else self.num_classes)

    @property
    def _is_binary(self) -> bool:
        """Whether targets are 0 and 1 rather than the number of a class."""
        return self.multilabel or self.num_classes == 1

    def _updates_queue(self) -> bool:
        return self.training or self.update_queue_in_eval

    def _depends_on_state(self) -> bool:
        return self.queue_size > 0 or self.max_pool_size is not None

    def _pool(self, batch: Pool) -> Pool:
        """The rows to rank: the batch, then those of the queue; without ignored ones; capped."""
        pool = batch
        if self.queue_size > 0:
            rows = self._queue.rows_beside(batch)
            if self.queue_follows_shift:
                shift = batch.zero_with_gradient_of_mean(self.ignore_index, rows.group)
                rows = rows.with_logits(rows.logits + shift)
            pool = batch.extend(rows)
        # Elsewhere dropping rows would wait for the device, and a compiler could not follow it. A
        # weight of zero does the same there.
        if is_on_host(pool.logits) or self.max_pool_size is not None:
            pool = pool.without_ignored(self.ignore_index)
        if self.max_pool_size is None or not self.training:
            return pool
        number = self._queue.num_steps
        return capped(pool, self.max_pool_size, self.sampling_seed, number, self._num_labels())

    def _remember(self, batch: Pool) -> None:
        """The one change of state of a forward pass."""
        if self._updates_queue():
            # A number that changes would have code compiled anew in every step. Only draws need it.
            is_counted = self.max_pool_size is not None or not torch.compiler.is_compiling()
            is_step = self.training and is_counted and not is_in_backward()
            self._queue.push(batch, is_step=is_step)

    def get_extra_state(self) -> Tensor:
        """Queue, counter, temperature: bytes, as many for every state."""
        return pack_ranking(self._saved())

    def _take(self, state: Tensor) -> None:
        saved = unpack_ranking(state, self._saved(), self.ignore_index, self._num_labels())
        self._queue.restore(saved)
        self.temperature = saved.temperature

    def _saved(self) -> Saved:
        return self._queue.saved(self._temperature)

    def _in_current_form(self, state_dict: dict[str, Any], prefix: str) -> dict[str, Any]:
        return in_current_form(state_dict, prefix, self._saved())

    def _follow(self, device: torch.device) -> None:
        super()._follow(device)
        self._queue.to(device)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy, or of what another process sent: its state is its own."""
        super().__setstate__(state)
        self._queue = copy.copy(self._queue)
