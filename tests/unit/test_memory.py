"""Memory of a training step: linear in the pool, whatever the share of positives."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from imbalanced_losses import SmoothAPLoss
from imbalanced_losses._ranking import dense
from imbalanced_losses.functional import Backend
from tests.helpers.cases import seeded
from tests.helpers.memory import LargestTensor

ROWS, QUEUE_SIZE = 1536, 512
POOL = ROWS + QUEUE_SIZE
LIMIT_BYTES = 512 * 2**20


def batch(num_rows: int, num_classes: int, share: float) -> tuple[Tensor, Tensor]:
    """Logits and targets; a share of the rows is positive for one class or another."""
    generator = seeded(0)
    logits = torch.randn(num_rows, num_classes, generator=generator)
    classes = torch.randint(max(1, num_classes - 1), (num_rows,), generator=generator) + 1
    is_positive = torch.rand(num_rows, generator=generator) < share
    return logits, classes * is_positive if num_classes > 1 else is_positive.long()


@pytest.mark.parametrize("weighted", [False, True], ids=["unweighted", "weighted"])
@pytest.mark.parametrize("backend", ["dense", "panel"])
@pytest.mark.parametrize("share", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("num_classes", [1, 10])
def test_of_a_step(
    num_classes: int,
    share: float,
    backend: Backend,
    weighted: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At most 64 bytes a score wait for backward, and no tensor is larger than a tile or some
    sixteen times the scores.
    """
    monkeypatch.setattr(SmoothAPLoss, "backend", backend)
    monkeypatch.setattr(dense, "TILE", 1 << 14)
    loss_fn = SmoothAPLoss(num_classes, QUEUE_SIZE, 0.1)
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    for _ in range(2):
        saved.clear()
        logits, targets = batch(ROWS, num_classes, share)
        weight = torch.rand(ROWS, generator=seeded(1)) if weighted else None
        leaf = logits.requires_grad_()
        with LargestTensor() as largest:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                loss = loss_fn(leaf, targets, sample_weight=weight)
            loss.backward()
    pairs = share * POOL * POOL
    scores = POOL * num_classes
    assert 0 < sum(saved.values()) <= 64 * scores
    assert 0 < largest.elements <= max(2 * dense.TILE, 16 * scores)
    if share == 0.5:
        assert pairs > 4 * largest.elements  # else this proves nothing


LARGE = """
import resource
import torch
from imbalanced_losses.functional import smooth_ap

scores = torch.randn(32_768, generator=torch.Generator().manual_seed(0)).requires_grad_()
is_positive = torch.arange(32_768) %% 2 == 0
smooth_ap(scores[:4000], is_positive[:4000], 0.01).ap.backward()
held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
limit = held + %d
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
smooth_ap(scores, is_positive, 0.01).ap.backward()
assert scores.grad.abs().sum() > 0
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_large_pool_half_of_it_positive_fits() -> None:
    """32 768 rows: 2 GiB for one float32 a pair. In a process of its own, over what it holds
    before; allocations beyond the limit fail there.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", LARGE % LIMIT_BYTES], check=True, env=environment)
