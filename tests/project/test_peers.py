"""What the pages about coming from other libraries say of them.

`make peers` fetches these; without them these tests are skipped.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from benchmarks import _peers
from torch import Tensor
from torch.nn.functional import normalize

from imbalanced_losses import NDCGLoss, SmoothAPLoss
from imbalanced_losses.functional import smooth_ap

pytestmark = pytest.mark.slow


def loaded(name: str) -> Iterator[ModuleType]:
    if not _peers.is_there(name):
        pytest.skip("fetch the peers with `make peers`")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))
        yield _peers.load(name)


@pytest.fixture(scope="module")
def metric_learning() -> Iterator[ModuleType]:
    yield from loaded("pml")


@pytest.fixture(scope="module")
def libauc() -> Iterator[ModuleType]:
    yield from loaded("libauc")


@pytest.fixture(scope="module")
def allrank() -> Iterator[ModuleType]:
    yield from loaded("allrank")


def clusters(num_labels: int, each: int, noise: float = 0.0) -> tuple[Tensor, Tensor]:
    """Embeddings [N, 16] around one centre a label, labels in order."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(num_labels).repeat_interleave(each)
    centres = normalize(torch.randn(num_labels, 16, generator=generator))
    return centres[labels] + noise * torch.randn(len(labels), 16, generator=generator), labels


def retrieval_loss(embeddings: Tensor, labels: Tensor, temperature: float = 0.01) -> Tensor:
    """As on the page."""
    vectors = normalize(embeddings)
    same = labels[:, None] == labels
    return 1 - smooth_ap(vectors @ vectors.T, same, temperature).ap.mean()


@pytest.mark.parametrize("size", [4, 8])
def test_metric_learning_as_many_labels_as_rows_of_each(
    metric_learning: ModuleType, size: int
) -> None:
    """The one case that it computes: value and gradient are the same here."""
    embeddings, labels = clusters(size, size, noise=0.3)
    embeddings.requires_grad_()
    theirs = metric_learning.SmoothAPLoss()(embeddings, labels)
    ours = retrieval_loss(embeddings, labels)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    gradients = [torch.autograd.grad(loss, embeddings)[0] for loss in (theirs, ours)]
    assert (gradients[0] - gradients[1]).norm() < 1e-4 * gradients[0].norm()


def test_metric_learning_refuses(metric_learning: ModuleType) -> None:
    embeddings, labels = clusters(4, 4)
    loss_fn = metric_learning.SmoothAPLoss()
    with pytest.raises(ValueError, match="same number of elements"):
        loss_fn(embeddings[:15], labels[:15])
    with pytest.raises(ValueError, match="ref_emb is not supported"):
        loss_fn(embeddings, labels, ref_emb=torch.ones(4, 16), ref_labels=torch.arange(4))
    with pytest.raises(Exception, match="CrossBatchMemory not supported"):
        metric_learning.CrossBatchMemory(loss_fn, 16)
    assert retrieval_loss(embeddings[:15], labels[:15]).isfinite()


def libauc_batch(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities, labels and row numbers; an eighth positive."""
    probabilities = torch.rand(64, 1, generator=torch.Generator().manual_seed(seed))
    return probabilities, (torch.arange(64) % 8 == 0)[:, None].long(), torch.arange(64)


def test_libauc_keeps_its_averages_out_of_the_checkpoint(libauc: ModuleType) -> None:
    loss_fn = libauc.APLoss(data_len=64)
    loss_fn(*libauc_batch(0))
    assert loss_fn.u_all.any()
    assert not loss_fn.state_dict()
    assert not list(loss_fn.buffers())
    queued = SmoothAPLoss(1, queue_size=64)
    assert queued.state_dict()


def test_libauc_needs_a_positive(libauc: ModuleType) -> None:
    probabilities, labels, rows = libauc_batch(0)
    with pytest.raises(AssertionError, match="no positive sample"):
        libauc.APLoss(data_len=64)(probabilities, torch.zeros_like(labels), rows)
    assert SmoothAPLoss(1, queue_size=0)(probabilities, torch.zeros_like(labels)) == 0


def test_allrank_ndcg_is_the_same(allrank: ModuleType) -> None:
    """Of padded slates that have a relevant row each; one without counts 0 there, and is no part
    of the mean here.
    """
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(4, 20, generator=generator).requires_grad_()
    grades = torch.randint(0, 5, (4, 20), generator=generator)
    grades[:, 0] = 1
    grades[0, 12:] = -1
    loss_fn = NDCGLoss(queue_size=0, temperature=0.1, ignore_index=-1)
    slate = torch.arange(4).repeat_interleave(20)

    def both() -> tuple[Tensor, Tensor]:
        theirs = allrank.approxNDCGLoss(scores, grades.float(), alpha=10.0)
        return theirs, loss_fn(scores.reshape(-1, 1), grades.reshape(-1), group=slate)

    theirs, ours = both()
    torch.testing.assert_close(ours, 1 + theirs)
    gradients = [torch.autograd.grad(loss, scores)[0] for loss in (theirs, ours)]
    assert (gradients[0] - gradients[1]).norm() < 1e-4 * gradients[1].norm()
    grades[3] = 0
    theirs, ours = both()
    torch.testing.assert_close(3 / 4 * (1 - ours), -theirs)
