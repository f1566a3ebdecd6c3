"""Share rows, or sums, between processes so that the gradient equals that of one process.

Either every process gets all rows (`gather="rows"`), or it keeps its own rows and gets the sums of
all (`gather="sums"`). Both begin with a header of fixed size, compared so that processes which
disagree all raise the same error.

The only file that knows torch.distributed.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from imbalanced_losses._checks.typing import Gather, GradReduce, Reduction, TemperatureUnit
from imbalanced_losses._ranking import Processes
from imbalanced_losses._rows.pool import Pool

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
else:
    ProcessGroup = getattr(dist, "ProcessGroup", Any)

__all__ = ["Gather", "GradReduce", "Group", "ProcessGroup", "Shards", "gather"]

# Settings that are words, which travel as their place in this list.
_WORDS = sorted({*get_args(Gather), *get_args(Reduction), *get_args(TemperatureUnit)})
# What processes may differ in.
_OWN = ("failed", "rows", "weighted", "valued", "differentiated")
_HEADER = (*_OWN, "group", "classes", "target columns", "dtype")  # then the settings


class Group:
    """The processes that gather: a process group, None for the default one.

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
        """How many processes it has; 1 without torch.distributed. Asked at every call."""
        if not (dist.is_available() and dist.is_initialized()):
            return 1
        return dist.get_world_size(self.handle)

    def rank(self) -> int:
        """The place of this process among them; 0 without torch.distributed."""
        return 0 if self.size() == 1 else dist.get_rank(self.handle)

    def summed(self, numbers: list[int], device: torch.device | str | None) -> list[int]:
        """The sum over processes of each number; None: on a device that the group can send from."""
        if device is None:
            is_nccl = "nccl" in dist.get_backend(self.handle)
            device = torch.device("cuda", torch.cuda.current_device()) if is_nccl else "cpu"
        sums = torch.tensor(numbers, dtype=torch.int64, device=device)
        _together(dist.all_reduce, sums, group=self)
        return [int(total) for total in sums.tolist()]


def gather(
    batch: Pool | Exception,
    settings: Mapping[str, Any],
    device: torch.device,
    group: Group,
    how: Gather,
    grad_reduce: GradReduce,
) -> tuple[Pool, Processes | None]:
    """The rows that this process is to rank, and what it exchanges with others to do so.

    Gradient flows to its own rows. For a trainer that averages gradients over processes it is
    multiplied by their number: the average of world_size × (own part) is the sum of the parts,
    which is the gradient of one process with all rows. The value of the loss is not scaled.

    Args:
        batch: the rows of this process, or the error that kept it from having any.
        settings: what has to be the same on every process, by name.
        device: of the collectives.
        group, how, grad_reduce: as the loss was given them.

    Raises:
        TypeError, ValueError: on every process, the error of the first that has one.
        RuntimeError: on every process, when settings or the forms of the rows differ, or when one
            does not take part.
    """
    headers = _exchanged_headers(batch, settings, device, group)
    if any(header["failed"] for header in headers):
        _raise_first_error(batch if isinstance(batch, Exception) else None, group)
    assert isinstance(batch, Pool)
    for name in headers[0]:
        values = [header[name] for header in headers]
        if name not in _OWN and any(value != values[0] for value in values):
            is_word = isinstance(settings.get(name), str)
            shown = ", ".join(_WORDS[int(v)] if is_word else f"{v:.17g}" for v in values)
            raise RuntimeError(
                f"ranks disagree on {name}: rank 0, 1, … have {shown}; it has to be the same on all"
            )

    is_differentiated = any(header["differentiated"] for header in headers)
    factor = group.size() if grad_reduce == "mean" else 1
    own = batch.with_logits(_ScaleGradient.apply(batch.logits, factor)).filled(
        weights=any(header["weighted"] for header in headers),
        value=any(header["valued"] for header in headers),
    )
    if how == "sums":
        return own, Shards(group, is_differentiated)
    lengths = [int(header["rows"]) for header in headers]
    return _rows_of_all(own, lengths, group), None


