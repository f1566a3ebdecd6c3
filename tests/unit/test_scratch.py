"""Kept memory that nobody gets to see."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from imbalanced_losses._ranking.scratch import Place, scratch
from imbalanced_losses.functional import smooth_ap
from tests.helpers.answers import Answer, solved
from tests.helpers.cases import seeded

BACKENDS = pytest.mark.parametrize("backend", ["dense", "panel"])
CLASSES = pytest.mark.parametrize("num_problems", [1, 3])


def _answer(seed: int, num_problems: int, backend: str) -> Answer:
    """AP and its gradient, at a size that uses kept memory."""
    scores = torch.randn(num_problems, 3000, generator=seeded(seed))
    is_positive = torch.rand(scores.shape, generator=seeded(seed + 1)) < 0.1
    return solved(scores, is_positive, 0.1, backend=backend)


@BACKENDS
@CLASSES
def test_backward_after_another_forward(backend: str, num_problems: int) -> None:
    """What backward needs is not in it either."""
    scores = torch.randn(num_problems, 3000, generator=seeded(0)).requires_grad_()
    is_positive = torch.rand(scores.shape, generator=seeded(1)) < 0.1
    ap, _ = smooth_ap(scores, is_positive, 0.1, backend=backend)
    _answer(5, num_problems, backend)
    (gradient,) = torch.autograd.grad(ap.sum(), scores)
    assert torch.equal(gradient, _answer(0, num_problems, backend).gradient)


@BACKENDS
def test_threads_have_their_own(backend: str) -> None:
    """Losses in several threads at once do not write over each other."""
    expected = [_answer(seed, 1, backend) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda seed: _answer(seed, 1, backend), list(range(8)) * 4))
    for number, answer in enumerate(got):
        assert all(map(torch.equal, answer, expected[number % 8]))


def test_inference_mode_leaves_it_usable() -> None:
    """Memory first taken under inference mode can be written to outside of it."""

    def alone() -> Tensor | None:
        with torch.inference_mode():
            scratch(Place.PAIRS, (20_000,), torch.zeros(1), torch.float32)
        memory = scratch(Place.PAIRS, (20_000,), torch.zeros(1), torch.float32)
        return None if memory is None else memory.fill_(1)

    with ThreadPoolExecutor(1) as pool:  # a thread that has none yet
        memory = pool.submit(alone).result()
    assert memory is not None
    assert not memory.is_inference()
