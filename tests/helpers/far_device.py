"""A device that is not the host, for machines without one: what a training step sends to and fro.

Its tensors live in the host's memory, but say that they do not, and every operation that would
copy to it, copy from it or wait for it is noted. Kernels are not launched: what they compute is for
other tests. PyTorch wants such a device declared for the whole process, so this is a program:

    python -m tests.helpers.far_device  ->  one JSON object a configuration and line
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from imbalanced_losses import (
    CrossEntropy,
    MixedLoss,
    NDCGLoss,
    PartialAUCLoss,
    RecallAtFPRLoss,
    RecallAtKLoss,
    SmoothAPLoss,
)
from imbalanced_losses._loss import RankingLoss
from imbalanced_losses._ranking import Problems, Ranks
from imbalanced_losses._ranking.cuda import launches
from tests.helpers.cases import seeded

FAR = "far"
# Their shapes, or what they return, depend on values.
WAITS = {
    "_local_scalar_dense",
    "nonzero",
    "nonzero_static",
    "masked_select",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "bincount",
    "equal",
    "repeat_interleave",
}
# They compute nothing.
NO_LAUNCH = ("empty", "new_empty", "detach", "_unsafe_view", "_reshape_alias")
Loss = RankingLoss | MixedLoss
CLASSES = (1, 10, 100)
ROWS, STEPS = 60, 3


class FarTensor(Tensor):
    """A tensor of the device, around the one in which its values are."""

    near: Tensor

    @staticmethod
    def __new__(cls, near: Tensor) -> FarTensor:
        far: FarTensor = Tensor._make_wrapper_subclass(
            cls,
            near.shape,
            strides=near.stride(),
            storage_offset=near.storage_offset(),
            dtype=near.dtype,
            device=torch.device(FAR, 0),
        )
        far.near = near
        return far

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return Crossings.now.computed(func, args, kwargs or {})


class Crossings(TorchDispatchMode):
    """Computes for the device, and notes what crosses between it and the host."""

    now: Crossings

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.launches: list[str] = []
        Crossings.now = self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.computed(func, args, kwargs or {})

    def computed(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        name = func.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        far = [tensor for tensor in tensors if isinstance(tensor, FarTensor)]
        is_far = bool(far)
        if kwargs.get("device") is not None:
            is_far = torch.device(kwargs["device"]).type == FAR
            kwargs = {**kwargs, "device": torch.device("cpu")}
        self._note(name, args, kwargs, bool(far), is_far)
        if is_far and not func.is_view and not name.startswith(NO_LAUNCH):
            self.launches.append(name)
        if name != "copy_" and far and any(t.dim() for t in tensors if type(t) is Tensor):
            raise RuntimeError(f"{name}: tensors of the host beside tensors of the device")
        own = {id(tensor.near): tensor for tensor in far}  # what is written in place stays itself

        def wrapped(value: Any) -> Any:
            if not is_far or not isinstance(value, Tensor):
                return value
            return own[id(value)] if id(value) in own else FarTensor(value)

        near_args, near_kwargs = tree_map(
            lambda value: value.near if isinstance(value, FarTensor) else value, (args, kwargs)
        )
        return tree_map(wrapped, func(*near_args, **near_kwargs))

    def _note(self, name: str, args: Any, kwargs: Any, was_far: bool, is_far: bool) -> None:
        if name == "copy_":
            is_far, was_far = (isinstance(tensor, FarTensor) for tensor in args[:2])
        if name in ("copy_", "_to_copy"):
            if was_far != is_far:
                self.found.append("to the device" if is_far else "to the host")
            return
        if name == "repeat_interleave" and kwargs.get("output_size") is not None:
            return
        has_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if was_far and (name in WAITS or has_mask):
            self.found.append(name)


def tolist(tensor: Tensor) -> Any:
    """`Tensor.tolist`, which PyTorch has for none but its own tensors."""
    if isinstance(tensor, FarTensor):
        Crossings.now.found.append("to the host")
        return tensor.near.tolist()
    return _tolist(tensor)


_tolist = Tensor.tolist


class Recall(RankingLoss):
    """Of the first 100 rows: a metric whose slopes autograd takes."""

    def metric(self, problems: Problems) -> Tensor:
        budget = problems.mass("all") / 100

        def worth(ranks: Ranks) -> Tensor:
            own = ranks.of_problem(budget)
            return torch.sigmoid((own - ranks.among("all")) / (0.25 * own))

        return problems.ranked_mean(worth)


class NoKernels:
    """Stands in for the kernels, which are launched as well."""

    def __getattr__(self, name: str) -> Any:
        Crossings.now.launches.append(name)
        return _NoKernel(name)


class _NoKernel:
    """Finds all values good, and computes nothing else."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self

    def __call__(self, *arguments: Any, **_: Any) -> None:
        if self.name == "check_rows":
            arguments[3].near.fill_(True)