class Shards:
    """Processes that each keep their rows, and exchange sums."""

    def __init__(self, group: Group, is_differentiated: bool) -> None:
        self.group = group
        self.is_differentiated = is_differentiated

    def sum(self, tensor: Tensor) -> Tensor:
        total: Tensor = _SumOverRanks.apply(tensor, self.group)
        return total

    def max(self, tensor: Tensor) -> Tensor:
        largest = tensor.detach().clone()
        _together(dist.all_reduce, largest, dist.ReduceOp.MAX, group=self.group)
        return largest

    def concatenated(self, rows: Tensor) -> Tensor:
        length = torch.tensor([len(rows)], device=rows.device)
        lengths = [int(one) for one in _all_gather(length, self.group)]
        return torch.cat(_all_rows(rows, lengths, self.group))


class _SumOverRanks(torch.autograd.Function):
    """An all-reduce, whose gradient is already that of the loss of all processes."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Group) -> Tensor:
        total = tensor.detach().clone()
        _together(dist.all_reduce, total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _ScaleGradient(torch.autograd.Function):
    """The identity, with its gradient multiplied by a factor."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, factor: int) -> Tensor:
        ctx.factor = factor
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.factor, None


def _rows_of_all(own: Pool, lengths: list[int], group: Group) -> Pool:
    """The rows of all processes in their order; the gradient reaches the own ones."""
    parts = [
        own.unpacked(rows, own.logits.dtype) for rows in _all_rows(own.packed(), lengths, group)
    ]
    rank = dist.get_rank(group.handle)
    parts[rank] = parts[rank].with_logits(own.logits)
    fields = zip(*(part.fields() for part in parts), strict=True)
    return Pool.of(None if field[0] is None else torch.cat(field) for field in fields)


def _all_rows(rows: Tensor, lengths: list[int], group: Group) -> list[Tensor]:
    """The rows [n, …] of each process, padded to the longest while they are sent."""
    padded = rows.new_zeros(max(lengths), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = zip(_all_gather(padded, group), lengths, strict=True)
    return [part[:length] for part, length in parts]


def _exchanged_headers(
    batch: Pool | Exception, settings: Mapping[str, Any], device: torch.device, group: Group
) -> list[dict[str, float]]:
    """What each process is about to send."""
    own: Sequence[float] = (1, *(0 for _ in _HEADER[1:]))
    if isinstance(batch, Pool):
        logits, targets, weights, value, ids, *_ = batch
        is_differentiated = torch.is_grad_enabled() and logits.requires_grad
        own = (0, len(logits), weights is not None, value is not None, is_differentiated)
        own += (ids is not None, logits.shape[1])
        own += (targets.shape[1:].numel(), torch.finfo(logits.dtype).bits)
    header = dict(zip(_HEADER, own, strict=True))
    header |= {name: _as_number(setting) for name, setting in settings.items()}
    values = torch.tensor(list(header.values()), dtype=torch.float64, device=device)
    rows = [row.tolist() for row in _all_gather(values, group)]
    return [dict(zip(header, row, strict=True)) for row in rows]


def _as_number(setting: str | float | tuple[float, ...] | None) -> float:
    """What tells settings apart: 0 for none, the place of a word, a checksum of several numbers."""
    if isinstance(setting, str):
        return _WORDS.index(setting)
    if isinstance(setting, tuple):
        return setting[0] if len(setting) == 1 else zlib.crc32(repr(setting).encode())
    return setting or 0


def _raise_first_error(own: Exception | None, group: Group) -> None:
    """Raise, on every process, the error of the first that has one."""
    errors: list[tuple[bool, str] | None] = [None] * group.size()
    mine = None if own is None else (isinstance(own, TypeError), str(own))
    _together(dist.all_gather_object, errors, mine, group=group)
    rank, (is_type_error, message) = next((r, e) for r, e in enumerate(errors) if e is not None)
    raise (TypeError if is_type_error else ValueError)(f"on rank {rank}: {message}") from own


def _all_gather(tensor: Tensor, group: Group) -> list[Tensor]:
    parts = [torch.empty_like(tensor) for _ in range(group.size())]
    _together(dist.all_gather, parts, tensor, group=group)
    return parts


def _together(collective: Callable[..., Any], *arguments: Any, group: Group) -> None:
    """A collective; if a process stays away, the others raise an error that says so."""
    try:
        collective(*arguments, group=group.handle)
    except RuntimeError as error:
        raise RuntimeError(
            "the loss ranks the rows of all processes together, and not all of them took part in "
            "this forward pass: one has ended, failed, or made fewer steps than the others, as its "
            f"own output will tell (this is rank {dist.get_rank(group.handle)} of {group.size()}). "
            "For processes with fewer batches see imbalanced_losses.distributed.even_steps. "
            f"torch.distributed says: {error}"
        ) from error
