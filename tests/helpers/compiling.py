"""The kernels as they are launched, compiled for a device that is not there.

Losses run as on a device of compute capability 9.0, with its compiler, up to the call that would
launch a kernel; nothing is computed. Triton wants its driver for the whole process, so this is a
program, which fails where a kernel does not compile, is not what a parallel machine wants, or is
launched otherwise than Triton would:

    python -m tests.helpers.compiling  ->  the name of each kernel, and how often it was compiled
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from imbalanced_losses import NDCGLoss, PartialAUCLoss, RecallAtKLoss, SmoothAPLoss
from imbalanced_losses._loss import RankingLoss
from imbalanced_losses._ranking.cuda import launches
from tests.helpers.cases import seeded

Launch = tuple[object, ...]


class Driver:
    """What Triton asks of a driver."""

    made: list[Launch]  # what was launched

    def __init__(self) -> None:
        self.utils, self.made = self, []

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 << 10}

    def load_binary(self, name: str, *rest: Any) -> tuple[None, str, int, int, int]:
        return None, name, 32, 0, 1024

    def unload_module(self, module: None) -> None:
        pass

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        """Note which kernel is launched, and with what."""

        def launched(*arguments: Any) -> None:  # the grid, six of the driver's own, the kernel's
            values = [(v.dtype, v.shape) if isinstance(v, Tensor) else v for v in arguments[9:]]
            self.made.append((source.hash(), *arguments[:3], *values))

        return launched


def losses() -> Iterator[tuple[RankingLoss, dict[str, Any]]]:
    """Each loss, and what it is called with beside logits and targets."""
    options: dict[str, Any] = {"queue_size": 16, "temperature": 0.1}
    yield SmoothAPLoss(1, **options), {}
    yield SmoothAPLoss(1, temperature_unit="spread", **options), {"value": True}
    yield SmoothAPLoss(1, 0, target_prior=0.1), {"sample_weight": True}
    yield SmoothAPLoss(1, 0, temperature_unit="spread"), {"group": True}
    yield PartialAUCLoss(1, 0.1, **options), {"group": True}
    yield RecallAtKLoss(3, 5, **options), {"sample_weight": True}
    yield NDCGLoss(3, 5, multilabel=True, **options), {"sample_weight": True}


def step(loss_fn: RankingLoss, num_rows: int, dtype: torch.dtype, **fields: bool) -> None:
    """Forward and backward pass, of rows that do not matter."""
    generator = seeded(num_rows)
    shape = (num_rows, loss_fn.num_classes)
    logits = torch.randn(shape, generator=generator, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, 2, shape if loss_fn.multilabel else shape[:1], generator=generator)
    rows = torch.rand(num_rows, generator=generator)
    loss_fn(
        logits, targets, **{k: rows.long() if k == "group" else rows for k in fields}
    ).backward()


def launched(driver: Driver) -> list[Launch]:
    """By steps of one row, of many that divide by 16, and of few that do not."""
    driver.made = []
    for backend, dtype in itertools.product(("dense", "panel"), (torch.float32, torch.float64)):
        RankingLoss.backend = backend  # type: ignore[assignment]
        for loss_fn, fields in losses():
            if backend == "dense" or "group" not in fields:
                sizes = (1, 5008, 33, 33) if loss_fn.num_classes == 1 else (33, 40_000, 140_000)
                for num_rows in sizes:
                    step(loss_fn, num_rows, dtype, **fields)
    return driver.made


def main() -> None:
    """Compile, launch, and look at what came out."""
    driver = Driver()
    triton.runtime.driver.set_active(driver)
    launches.DEVICES = ("cpu",)
    launches._has_triton = lambda: True
    directly = launched(driver)
    compiled = [kernel for kernel, _ in launches._COMPILED.values()]
    for kernel in compiled:
        assert kernel.asm["cubin"], kernel.name
        assert "atom" not in kernel.asm["ptx"], kernel.name
        assert ".local" not in kernel.asm["ptx"], kernel.name
    launches._OLDEST_DIRECT = (99,)
    launches._COMPILED.clear()
    assert launched(driver) == directly
    print(Counter(kernel.name for kernel in compiled))


if __name__ == "__main__":
    main()
