"""The kernels for CUDA devices: against the definition, in Triton's interpreter or on a device."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from imbalanced_losses import (
    CrossEntropy,
    NDCGLoss,
    PartialAUCLoss,
    RecallAtFPRLoss,
    RecallAtKLoss,
    SmoothAPLoss,
)
from imbalanced_losses._loss import RankingLoss
from imbalanced_losses._ranking.cuda import launches
from imbalanced_losses.functional import smooth_ap
from tests.helpers import far_device, oracle
from tests.helpers.answers import Answer, solved
from tests.helpers.cases import seeded
from tests.helpers.rows import IGNORED, state_of

pytest.importorskip("triton", minversion="3.2")

# The interpreter computes with numpy, which says where an infinity comes up.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered.*:RuntimeWarning")

HAS_DEVICE = torch.cuda.is_available()
BACKENDS = ("dense", "panel")


def pool(
    shape: tuple[int, int], seed: int = 0, *, share: float = 0.2, weighted: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Scores float64, positives, weights of which a fifth are zero."""
    generator = seeded(seed)
    scores = torch.randn(shape, generator=generator, dtype=torch.float64).float().double()
    is_positive = torch.rand(shape, generator=generator) < share
    weights = torch.rand(shape, generator=generator, dtype=torch.float64)
    weights *= torch.rand(shape, generator=generator) < 0.8
    return scores, is_positive, weights if weighted else None


def defined(
    scores: Tensor, is_positive: Tensor, tau: float | Tensor, weights: Tensor | None
) -> Answer:
    """In float64 on the host, from all pairs."""
    leaf = scores.detach().double().cpu().requires_grad_()
    tau = torch.as_tensor(tau, dtype=torch.float64).cpu().expand(len(scores))
    omega = torch.ones_like(leaf).detach() if weights is None else weights.double().cpu()
    ap = oracle.smooth_ap_by_pairs(leaf, is_positive.cpu(), tau, omega)
    (gradient,) = torch.autograd.grad(ap.sum(), leaf)
    return Answer(ap.detach().nan_to_num(), ~ap.isnan(), gradient)


def ranked(*arguments: Any, backend: str) -> Answer:
    """The same by the library."""
    return Answer(*(part.cpu() for part in solved(*arguments, backend=backend)))


def assert_as_defined(
    device: str,
    dtype: torch.dtype,
    case: tuple[Tensor, Tensor, Tensor | None],
    tau: float | Tensor,
    backend: str,
) -> None:
    scores, is_positive, weights = case
    ap, valid, gradient = ranked(
        scores.to(device, dtype),
        is_positive.to(device),
        tau.to(device, dtype) if isinstance(tau, Tensor) else tau,
        None if weights is None else weights.to(device, dtype),
        backend=backend,
    )
    weights = None if weights is None else weights.to(dtype)
    expected = defined(scores.to(dtype), is_positive, tau, weights)
    assert torch.equal(valid, expected.valid)
    tight = dtype == torch.float64
    torch.testing.assert_close(ap.double(), expected.ap, rtol=0, atol=1e-12 if tight else 2e-7)
    largest = float(expected.gradient.abs().max())
    atol = (1e-11 if tight else 3e-6) * max(largest, 0.01)
    torch.testing.assert_close(gradient.double(), expected.gradient, rtol=0, atol=atol)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize(
    ("shape", "weighted"),
    [((1, 2), False), ((1, 2), True), ((3, 77), False), ((3, 77), True), ((1, 600), True)],
    ids=str,
)
def test_as_defined(
    device: str, backend: str, dtype: torch.dtype, weighted: bool, shape: tuple[int, int]
) -> None:
    """The largest: chunks of sources, and panels so crowded that several programs share one."""
    case = pool(shape, weighted=weighted)
    if shape[1] > 512:
        case[0].mul_(0.2)
    case[1][0, 0], case[1][0, 1] = True, False
    case[0][0, 0] = case[0][0, 1] - 0.1
    if case[2] is not None:
        case[2][0, :2] = 1.0
    assert_as_defined(device, dtype, case, 0.1, backend)


