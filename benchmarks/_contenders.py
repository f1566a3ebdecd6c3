"""What is measured: for each implementation, one forward and backward pass on given rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import _peers

Step = Callable[[], object]
EMBEDDING_SIZE = 32
ROWS_PER_LABEL = 4


@dataclass(frozen=True)
class Case:
    """One size; everything here is plain data, so that it can travel between processes.

    Attributes:
        num_rows: M, rows of the live batch (N embeddings for retrieval).
        positive_rate: share of positives for one class; more classes are balanced.
        num_classes: C.
        queue_size: rows of the queue, filled before anything is measured.
        temperature: τ; scores are standard normal.
        device: "cpu" or "cuda".
    """

    num_rows: int
    positive_rate: float = 0.1
    num_classes: int = 1
    queue_size: int = 0
    temperature: float = 0.01
    device: str = "cpu"

    def tiny(self) -> Case:
        """The same at a size that costs nothing, for warming up."""
        rows = 16 * max(2, self.num_classes)
        return Case(rows, 0.25, self.num_classes, 0, self.temperature, self.device)


class Contender(NamedTuple):
    """Which library must be loaded, and how its step is built."""

    peer: str
    build: Callable[[Any, Case], Step]


def build(name: str, case: Case) -> Step:
    """The step of a contender, its inputs made."""
    contender = CONTENDERS[name]
    module = None if contender.peer == "none" else _peers.load(contender.peer)
    return contender.build(module, case)


def rows(case: Case, num_rows: int | None = None) -> tuple[Tensor, Tensor]:
    """Scores [M, C] and targets [M] with exactly the share of positives asked for."""
    num_rows = case.num_rows if num_rows is None else num_rows
    generator = torch.Generator().manual_seed(num_rows)
    logits = torch.randn(num_rows, case.num_classes, generator=generator)
    order = torch.randperm(num_rows, generator=generator)
    if case.num_classes == 1:
        targets = (order < max(1, round(case.positive_rate * num_rows))).long()
    else:
        targets = order % case.num_classes
    return logits.to(case.device), targets.to(case.device)


def _forward_backward(leaf: Tensor, loss: Callable[[], Tensor]) -> Step:
    def step() -> None:
        leaf.grad = None
        loss().backward()

    leaf.requires_grad_()
    return step


def _smooth_ap_loss(module: Any, case: Case) -> Step:
    """SmoothAPLoss of either library, its queue full."""
    loss_fn = module.SmoothAPLoss(case.num_classes, case.queue_size, case.temperature)
    loss_fn.to(case.device)
    if case.queue_size:
        with torch.no_grad():
            loss_fn(*rows(case, case.queue_size))
    logits, targets = rows(case)
    return _forward_backward(logits, lambda: loss_fn(logits, targets))


def _our_kernel(backend: str) -> Callable[[Any, Case], Step]:
    """The kernel by one backend, one problem a class."""

    def build_step(module: Any, case: Case) -> Step:
        from imbalanced_losses.functional import smooth_ap

        logits, targets = rows(case)
        scores, is_positive = logits[:, 0].contiguous(), targets == 1
        if case.num_classes > 1:
            scores = logits.T.contiguous()
            is_positive = targets == torch.arange(case.num_classes, device=case.device)[:, None]

        def loss() -> Tensor:
            ap = smooth_ap(scores, is_positive, case.temperature, backend=backend).ap
            return 1 - ap.mean()

        return _forward_backward(scores, loss)

    return build_step


def _predecessor_kernel(module: Any, case: Case) -> Step:
    logits, targets = rows(case)
    scores, is_positive = logits[:, 0].contiguous(), targets == 1
    kernel = module.SmoothAPLoss._compute_smooth_ap
    return _forward_backward(scores, lambda: 1 - kernel(scores, is_positive, case.temperature)[0])


def _libauc(module: Any, case: Case) -> Step:
    """APLoss, or for several classes mAPLoss with one-hot targets; both ask for row indices."""
    logits, targets = rows(case)
    index = torch.arange(case.num_rows, device=case.device)
    if case.num_classes == 1:
        loss_fn = module.APLoss(data_len=case.num_rows)
        labels = targets[:, None]
    else:
        loss_fn = module.mAPLoss(data_len=case.num_rows, num_labels=case.num_classes)
        labels = torch.nn.functional.one_hot(targets, case.num_classes)
    return _forward_backward(logits, lambda: loss_fn(logits, labels, index))


def embeddings(case: Case) -> tuple[Tensor, Tensor]:
    """Unit vectors [N, D] and labels [N], four of each: every row is a query."""
    generator = torch.Generator().manual_seed(case.num_rows)
    vectors = torch.randn(case.num_rows, EMBEDDING_SIZE, generator=generator)
    labels = torch.arange(case.num_rows) // ROWS_PER_LABEL
    return torch.nn.functional.normalize(vectors).to(case.device), labels.to(case.device)


def _our_retrieval(module: Any, case: Case) -> Step:
    """One ranking problem a query: Smooth-AP as published, the query itself a positive."""
    vectors, labels = embeddings(case)
    same_label = labels[:, None] == labels
    kernel = module.functional.smooth_ap
    return _forward_backward(
        vectors,
        lambda: 1 - kernel(vectors @ vectors.T, same_label, case.temperature).ap.mean(),
    )


def _pml(name: str) -> Callable[[Any, Case], Step]:
    def build_step(module: Any, case: Case) -> Step:
        vectors, labels = embeddings(case)
        loss_fn = getattr(module, name)()
        return _forward_backward(vectors, lambda: loss_fn(vectors, labels))

    return build_step


def _sort(module: Any, case: Case) -> Step:
    scores = rows(case)[0][:, 0].contiguous()
    return lambda: torch.sort(scores, descending=True)


def _sklearn(module: Any, case: Case) -> Step:
    from sklearn.metrics import average_precision_score

    logits, targets = rows(case)
    scores, labels = logits[:, 0].cpu().numpy(), targets.cpu().numpy()
    return lambda: average_precision_score(labels, scores)


CONTENDERS = {
    "ours": Contender("ours", _smooth_ap_loss),
    "predecessor": Contender("predecessor", _smooth_ap_loss),
    "libauc APLoss": Contender("libauc", _libauc),
    "ours, kernel": Contender("ours", _our_kernel("auto")),
    "ours, auto": Contender("ours", _our_kernel("auto")),
    "ours, dense": Contender("none", _our_kernel("dense")),
    "predecessor, kernel": Contender("predecessor", _predecessor_kernel),
    "ours, retrieval": Contender("ours", _our_retrieval),
    "pml SmoothAPLoss": Contender("pml", _pml("SmoothAPLoss")),
    "pml FastAPLoss": Contender("pml", _pml("FastAPLoss")),
    "torch.sort": Contender("none", _sort),
    "sklearn AP": Contender("none", _sklearn),
}
