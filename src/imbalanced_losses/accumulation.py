"""The gradient of a batch too large for one forward pass, exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from imbalanced_losses._checks import training as _checks
from imbalanced_losses._options import RowValues, Unpack

__all__ = ["backward_in_micro_batches"]


def backward_in_micro_batches(
    model: Callable[[Any], Tensor],
    loss_fn: Callable[..., Tensor],
    inputs: Sequence[Any],
    targets: Tensor,
    *,
    module: nn.Module | None = None,
    scale: Callable[[Tensor], Tensor] | None = None,
    **values: Unpack[RowValues],
) -> Tensor:
    """`loss_fn(model(rows), targets).backward()` in the memory of a micro-batch.

    A ranking loss does not split: losses of micro-batches rank each of them by
    itself. A first pass without gradient gives the logits of all rows, and a
    second sends the gradient of their loss through the network, micro-batch by
    micro-batch. The network runs forward twice, the loss once.

    The second pass draws the random numbers of the first (dropout), and running
    statistics in buffers move in the second only. Batch normalisation takes the
    statistics of a micro-batch, as with any accumulation, and random numbers
    fall otherwise than in one pass with all rows.

    A module with `no_sync`, such as DistributedDataParallel, synchronises
    gradients in the last micro-batch alone; every process needs as many
    micro-batches. Under autocast, call it within the context; with a
    GradScaler, pass `scale=scaler.scale` and step as usual.

    Args:
        model: inputs of a micro-batch -> logits [n, C]; a module, or a function
            that calls one.
        loss_fn: (logits [N, C], targets) -> [], such as `SmoothAPLoss` or
            `MixedLoss`; also gets the values that come with rows.
        inputs: one for each micro-batch, at least one. Their rows follow each
            other as in targets.
        targets: of all rows, as for the loss.
        module: what a function calls: its running statistics and its `no_sync`
            are looked after. Not needed where model is a module itself.
        scale: what multiplies the loss before its gradient is taken.
        values: sample_weight, group and value of all rows, as for the loss.

    Returns:
        [], the loss of the whole batch, detached and not scaled. Gradients have
        been added to those of the parameters.

    Raises:
        TypeError: a function without `module`; inputs that are one tensor, or
            can only be gone through once.
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
    called = _checks.called_module(model, module)
    random, seen = [], []  # the generators before each micro-batch, and its logits
    with torch.no_grad(), _buffers_kept(called):
        for rows in inputs:
            random.append(_random_state())
            seen.append(model(rows))
    torch.clear_autocast_cache()  # weights cast without gradient are not for the second pass
    after = _random_state()

    logits = torch.cat(seen).requires_grad_()
    given = {name: value for name, value in values.items() if value is not None}
    loss = loss_fn(logits, targets, **given)
    _checks.one_number("loss_fn", loss)
    (gradient,) = torch.autograd.grad(loss if scale is None else scale(loss), logits)

    parts = gradient.split([len(one) for one in seen])
    unsynchronised = getattr(called, "no_sync", nullcontext)
    try:
        for k, (rows, state, part) in enumerate(zip(inputs, random, parts, strict=True)):
            _restore(state)
            with nullcontext() if k == len(inputs) - 1 else unsynchronised():
                again = model(rows)
                if again.shape != part.shape:
                    raise RuntimeError(
                        f"the logits of micro-batch {k} were {list(part.shape)} in the first pass "
                        f"and are {list(again.shape)} in the second"
                    )
                again.backward(part.to(again.dtype))
    finally:
        _restore(after)
    return loss.detach()


def _random_state() -> list[Tensor]:
    """Of the generators of the CPU and, where it is in use, of the current CUDA device."""
    is_used = torch.cuda.is_available() and torch.cuda.is_initialized()
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if is_used else [])]


def _restore(random_state: list[Tensor]) -> None:
    of_cpu, *of_cuda = random_state
    torch.set_rng_state(of_cpu)
    for state in of_cuda:
        torch.cuda.set_rng_state(state)


@contextmanager
def _buffers_kept(module: nn.Module) -> Iterator[None]:
    """Put the buffers of a module back as they were, also where it assigned others."""
    before = [
        (part, name, buffer, buffer.clone())
        for part in module.modules()
        for name, buffer in part.named_buffers(recurse=False)
    ]
    try:
        yield
    finally:
        for part, name, buffer, value in before:
            buffer.copy_(value)
            setattr(part, name, buffer)