SPECIAL: dict[str, Callable[[Tensor], Tensor]] = {
    "tied": torch.zeros_like,
    "crowded": lambda s: torch.where(s < 1, 0.001 * s, s),
    "outlier": lambda s: s.index_fill(1, torch.tensor([5], device="cpu"), 1e9),
    "scattered": lambda s: 1e3 * s,
    "offset": lambda s: s + 4096,
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SPECIAL)
def test_scores_of_every_range(device: str, backend: str, name: str) -> None:
    scores, is_positive, weights = pool((1, 90), weighted=True)
    scores = SPECIAL[name](scores)
    assert_as_defined(device, torch.float32, (scores, is_positive, weights), 0.02, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_infinities_have_no_gradient_and_nan_stays_in_its_class(device: str, backend: str) -> None:
    scores, is_positive, _ = pool((2, 60))
    is_positive[:, :2] = torch.tensor([True, False])
    scores[0, 0], scores[0, 1] = float("inf"), float("-inf")
    far = scores.clone()
    far[0, 0], far[0, 1] = 1e4, -1e4
    expected = defined(far, is_positive, 0.1, None)
    scores[1, 7] = float("nan")
    ap, _, gradient = ranked(scores.to(device), is_positive.to(device), 0.1, None, backend=backend)
    assert ap[0].item() == pytest.approx(expected[0][0].item(), abs=1e-12)
    torch.testing.assert_close(gradient[0], expected[2][0], rtol=0, atol=1e-11)
    assert ap[1].isnan()
    assert gradient[1].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_bits_every_time(device: str, backend: str) -> None:
    scores, is_positive, weights = pool((1, 300), weighted=True)
    arguments = scores.float().to(device), is_positive.to(device), 0.1, weights.float().to(device)  # type: ignore[union-attr]
    first, again = (ranked(*arguments, backend=backend) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_derivatives_by_scores_and_temperature(device: str, backend: str) -> None:
    scores, is_positive, _ = pool((1, 8), share=0.5)
    scores, is_positive = scores.to(device), is_positive.to(device)
    tau = torch.tensor(0.2, dtype=torch.float64, device=device)

    def ap(scores: Tensor, tau: Tensor) -> Tensor:
        return smooth_ap(scores, is_positive, tau, backend=backend).ap  # type: ignore[arg-type]

    inputs = scores.requires_grad_(), tau.requires_grad_()
    assert torch.autograd.gradcheck(ap, inputs, rtol=1e-4)


FAMILY: dict[str, Callable[..., RankingLoss]] = {
    "AP": partial(SmoothAPLoss, 2),
    "AP, spread and prior": partial(
        SmoothAPLoss, 2, temperature_unit="spread", target_prior=[0.1, 0.2]
    ),
    "AP of labels": partial(SmoothAPLoss, 2, multilabel=True),
    "recall at k": partial(RecallAtKLoss, 1, 2),
    "recall at FPR": partial(RecallAtFPRLoss, 1, 0.4),
    "partial AUC": partial(PartialAUCLoss, 1, 0.4),
    "NDCG": partial(NDCGLoss, k=4),
}


@pytest.mark.parametrize("is_grouped", [False, True], ids=["one group", "groups"])
@pytest.mark.parametrize("loss", FAMILY.values(), ids=FAMILY)
def test_the_family_is_that_of_the_host(
    loss: Callable[..., RankingLoss],
    is_grouped: bool,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    """With weights, values and a queue."""
    monkeypatch.setattr(RankingLoss, "backend", "dense")

    def trained(device: str) -> tuple[list[Tensor], dict[str, Any]]:
        loss_fn, found, generator = loss(queue_size=9, temperature=0.3), [], seeded(0)
        num_classes, num_labels = loss_fn.num_classes, loss_fn._num_labels()
        for _ in range(2):
            shape = (24, num_classes)
            leaf = torch.randn(shape, generator=generator).to(device).requires_grad_()
            targets = torch.randint(
                0,
                min(num_labels, 4),
                shape if loss_fn.multilabel else shape[:1],
                generator=generator,
            )
            targets[1] = IGNORED
            weights, value = torch.rand(2, 24, generator=generator)
            group = torch.randint(-3, 0, (24,), generator=generator)
            given = {"sample_weight": weights, "value": value}
            given |= {"group": group} if is_grouped else {}
            given = {name: field.to(device) for name, field in given.items()}
            value_of_loss = loss_fn(leaf, targets.to(device), **given)
            value_of_loss.backward()
            assert leaf.grad is not None
            found += [value_of_loss.detach().cpu(), leaf.grad.cpu()]
        return found, state_of(loss_fn.cpu())

    expected, state = trained("cpu")
    assert 0 < expected[0] < 1
    got, own_state = trained(request.getfixturevalue("device"))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(own_state, state)


@pytest.fixture(scope="module")
def crossings() -> list[dict[str, Any]]:
    """What a training step sends between host and device: a row a configuration."""
    if HAS_DEVICE:
        pytest.skip("the device tells by itself: test_how_often_a_step_waits")
    command = [sys.executable, "-m", "tests.helpers.far_device"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


DENSE = {"label_rows", "prepare", "soft_ranks", "score_slopes", "weighted_totals"}
LINEAR = {"label_rows", "prepare", "block_moments", "far_ranks", "slope_moments", "far_slopes"}
SEGMENTS = {"label_rows", "segment_facts", "segment_ranks", "segment_slopes", "segment_totals"}
# Kernels, copies and fills of a step, with values unchecked; one more with weights.
MOST_LAUNCHES = {
    "plain": 17,
    "queue": 21,
    "labels": 21,
    "recall": 26,
    "recall at k": 31,
    "recall at FPR": 31,
    "partial AUC": 46,
    "NDCG": 51,
    "spread": 55,
    "prior": 22,
    "values": 30,
    "groups": 46,
}


@pytest.mark.parametrize("checked", [False, True], ids=["values unchecked", "values checked"])
@pytest.mark.parametrize("num_classes", [1, 10, 100])
def test_a_step_on_a_device(
    num_classes: int,
    checked: bool,
    crossings: list[dict[str, Any]],
    record_property: Callable[[str, object], None],
) -> None:
    """Nothing is copied to the device; one value is read for each loss that checks some, none
    otherwise; a cap on the pool reads some, whatever the classes.
    Launches are few: each costs more than the arithmetic of a small pool.
    """
    rows = [row for row in crossings if (row["classes"], row["checked"]) == (num_classes, checked)]
    assert len(rows) == 30
    record_property("cases", len(rows))
    for row in rows:
        expected = ["_local_scalar_dense"] * checked
        if row["loss"] in ("mixed", "values"):
            expected *= 2
        elif row["loss"] == "capped":
            expected += ["_local_scalar_dense", "nonzero", "to the device", "_unique2"]
        assert row["forward"] == expected, row
        assert row["backward"] == [], row
        kernels = {"linear": LINEAR, "groups": SEGMENTS}
        assert set(row["launches"]) >= kernels.get(row["loss"], DENSE)
        if row["loss"] in MOST_LAUNCHES and not checked:
            assert len(row["launches"]) <= MOST_LAUNCHES[row["loss"]] + row["weighted"], row


def test_a_kernel_is_launched_on_the_device_of_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current one, which need not be that of the loss."""
    current, launched = [0], []

    @contextlib.contextmanager
    def device(wanted: torch.device) -> Iterator[None]:
        current.append(wanted.index)
        yield
        current.pop()

    class Kernel:
        def __getitem__(self, grid: tuple[int, int]) -> Callable[..., None]:
            return lambda *_, **__: launched.append(current[-1])

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(launches, "specialized", repr)
    monkeypatch.setattr(launches, "_kernels", lambda name: SimpleNamespace(kernel=Kernel()))
    launches.launch("kernel", (1, 1), SimpleNamespace(device=torch.device("cuda", 1)))
    assert (launched, current) == ([1], [0])


def test_importing_the_package_does_not_import_triton() -> None:
    code = "import sys, imbalanced_losses; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow
def test_kernels_compile_and_are_launched_as_triton_would() -> None:
    """For a device of compute capability 9.0, which needs none; without atomics and spills."""
    command = [sys.executable, "-m", "tests.helpers.compiling"]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


# On a device only --------------------------------------------------------------------------------


needs_device = pytest.mark.skipif(not HAS_DEVICE, reason="needs a CUDA device")


@pytest.mark.gpu
@needs_device
@pytest.mark.parametrize("queue_size", [0, 1024])
@pytest.mark.parametrize("num_classes", [1, 10])
def test_a_training_step_is_captured_as_a_cuda_graph(
    num_classes: int, queue_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Network, loss, backward pass and optimiser, replayed on other batches."""
    monkeypatch.setattr(SmoothAPLoss, "check_values", False)
    model = torch.nn.Linear(16, num_classes).cuda()
    loss_fn = SmoothAPLoss(num_classes, queue_size, 0.1, target_prior=[0.1] * num_classes).cuda()
    features = torch.randn(2048, 16, device="cuda")
    targets = torch.randint(0, max(2, num_classes), (2048,), device="cuda")

    def step(model: torch.nn.Module, loss_fn: SmoothAPLoss, *batch: Tensor) -> Tensor:
        for parameter in model.parameters():
            parameter.grad = None
        loss: Tensor = loss_fn(model(batch[0]), batch[1])
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(parameter.grad, alpha=-0.1)  # type: ignore[arg-type]
        return loss.detach()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(model, loss_fn, features, targets)
    torch.cuda.current_stream().wait_stream(stream)
    beside = copy.deepcopy(model), copy.deepcopy(loss_fn)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step(model, loss_fn, features, targets)
    for seed in range(3):
        features.copy_(torch.randn(2048, 16, generator=seeded(seed)))
        targets.copy_(torch.randint(0, max(2, num_classes), (2048,), generator=seeded(seed)))
        targets[:seed] = IGNORED
        graph.replay()
        torch.testing.assert_close(loss, step(*beside, features, targets))
        torch.testing.assert_close([*model.parameters()], [*beside[0].parameters()])
    # A replay counts no steps.
    saved, other = (one._saved()._replace(num_steps=0) for one in (loss_fn, beside[1]))
    torch.testing.assert_close(saved, other)


@pytest.mark.gpu
@needs_device
@pytest.mark.parametrize("checked", [False, True], ids=["values unchecked", "values checked"])
@pytest.mark.parametrize("num_classes", far_device.CLASSES)
def test_how_often_a_step_waits(
    num_classes: int, checked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `test_a_step_on_a_device` says, told by CUDA."""
    for kind in (RankingLoss, CrossEntropy):
        monkeypatch.setattr(kind, "check_values", checked)
    for name, loss_fn in far_device.losses_of(num_classes).items():
        monkeypatch.setattr(RankingLoss, "backend", "panel" if name == "linear" else "dense")
        ranking = getattr(loss_fn, "main_loss", loss_fn)
        batches = far_device.batches(num_classes, ranking.multilabel)
        for logits, targets, weights in batches:
            leaf, labels = logits.cuda().requires_grad_(), targets.cuda()
            fields = far_device.fields_of(name, weights.cuda())
            loss, of_forward = waiting(lambda: loss_fn(leaf, labels, **fields))  # noqa: B023
            _, of_backward = waiting(loss.backward)
        if name != "capped":
            assert of_forward == checked * (1 + (name in ("mixed", "values"))), name
        assert of_backward == 0, name


def waiting(function: Callable[[], Any]) -> tuple[Any, int]:
    """What a function returns, and how often the host waited for the device."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            result = function()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return result, sum("synchronizing CUDA operation" in str(one.message) for one in found)


@pytest.mark.gpu
@needs_device
@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_on_a_device_is_linear(backend: str) -> None:
    scores, is_positive, _ = pool((1, 1 << 17), share=0.5)
    arguments = scores.float().cuda(), is_positive.cuda(), 0.1, None
    ranked(*arguments, backend=backend)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ranked(*arguments, backend=backend)
    assert torch.cuda.max_memory_allocated() - before < 1024 * scores.numel()


DETERMINISTIC = """
import torch
from imbalanced_losses.functional import smooth_ap

torch.use_deterministic_algorithms(True)
scores = torch.randn(2, 5000, device="cuda", requires_grad=True)
for backend in ("dense", "panel"):
    smooth_ap(scores, scores.detach() > 1, 0.1, backend=backend).ap.sum().backward()
"""


@pytest.mark.gpu
@needs_device
def test_deterministic_algorithms_are_all_there_is() -> None:
    environment = os.environ | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    subprocess.run([sys.executable, "-c", DETERMINISTIC], check=True, env=environment)


@pytest.mark.gpu
@needs_device
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_temperature_that_is_on_the_host(backend: str) -> None:
    scores, is_positive, _ = pool((2, 300))
    tau = torch.tensor(0.1, dtype=torch.float64, device="cpu", requires_grad=True)
    leaf = scores.cuda().requires_grad_()
    ap = smooth_ap(leaf, is_positive.cuda(), tau, backend=backend).ap  # type: ignore[arg-type]
    ap.sum().backward()
    expected = defined(scores, is_positive, 0.1, None)
    torch.testing.assert_close(ap.detach().cpu(), expected[0], rtol=0, atol=1e-12)
    assert tau.grad is not None
    assert tau.grad.device.type == "cpu"
