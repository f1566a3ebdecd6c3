"""The gradient of a batch too large for one forward pass, exactly."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from imbalanced_losses import _checks

__all__ = ["backward_in_micro_batches"]


def backward_in_micro_batches(
    model: Callable[[Any], Tensor],
    loss_fn: Callable[..., Tensor],
    inputs: Sequence[Any],
    targets: Tensor,
    *,
    sample_weight: Tensor | None = None,
    scale: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """`loss_fn(model(rows), targets).backward()` in the memory of a micro-batch.

    A ranking loss does not split: the sum of the losses of micro-batches ranks
    each of them by itself, and its gradient is not that of the batch. This
    makes a first pass without gradient for the logits of all rows, takes the
    loss and its gradient there, and sends that gradient through a second pass,
    micro-batch by micro-batch. The network runs forward twice, the loss once.

    The second pass draws the random numbers of the first (dropout). Running
    statistics (batch normalisation) move in the second pass only: the buffers
    of every module that `model` is or calls, and of its submodules, are put
    back after the first pass. Modules may be compiled. What differs from one
    pass with all rows: batch normalisation takes the statistics of a
    micro-batch, as with any accumulation, and where a network draws random
    numbers they fall otherwise.

    A module with `no_sync`, such as DistributedDataParallel, which `model` is
    or calls, synchronises gradients in the last micro-batch alone; every
    process needs as many micro-batches. Under autocast, call it within the
    context (equal then to the rounding of the low precision); with a
    GradScaler, pass `scale=scaler.scale` and step as usual.

    Args:
        model: inputs of a micro-batch -> logits [n, C]. A module, or any
            function that calls modules, such as `lambda batch: net(**batch)`.
            Compile the modules, not the function: what runs within a compiled
            function can't be seen.
        loss_fn: (logits [N, C], targets) -> [], such as `SmoothAPLoss` or
            `MixedLoss`; also gets sample_weight where there is one.
        inputs: one for each micro-batch, at least one. Their rows follow each
            other as in targets.
        targets: of all rows, as for the loss.
        sample_weight: [N], as for the loss.
        scale: what multiplies the loss before its gradient is taken.

    Returns:
        [], the loss of the whole batch, detached and not scaled. Gradients have
        been added to those of the parameters.

    Raises:
        TypeError: inputs that are one tensor, or can only be gone through once.
            A model that is a compiled function.
        ValueError: no micro-batch, or a loss that is not one number.
        RuntimeError: a micro-batch whose logits have another shape in the
            second pass. What the loss raises, before any gradient has changed.

    Example:
        >>> from imbalanced_losses import SmoothAPLoss
        >>> features, targets = torch.randn(64, 5), torch.arange(64) % 4 == 0
        >>> model, loss_fn = nn.Linear(5, 1), SmoothAPLoss(1, queue_size=0)
        >>> parts = features.split(16)
        >>> loss = backward_in_micro_batches(model, loss_fn, parts, targets)
        >>> gradient, model.weight.grad = model.weight.grad, None
        >>> loss_fn(model(features), targets).backward()
        >>> torch.allclose(gradient, model.weight.grad, atol=1e-6)
        True

    Source: Gao et al., "Scaling Deep Contrastive Learning Batch Size under
    Memory Limited Setup", 2021, arXiv 2101.06983 (gradient cache).
    """
    _checks.micro_batches(inputs)
    if hasattr(model, "_torchdynamo_orig_callable") and not isinstance(model, nn.Module):
        raise TypeError(
            "model must be a module or a plain function, got a compiled function, within which "
            "the modules can't be seen; compile the module and call it in a plain function"
        )
    seen: list[_Seen] = []
    called = _Called(model)
    with torch.no_grad(), called.noted():
        for rows in inputs:
            random = _RandomState.now()
            seen.append(_Seen(model(rows), random))
    torch.clear_autocast_cache()  # weights cast without gradient are not for the second pass
    after = _RandomState.now()

    logits = torch.cat([one.logits for one in seen]).requires_grad_()
    weights = {} if sample_weight is None else {"sample_weight": sample_weight}
    loss = loss_fn(logits, targets, **weights)
    _checks.one_number("loss_fn", loss)
    (gradient,) = torch.autograd.grad(loss if scale is None else scale(loss), logits)

    parts = gradient.split([len(one.logits) for one in seen])
    try:
        for k, (rows, one, part) in enumerate(zip(inputs, seen, parts, strict=True)):
            one.random.restore()
            with ExitStack() as stack:
                for module in called.synchronising() if k < len(inputs) - 1 else ():
                    stack.enter_context(module.no_sync())
                again = model(rows)
                if again.shape != part.shape:
                    raise RuntimeError(
                        f"the logits of micro-batch {k} were {list(part.shape)} in the first pass "
                        f"and are {list(again.shape)} in the second"
                    )
                again.backward(part.to(again.dtype))
    finally:
        after.restore()
    return loss.detach()


class _RandomState(NamedTuple):
    """The random generators of the CPU and of the current CUDA device."""

    cpu: Tensor
    cuda: Tensor | None

    @classmethod
    def now(cls) -> _RandomState:
        is_used = torch.cuda.is_available() and torch.cuda.is_initialized()
        return cls(torch.get_rng_state(), torch.cuda.get_rng_state() if is_used else None)

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda)


class _Seen(NamedTuple):
    """A micro-batch in the first pass."""

    logits: Tensor
    random: _RandomState  # before it


class _Called:
    """The modules that a first pass calls, and their buffers as they were before."""

    in_thread: ClassVar[dict[int, _Called]] = {}  # the first passes under way
    lock: ClassVar = threading.Lock()  # of in_thread and of `nn.Module.__call__`
    plain_call: ClassVar[Callable[..., Any]]

    def __init__(self, model: Any) -> None:
        self.outermost: list[Any] = []
        self.buffers: dict[nn.Module, list[tuple[str, Tensor, Tensor]]] = {}
        if isinstance(model, nn.Module):
            self.add(model)
        else:
            self.outermost.append(model)

    def add(self, module: nn.Module) -> None:
        if module not in self.buffers:
            self.outermost.append(module)
            for part in set(module.modules()) - self.buffers.keys():
                own = part.named_buffers(recurse=False)
                self.buffers[part] = [(name, buffer, buffer.clone()) for name, buffer in own]

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Add what this thread calls within; put the buffers back at the end."""
        with self.lock:
            if not self.in_thread:
                _Called.plain_call = nn.Module.__call__
                setattr(nn.Module, "__call__", _noted_call)  # noqa: B010 - for mypy
            self.in_thread[threading.get_ident()] = self
        try:
            yield
        finally:
            with self.lock:
                del self.in_thread[threading.get_ident()]
                if not self.in_thread:
                    setattr(nn.Module, "__call__", _Called.plain_call)  # noqa: B010
            # The latest first: a buffer that two modules share ends as it was before both.
            for part, own in reversed(self.buffers.items()):
                for name, buffer, value in own:
                    buffer.copy_(value)
                    setattr(part, name, buffer)  # where the module assigned another
            self.buffers.clear()

    def synchronising(self) -> list[Any]:
        """The outermost of all that have `no_sync`."""
        found, left = [], self.outermost.copy()
        while left:
            one = left.pop()
            if hasattr(one, "no_sync"):
                found.append(one)
            elif isinstance(one, nn.Module):
                left.extend(one.children())
        return found


def _noted_call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """`nn.Module.__call__` during a first pass.

    Not a global hook of torch: with one, compiled modules warn, compile anew at every step, and
    fail under fullgraph.
    """
    if not torch.compiler.is_compiling():
        called = _Called.in_thread.get(threading.get_ident())
        if called is not None:
            called.add(module)
    return _Called.plain_call(module, *args, **kwargs)
