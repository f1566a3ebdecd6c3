"""What a ranking loss, and a call of one, takes by name: for type checkers and subclasses."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypedDict

from torch import Tensor

from imbalanced_losses._checks.typing import Gather, GradReduce, Reduction, TemperatureUnit
from imbalanced_losses._rows.gather import ProcessGroup

if TYPE_CHECKING:
    from typing_extensions import Unpack
else:
    Unpack = None  # which nobody evaluates

__all__ = ["COMPARED", "RankingOptions", "RowValues", "Unpack", "complete_signature"]

# What has to be the same in every process that ranks rows together.
COMPARED = (
    *("gather", "grad_reduce", "reduction", "temperature_unit", "queue_follows_shift"),
    *("ignore_index", "queue_size", "max_pool_size", "temperature", "target_prior", "training"),
)


class RankingOptions(TypedDict, total=False):
    """The arguments of every ranking loss but `num_classes`, for a subclass's `**options`."""

    queue_size: int
    temperature: float
    reduction: Reduction
    ignore_index: int
    update_queue_in_eval: bool
    gather_distributed: bool | None
    max_pool_size: int | None
    multilabel: bool
    temperature_unit: TemperatureUnit
    queue_follows_shift: bool
    process_group: ProcessGroup | None
    grad_reduce: GradReduce
    gather: Gather
    target_prior: float | Sequence[float] | Tensor | None


class RowValues(TypedDict, total=False):
    """What may come with the rows of a call."""

    sample_weight: Tensor | None
    group: Tensor | None
    value: Tensor | None


def complete_signature(loss: type, options: Mapping[str, inspect.Parameter]) -> inspect.Signature:
    """Of a constructor, with the options that it hands over as `**options`."""
    own = inspect.signature(loss.__init__)  # type: ignore[misc]
    _, *parameters = own.parameters.values()
    if parameters and "RankingOptions" in str(parameters[-1].annotation):
        parameters[-1:] = [
            options[name].replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for name in RankingOptions.__annotations__
            if name not in own.parameters
        ]
    return own.replace(parameters=parameters)
