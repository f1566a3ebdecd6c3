"""Rows of every rank on every rank, with the gradient that one process would have.

The only file that knows torch.distributed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from imbalanced_losses._pool import Pool

_DTYPES = (torch.float32, torch.float64)


def world_size() -> int:
    """Ranks in the default process group; 1 where there is none. Asked at every call."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather(batch: Pool) -> Pool:
    """The rows of all ranks, in rank order, the same on every rank.

    Gradient flows to the rank's own rows, multiplied by the number of ranks: trainers average
    gradients over ranks, and the average of world_size × (own part) is the sum of the parts, which
    is the gradient of one process with all rows. The value of the loss is not scaled.

    Two collectives: a header of fixed size, compared so that ranks which disagree all raise the
    same error, and one payload, padded to the longest rank.

    Raises:
        RuntimeError: on every rank, when dtypes, numbers of classes or kinds of targets differ.
    """
    size, rank = dist.get_world_size(), dist.get_rank()
    num_classes, target_columns = batch.logits.shape[1], _columns(batch.targets)
    header = torch.tensor(
        [len(batch.logits), num_classes, target_columns, _DTYPES.index(batch.logits.dtype)],
        device=batch.logits.device,
    )
    headers = _all_gather(header, size).tolist()
    if any(other[1:] != headers[0][1:] for other in headers):
        raise RuntimeError(
            "ranks disagree on what to gather: [rows, num_classes, target columns, dtype] of "
            f"rank 0, 1, … are {headers}"
        )

    lengths = [other[0] for other in headers]
    payload = _packed(batch, max(lengths))
    parts = [
        _unpacked(part[:length], batch)
        for part, length in zip(_all_gather(payload, size), lengths, strict=True)
    ]
    own: Tensor = _ScaleGradient.apply(batch.logits, size)
    parts[rank] = parts[rank]._replace(logits=own)
    return Pool(*(torch.cat(fields) for fields in zip(*parts, strict=True)))


class _ScaleGradient(torch.autograd.Function):
    """The identity, with its gradient multiplied by a factor."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, factor: int) -> Tensor:
        ctx.factor = factor
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.factor, None


def _all_gather(tensor: Tensor, size: int) -> Tensor:
    out = tensor.new_empty((size * len(tensor), *tensor.shape[1:]))
    dist.all_gather_into_tensor(out, tensor.contiguous())
    return out.view(size, *tensor.shape)


def _columns(targets: Tensor) -> int:
    return 1 if targets.dim() == 1 else targets.shape[1]


def _packed(batch: Pool, num_rows: int) -> Tensor:
    """One float64 row [C + target columns + 1] a batch row, padded: exact for every field."""
    targets = batch.targets.reshape(len(batch.targets), _columns(batch.targets))
    fields = (batch.logits.detach(), targets, batch.weights[:, None])
    rows = torch.cat([field.double() for field in fields], dim=1)
    return torch.nn.functional.pad(rows, (0, 0, 0, num_rows - len(rows)))


def _unpacked(rows: Tensor, like: Pool) -> Pool:
    num_classes = like.logits.shape[1]
    logits, targets, weights = rows.split((num_classes, _columns(like.targets), 1), dim=1)
    return Pool(
        logits.to(like.logits.dtype),
        targets.to(torch.int64).reshape(len(rows), *like.targets.shape[1:]),
        weights.squeeze(1).to(like.weights.dtype),
    )
