"""Low precision: float32 from the first subtraction on, under every global setting."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from imbalanced_losses import SmoothAPLoss
from imbalanced_losses._ranking import dense, sigmoid_sums
from imbalanced_losses.functional import Backend, ndcg, smooth_ap
from tests.helpers.cases import random_batch, seeded
from tests.helpers.rows import Batch

LOW = {"float16": torch.float16, "bfloat16": torch.bfloat16}
CONFIGURATIONS = [
    pytest.param({"num_classes": 1}, id="binary"),
    pytest.param({"num_classes": 5}, id="one of five"),
    pytest.param({"num_classes": 3, "multilabel": True}, id="multilabel"),
    pytest.param({"num_classes": 1, "temperature_unit": "spread"}, id="binary-spread"),
    pytest.param(
        {"num_classes": 3, "temperature_unit": "spread", "queue_follows_shift": True},
        id="one of three-spread-following",
    ),
]
QUEUE_SIZE = 64


def _batches(config: dict[str, Any], dtype: torch.dtype) -> list[Batch]:
    """Two weighted batches with logits that the dtype holds exactly."""
    batches = [
        random_batch(
            seeded(seed),
            300,
            config["num_classes"],
            multilabel=config.get("multilabel", False),
            weights="real",
        )
        for seed in range(2)
    ]
    return [batch._replace(logits=batch.logits.to(dtype).double()) for batch in batches]


def _run(loss_fn: SmoothAPLoss, batches: list[Batch], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(loss, gradient) of the last of some steps on logits of a dtype."""
    for logits, targets, weights in batches:
        leaf = logits.to(dtype).requires_grad_()
        loss = loss_fn(leaf, targets, sample_weight=weights)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient


