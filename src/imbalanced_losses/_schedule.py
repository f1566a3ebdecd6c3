"""When a ranking loss takes part in a mix, and how sharply; and the steps that tell."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from imbalanced_losses._checks import arguments as _checks
from imbalanced_losses._checks.tracing import is_in_backward
from imbalanced_losses._checks.training import temperature_schedule
from imbalanced_losses._loss import RankingLoss
from imbalanced_losses._module import StatefulLoss
from imbalanced_losses._options import RowValues, Unpack
from imbalanced_losses._rows.checkpoint import older_numbers, pack, unchanged_on_error, unpack

_STATE = ("num_calls", "num_steps", "has_switched", "temperature_scale")


class Schedule(NamedTuple):
    """Warm-up with the auxiliary loss alone, then a linear blend; the temperature is annealed."""

    main_weight: float  # w in the end
    warmup_steps: int
    blend_steps: int
    temperature: tuple[float, float, int] | None  # start, end, steps from the warm-up on

    @classmethod
    def of(
        cls, main_weight: Any, warmup_steps: Any, blend_steps: Any, temperature: Any
    ) -> Schedule:
        """The arguments of `MixedLoss`, checked."""
        weight = _checks.number_above_zero("main_weight", main_weight)
        if weight > 1:
            raise ValueError(f"main_weight must be in (0, 1], got {main_weight!r}")
        schedule = cls(
            weight,
            _checks.integer("warmup_steps", warmup_steps, minimum=0),
            _checks.integer("blend_steps", blend_steps, minimum=0),
            _checks.maybe(temperature_schedule, "temperature", temperature),
        )
        if weight == 1 and schedule.warmup_steps == schedule.blend_steps == 0:
            raise ValueError(
                "main_weight must be below 1 without warmup_steps and blend_steps: auxiliary_loss "
                "would never be used"
            )
        return schedule

    @property
    def is_constant(self) -> bool:
        """Whether every step has the same weight and temperature."""
        return self.warmup_steps == self.blend_steps == 0 and self.temperature is None

    def weight_at(self, step: int) -> float:
        """w of a step."""
        done = step - self.warmup_steps
        if done < 0:
            return 0.0
        if done < self.blend_steps:
            return self.main_weight * (done + 1) / (self.blend_steps + 1)
        return self.main_weight

    def temperature_at(self, step: int) -> float | None:
        """τ of a step, geometrically from start to end; None where it is left alone."""
        if self.temperature is None:
            return None
        start, end, steps = self.temperature
        share = min(1.0, max(0, step - self.warmup_steps) / steps)
        return math.pow(start, 1 - share) * math.pow(end, share)


class ScheduledLoss(StatefulLoss):
    """A loss with a ranking loss in it: counts the steps, and sets its temperature."""

    main_loss: RankingLoss
    refit_temperature: bool
    calls_per_step: int | None
    _schedule: Schedule

    _num_calls = 0  # in training, of the current step
    _num_steps = 0
    _has_switched = False  # whether the warm-up has been left behind
    _temperature_scale = 1.0  # of the main loss, since then

    @property
    def num_steps(self) -> int:
        """Steps made."""
        return self._num_steps

    @property
    def main_weight(self) -> float:
        """w of the next call."""
        return self._schedule.weight_at(self._num_steps)

    @property
    def in_warmup(self) -> bool:
        """Whether the next call has the auxiliary loss alone."""
        return self._num_steps < self._schedule.warmup_steps

    @property
    def in_blend(self) -> bool:
        """Whether w is on its way from 0 to its end."""
        done = self._num_steps - self._schedule.warmup_steps
        return 0 <= done < self._schedule.blend_steps

    @property
    def current_temperature(self) -> float:
        """τ of the main loss in the next call, a refit to come not included."""
        annealed = self._schedule.temperature_at(self._num_steps)
        return self._ranking.temperature if annealed is None else self._temperature_scale * annealed

    @property
    def _ranking(self) -> RankingLoss:
        """The main loss itself, where it was compiled."""
        ranking: RankingLoss = getattr(self.main_loss, "_orig_mod", self.main_loss)
        return ranking

    def step(self) -> None:
        """Count one step, with calls_per_step=None.

        Raises:
            RuntimeError: when calls are counted.
        """
        if self.calls_per_step is not None:
            raise RuntimeError(
                f"steps are counted by calls (calls_per_step={self.calls_per_step}): construct "
                "MixedLoss with calls_per_step=None to count them by step()"
            )
        self._num_steps += 1

    def _count(self) -> None:
        # A number that changes would have code compiled anew in every step; again is no step.
        is_idle = torch.compiler.is_compiling() or is_in_backward()
        if self.calls_per_step is None or (is_idle and not self._depends_on_state()):
            return
        # At the end of a step; resumed with fewer calls a step, it may lie behind.
        is_end = self._num_calls + 1 >= self.calls_per_step
        calls = 0 if is_end else self._num_calls + 1
        self._num_calls, self._num_steps = calls, self._num_steps + is_end

    def _prepare(self, logits: Tensor, targets: Tensor, **values: Unpack[RowValues]) -> None:
        """Set the main loss's temperature; at the end of the warm-up also empty its queue."""
        if not self._has_switched:
            if self.refit_temperature:
                self._temperature_scale = _spread_of(self._ranking, logits, targets, **values)
                if self._schedule.temperature is None:
                    self._ranking.temperature *= self._temperature_scale
            self._ranking.reset_queue()
            self._has_switched = True
        if self._schedule.temperature is not None:
            self._ranking.temperature = self.current_temperature

    @contextmanager
    def _unchanged_on_error(self) -> Iterator[None]:
        """Move nothing if the block raises before the main loss has made its step."""
        ranking, queue = self._ranking, self._ranking._queue
        steps = queue.num_steps
        with (
            unchanged_on_error(vars(self), vars(ranking), unless=lambda: queue.num_steps > steps),
            nullcontext() if self._has_switched else queue.unchanged_on_error(),
        ):
            yield

    def _depends_on_state(self) -> bool:
        return not self._schedule.is_constant

    def get_extra_state(self) -> Tensor:
        """Where the schedule stands: bytes, as many for every state."""
        return pack([getattr(self, "_" + name) for name in _STATE])

    def _take(self, state: Tensor) -> None:
        (*counts, scale), _ = unpack(state, len(_STATE))
        numbers = [
            _checks.saved_count(name, count, 1 if name == "has_switched" else 2**53)
            for name, count in zip(_STATE, counts, strict=False)
        ]
        self._temperature_scale = _checks.number_above_zero("temperature_scale", scale)
        self._num_calls, self._num_steps, self._has_switched = *numbers[:2], bool(numbers[2])

    def _in_current_form(self, state_dict: dict[str, Any], prefix: str) -> dict[str, Any]:
        return older_numbers(state_dict, prefix, _STATE)


def _spread_of(
    loss: RankingLoss, logits: Tensor, targets: Tensor, **values: Unpack[RowValues]
) -> float:
    """Standard deviation of the scores, the mean over classes; over processes as in forward."""
    batch, processes = loss._batch(logits, targets, **values)
    return float(loss._problems(batch, processes, batch.groups()).spread().detach().mean())
