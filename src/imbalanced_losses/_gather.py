"""Rows of every rank on every rank, with the gradient that one process would have.

The only file that knows torch.distributed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from imbalanced_losses._pool import Pool

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
else:
    ProcessGroup = getattr(dist, "ProcessGroup", Any)

__all__ = ["GradReduce", "Group", "ProcessGroup", "gather"]

GradReduce = Literal["mean", "sum"]

_DTYPES = (torch.float32, torch.float64)


class Group:
    """The ranks that gather: a process group, None for the default one.

    A copy of a loss has the same group; a pickled loss, which another process may load, has none.
    """

    def __init__(self, handle: ProcessGroup | None = None) -> None:
        if handle is not None and not isinstance(handle, ProcessGroup):
            raise TypeError(
                "process_group must be a torch.distributed.ProcessGroup that has this rank as a "
                f"member, or None, got {handle!r}"
            )
        self.handle = handle

    def __deepcopy__(self, memo: dict[int, Any]) -> Group:
        return self

    def __reduce__(self) -> tuple[type[Group], tuple[()]]:
        return Group, ()

    def size(self) -> int:
        """How many ranks it has; 1 without torch.distributed. Asked at every call."""
        if not (dist.is_available() and dist.is_initialized()):
            return 1
        return dist.get_world_size(self.handle)


def gather(
    batch: Pool | Exception,
    settings: dict[str, float],
    device: torch.device,
    group: Group,
    grad_reduce: GradReduce = "mean",
) -> Pool:
    """The rows of all ranks, in rank order, the same on every rank.

    Gradient flows to the rank's own rows. Trainers that average gradients over ranks get it
    multiplied by the number of ranks: the average of world_size × (own part) is the sum of the
    parts, which is the gradient of one process with all rows. The value of the loss is not scaled.

    Two collectives: a header of fixed size, compared so that ranks which disagree all raise the
    same error, and one payload, padded to the longest rank.

    Args:
        batch: this rank's rows, or the error that kept it from having any.
        settings: what has to be the same on every rank, by name.
        device: of the collectives.
        group: the ranks.
        grad_reduce: what the trainer does with the gradients of the ranks.

    Raises:
        TypeError, ValueError: on every rank, the error of the first rank that has one.
        RuntimeError: on every rank, when settings or the forms of the rows differ.
    """
    size, rank = group.size(), dist.get_rank(group.handle)
    headers = _exchanged_headers(batch, settings, device, group)
    if any(header["failed"] for header in headers):
        _raise_first_error(batch if isinstance(batch, Exception) else None, group)
    assert isinstance(batch, Pool)
    for name in headers[0]:
        if name in ("rows", "weighted"):
            continue
        values = [header[name] for header in headers]
        if any(value != values[0] for value in values):
            shown = ", ".join(f"{value:.17g}" for value in values)
            raise RuntimeError(f"ranks disagree on {name}: rank 0, 1, … have {shown}")

    lengths = [int(header["rows"]) for header in headers]
    packed = _packed(batch, max(lengths))
    parts = [
        _unpacked(part[:length], batch)
        for part, length in zip(_all_gather(packed, group), lengths, strict=True)
    ]
    factor = size if grad_reduce == "mean" else 1
    own: Tensor = _ScaleGradient.apply(batch.logits, factor)
    parts[rank] = parts[rank]._replace(logits=own)
    logits = torch.cat([part.logits for part in parts])
    targets = torch.cat([part.targets for part in parts])
    weights = torch.cat([part.row_weights() for part in parts])
    is_weighted = any(header["weighted"] for header in headers)
    return Pool(logits, targets, weights if is_weighted else None)


class _ScaleGradient(torch.autograd.Function):
    """The identity, with its gradient multiplied by a factor."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, factor: int) -> Tensor:
        ctx.factor = factor
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.factor, None


def _exchanged_headers(
    batch: Pool | Exception, settings: dict[str, float], device: torch.device, group: Group
) -> list[dict[str, float]]:
    """What each rank is about to send."""
    header: dict[str, float] = {
        "failed": 1,
        "rows": 0,
        "weighted": 0,
        "classes": 0,
        "target columns": 0,
        "dtype": 0,
    }
    if isinstance(batch, Pool):
        header["failed"] = 0
        header["rows"] = len(batch.logits)
        header["weighted"] = int(batch.weights is not None)
        header["classes"] = batch.logits.shape[1]
        header["target columns"] = _columns(batch.targets)
        header["dtype"] = 32 << _DTYPES.index(batch.logits.dtype)  # bits
    header |= settings
    values = torch.tensor(list(header.values()), dtype=torch.float64, device=device)
    return [dict(zip(header, row.tolist(), strict=True)) for row in _all_gather(values, group)]


def _raise_first_error(own: Exception | None, group: Group) -> None:
    """Raise, on every rank, the error of the first rank that has one."""
    errors: list[tuple[bool, str] | None] = [None] * group.size()
    mine = None if own is None else (isinstance(own, TypeError), str(own))
    dist.all_gather_object(errors, mine, group=group.handle)
    rank, (is_type_error, message) = next((r, e) for r, e in enumerate(errors) if e is not None)
    raise (TypeError if is_type_error else ValueError)(f"on rank {rank}: {message}") from own


def _all_gather(tensor: Tensor, group: Group) -> list[Tensor]:
    parts = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(parts, tensor, group=group.handle)
    return parts


def _columns(targets: Tensor) -> int:
    return 1 if targets.dim() == 1 else targets.shape[1]


def _packed(batch: Pool, num_rows: int) -> Tensor:
    """One float64 row [C + target columns + 1] a batch row, padded: exact for every field."""
    targets = batch.targets.reshape(len(batch.targets), _columns(batch.targets))
    fields = (batch.logits.detach(), targets, batch.row_weights()[:, None])
    rows = torch.cat([field.double() for field in fields], dim=1)
    return torch.nn.functional.pad(rows, (0, 0, 0, num_rows - len(rows)))


def _unpacked(rows: Tensor, like: Pool) -> Pool:
    num_classes = like.logits.shape[1]
    logits, targets, weights = rows.split((num_classes, _columns(like.targets), 1), dim=1)
    return Pool(
        logits.to(like.logits.dtype),
        targets.to(torch.int64).reshape(len(rows), *like.targets.shape[1:]),
        weights.squeeze(1).to(like.logits.dtype),
    )