def _ulp(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance from each value to its neighbour in a dtype, as float64."""
    limits = torch.finfo(dtype)
    exponent = values.double().abs().clamp(min=limits.smallest_normal).log2().floor()
    return limits.eps * exponent.exp2()


@pytest.mark.parametrize("temperature", [0.01, 0.3])
@pytest.mark.parametrize("config", CONFIGURATIONS)
@pytest.mark.parametrize("dtype", LOW.values(), ids=LOW)
def test_low_precision_logits(
    dtype: torch.dtype, config: dict[str, Any], temperature: float
) -> None:
    """The loss is float32's on the same logits, bit for bit; the gradient is the exact one within
    2 ulp of the dtype of the logits.
    """
    batches = _batches(config, dtype)
    arguments = {**config, "queue_size": QUEUE_SIZE, "temperature": temperature}
    loss, gradient = _run(SmoothAPLoss(**arguments), batches, dtype)
    single, _ = _run(SmoothAPLoss(**arguments), batches, torch.float32)
    exact, exact_gradient = _run(SmoothAPLoss(**arguments), batches, torch.float64)

    assert loss.dtype == torch.float32
    assert torch.equal(loss, single)
    assert loss.item() == pytest.approx(exact.item(), rel=0, abs=2e-6)
    assert gradient.dtype == dtype
    # Entries in which much cancels are as good as float32's sums over some 400 rows.
    rounding = 1e-6 * exact_gradient.abs().max()
    error = (gradient.double() - exact_gradient).abs()
    assert (error <= 2 * _ulp(exact_gradient, dtype) + rounding).all()


@pytest.mark.parametrize("dtype", [*LOW.values(), torch.float32], ids=[*LOW, "float32"])
def test_counts_beyond_the_dtype(dtype: torch.dtype) -> None:
    """70 000 rows, more than float16 can count to, and ranks that bfloat16 and float16 could not
    tell from their neighbours.
    """
    count, positives = 70_000, 40
    generator = seeded(0)
    scores = torch.randn(count, generator=generator).to(dtype)
    scores[:positives] += 2
    is_positive = torch.arange(count) < positives
    ap, valid = smooth_ap(scores, is_positive, 0.3)
    assert valid
    x = (scores.double() - scores[:positives, None].double()) / 0.3
    above = x.sigmoid()
    exact = ((0.5 + above[:, :positives].sum(1)) / (0.5 + above.sum(1))).mean()
    assert ap.dtype == torch.float32
    assert ap.item() == pytest.approx(exact.item(), rel=1e-5, abs=0)


# Global settings ----------------------------------------------------------------------------------


def _second_order(loss_fn: SmoothAPLoss, logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """(loss, gradient, derivative of the gradient's squared norm)."""
    leaf = logits.clone().requires_grad_()
    loss = loss_fn(leaf, targets)
    (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
    (curvature,) = torch.autograd.grad(gradient.square().sum(), leaf)
    return loss.detach(), gradient.detach(), curvature


def _assert_within_rounding(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Equal, dtypes too, but for the order in which float32 sums some 400 terms."""
    for one, other in zip(got, expected, strict=True):
        atol = 1e-5 * other.abs().max().item()
        torch.testing.assert_close(one, other, rtol=0, atol=atol)


@pytest.mark.parametrize("config", CONFIGURATIONS)
def test_autocast_changes_nothing(config: dict[str, Any]) -> None:
    """Forward, backward and double backward inside of autocast are as good as outside: nothing is
    rounded to the dtype of autocast, which would be seen in the third digit.
    """
    logits, targets, _ = random_batch(
        seeded(0), 300, config["num_classes"], multilabel=config.get("multilabel", False)
    )
    outside = _second_order(SmoothAPLoss(**config, temperature=0.1), logits.float(), targets)
    for dtype in LOW.values():
        with torch.autocast("cpu", dtype=dtype):
            inside = _second_order(SmoothAPLoss(**config, temperature=0.1), logits.float(), targets)
        _assert_within_rounding(inside, outside)


class _Products(TorchDispatchMode):
    """Remembers the matrix products and convolutions of float32 operands."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in {"mm", "bmm", "addmm", "baddbmm", "convolution"} and any(
            isinstance(arg, Tensor) and arg.dtype == torch.float32 for arg in args
        ):
            self.names.add(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("_restored_matmul_precision")
@pytest.mark.parametrize("precision", ["high", "medium"])
@pytest.mark.parametrize("backend", ["dense", "panel"])
@pytest.mark.parametrize("config", CONFIGURATIONS)
def test_matmul_precision_changes_nothing(
    config: dict[str, Any], backend: Backend, precision: str
) -> None:
    """`torch.set_float32_matmul_precision` trades digits for speed in the caller's model, not in
    ranks: value and two derivatives stay at float32's rounding. Whether a CPU makes use of the
    licence depends on its instructions, so none may be given: no float32 product at all.
    """
    logits, targets, _ = random_batch(
        seeded(0), 400, config["num_classes"], multilabel=config.get("multilabel", False)
    )
    loss_fn, coarse = (SmoothAPLoss(**config, temperature=0.3) for _ in range(2))
    loss_fn.backend = coarse.backend = backend
    expected = _second_order(loss_fn, logits.float(), targets)
    torch.set_float32_matmul_precision(precision)
    with _Products() as products:
        got = _second_order(coarse, logits.float(), targets)
    _assert_within_rounding(got, expected)
    assert products.names == set()


@pytest.mark.skipif(
    not hasattr(torch.backends, "fp32_precision"), reason="set by backend from torch 2.9 on"
)
@pytest.mark.usefixtures("_restored_matmul_precision")
@pytest.mark.parametrize("scope", ["all backends", "mkldnn", "cuda"])
def test_precision_set_for_a_backend(scope: str) -> None:
    """The newer way to set it, `torch.backends.….fp32_precision`, changes nothing either, and does
    not make the loss fail (torch refuses to tell the older setting from then on).
    """
    module = {
        "all backends": torch.backends,
        "mkldnn": torch.backends.mkldnn.matmul,
        "cuda": torch.backends.cuda.matmul,
    }[scope]
    if not hasattr(module, "fp32_precision"):
        pytest.skip("this torch has the older setting only")
    logits, targets, _ = random_batch(seeded(0), 400, 1)
    expected = _second_order(SmoothAPLoss(1, temperature=0.3), logits.float(), targets)
    module.fp32_precision = "tf32"
    got = _second_order(SmoothAPLoss(1, temperature=0.3), logits.float(), targets)
    _assert_within_rounding(got, expected)


@pytest.mark.usefixtures("_restored_matmul_precision")
@pytest.mark.parametrize("num_problems", [1, 3])
def test_sigmoid_sums_at_medium_precision(num_problems: int) -> None:
    """The primitive keeps float32's digits in both directions."""
    generator = seeded(0)
    queries, sources = torch.randn(300, generator=generator), torch.randn(num_problems, 400)
    problem = torch.randint(num_problems, (300,), generator=generator)
    weights = torch.rand(num_problems, 400, 2, requires_grad=True)
    cotangent = torch.randn(300, 2, generator=generator)
    outputs, products = [], _Products()
    for precision in ("highest", "medium"):
        torch.set_float32_matmul_precision(precision)
        products.names.clear()
        with products:
            out = sigmoid_sums(queries, problem, sources, weights, 0.3)
            outputs.append((out.detach(), *torch.autograd.grad(out, weights, cotangent)))
    _assert_within_rounding(*outputs)
    assert products.names == set()


@pytest.mark.usefixtures("_restored_matmul_precision")
def test_products_are_trusted_only_where_no_setting_rounds_them() -> None:
    assert dense._float32_products_are_exact()
    torch.set_float32_matmul_precision("high")
    assert not dense._float32_products_are_exact()
    torch.set_float32_matmul_precision("highest")
    if hasattr(torch.backends, "fp32_precision"):
        torch.backends.mkldnn.matmul.fp32_precision = "tf32"
        assert not dense._float32_products_are_exact()  # torch does not tell the older setting


@pytest.mark.parametrize("k", [None, 0.2])
def test_ndcg_of_huge_weights(k: float | None) -> None:
    """Ranks in the caller's weights come near the largest number of float32."""
    scores = torch.randn(30, generator=seeded(0))
    grades = torch.randint(0, 4, (30,), generator=seeded(1))
    weights = 1e37 * (0.5 + torch.rand(30, generator=seeded(2)))
    results = []
    for dtype in (torch.float32, torch.float64):
        leaf = scores.to(dtype).requires_grad_()
        found = ndcg(leaf, grades, 0.3, sample_weight=weights.to(dtype), k=k).metric
        results.append(
            [one.double() for one in (found.detach(), *torch.autograd.grad(found, leaf))]
        )
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(
            got, expected, rtol=1e-5, atol=1e-6 * expected.abs().max().item()
        )