def losses_of(num_classes: int) -> dict[str, Loss]:
    """Those of the configurations that a device need not be waited for, and one with a cap."""
    queue: dict[str, Any] = {"num_classes": num_classes, "queue_size": 64, "temperature": 0.1}
    shift: dict[str, Any] = {"temperature_unit": "spread", "queue_follows_shift": True}
    return {
        "plain": SmoothAPLoss(num_classes, 0, 0.1),
        "queue": SmoothAPLoss(**queue),
        "labels": SmoothAPLoss(**queue, multilabel=True),
        "spread": SmoothAPLoss(**queue, **shift),
        "prior": SmoothAPLoss(**queue, target_prior=[0.01] * num_classes),
        "mixed": MixedLoss(CrossEntropy(num_classes), SmoothAPLoss(**queue), main_weight=0.5),
        "recall": Recall(**queue),
        "capped": SmoothAPLoss(num_classes, 0, 0.1, max_pool_size=40),
        "linear": SmoothAPLoss(**queue),
        "groups": SmoothAPLoss(**queue),
        "values": SmoothAPLoss(**queue),
        "recall at k": RecallAtKLoss(k=0.1, **queue),
        "recall at FPR": RecallAtFPRLoss(max_fpr=0.1, **queue),
        "partial AUC": PartialAUCLoss(max_fpr=0.1, **queue),
        "NDCG": NDCGLoss(num_classes, k=9, queue_size=64, multilabel=num_classes > 1),
    }


def batches(num_classes: int, multilabel: bool) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Logits, targets and weights on the host; the number of positives changes."""
    for step in range(STEPS):
        generator = seeded(step)
        shape = (ROWS, num_classes) if multilabel else (ROWS,)
        labels = 2 if multilabel else max(2, num_classes)
        targets = torch.randint(0, labels, shape, generator=generator)
        targets[step] = -100
        logits = torch.randn(ROWS, num_classes, generator=generator)
        yield logits, targets, torch.rand(ROWS, generator=generator)


def main() -> None:
    """What the last of some steps sends, for every configuration."""
    backend_registration._setup_privateuseone_for_python_backend(FAR)
    Tensor.tolist = tolist  # type: ignore[method-assign,assignment]
    launches.DEVICES = (FAR,)
    launches._has_triton = lambda: True
    for num_classes, checked, weighted in itertools.product(CLASSES, (False, True), (False, True)):
        RankingLoss.check_values = CrossEntropy.check_values = checked
        for name, loss_fn in losses_of(num_classes).items():
            RankingLoss.backend = "panel" if name == "linear" else "dense"
            case = {"loss": name, "classes": num_classes, "checked": checked, "weighted": weighted}
            print(json.dumps(case | crossings_of(name, loss_fn, weighted)))


def fields_of(name: str, weights: Tensor) -> dict[str, Tensor]:
    """What a loss of `losses_of` is called with beside weights."""
    if name == "groups":
        return {"group": (9 * weights).long()}
    return {"value": weights} if name == "values" else {}


def crossings_of(name: str, loss_fn: Loss, is_weighted: bool) -> dict[str, list[str]]:
    """{"forward": …, "backward": …, "launches": …} of the last step."""
    ranking = loss_fn.main_loss if isinstance(loss_fn, MixedLoss) else loss_fn
    launches._kernels = lambda name: NoKernels()
    with Crossings() as crossings:
        for logits, targets, weights in batches(ranking.num_classes, ranking.multilabel):
            leaf, labels = logits.to(FAR).requires_grad_(), targets.to(FAR)
            given = fields_of(name, weights) | ({"sample_weight": weights} if is_weighted else {})
            options = {name: field.to(FAR) for name, field in given.items()}
            crossings.found, crossings.launches = [], []
            loss = loss_fn(leaf, labels, **options)
            forward, crossings.found = crossings.found, []
            loss.backward()
    return {
        "forward": forward,
        "backward": crossings.found,
        "launches": crossings.launches,
    }


if __name__ == "__main__":
    main()
