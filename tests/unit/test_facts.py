"""What a device computes of rows before they are ranked, against the same in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from imbalanced_losses import NDCGLoss, RecallAtKLoss, SmoothAPLoss
from imbalanced_losses._ranking.cuda import facts, launches, rows
from imbalanced_losses._rows.reduce import mean_where
from imbalanced_losses.functional import prior_weights, score_spread, smooth_ap
from tests.helpers.cases import seeded

# The interpreter computes with numpy, which says where an infinity comes up.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered.*:RuntimeWarning")

Function = Callable[..., Tensor]


@pytest.fixture
def both(device: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[list[Tensor]]]:
    """The value of a function and its gradient by its first argument, of the host and a device."""
    launched: list[str] = []
    monkeypatch.setattr(facts, "launch_through", watched(facts.launch_through, launched))
    monkeypatch.setattr(rows, "launch", watched(rows.launch, launched))

    def found(function: Function, *given: Any, on: str) -> list[Tensor]:
        first, *rest = (one.to(on) if isinstance(one, Tensor) else one for one in given)
        leaf = first.detach().clone()
        if leaf.is_floating_point():
            leaf.requires_grad_()
        value = function(leaf, *rest)
        if not value.requires_grad:
            return [value.cpu()]
        weights = torch.linspace(1, 2, value.numel(), dtype=value.dtype, device=on)
        (value.flatten() * weights).sum().backward()
        assert leaf.grad is not None
        return [value.detach().cpu(), leaf.grad.cpu()]

    def on_both(function: Function, *given: Any) -> list[list[Tensor]]:
        got = found(function, *given, on=device)
        assert launched  # else nothing is compared
        with monkeypatch.context() as patched:
            patched.setattr(launches, "DEVICES", ())
            return [got, found(function, *given, on="cpu")]

    return on_both


def watched(launch: Callable[..., None], names: list[str]) -> Callable[..., None]:
    def noted(name: str, *arguments: Any, **options: Any) -> None:
        names.append(name)
        launch(name, *arguments, **options)

    return noted


def assert_same(results: list[list[Tensor]], rtol: float = 1e-6) -> None:
    for got, expected in zip(*results, strict=True):
        rtol = max(rtol, torch.finfo(got.dtype).eps if got.is_floating_point() else 0)
        torch.testing.assert_close(got, expected, rtol=rtol, atol=1e-7, equal_nan=True)


def spread_cases() -> dict[str, tuple[Tensor, Tensor | None]]:
    scores = torch.randn(3, 1500, generator=seeded(0))
    scores[0, :3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    scores[1] = 7.0
    weights = torch.rand(3, 1500, generator=seeded(1)) * (scores < 1)
    far = torch.tensor([[1e300, 1.5e300, -1e300]], dtype=torch.float64)
    return {
        "not finite, or constant": (scores, None),
        "weighted": (scores, weights),
        "of a column": (torch.randn(40, 2, generator=seeded(2)).T, None),
        "half precision": (torch.randn(1, 60, generator=seeded(3)).half(), None),
        "bfloat16": (torch.randn(1, 60, generator=seeded(3)).bfloat16(), None),
        "constants of float64": (torch.full((1, 1501), 0.1, dtype=torch.float64), None),
        "large": (far, None),
        "tiny": (far * 1e-600, None),
        "weights of nothing": (scores[:, 5:9], torch.zeros(3, 4)),
        "weights of almost nothing": (far * 1e-300, torch.full((1, 3), 1e-310).double()),
    }


@pytest.mark.parametrize("name", spread_cases())
def test_the_spread_of_scores(name: str, both: Callable[..., list[list[Tensor]]]) -> None:
    scores, weights = spread_cases()[name]
    assert_same(both(score_spread, scores, weights))


def test_second_derivatives_of_the_spread(device: str) -> None:
    scores = torch.randn(2, 5, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradgradcheck(score_spread, scores)


@pytest.mark.parametrize("prior", [0.01, torch.tensor([0.5, 0.001, 0.2])], ids=["one", "three"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_weights_at_a_prior(
    prior: float | Tensor, dtype: torch.dtype, both: Callable[..., list[list[Tensor]]]
) -> None:
    is_positive = torch.rand(3, 1500, generator=seeded(0)) < 0.3
    is_positive[1] = False  # keeps its weights
    weights = torch.rand(3, 1500, generator=seeded(1), dtype=dtype)
    weights[:, ::7] = 0
    assert_same(both(prior_weights, is_positive, prior, weights))


def test_the_gradient_by_a_temperature(both: Callable[..., list[list[Tensor]]]) -> None:
    """Of scores far from 0, and of a temperature that was raised to the smallest."""
    scores = 0.1 * torch.randn(3, 40, generator=seeded(0), dtype=torch.float64) + 1e4
    is_positive = torch.rand(3, 40, generator=seeded(1)) < 0.3
    tau = torch.tensor([0.1, 0.2, 1e-200], dtype=torch.float64)

    def ap(tau: Tensor, scores: Tensor, is_positive: Tensor) -> Tensor:
        return smooth_ap(scores, is_positive, tau).ap

    assert_same(both(ap, tau, scores, is_positive), rtol=1e-9)


LOSSES = {
    "AP": lambda: SmoothAPLoss(2, 0, 0.3, reduction="none"),
    "a budget": lambda: RecallAtKLoss(2, 3, queue_size=0, temperature=0.3, reduction="none"),
    "graded": lambda: NDCGLoss(2, queue_size=0, multilabel=True, reduction="none"),
    "graded, a budget": lambda: NDCGLoss(2, 3, queue_size=0, multilabel=True, reduction="none"),
}


@pytest.mark.parametrize("is_grouped", [False, True], ids=["one group", "groups"])
@pytest.mark.parametrize("name", LOSSES)
def test_what_positives_are_worth(
    name: str, is_grouped: bool, both: Callable[..., list[list[Tensor]]]
) -> None:
    """Also nothing, and of grades all the same: not valid. Equal gains, the lighter first."""
    targets = torch.randint(0, 4 if "graded" in name else 2, (60, 2), generator=seeded(0))
    value = torch.randint(0, 3, (60, 2), generator=seeded(1)).float()
    group = torch.arange(60) // 15
    value[group == 1] = 0
    value[group == 2], targets[group == 2] = 2, 1
    weights = torch.randint(0, 3, (60, 2), generator=seeded(2)).float()
    weights[weights == 1] = 1e-25 if is_grouped else 0.5
    if "AP" in name or name == "a budget":
        targets, weights, value = targets[:, 0], weights[:, 0], value[:, 0]

    def loss(logits: Tensor, targets: Tensor, *fields: Tensor) -> Tensor:
        names = ("sample_weight", "value", "group")
        found: Tensor = LOSSES[name]()(logits, targets, **dict(zip(names, fields, strict=False)))
        return found

    logits = torch.randn(60, 2, generator=seeded(3))
    fields = (weights, value, group) if is_grouped else (weights, value)
    assert_same(both(loss, logits, targets, *fields), rtol=1e-5)


@pytest.mark.parametrize(
    ("backend", "is_grouped"), [("dense", False), ("panel", False), ("dense", True)]
)
def test_rows_left_out_have_no_gradient_beside_nan(
    backend: Any, is_grouped: bool, device: str
) -> None:
    logits = torch.randn(12, 1, generator=seeded(0)).to(device)
    logits[5] = float("nan")
    leaf, targets = logits.requires_grad_(), torch.arange(12, device=device) % 2
    targets[:2] = -100
    loss_fn = SmoothAPLoss(1, 0, 0.3, temperature_unit="spread")
    loss_fn.backend = backend
    loss_fn(leaf, targets, group=torch.zeros_like(targets) if is_grouped else None).backward()
    assert leaf.grad is not None
    assert leaf.grad[:2].eq(0).all()
    assert leaf.grad[2:].isnan().any()


@pytest.mark.parametrize("is_mean", [True, False], ids=["mean", "sum"])
def test_the_mean_of_what_counts(is_mean: bool, both: Callable[..., list[list[Tensor]]]) -> None:
    """Of many, of one, and of none; what stands elsewhere does not matter."""
    counts = torch.rand(3, 1500, generator=seeded(0)) < 0.3
    counts[1], counts[2, 1:] = False, False
    values = torch.where(counts, torch.randn(3, 1500, generator=seeded(1)), torch.nan)

    def mean(values: Tensor, counts: Tensor) -> Tensor:
        found, is_any = mean_where(values, counts, is_mean)
        assert is_any.equal(counts.any(1))
        return found

    assert_same(both(mean, values, counts))


def test_derivatives_of_the_mean(device: str) -> None:
    counts = torch.tensor([[True, False, True], [False, False, False]], device=device)
    values = torch.rand(2, 3, dtype=torch.float64, device=device, requires_grad=True)
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda own: mean_where(own**2, counts)[0], values)


def test_a_gradient_by_weights_is_not_lost(device: str) -> None:
    weights = torch.rand(8, device=device, requires_grad=True)
    assert prior_weights(torch.arange(8, device=device) < 3, 0.1, weights).requires_grad
    assert score_spread(torch.arange(8.0, device=device), weights).requires_grad


def test_many_rows(
    monkeypatch: pytest.MonkeyPatch, both: Callable[..., list[list[Tensor]]]
) -> None:
    """Those of values that no program goes through."""
    value, is_positive = torch.rand(2, 70, generator=seeded(0)), torch.arange(70) % 3 == 0
    value[1] = 0

    def ap(scores: Tensor, is_positive: Tensor, value: Tensor) -> Tensor:
        spread = score_spread(scores).detach()
        with monkeypatch.context() as patched:
            patched.setattr(facts, "_MOST_ROWS", 50)
            return smooth_ap(scores, is_positive, 0.1 * spread, value=value).ap

    assert_same(both(ap, torch.randn(2, 70, generator=seeded(1)), is_positive.expand(2, -1), value))


def test_no_spread_of_constants() -> None:
    """However they round, and however many they are."""
    for size in (3, 1501, 100_003):
        scores = torch.rand(20, 1, dtype=torch.float64, generator=seeded(size)).expand(-1, size)
        assert score_spread(scores).eq(1).all()
