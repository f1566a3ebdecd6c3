"""When a ranking loss takes part in a mix, and how sharply: a pure function of the step."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from imbalanced_losses._checks import arguments as _checks


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
            None if temperature is None else _checks.temperature_schedule(temperature),
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
