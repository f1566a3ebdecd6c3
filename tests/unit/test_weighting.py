"""`target_prior`: AP at the prevalence of deployment, from rows with more positives."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from imbalanced_losses import SmoothAPLoss
from imbalanced_losses.functional import prior_weights, smooth_ap
from tests.helpers.cases import seeded
from tests.helpers.rows import IGNORED, make_batch

PRIORS = (0.01, 0.3, 0.9)


def share_of(is_positive: Tensor, weights: Tensor) -> Tensor:
    return (weights * is_positive).sum(-1) / weights.sum(-1)


@pytest.mark.parametrize("prior", [1e-6, 0.009, 0.5, 0.99])
@pytest.mark.parametrize("is_weighted", [False, True])
def test_positives_get_their_share(prior: float, is_weighted: bool) -> None:
    is_positive = torch.rand(3, 40, generator=seeded(0)) < 0.4
    weights = torch.rand(40, generator=seeded(1), dtype=torch.float64) if is_weighted else None
    found = prior_weights(is_positive, prior, weights)
    assert found.shape == (3, 40)
    assert found.dtype == (torch.float64 if is_weighted else torch.float32)
    rel = 1e-12 if is_weighted else 1e-5
    assert share_of(is_positive, found).tolist() == pytest.approx([prior] * 3, rel=rel)
    # Within a side nothing changes, and one side keeps what it had.
    ratio = found if weights is None else found / weights
    for own, labels in zip(ratio, is_positive, strict=True):
        sides = [own[labels], own[~labels]]
        assert all(side.max() - side.min() < 1e-6 * side.max() for side in sides)
        assert max(side.max() for side in sides) == pytest.approx(1, rel=1e-12)


def test_weights_at_the_ends_of_the_range() -> None:
    is_positive = torch.tensor([True, False, False])
    for size in (1e-30, 1e38):
        found = prior_weights(is_positive, 0.01, torch.tensor([size, size, 0.0]))
        assert found[2] == 0
        assert share_of(is_positive, found.double()).item() == pytest.approx(0.01, rel=1e-5)


def make_scores(num_rows: int, share: float) -> tuple[Tensor, Tensor]:
    is_positive = torch.rand(num_rows, generator=seeded(3)) < share
    noise = torch.randn(num_rows, generator=seeded(4), dtype=torch.float64)
    return noise + 1.5 * is_positive, is_positive


def test_a_sample_with_fewer_negatives_tells_ap_at_the_true_prevalence() -> None:
    scores, is_positive = make_scores(200_000, 0.009)
    true_ap = smooth_ap(scores, is_positive, 0.01).ap
    negatives = (~is_positive).nonzero().squeeze(1)[: 10 * int(is_positive.sum())]
    kept = torch.cat((is_positive.nonzero().squeeze(1), negatives))
    of_sample = smooth_ap(scores[kept], is_positive[kept], 0.01).ap
    loss_fn = SmoothAPLoss(1, 0, 0.01, target_prior=0.009)
    at_prior = 1 - loss_fn(scores[kept, None], is_positive[kept])
    assert of_sample > 2 * true_ap
    assert at_prior.item() == pytest.approx(true_ap.item(), rel=0.1)


@pytest.mark.parametrize("unit", ["score", "spread"])
@pytest.mark.parametrize("options", [{}, {"queue_size": 30}])
@pytest.mark.parametrize("kind", ["binary", "classes", "multilabel"])
def test_loss_is_that_of_weighted_problems(unit: str, options: dict[str, Any], kind: str) -> None:
    """By hand: every class of the pool through the functional form, with weights of its own."""
    num_classes = 1 if kind == "binary" else 3
    multilabel = kind == "multilabel"
    options = {"queue_size": 0, "temperature": 0.2, "temperature_unit": unit, **options}
    loss_fn = SmoothAPLoss(
        num_classes, multilabel=multilabel, target_prior=PRIORS[:num_classes], **options
    )
    earlier = make_batch(20, num_classes, seed=5, multilabel=multilabel, dtype=torch.float64)
    live = make_batch(25, num_classes, seed=6, multilabel=multilabel, dtype=torch.float64).leaf()
    row_weights = torch.rand(25, generator=seeded(7), dtype=torch.float64)
    live.targets[3] = IGNORED
    earlier.through(loss_fn)
    loss, per_class, _ = loss_fn(live.logits, live.targets, True, sample_weight=row_weights)
    (gradient,) = torch.autograd.grad(loss, live.logits)

    logits, targets, weights = live.logits, live.targets, row_weights
    if options["queue_size"]:
        logits = torch.cat((logits, earlier.logits))
        targets = torch.cat((targets, earlier.targets))
        weights = torch.cat((weights, torch.ones(20, dtype=torch.float64)))
    expected = []
    for c, prior in enumerate(PRIORS[:num_classes]):
        labels = targets[:, c] if multilabel else targets
        kept = labels != IGNORED
        is_positive = labels[kept] == (1 if multilabel or num_classes == 1 else c)
        own = prior_weights(is_positive, prior, weights[kept])
        scores = logits[kept, c]
        tau: Any = 0.2
        if unit == "spread":
            mean = (own * scores).sum() / own.sum()
            tau = 0.2 * ((own * (scores - mean) ** 2).sum() / own.sum()).sqrt()
        expected.append(1 - smooth_ap(scores, is_positive, tau, sample_weight=own).ap)
    by_hand = torch.stack(expected)
    torch.testing.assert_close(per_class, by_hand, rtol=1e-12, atol=1e-14)
    (gradient_by_hand,) = torch.autograd.grad(by_hand.mean(), live.logits)
    torch.testing.assert_close(gradient, gradient_by_hand, rtol=1e-9, atol=1e-14)
    without = SmoothAPLoss(num_classes, multilabel=multilabel, **options)
    earlier.through(without)
    assert without(live.logits, live.targets, sample_weight=row_weights) != loss


@pytest.mark.parametrize(("num_classes", "prior", "error"), [
    (1, 0.0, ValueError), (1, 1.0, ValueError), (1, -0.1, ValueError), (1, math.nan, ValueError),
    (1, "rare", TypeError), (1, True, TypeError), (1, [0.1, 0.2], ValueError), (2, 0.1, TypeError),
    (3, 0.1, TypeError), (3, [0.1, 0.2], ValueError), (3, [0.1, 0.2, 2.0], ValueError),
])  # fmt: skip
def test_bad_priors(num_classes: int, prior: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"^target_prior must .*got "):
        SmoothAPLoss(num_classes, target_prior=prior)


IS_POSITIVE = torch.tensor([True, False])


@pytest.mark.parametrize(("arguments", "error", "name", "got"), [
    ((IS_POSITIVE.long(), 0.1), TypeError, "is_positive", "torch.int64; use targets == 1"),
    (([True, False], 0.1), TypeError, "is_positive", "list"),
    ((IS_POSITIVE[None, None], 0.1), ValueError, "is_positive", "[1, 1, 2]"),
    ((IS_POSITIVE, 1.5), ValueError, "target_prior", "1.5"),
    ((IS_POSITIVE, torch.tensor([0.1, 0.2])), ValueError, "target_prior", "[2]"),
    ((IS_POSITIVE[None], torch.ones(1, device="meta")), ValueError, "target_prior", "meta"),
    ((IS_POSITIVE, 0.1, IS_POSITIVE), TypeError, "sample_weight", "torch.bool"),
    ((IS_POSITIVE, 0.1, [1.0, 1.0]), TypeError, "sample_weight", "list"),
    ((IS_POSITIVE, 0.1, torch.ones(3)), ValueError, "sample_weight", "[3]"),
    ((IS_POSITIVE, 0.1, torch.tensor(1.0)), ValueError, "sample_weight", "[]"),
    ((IS_POSITIVE[None], 0.1, torch.ones(3)), ValueError, "sample_weight", "[3]"),
])  # fmt: skip
def test_bad_arguments(arguments: Any, error: type[Exception], name: str, got: str) -> None:
    with pytest.raises(error, match=rf"^{name} must .*got {re.escape(got)}"):
        prior_weights(*arguments)
