"""What rows go through on a device beside the ranking: a launch or two each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from imbalanced_losses._checks import arguments as _checks
from imbalanced_losses._checks.tracing import is_traced, is_transformed
from imbalanced_losses._ranking.cuda.launches import (
    blocks_of,
    ceil,
    expanded,
    has_kernels,
    launch,
)

# Rows and columns that one program stores, at most.
_STORED = 32


def serves(rows: Tensor) -> bool:
    """Whether kernels take these rows [N, ...]."""
    is_plain = not (is_traced(rows) or is_transformed())
    return is_plain and has_kernels(rows, (1, rows.numel()))


def check_values(
    targets: Tensor,
    sample_weight: Tensor | None,
    weights: Tensor | None,
    num_labels: int,
    ignore_index: int,
    is_graded: bool = False,
) -> None:
    """`_checks.row_values`; of good values on a device in one launch and one read."""
    values = targets, sample_weight, weights, num_labels, ignore_index
    if not (serves(targets) and _are_good(*values)):
        _checks.row_values(*values, is_graded)


def _are_good(
    targets: Tensor,
    sample_weight: Tensor | None,
    weights: Tensor | None,
    num_labels: int,
    ignore_index: int,
) -> bool:
    if targets.dtype == torch.uint64:
        return False  # too large for kernels, maybe
    is_weighted = sample_weight is not None and weights is not None
    given = (sample_weight, weights) if is_weighted else (targets, targets)
    fields = [field.reshape(-1) for field in (targets, *given) if field is not None]
    fields = [field.view(torch.uint8) if field.dtype == torch.bool else field for field in fields]
    block, num_blocks = blocks_of(targets.numel())
    verdicts = torch.empty(num_blocks, dtype=torch.bool, device=targets.device)
    launch(
        "check_rows",
        (num_blocks, 1),
        *(*fields, verdicts.view(torch.uint8), num_labels, ignore_index, targets.numel()),
        WEIGHTED=is_weighted,
        BLOCK=block,
    )
    return bool(verdicts if num_blocks == 1 else verdicts.all())


def labelled(
    targets: Tensor,
    weights: Tensor | None,
    num_classes: int,
    ignore_index: int,
    like: Tensor,
    is_graded: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Which rows are positive [C, M] bool, their weights [C, M], 0 where ignored, and gains.

    Args:
        targets: [1 or C, M], of each row its class or of each label whether it is positive; or
            grades, of which `gain_of` says what they are worth.
        weights: as targets; None = 1 everywhere.
        like: of the dtype of the weights.
    """
    num_labels, num_rows = targets.shape
    is_positive = torch.empty(num_classes, num_rows, dtype=torch.bool, device=like.device)
    own = like.new_empty(num_labels, num_rows)
    gains = torch.empty_like(own) if is_graded else own
    block, num_blocks = blocks_of(num_rows)
    given = targets if weights is None else weights
    launch(
        "label_rows",
        (num_blocks, num_classes),
        *(targets, given, is_positive.view(torch.uint8), own, gains),
        *(*targets.stride(), *given.stride(), ignore_index, num_rows),
        WEIGHTED=weights is not None,
        BY_CLASS=num_classes > 1 and num_labels == 1,
        BY_LABEL=num_labels > 1,
        GRADED=is_graded,
        BLOCK=block,
    )
    return is_positive, expanded(own, is_positive.shape), gains if is_graded else None


def mean_where(values: Tensor, counts: Tensor, is_mean: bool) -> tuple[Tensor, Tensor]:
    """`_rows.reduce.mean_where`."""
    found: tuple[Tensor, Tensor] = _MeanWhere.apply(values, counts, is_mean)
    return found


class _MeanWhere(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, counts: Tensor, is_mean: bool) -> tuple[Tensor, Tensor]:
        shape, num_columns = values.shape[:-1], values.shape[-1]
        counts = counts.contiguous()
        means, divisors = values.new_empty(shape), values.new_empty(shape)
        is_any = torch.empty(shape, dtype=torch.bool, device=values.device)
        launch(
            "whole_mean",
            (means.numel(), 1),
            *(values.contiguous(), counts.view(torch.uint8), means, is_any.view(torch.uint8)),
            *(divisors, num_columns),
            DIVIDED=is_mean,
            BLOCK=blocks_of(num_columns)[0],
        )
        ctx.save_for_backward(counts, divisors)
        ctx.mark_non_differentiable(is_any)
        ctx.set_materialize_grads(False)
        return means, is_any

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if grads[0] is None:
            return None, None, None
        counts, divisors = ctx.saved_tensors
        return counts * (grads[0] / divisors).unsqueeze(-1), None, None


def push(
    rows: tuple[Tensor | None, ...],
    stored: tuple[Tensor, ...],
    cursor: Tensor,
    pushed_at: Tensor,
    ignore_index: int,
) -> None:
    """Store the rows that are present and finite in a ring; see `MemoryQueue.push`.

    Args:
        rows: logits [N, C], targets, weights and values [N] or [N, C], groups [N].
        stored: the same of the ring, [size + 1, ...].
    """
    logits, targets, *rest = (field if field is None else _wide(field) for field in rows)
    assert logits is not None
    assert targets is not None
    weights, values, groups = rest
    num_rows, num_classes = logits.shape
    num_labels = targets.shape[1]
    given = [targets if field is None else field for field in rest]
    block, num_blocks = _STORED, ceil(num_rows, _STORED)
    keep = torch.empty(num_rows, dtype=torch.uint8, device=logits.device)
    counts = torch.empty(num_blocks, dtype=torch.int32, device=logits.device)
    before = torch.empty(2, dtype=torch.int64, device=logits.device)
    strides = [stride for field in (logits, targets, *given) for stride in field.stride()]
    columns = min(_STORED, 1 << (num_classes - 1).bit_length())
    options = {"WEIGHTED": weights is not None, "BLOCK": block, "COLUMNS": columns}
    size = pushed_at.shape[0] - 1
    launch(
        "choose_rows",
        (num_blocks, 1),
        *(logits, targets, given[0], keep, counts, before, cursor, pushed_at, *strides[:6]),
        *(size, num_rows, num_classes, num_labels, ignore_index),
        **options,
    )
    launch(
        "store_rows",
        (num_blocks, ceil(num_classes, columns)),
        *(logits, targets, *given, keep, counts, before, *stored, cursor, pushed_at, *strides[:9]),
        *(size, num_rows, num_classes, num_labels),
        BLOCKS=1 << (num_blocks - 1).bit_length(),
        VALUED=values is not None,
        GROUPED=groups is not None,
        **options,
    )


def _wide(field: Tensor) -> Tensor:
    return field.unsqueeze(1) if field.dim() == 1 else field
