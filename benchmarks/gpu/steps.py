"""What is measured on a device: steps of this library, and of others that do the same."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import _contenders
from benchmarks._contenders import Case

Run = Callable[[], Tensor]
FUNCTION = "smooth_ap"  # the functional form; the other steps are called as the class of the loss
FAMILY: dict[str, dict[str, Any]] = {
    "SmoothAPLoss": {},
    "RecallAtKLoss": {"k": 0.01},
    "RecallAtFPRLoss": {"max_fpr": 0.01},
    "PartialAUCLoss": {"max_fpr": 0.05},
    "NDCGLoss": {},
}
OF_OPTION: dict[str, dict[str, Any]] = {
    "spread": {"temperature_unit": "spread"},
    "prior": {"target_prior": 0.01},
}
MODES = {"compiled": "default", "compiled, reduce-overhead": "reduce-overhead"}


class Step(NamedTuple):
    """One forward and backward pass: float32, 10 % positive for one class, τ = 0.01.

    Attributes:
        library: one of `_peers.PEERS`.
        name: the loss, or `FUNCTION`.
        rows, classes, queue: rows of the batch, of which the queue holds more.
        backend: of ours.
        option: "checked" (values are; else not), "groups", "value", or a key of `OF_OPTION` or
            of `MODES`.
    """

    library: str
    name: str
    rows: int
    classes: int = 1
    queue: int = 0
    backend: str = "auto"
    option: str = ""


def all_steps() -> Iterator[Step]:
    """What goals are about comes first; other libraries' sizes grow until their memory ends."""
    beside_queue = [(1024, 1, 0), *((3072, classes, 1024) for classes in (1, 10, 100))]
    for library, option in (("ours", ""), ("ours", "checked"), ("predecessor", "")):
        for sizes in beside_queue:
            yield Step(library, "SmoothAPLoss", *sizes, option=option)
    for power in range(10, 21, 2):
        yield Step("ours", FUNCTION, 1 << power)
    for option in ("groups", "value", *OF_OPTION):
        yield Step("ours", "SmoothAPLoss", 4096, option=option)
    for name, rows in itertools.product(FAMILY, (4096, 1 << 20)):
        yield Step("ours", name, rows)
    for option, queue in itertools.product(MODES, (0, 1024)):
        yield Step("ours", "SmoothAPLoss", 3072, queue=queue, option=option)
    for backend, (classes, powers) in itertools.product(
        ("dense", "panel"), ((1, (12, 14, 15, 16, 17)), (10, (12, 14, 15)))
    ):
        for power in powers:
            yield Step("ours", FUNCTION, 1 << power, classes, backend=backend)
    for library, name in (("predecessor", FUNCTION), ("libauc", "APLoss")):
        for power in range(10, 20, 2):
            yield Step(library, name, 1 << power)


def built(step: Step, library: Any, device: str) -> tuple[Run, Tensor]:
    """A pass that returns its loss, and the leaf that it gives a gradient."""
    case = Case(step.rows, num_classes=step.classes, queue_size=step.queue, device=device)
    logits, targets = _contenders.rows(case)
    if step.name == FUNCTION:
        return _of_function(step, library, logits, targets)
    if step.library == "libauc":
        loss_fn = library.APLoss(data_len=step.rows)
        index = torch.arange(step.rows, device=device)
        leaf = logits.requires_grad_()
        return run_of(lambda: loss_fn(leaf, targets[:, None], index), leaf), leaf
    own = FAMILY[step.name] | OF_OPTION.get(step.option, {})
    loss_fn = getattr(library, step.name)(
        num_classes=step.classes, queue_size=step.queue, temperature=0.01, **own
    ).to(device)
    if step.library == "ours":
        loss_fn.check_values, loss_fn.backend = step.option == "checked", step.backend
    if step.queue:
        with torch.no_grad():
            loss_fn(*_contenders.rows(case, step.queue))
    fields: dict[str, Tensor] = {}
    if step.option == "groups":
        fields["group"] = torch.arange(step.rows, device=device) % 100
    elif step.option == "value":
        fields["value"] = torch.rand(step.rows, device=device)
    elif step.option in MODES:
        loss_fn = torch.compile(loss_fn, fullgraph=True, mode=MODES[step.option])
    leaf = logits.requires_grad_()
    return run_of(lambda: loss_fn(leaf, targets, **fields), leaf), leaf


def _of_function(step: Step, library: Any, logits: Tensor, targets: Tensor) -> tuple[Run, Tensor]:
    if step.classes == 1:
        leaf, is_positive = logits[:, 0].contiguous(), targets == 1
    else:
        leaf = logits.T.contiguous()
        is_positive = targets == torch.arange(step.classes, device=logits.device)[:, None]
    leaf.requires_grad_()
    if step.library == "predecessor":
        kernel = library.SmoothAPLoss._compute_smooth_ap
        return run_of(lambda: 1 - kernel(leaf, is_positive, 0.01)[0], leaf), leaf
    function = library.functional.smooth_ap
    return run_of(
        lambda: 1 - function(leaf, is_positive, 0.01, backend=step.backend).ap.mean(), leaf
    ), leaf


def cross_entropy(step: Step, device: str) -> Run:
    """`BCEWithLogitsLoss` of as many rows and classes."""
    leaf = torch.randn(step.rows, step.classes, device=device)
    labels, loss_fn = (leaf > 1).float(), torch.nn.BCEWithLogitsLoss()
    leaf.requires_grad_()
    return run_of(lambda: loss_fn(leaf, labels), leaf)


def run_of(loss: Run, leaf: Tensor) -> Run:
    """Forward and backward."""

    def run() -> Tensor:
        leaf.grad = None
        found = loss()
        found.backward()
        return found.detach()

    return run
