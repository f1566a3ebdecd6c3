"""The targets of `make fuzz`, driven by random bytes, without atheris; and what they have found."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

from imbalanced_losses import SmoothAPLoss
from tests.hardening.fuzz import forward, load_state_dict

RUNS = 1000


@pytest.mark.parametrize(
    "one_run", [forward.one_run, load_state_dict.one_run], ids=["forward", "load_state_dict"]
)
def test_no_bytes_break_a_property(
    one_run: Callable[[bytes], None], record_property: Callable[[str, object], None]
) -> None:
    record_property("cases", RUNS)
    generator = random.Random(0)
    for _ in range(RUNS):
        data = generator.randbytes(generator.randrange(4, 160))
        try:
            one_run(data)
        except Exception as error:
            raise AssertionError(f"{one_run.__module__}: {data!r}") from error


class Found(NamedTuple):
    """A batch that had a loss out of range, or a gradient that was not finite."""

    logits: list[Any]  # [N], or [N, C] for several classes
    targets: list[int]
    weights: list[float] | None
    options: dict[str, Any]
    dtype: torch.dtype = torch.float32


HUGE = 3.4e38
FOUND = {
    "weights beyond a float's reciprocal": Found(
        [-4.0, -0.5, 1.0], [1, 0, 1], [1.0, HUGE, 1.0], {"temperature": 1e-6}
    ),
    "a spread times a temperature below all floats": Found(
        [0.75, 1e19, 0.0, 1e19, -3.4e38], [0, 0, 1, 1, 0], None,
        {"temperature": 1e-300, "temperature_unit": "spread"},
    ),
    "a temperature beyond all floats": Found(
        [[1.7e308, 0.0], [-1.7e308, math.inf], [1.0, 0.0], [2.0, 0.0]], [0, 1, 1, 0], None,
        {"temperature": 1e10, "temperature_unit": "spread"}, torch.float64,
    ),
    "huge weights that a draw makes larger": Found(
        [-3.75, 3.125, -3.6, -0.75, 2.9, -1.75], [1, 1, 0, 0, 0, 0], [HUGE] * 6,
        {"max_pool_size": 4, "temperature": 1e6},
    ),
    "weights that are lost beside others": Found(
        [-4.0, -1.5, -1.5, -1.5, -1.5, -3.625, -1.5, -0.875, 2.5], [0, 0, 0, 0, 1, 0, 0, 1, 1],
        [2.5, 1e19, 1.0, 1.0, 1.0, 1.0, 3.875, 1.0, 0.0], {"temperature": 1e-6},
    ),
}  # fmt: skip


@pytest.mark.parametrize("backend", ["auto", "dense", "panel"])
@pytest.mark.parametrize("found", FOUND.values(), ids=FOUND)
def test_in_range_and_finite(found: Found, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SmoothAPLoss, "backend", backend)
    logits = torch.tensor(found.logits, dtype=found.dtype)
    logits = logits.reshape(len(logits), -1).requires_grad_()
    weights = None if found.weights is None else torch.tensor(found.weights)
    loss_fn = SmoothAPLoss(logits.shape[1], **{"queue_size": 0, **found.options})
    loss, _, valid = loss_fn(logits, torch.tensor(found.targets), True, sample_weight=weights)
    loss.backward()
    assert valid.all()
    assert 0 <= loss.item() <= 1 + 1e-6
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
