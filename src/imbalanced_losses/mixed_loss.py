"""A ranking loss beside a pointwise one, with warm-up, blend and annealing."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from imbalanced_losses._checks import arguments as _checks
from imbalanced_losses._checks.tracing import is_in_backward
from imbalanced_losses._checks.typing import typed_as
from imbalanced_losses._loss import RankingLoss
from imbalanced_losses._module import StatefulLoss, arguments_of
from imbalanced_losses._rows.checkpoint import older_numbers, pack, unchanged_on_error, unpack
from imbalanced_losses._schedule import Schedule

__all__ = ["MixedLoss"]

_STATE = ("num_calls", "num_steps", "has_switched", "temperature_scale")


class MixedLoss(StatefulLoss):
    """(1 − w) · auxiliary + w · main, where w may start at 0 and grow.

    A constant mix is the first choice: cross-entropy gives every row a gradient
    and the logits a scale, the ranking loss aims at Average Precision.
    Optionally training begins with the auxiliary loss alone (w = 0), then
    blends linearly to `main_weight`, and the temperature of the main loss is
    annealed from the moment when it takes part.

    The schedule counts training-mode calls, so there is nothing to call but the
    loss itself, and is part of the checkpoint: a resumed run goes on exactly.

    Args:
        auxiliary_loss: (logits, targets) -> [], such as `CrossEntropy`; also
            gets sample_weight where a call has one.
        main_loss: a ranking loss, with reduction "mean" or "sum".
        main_weight: w in the end, 0 < w ≤ 1; 1 hands over to the main loss
            altogether. Smooth-AP and a tenth as much cross-entropy is w =
            10/11.
        warmup_steps: steps of the auxiliary loss alone, ≥ 0. At their end the
            main loss's queue is emptied.
        blend_steps: steps after the warm-up in which w grows linearly from 0 to
            main_weight, ≥ 0.
        temperature: (start, end, steps): the main loss's temperature goes
            geometrically from start to end in the first `steps` steps in which
            it takes part. None leaves it alone.
        refit_temperature: at the end of the warm-up, multiply the main loss's
            temperature, from then on, by the standard deviation of the scores
            in that batch (the mean over classes): cross-entropy has given the
            logits a scale that a temperature in units of the scores does not
            know. temperature_unit="spread" does so at every step and needs no
            refit.
        calls_per_step: training-mode calls that make one step: the number of
            micro-batches with gradient accumulation. None: steps are counted by
            `step()` alone, such as once an epoch.

    Attributes:
        final_main_weight: the argument main_weight; the attribute main_weight
            is that of the next call.
        temperature_schedule: the argument temperature.

    Raises:
        TypeError, ValueError: an argument that does not fit, or settings that
            would do nothing.

    Example:
        >>> import torch
        >>> from imbalanced_losses import CrossEntropy, SmoothAPLoss
        >>> loss_fn = MixedLoss(
        ...     CrossEntropy(1),
        ...     SmoothAPLoss(1, 0, temperature=0.1, temperature_unit="spread"),
        ...     main_weight=0.9,
        ...     warmup_steps=2,
        ... )
        >>> logits = torch.randn(8, 1, requires_grad=True)
        >>> targets = torch.arange(8) % 2
        >>> for _ in range(3):
        ...     w = loss_fn.main_weight
        ...     loss_fn(logits, targets).backward()
        ...     print(w)
        0.0
        0.0
        0.9

    Note:
        Compare runs by a metric, not by the value of this loss, which changes
        with w.
    """

    # Under the names of these arguments is what holds now.
    _attributes: Mapping[str, str] = {
        "main_weight": "final_main_weight",
        "temperature": "temperature_schedule",
    }

    def __init__(
        self,
        auxiliary_loss: Callable[..., Tensor],
        main_loss: RankingLoss,  # or what torch.compile makes of one
        *,
        main_weight: float,
        warmup_steps: int = 0,
        blend_steps: int = 0,
        temperature: tuple[float, float, int] | None = None,
        refit_temperature: bool = False,
        calls_per_step: int | None = 1,
    ) -> None:
        """See the class for the arguments."""
        super().__init__()
        ranking = getattr(main_loss, "_orig_mod", main_loss)  # of a compiled loss
        _checks.losses_to_mix(auxiliary_loss, ranking, RankingLoss)
        self.auxiliary_loss = auxiliary_loss
        self.main_loss = main_loss
        schedule = Schedule.of(main_weight, warmup_steps, blend_steps, temperature)
        self._schedule = schedule
        self.final_main_weight, self.warmup_steps, self.blend_steps, self.temperature_schedule = (
            schedule
        )
        self.refit_temperature = _checks.boolean("refit_temperature", refit_temperature)
        self.calls_per_step = calls_per_step
        if calls_per_step is not None:
            _checks.integer("calls_per_step", calls_per_step, minimum=1)
        if self.refit_temperature and self.warmup_steps == 0:
            raise ValueError("refit_temperature=True needs warmup_steps >= 1: it acts at their end")
        if self.refit_temperature and ranking.temperature_unit == "spread":
            raise ValueError(
                'refit_temperature must be False where main_loss has temperature_unit="spread", '
                "which follows the spread of the scores at every step"
            )
        self._num_calls = 0  # in training, of the current step
        self._num_steps = 0
        self._has_switched = self.warmup_steps == 0
        self._temperature_scale = 1.0
        self._settings = arguments_of(MixedLoss)

    @property
    def _ranking(self) -> RankingLoss:
        """The main loss itself, where it was compiled."""
        ranking: RankingLoss = getattr(self.main_loss, "_orig_mod", self.main_loss)
        return ranking

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
        return self._num_steps < self.warmup_steps

    @property
    def in_blend(self) -> bool:
        """Whether w is on its way from 0 to its end."""
        return 0 <= self._num_steps - self.warmup_steps < self.blend_steps

    @property
    def current_temperature(self) -> float:
        """τ of the main loss in the next call, a refit to come not included."""
        temperature = self._schedule.temperature_at(self._num_steps)
        return (
            self._ranking.temperature
            if temperature is None
            else self._temperature_scale * temperature
        )

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

    def forward(
        self, logits: Tensor, targets: Tensor, *, sample_weight: Tensor | None = None
    ) -> Tensor:
        """The mix of both losses of a batch.

        Args:
            logits: [N, C], as for both losses.
            targets: [N] or [N, C], as for both losses.
            sample_weight: as for both losses.

        Returns:
            [] in the dtype of the losses.

        Raises:
            TypeError, ValueError: what the losses raise. The schedule has not
                moved then.
        """
        if self.training:
            self._require_step()
        weight = self.main_weight
        if self.training and weight > 0:
            self._ranking._require_step()  # which a compiled loss can't tell by itself
        weights = {} if sample_weight is None else {"sample_weight": sample_weight}
        auxiliary: Tensor | float = 0.0
        if weight < 1:
            try:
                found = self.auxiliary_loss(logits, targets, **weights)
                auxiliary = (1 - weight) * _checks.plain(found)
            except Exception as error:
                if weight > 0:  # ranks that rank together wait for this one
                    self._ranking._batch(logits, targets, sample_weight, error=error)
                raise
        if weight > 0:
            main = self._counted_main_loss if self.training else self.main_loss
            return weight * main(logits, targets, sample_weight=sample_weight) + auxiliary
        if self.training:
            self._count()
        assert isinstance(auxiliary, Tensor)
        return auxiliary

    def _counted_main_loss(
        self, logits: Tensor, targets: Tensor, sample_weight: Tensor | None = None
    ) -> Tensor:
        """The main loss of a training call, which then counts; if it raises, nothing has moved."""
        with nullcontext() if torch.compiler.is_compiling() else self._unchanged_on_error():
            self._prepare(logits, targets, sample_weight)
            self._count()
            loss: Tensor = self.main_loss(logits, targets, sample_weight=sample_weight)
            return loss

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

    if TYPE_CHECKING:

        @typed_as(forward)
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def _prepare(self, logits: Tensor, targets: Tensor, sample_weight: Tensor | None) -> None:
        """Set the main loss's temperature; at the end of the warm-up also empty its queue."""
        if not self._has_switched:
            scale = 1.0
            if self.refit_temperature:
                scale = self._ranking._spread_of_batch(logits, targets, sample_weight)
                if self.temperature_schedule is None:
                    self._ranking.temperature *= scale
            self._ranking.reset_queue()
            self._temperature_scale, self._has_switched = scale, True
        if self.temperature_schedule is not None:
            self._ranking.temperature = self.current_temperature

    def _count(self) -> None:
        # A number that changes would have code compiled anew in every step; again is no step.
        is_idle = torch.compiler.is_compiling() or is_in_backward()
        if self.calls_per_step is None or (is_idle and not self._depends_on_state()):
            return
        # At the end of a step; resumed with fewer calls a step, it may lie behind.
        is_end = self._num_calls + 1 >= self.calls_per_step
        calls = 0 if is_end else self._num_calls + 1
        self._num_calls, self._num_steps = calls, self._num_steps + is_end

    def _depends_on_state(self) -> bool:
        return not self._schedule.is_constant

    def __copy__(self) -> MixedLoss:
        """With a main loss of its own, as that has state; not compiled."""
        copied = object.__new__(type(self))
        modules = {**self._modules, "main_loss": copy.copy(self._ranking)}
        vars(copied).update(vars(self), _modules=modules)
        return copied

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
