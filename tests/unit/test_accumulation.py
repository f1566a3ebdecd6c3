"""`backward_in_micro_batches` beside one backward pass of the whole batch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from imbalanced_losses import CrossEntropy, MixedLoss, SmoothAPLoss
from imbalanced_losses.accumulation import backward_in_micro_batches
from tests.helpers.cases import seeded
from tests.helpers.ranks import WORLD_SIZE, Failure, Ranks
from tests.helpers.rows import make_batch

SIZES = ([24], [8, 8, 8], [1] * 24, [0, 20, 4], [5, 5, 14])


def make_model(*between: nn.Module, num_classes: int = 1) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), *between, nn.Linear(6, num_classes)).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, generator=seeded(7))
    return model


def make_features(num_rows: int = 24, seed: int = 0) -> Tensor:
    return make_batch(num_rows, 5, seed=seed, dtype=torch.float64).logits


def gradients(model: nn.Module) -> list[Tensor]:
    found = [p.grad for p in model.parameters()]
    model.zero_grad()
    return found  # type: ignore[return-value]


def make_loss(kind: str) -> Any:
    num_classes = 1 if kind == "binary" else 3
    ranking = SmoothAPLoss(num_classes, 30, 0.2, multilabel=kind == "multilabel")
    if kind != "mixed":
        return ranking
    return MixedLoss(CrossEntropy(num_classes), ranking, main_weight=0.5)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("kind", ["binary", "classes", "multilabel", "mixed"])
@pytest.mark.parametrize("is_weighted", [False, True])
def test_gradient_and_state_are_those_of_the_whole_batch(
    sizes: list[int], kind: str, is_weighted: bool
) -> None:
    num_classes = 1 if kind == "binary" else 3
    model = make_model(num_classes=num_classes)
    whole_loss, split_loss = make_loss(kind), make_loss(kind)
    for step in range(3):
        features = make_features(seed=step)
        targets = make_batch(24, num_classes, multilabel=kind == "multilabel").targets
        weight = torch.rand(24, generator=seeded(step)) if is_weighted else None
        weights = {} if weight is None else {"sample_weight": weight}
        expected = whole_loss(model(features), targets, **weights)
        expected.backward()
        by_whole = gradients(model)
        loss = backward_in_micro_batches(
            model, split_loss, features.split(sizes), targets, sample_weight=weight
        )
        assert not loss.requires_grad
        assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
        torch.testing.assert_close(gradients(model), by_whole, rtol=1e-10, atol=1e-13)
    queues = [getattr(it, "main_loss", it)._queue for it in (split_loss, whole_loss)]
    fields = (queue.slots().packed() for queue in queues)
    torch.testing.assert_close(*fields, rtol=1e-12, atol=1e-13)


def test_dropout_draws_the_same_numbers_twice_and_goes_on_after() -> None:
    """Beside both micro-batches in one graph, with the numbers that they would draw."""
    model, features, targets = make_model(nn.Dropout(0.5)), make_features(), make_batch(24).targets
    torch.manual_seed(11)
    logits = torch.cat([model(rows) for rows in features.split(12)])
    SmoothAPLoss(1, 0, 0.2)(logits, targets).backward()
    expected, next_number = gradients(model), torch.rand(())

    torch.manual_seed(11)
    backward_in_micro_batches(model, SmoothAPLoss(1, 0, 0.2), features.split(12), targets)
    assert torch.rand(()) == next_number
    torch.testing.assert_close(gradients(model), expected, rtol=1e-10, atol=1e-13)


class Mean(nn.Module):
    """Counts its calls, and keeps the last mean in a buffer that it assigns anew."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("num_calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(6).double())

    def forward(self, hidden: Tensor) -> Tensor:
        self.num_calls += 1
        self.mean = 0.9 * self.mean + hidden.detach().mean(0)
        return hidden


def compiled(model: Any) -> Any:
    torch.compiler.reset()
    return torch.compile(model, backend="aot_eager", fullgraph=True)


@pytest.mark.parametrize(
    "as_callable",
    [
        lambda model: (model, None),
        lambda model: (compiled(model), None),
        lambda model: (lambda rows: model(rows), model),  # noqa: PLW0108 - so that it is no module
        lambda model: (model.forward, model),
        lambda model: (compiled(model.forward), model),
    ],
    ids=["module", "compiled", "lambda", "method", "compiled-method"],
)
@pytest.mark.parametrize("between", [nn.BatchNorm1d, lambda _: Mean()], ids=["norm", "mean"])
def test_running_statistics_move_once(
    as_callable: Callable[[nn.Module], Any], between: Callable[[int], nn.Module]
) -> None:
    features, targets = make_features(), make_batch(24).targets
    model = make_model(between(6).double())
    beside = copy.deepcopy(model)
    (call, module), (call_beside, _) = as_callable(model), as_callable(beside)
    loss_fn = SmoothAPLoss(1, 0, 0.2)
    for _ in range(2):
        backward_in_micro_batches(call, loss_fn, features.split(12), targets, module=module)
        logits = torch.cat([call_beside(rows) for rows in features.split(12)])
        loss_fn(logits, targets).backward()
    torch.testing.assert_close([*model.buffers()], [*beside.buffers()])
    torch.testing.assert_close(gradients(model), gradients(beside), rtol=1e-10, atol=1e-13)


