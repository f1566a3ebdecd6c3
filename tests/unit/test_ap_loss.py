"""`SmoothAPLoss`: the maths of the whole loss, against the oracle with its deque."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from imbalanced_losses import SmoothAPLoss
from imbalanced_losses._checks.typing import TemperatureUnit
from imbalanced_losses.functional import Backend, smooth_ap
from tests.helpers.cases import random_batch, seeded
from tests.helpers.oracle import OracleLoss, Result
from tests.helpers.rows import IGNORED, Batch

REDUCTIONS = ("mean", "sum", "none")
TEMPERATURES = (0.01, 0.1, 0.5, 3.0)


def _configurations() -> list[Any]:
    """Every combination of what changes the formula, and of weights in turn."""
    combinations = [
        (*choices, ("none", "real", "counts")[number % 3])
        for number, choices in enumerate(
            itertools.product((1, 2, 5), (False, True), ("score", "spread"), (False, True))
        )
    ]
    return [
        pytest.param(
            {
                "num_classes": num_classes,
                "multilabel": multilabel,
                "temperature_unit": unit,
                "queue_follows_shift": follows,
            },
            weights,
            id=f"C={num_classes}-{'multilabel' if multilabel else 'one label'}-{unit}-"
            f"{'following queue' if follows else 'still queue'}-{weights} weights",
        )
        for num_classes, multilabel, unit, follows, weights in combinations
    ]


def _batches(seed: int, config: dict[str, Any], weights: str) -> list[Batch]:
    """Successive ragged batches: a large one, a single row, then two that wrap the ring."""
    generator = seeded(seed)
    return [
        random_batch(
            generator,
            num_rows,
            config["num_classes"],
            multilabel=config["multilabel"],
            weights=weights,
            ties=seed % 2 == 1,
        )
        for num_rows in (15, 1, 11, 12)
    ]


def _scalar(loss: Tensor) -> Tensor:
    """What is differentiated: for reduction "none" the sum over the valid classes."""
    return loss.nansum() if loss.dim() else loss


def _assert_same(
    loss: Tensor, gradient: Tensor, expected: Result, tau: float, atol: float, rtol: float
) -> None:
    """atol is for the loss. The error of a gradient is measured against its largest entry; where
    all of it cancels, against the rounding of its terms, which are up to 1 / 4τ a pair.
    """
    assert loss.tolist() == pytest.approx(expected.loss, rel=0, abs=atol, nan_ok=True)
    largest = np.abs(expected.gradient).max(initial=0)
    rounding = 8 * torch.finfo(gradient.dtype).eps / tau
    np.testing.assert_allclose(gradient, expected.gradient, rtol=0, atol=rtol * largest + rounding)


# The oracle ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["dense", "panel"])
@pytest.mark.parametrize(("config", "weights"), _configurations())
def test_float64_is_the_oracle(
    config: dict[str, Any],
    weights: str,
    backend: Backend,
    record_property: Callable[[str, object], None],
) -> None:
    """Four batches through the queue: loss, per-class losses, validity and gradient, over all
    reductions, queue sizes and temperatures.
    """
    record_property("cases", 3)
    for seed in range(3) if backend == "dense" else range(3, 6):
        arguments = {
            **config,
            "queue_size": (0, 7, 20)[seed % 3],
            "temperature": TEMPERATURES[seed % 4],
            "reduction": REDUCTIONS[(seed + len(weights)) % 3],
        }
        loss_fn, oracle = SmoothAPLoss(**arguments), OracleLoss(**arguments)
        loss_fn.backend = backend
        for logits, targets, sample_weight in _batches(seed, config, weights):
            logits.requires_grad_()
            loss, per_class, valid = loss_fn(logits, targets, True, sample_weight=sample_weight)
            (gradient,) = torch.autograd.grad(_scalar(loss), logits)
            expected = oracle.step(logits.detach(), targets, sample_weight)
            tau = loss_fn.temperature
            _assert_same(loss, gradient, expected, tau, atol=1e-12, rtol=1e-10)
            assert valid.tolist() == expected.valid
            assert per_class.tolist() == pytest.approx(
                expected.per_class, rel=0, abs=1e-12, nan_ok=True
            )


@pytest.mark.parametrize("multilabel", [False, True], ids=["one label", "multilabel"])
def test_following_queue_keeps_the_value(multilabel: bool) -> None:
    """`queue_follows_shift` changes gradients, never losses; with it they sum to zero, without it
    they do not.
    """
    config = {"num_classes": 2, "queue_size": 20, "temperature": 0.5, "multilabel": multilabel}
    still, following = (SmoothAPLoss(**config, queue_follows_shift=f) for f in (False, True))
    for batch in _batches(0, config, "real"):
        sums = []
        for loss_fn in (still, following):
            leaf = batch.logits.clone().requires_grad_()
            loss = batch._replace(logits=leaf).through(loss_fn)
            (gradient,) = torch.autograd.grad(loss, leaf)
            sums.append((loss.item(), *gradient.sum(0).abs().tolist()))
    (value, *drift), (same_value, *no_drift) = sums
    assert same_value == value
    assert max(no_drift) < 1e-13
    assert min(drift) > 1e-3


# Known answers and the functional form ------------------------------------------------------------


def test_compute_smooth_ap() -> None:
    """`_compute_smooth_ap` is smooth_ap, for one problem or several, on the class or on a loss."""
    scores, is_pos = torch.randn(3, 20), torch.rand(3, 20) < 0.4
    weights = torch.rand(3, 20)
    for owner in (SmoothAPLoss, SmoothAPLoss(num_classes=3)):
        several = owner._compute_smooth_ap(scores, is_pos, 0.3, weights)
        expected = smooth_ap(scores, is_pos, 0.3, sample_weight=weights)
        assert torch.equal(several.ap, expected.ap)
        assert torch.equal(several.valid, expected.valid)
        one = owner._compute_smooth_ap(scores[0], is_pos=is_pos[0], tau=0.3)
        assert torch.equal(one.ap, smooth_ap(scores[0], is_pos[0], 0.3).ap)


def test_binary_is_one_of_two_classes() -> None:
    """One column with labels {0, 1} is class 1 of a two-class loss; [N, 1] targets are the same."""
    logits, targets, _ = random_batch(seeded(2), 30, 1)
    binary = SmoothAPLoss(num_classes=1, queue_size=0, temperature=0.1)
    two = SmoothAPLoss(num_classes=2, queue_size=0, temperature=0.1)
    _, per_class, _ = two(torch.cat((-logits, logits), 1), targets, True)
    assert binary(logits, targets).item() == pytest.approx(per_class[1].item(), rel=0, abs=1e-15)
    assert binary(logits, targets[:, None]) == binary(logits, targets)


def test_temperature_can_change_between_steps() -> None:
    """A new temperature counts from the next forward pass on."""
    logits, targets, _ = random_batch(seeded(1), 30, 1)
    loss_fn = SmoothAPLoss(num_classes=1, queue_size=0, temperature=0.01)
    for tau in (0.01, 2.0, 0.3):
        loss_fn.temperature = tau
        expected = OracleLoss(1, temperature=tau).step(logits, targets).loss
        assert loss_fn(logits, targets).item() == pytest.approx(expected, rel=0, abs=1e-12)


# Derivatives --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_classes", "multilabel", "weighted", "follows", "unit"),
    [
        (1, False, False, False, "score"),
        (3, False, True, False, "spread"),
        (3, True, False, False, "score"),
        (1, False, True, True, "spread"),
        (3, True, True, True, "score"),
    ],
)
def test_gradcheck(
    num_classes: int, multilabel: bool, weighted: bool, follows: bool, unit: TemperatureUnit
) -> None:
    """First and second derivatives in eval mode with a filled queue, against finite differences
    and batched over cotangents.

    Finite differences do not see how a queue follows the batch, since its values stay. There the
    derivatives must be those of a loss whose old rows are live and really move.
    """
    config = {
        "num_classes": num_classes,
        "temperature": 0.7,
        "multilabel": multilabel,
        "temperature_unit": unit,
    }
    weights = "real" if weighted else "none"
    stored, live = (
        random_batch(seeded(seed), 6, num_classes, multilabel=multilabel, weights=weights)
        for seed in (0, 2)
    )
    queued = SmoothAPLoss(**config, queue_size=6, queue_follows_shift=follows)
    stored.through(queued)
    queued.eval()

    def loss(logits: Tensor) -> Tensor:
        return live._replace(logits=logits).through(queued)

    ignored = (live.targets == IGNORED).view(6, -1)  # [N, 1] or [N, C]
    start = live.logits.clone()

    def moving_loss(logits: Tensor) -> Tensor:
        moved = torch.where(ignored, 0, logits - start).sum(0) / (~ignored).sum(0)
        rows = torch.cat((logits, stored.logits + moved))
        targets = torch.cat((live.targets, stored.targets))
        row_weights = None
        if weighted:
            row_weights = torch.cat((live.weights, stored.weights))
        return Batch(rows, targets, row_weights).through(SmoothAPLoss(**config, queue_size=0))

    leaf = live.logits.requires_grad_()
    function = moving_loss if follows else loss
    (gradient,) = torch.autograd.grad(function(leaf), leaf)
    assert gradient.abs().max() > 0.01  # else the checks compare zeros
    assert torch.autograd.gradcheck(function, leaf, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, leaf, check_batched_grad=True)
    if follows:
        (got,) = torch.autograd.grad(loss(leaf), leaf)
        torch.testing.assert_close(got, gradient, rtol=1e-10, atol=1e-13)
        hessian, expected = (torch.autograd.functional.hessian(f, leaf) for f in (loss, function))
        torch.testing.assert_close(hessian, expected, rtol=1e-10, atol=1e-13)
