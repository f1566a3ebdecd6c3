"""A ranking loss beside a pointwise one, with warm-up, blend and annealing."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from imbalanced_losses._checks import arguments as _checks
from imbalanced_losses._checks.tensors import plain
from imbalanced_losses._checks.training import losses_to_mix
from imbalanced_losses._checks.typing import typed_as
from imbalanced_losses._loss import RankingLoss
from imbalanced_losses._module import arguments_of
from imbalanced_losses._options import RowValues
from imbalanced_losses._schedule import Schedule, ScheduledLoss

__all__ = ["MixedLoss"]


class MixedLoss(ScheduledLoss):
    """(1 − w) · auxiliary + w · main, where w may start at 0 and grow.

    A constant mix is the first choice: cross-entropy gives every row a gradient
    and the logits a scale, the ranking loss aims at Average Precision.
    Optionally training begins with the auxiliary loss alone (w = 0), then
    blends linearly to `main_weight`, and the main loss's temperature is
    annealed. The schedule counts training-mode calls and is part of the
    checkpoint: a resumed run goes on exactly.

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

    # The attributes with the names of these arguments hold the current values.
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
        losses_to_mix(auxiliary_loss, ranking, RankingLoss)
        self.auxiliary_loss, self.main_loss = auxiliary_loss, main_loss
        schedule = Schedule.of(main_weight, warmup_steps, blend_steps, temperature)
        self.final_main_weight, self.warmup_steps, self.blend_steps, annealing = schedule
        self.temperature_schedule, self._schedule = annealing, schedule
        self.refit_temperature = _checks.boolean("refit_temperature", refit_temperature)
        self.calls_per_step = _checks.maybe(_checks.integer, "calls_per_step", calls_per_step, 1)
        if refit_temperature and self.warmup_steps == 0:
            raise ValueError("refit_temperature=True needs warmup_steps >= 1: it acts at their end")
        if refit_temperature and ranking.temperature_unit == "spread":
            raise ValueError(
                'refit_temperature must be False where main_loss has temperature_unit="spread", '
                "which follows the spread of the scores at every step"
            )
        self._has_switched = self.warmup_steps == 0
        self._settings = arguments_of(MixedLoss)

    def forward(
        self,
        logits: Tensor,
        targets: Tensor,
        *,
        sample_weight: Tensor | None = None,
        group: Tensor | None = None,
        value: Tensor | None = None,
    ) -> Tensor:
        """The mix of both losses of a batch.

        Args:
            logits: [N, C], as for both losses.
            targets: [N] or [N, C], as for both losses.
            sample_weight: as for both losses.
            group: as for the main loss, which alone gets it.
            value: as for the main loss, which alone gets it.

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
        shared: RowValues = {} if sample_weight is None else {"sample_weight": sample_weight}
        values: RowValues = {**shared}
        if group is not None:
            values["group"] = group
        if value is not None:
            values["value"] = value
        auxiliary: Tensor | float = 0.0
        if weight < 1:
            try:
                found = self.auxiliary_loss(logits, targets, **shared)
                auxiliary = (1 - weight) * plain(found)
            except Exception as error:
                if weight > 0:  # the other processes wait for this one
                    self._ranking._batch(logits, targets, error=error, **values)
                raise
        if weight == 0:
            if self.training:
                self._count()
            return cast(Tensor, auxiliary)
        is_step = self.training
        is_guarded = is_step and not torch.compiler.is_compiling()
        with self._unchanged_on_error() if is_guarded else nullcontext():
            if is_step:
                self._prepare(logits, targets, **values)
                self._count()
            main: Tensor = self.main_loss(logits, targets, **values)
        return weight * main + auxiliary

    if TYPE_CHECKING:

        @typed_as(forward)
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def __copy__(self) -> MixedLoss:
        """A copy with its own main loss, which has state; not compiled."""
        copied = object.__new__(type(self))
        modules = {**self._modules, "main_loss": copy.copy(self._ranking)}
        vars(copied).update(vars(self), _modules=modules)
        return copied
