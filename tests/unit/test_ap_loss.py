"""`SmoothAPLoss`: the maths of the whole loss, against the oracle with its deque."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from imbalanced_losses import SmoothAPLoss
from imbalanced_losses._checks.typing import TemperatureUnit
from imbalanced_losses._rows.gather import _as_number
from imbalanced_losses._schedule import _spread_of
from imbalanced_losses.functional import Backend, score_spread, smooth_ap
from tests.helpers.cases import IGNORED, Batch, Case, cases, random_batch, seeded
from tests.helpers.oracle import OracleLoss, Result

REDUCTIONS = ("mean", "sum", "none")
TEMPERATURES = (0.01, 0.1, 0.5, 3.0)


def _configurations() -> list[Any]:
    """Every combination of what changes the formula."""
    combinations = itertools.product(
        (1, 2, 5), (False, True), ("score", "spread"), (False, True), ("none", "real", "counts")
    )
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
    """Four batches through the queue: loss, per-class losses, validity and gradient, 72 × 6 runs
    over all reductions, queue sizes and temperatures.
    """
    record_property("cases", 6)
    for seed in range(6):
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


@pytest.mark.parametrize("backend", ["dense", "panel"])
@pytest.mark.parametrize(("config", "weights"), _configurations())
def test_float32_is_near_the_oracle(
    config: dict[str, Any],
    weights: str,
    backend: Backend,
    record_property: Callable[[str, object], None],
) -> None:
    """The same in float32, on inputs that float32 holds exactly: rounding of a number in [0, 1]."""
    record_property("cases", 2)
    for seed in range(2):
        arguments = {
            **config,
            "queue_size": 20,
            "temperature": (0.01, 0.5)[seed],
            "reduction": "none",
        }
        loss_fn, oracle = SmoothAPLoss(**arguments), OracleLoss(**arguments)
        loss_fn.backend = backend
        for logits, targets, sample_weight in _batches(seed, config, weights):
            leaf = logits.float().requires_grad_()
            loss = loss_fn(leaf, targets, sample_weight=sample_weight)
            (gradient,) = torch.autograd.grad(_scalar(loss), leaf)
            expected = oracle.step(logits, targets, sample_weight)
            assert loss.dtype == gradient.dtype == torch.float32
            tau = loss_fn.temperature
            _assert_same(loss, gradient, expected, tau, atol=1e-6, rtol=1e-5)


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
            loss = loss_fn(leaf, batch.targets, sample_weight=batch.sample_weight)
            (gradient,) = torch.autograd.grad(loss, leaf)
            sums.append((loss.item(), *gradient.sum(0).abs().tolist()))
    (value, *drift), (same_value, *no_drift) = sums
    assert same_value == value
    assert max(no_drift) < 1e-13
    assert min(drift) > 1e-3


# Known answers and the functional form ------------------------------------------------------------


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in cases()])
def test_known_answer(case: Case) -> None:
    """The loss is one minus an AP known by hand, and exactly 0 where AP is not defined."""
    loss_fn = SmoothAPLoss(num_classes=1, queue_size=0, temperature=case.temperature)
    logits = case.scores[:, None].clone().requires_grad_()
    loss = loss_fn(logits, case.is_positive)
    loss.backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    expected = 0 if math.isnan(case.ap) else 1 - case.ap
    assert loss.item() == pytest.approx(expected, rel=0, abs=1e-15)


def test_is_the_functional_form() -> None:
    """Without a queue, the loss of class c is 1 − smooth_ap of column c, bit for bit."""
    logits, targets, weights = random_batch(seeded(0), 40, 4, weights="real")
    loss_fn = SmoothAPLoss(num_classes=4, queue_size=0, temperature=0.2)
    _, per_class, valid = loss_fn(logits, targets, True, sample_weight=weights)
    kept = targets != IGNORED
    assert valid.all()
    for c in range(4):
        ap, _ = smooth_ap(logits[kept, c], targets[kept] == c, 0.2, sample_weight=weights[kept])
        assert per_class[c].item() == pytest.approx(1 - ap.item(), rel=0, abs=1e-15)


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


def test_backend_reaches_the_ranks() -> None:
    """The class attribute `backend` is what ranks: a name that does not exist is refused."""
    loss_fn = SmoothAPLoss(num_classes=1)
    loss_fn.backend = "nothing"  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"backend must be one of .*'dense'.*got 'nothing'"):
        loss_fn(torch.zeros(2, 1), torch.tensor([0, 1]))


def test_pairs_of_all_rows_take_all_rows() -> None:
    loss_fn = SmoothAPLoss(num_classes=1, queue_size=0, gather="sums")
    loss_fn.backend = "dense"
    with pytest.raises(ValueError, match="backend") as caught:
        loss_fn(torch.zeros(2, 1), torch.tensor([0, 1]))
    assert str(caught.value) == (
        'backend must be "auto" or "panel" with gather="sums": a process that lacks the rows of '
        'the others has no pairs to sum over; got "dense"'
    )


def test_binary_is_one_of_two_classes() -> None:
    """One column with labels {0, 1} is class 1 of a two-class loss; [N, 1] targets are the same."""
    logits, targets, _ = random_batch(seeded(2), 30, 1)
    binary = SmoothAPLoss(num_classes=1, queue_size=0, temperature=0.1)
    two = SmoothAPLoss(num_classes=2, queue_size=0, temperature=0.1)
    _, per_class, _ = two(torch.cat((-logits, logits), 1), targets, True)
    assert binary(logits, targets).item() == pytest.approx(per_class[1].item(), rel=0, abs=1e-15)
    assert binary(logits, targets[:, None]) == binary(logits, targets)


def test_reductions_agree() -> None:
    """mean = sum / number of valid classes, none = per-class losses with NaN at invalid ones."""
    logits, targets, _ = random_batch(seeded(1), 30, 4)
    targets[targets == 2] = 0  # class 2 has no positive
    outputs = {}
    for reduction in REDUCTIONS:
        loss_fn = SmoothAPLoss(num_classes=4, queue_size=0, temperature=0.1, reduction=reduction)
        outputs[reduction], per_class, valid = loss_fn(logits, targets, True)
        assert torch.equal(outputs[reduction].nansum(), loss_fn(logits, targets).nansum())
    assert valid.tolist() == [True, True, False, True]
    assert per_class.isnan().tolist() == [False, False, True, False]
    torch.testing.assert_close(outputs["none"], per_class, equal_nan=True, rtol=0, atol=0)
    torch.testing.assert_close(outputs["sum"], per_class.nansum())
    torch.testing.assert_close(outputs["mean"], per_class.nansum() / 3)


def test_temperature_can_change_between_steps() -> None:
    """A new temperature counts from the next forward pass on."""
    logits, targets, _ = random_batch(seeded(1), 30, 1)
    loss_fn = SmoothAPLoss(num_classes=1, queue_size=0, temperature=0.01)
    for tau in (0.01, 2.0, 0.3):
        loss_fn.temperature = tau
        expected = OracleLoss(1, temperature=tau).step(logits, targets).loss
        assert loss_fn(logits, targets).item() == pytest.approx(expected, rel=0, abs=1e-12)


# Derivatives --------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["score", "spread"])
@pytest.mark.parametrize("follows", [False, True], ids=["still queue", "following queue"])
@pytest.mark.parametrize("weighted", [False, True], ids=["unweighted", "weighted"])
@pytest.mark.parametrize("multilabel", [False, True], ids=["one label", "multilabel"])
@pytest.mark.parametrize("num_classes", [1, 3])
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
    queued(stored.logits, stored.targets, sample_weight=stored.sample_weight)
    queued.eval()

    def loss(logits: Tensor) -> Tensor:
        out: Tensor = queued(logits, live.targets, sample_weight=live.sample_weight)
        return out

    ignored = (live.targets == IGNORED).view(6, -1)  # [N, 1] or [N, C]
    start = live.logits.clone()

    def moving_loss(logits: Tensor) -> Tensor:
        moved = torch.where(ignored, 0, logits - start).sum(0) / (~ignored).sum(0)
        rows = torch.cat((logits, stored.logits + moved))
        targets = torch.cat((live.targets, stored.targets))
        row_weights = None
        if live.sample_weight is not None and stored.sample_weight is not None:
            row_weights = torch.cat((live.sample_weight, stored.sample_weight))
        out: Tensor = SmoothAPLoss(**config, queue_size=0)(rows, targets, sample_weight=row_weights)
        return out

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


@pytest.mark.filterwarnings("ignore:.torch.jit.script")  # torch's own import
def test_forward_mode_is_refused() -> None:
    """Forward-mode differentiation raises rather than being silently wrong."""
    logits, targets, _ = random_batch(seeded(0), 9, 1)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(logits, logits)
        with pytest.raises(RuntimeError, match=r"forward mode|jvp"):
            SmoothAPLoss(num_classes=1)(dual, targets)


# --- What every ranking loss has -----------------------------------------------------------------


def test_repr_names_what_is_not_usual() -> None:
    assert SmoothAPLoss(2).extra_repr() == "num_classes=2"
    options: dict[str, Any] = {
        "ignore_index": -1,
        "update_queue_in_eval": True,
        "gather_distributed": False,
        "max_pool_size": 9,
        "temperature_unit": "spread",
        "queue_follows_shift": True,
        "grad_reduce": "sum",
        "target_prior": (0.1, 0.2),
    }
    words = ["num_classes=2", *(f"{name}={value!r}" for name, value in options.items())]
    assert SmoothAPLoss(2, **options).extra_repr() == ", ".join(words)
    assert SmoothAPLoss(2, gather="sums").extra_repr() == "num_classes=2, gather='sums'"


def test_the_spread_of_a_batch_is_that_of_its_weighted_rows() -> None:
    logits, targets = torch.randn(30, 2, dtype=torch.float64), torch.arange(30).remainder(2)
    weights = torch.arange(30.0, dtype=torch.float64).remainder(7)
    found = _spread_of(SmoothAPLoss(2), logits, targets, sample_weight=weights)
    expected = score_spread(logits.T, sample_weight=weights).mean().item()
    assert found == pytest.approx(expected, rel=1e-12)
    assert found != pytest.approx(score_spread(logits.T).mean().item(), rel=1e-3)


def test_priors_are_told_apart_by_a_number() -> None:
    priors = (None, (0.1,), (0.2,), (0.1, 0.2), (0.2, 0.1), (0.1, 0.2, 0.3))
    numbers = [_as_number(prior) for prior in priors]
    assert numbers[:3] == [0.0, 0.1, 0.2]
    assert len(set(numbers)) == len(priors)


@pytest.mark.parametrize(
    ("options", "expected"),
    [({"queue_size": 0}, False), ({"queue_size": 1}, True), ({"max_pool_size": 9}, True)],
)
def test_what_a_forward_pass_depends_on(options: dict[str, int], expected: bool) -> None:
    assert SmoothAPLoss(1, **{"queue_size": 0, **options})._depends_on_state() is expected