def test_a_function_has_to_name_its_module() -> None:
    model, features = make_model(), make_features()
    with pytest.raises(TypeError, match="module must be the network that the function calls"):
        backward_in_micro_batches(model.forward, SmoothAPLoss(1), [features], torch.zeros(24))
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_with_a_scaler(dtype: torch.dtype) -> None:
    model, features, targets = make_model().float(), make_features().float(), make_batch(24).targets
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    loss_fn = SmoothAPLoss(1, 0, 0.2)
    with torch.autocast("cpu", dtype):
        logits = torch.cat([model(rows) for rows in features.split(8)])
        scaler.scale(loss_fn(logits, targets)).backward()
        expected = gradients(model)
    with torch.autocast("cpu", dtype):  # another: the copies of the weights are its own
        loss = backward_in_micro_batches(
            model, loss_fn, features.split(8), targets, scale=scaler.scale
        )
    assert loss.dtype == torch.float32
    assert 0 <= loss <= 1
    # Each micro-batch's part is rounded to the low precision.
    eps = 2 * torch.finfo(dtype).eps
    for own, other in zip(gradients(model), expected, strict=True):
        assert other.any()
        torch.testing.assert_close(own, other, rtol=eps, atol=eps * other.abs().max().item())


def test_errors_leave_no_gradient() -> None:
    model, features = make_model(), make_features()
    with pytest.raises(ValueError, match="inputs must hold at least one micro-batch"):
        backward_in_micro_batches(model, SmoothAPLoss(1), [], torch.zeros(0))
    with pytest.raises(ValueError, match=r"targets must be \[24\]"):
        backward_in_micro_batches(model, SmoothAPLoss(1), features.split(8), torch.zeros(23))
    assert all(p.grad is None for p in model.parameters())
    calls = iter(range(3))

    def shrinking(rows: Tensor) -> Tensor:
        return model(rows[next(calls) :])

    random = torch.get_rng_state()
    with pytest.raises(RuntimeError, match=r"micro-batch 0 were \[24, 1\] .* are \[23, 1\]"):
        backward_in_micro_batches(
            shrinking, SmoothAPLoss(1), [features], make_batch(24).targets, module=model
        )
    assert torch.equal(torch.get_rng_state(), random)


class CountingModel(nn.Module):
    """Counts the micro-batches in which DDP synchronises."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make_model(nn.BatchNorm1d(6, track_running_stats=False, affine=False))

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.net(features)
        return logits


def train_on(rank: int, gather: str, is_called: bool) -> tuple[list[Tensor], int, float]:
    """Gradient of the share of a rank, in micro-batches; how often DDP reduced; the loss."""
    model = CountingModel()
    wrapped = DistributedDataParallel(model)
    reduced = 0

    def count(state, bucket):  # type: ignore[no-untyped-def]
        nonlocal reduced
        reduced += 1
        return allreduce_hook(None, bucket)

    wrapped.register_comm_hook(None, count)
    loss_fn = SmoothAPLoss(1, 0, 0.2, gather=gather)  # type: ignore[arg-type]
    rows = slice(24 * rank, 24 * rank + 24)
    features, targets = make_features(48)[rows], make_batch(48).targets[rows]
    call, module = (lambda rows: wrapped(rows), wrapped) if is_called else (wrapped, None)  # noqa: PLW0108
    parts = features.split(8)
    loss = backward_in_micro_batches(call, loss_fn, parts, targets, module=module)
    return [p.grad for p in model.parameters()], reduced, loss.item()  # type: ignore[misc]


@pytest.mark.parametrize("gather", ["rows", "sums"])
@pytest.mark.parametrize("is_called", [False, True], ids=["wrapped", "called"])
def test_ranks_that_accumulate_equal_one_process(
    ranks: Ranks, gather: str, is_called: bool
) -> None:
    model = CountingModel()
    logits = torch.cat([model(rows) for rows in make_features(48).split(8)])
    expected = SmoothAPLoss(1, 0, 0.2)(logits, make_batch(48).targets)
    expected.backward()
    by_one = gradients(model)
    results = ranks.run(train_on, gather, is_called)
    assert len(results) == WORLD_SIZE
    for result in results:
        assert not isinstance(result, Failure), result
        found, reduced, loss = result
        assert reduced == 1
        assert loss == pytest.approx(expected.item(), rel=1e-12)
        torch.testing.assert_close(found, by_one, rtol=1e-9, atol=1e-13)
