"""torch.compile, torch.export, tensors without values: the same results, in one graph. No vmap."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from imbalanced_losses import CrossEntropy, MixedLoss, SmoothAPLoss
from imbalanced_losses._checks.tracing import is_on_host, is_traced
from imbalanced_losses._ranking import Problems
from imbalanced_losses._ranking.average_precision import average_precision
from imbalanced_losses.functional import Backend, score_spread, smooth_ap
from tests.helpers.cases import seeded
from tests.helpers.rows import IGNORED, assert_same_state, state_of

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch's compiler, about itself

STEPS = 30
OPERATORS = torch.ops.imbalanced_losses


def batches(num_classes: int, multilabel: bool = False) -> list[tuple[Tensor, Tensor]]:
    """Steps whose number of positives changes."""
    found = []
    for step in range(STEPS):
        generator = seeded(step)
        shape = (64, num_classes) if multilabel else (64,)
        labels = 2 if multilabel else max(2, num_classes)
        targets = torch.randint(0, labels, shape, generator=generator)
        is_kept = torch.rand(shape, generator=generator) < 0.1 * (1 + step % 5)
        targets = targets * is_kept
        if step % 3 == 0:
            targets[1] = IGNORED
        found.append((torch.randn(64, 8, generator=generator), targets))
    return found


def trained(loss_fn: nn.Module, steps: list[tuple[Tensor, Tensor]], compiled: Any) -> list[Tensor]:
    """Losses and gradients; `compiled` makes a step of it."""
    model = nn.Linear(
        8, steps[0][1].shape[-1] if loss_fn_is_multilabel(loss_fn) else classes(loss_fn)
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, generator=seeded(5))

    def forward(features: Tensor, targets: Tensor) -> Tensor:
        loss: Tensor = loss_fn(model(features), targets)
        return loss

    step = compiled(forward)
    found = []
    for features, targets in steps:
        model.zero_grad()
        loss = step(features, targets)
        loss.backward()
        found += [loss.detach(), *(p.grad.clone() for p in model.parameters())]  # type: ignore[union-attr]
    return found


def ranking(loss_fn: Any) -> Any:
    return getattr(loss_fn, "main_loss", loss_fn)


def classes(loss_fn: Any) -> int:
    count: int = ranking(loss_fn).num_classes
    return count


def loss_fn_is_multilabel(loss_fn: Any) -> bool:
    return bool(ranking(loss_fn).multilabel)


LOSSES: dict[str, Any] = {
    "binary": lambda: SmoothAPLoss(1, 0, 0.1),
    "binary-queue": lambda: SmoothAPLoss(1, 150, 0.1),
    "classes": lambda: SmoothAPLoss(10, 0, 0.1),
    "classes-queue": lambda: SmoothAPLoss(10, 150, 0.1),
    "labels-queue": lambda: SmoothAPLoss(3, 150, 0.1, multilabel=True),
    "spread": lambda: SmoothAPLoss(1, 150, 0.1, temperature_unit="spread"),
    "prior": lambda: SmoothAPLoss(1, 150, 0.1, target_prior=0.1, queue_follows_shift=True),
    "mixed": lambda: MixedLoss(CrossEntropy(1), SmoothAPLoss(1, 50, 0.1), main_weight=0.5),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", LOSSES)
def test_one_graph_with_the_results_of_eager_code(name: str, training: bool) -> None:
    torch._dynamo.reset()
    loss_fn = LOSSES[name]().train(training)
    beside = copy.deepcopy(loss_fn)
    counter = CompileCounterWithBackend("aot_eager")
    steps = batches(classes(loss_fn), loss_fn_is_multilabel(loss_fn))
    found = trained(loss_fn, steps, lambda f: torch.compile(f, fullgraph=True, backend=counter))
    expected = trained(beside, steps, lambda f: f)
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-6)
    assert counter.frame_count <= 2
    # Compiled code counts no steps.
    saved, other = (ranking(one)._saved()._replace(num_steps=0) for one in (loss_fn, beside))
    torch.testing.assert_close(saved, other, rtol=1e-5, atol=1e-6)


def test_the_default_compiler() -> None:
    torch._dynamo.reset()
    loss_fn = SmoothAPLoss(1, 150, 0.1)
    beside = copy.deepcopy(loss_fn)
    found = trained(loss_fn, batches(1), lambda f: torch.compile(f, fullgraph=True))
    for own, other in zip(found, trained(beside, batches(1), lambda f: f), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-6)


def test_a_temperature_that_changes_is_not_compiled_anew() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    loss_fn = SmoothAPLoss(1, 0)
    compiled = torch.compile(loss_fn, fullgraph=True, backend=counter)
    logits, targets = torch.randn(40, 1, generator=seeded(0)), torch.arange(40) % 4 == 0
    for tau in (1.0, 0.5, 0.2, 0.1, 0.05):
        loss_fn.temperature = tau
        expected = 1 - smooth_ap(logits[:, 0], targets, tau).ap
        torch.testing.assert_close(compiled(logits, targets), expected)
    assert counter.frame_count <= 2


def test_settings_as_tensors_follow_the_device_alone() -> None:
    """Neither casts nor devices without values change them, and no checkpoint holds them twice."""
    with torch.inference_mode():
        loss_fn = SmoothAPLoss(1, 0, 0.1, target_prior=0.3)
    assert loss_fn.get_extra_state().equal(SmoothAPLoss(1, 0, 0.1).get_extra_state())
    for change in (loss_fn.half, loss_fn.double, lambda: loss_fn.to("meta")):
        change()
        for tensor in (loss_fn._temperature_now, loss_fn._prior):
            assert tensor is not None
            assert tensor.dtype == torch.float64
            assert tensor.device == loss_fn._queue.cursor.device
    loss_fn.temperature = 0.2
    loss_fn.to_empty(device="cpu")
    assert loss_fn._temperature_now.item() == 0.2
    assert loss_fn._prior is not None
    assert loss_fn._prior.tolist() == [0.3]
    logits, targets = torch.randn(40, 1, generator=seeded(0)), torch.arange(40) % 4 == 0
    torch.testing.assert_close(
        loss_fn.float()(logits, targets), SmoothAPLoss(1, 0, 0.2, target_prior=0.3)(logits, targets)
    )


def test_bad_labels_raise_in_compiled_code_and_change_nothing() -> None:
    torch._dynamo.reset()
    loss_fn = SmoothAPLoss(1, 8)
    compiled = torch.compile(loss_fn, fullgraph=True, backend="aot_eager")
    logits = torch.randn(6, 1, generator=seeded(0)).requires_grad_()
    compiled(logits, torch.tensor([0, 1, 0, 0, 1, 0]))
    before = state_of(loss_fn)
    with pytest.raises(RuntimeError, match="targets must be 0 or 1, or ignore_index=-100"):
        compiled(logits, torch.tensor([0, 1, 0, 5, 1, 0]))
    assert_same_state(loss_fn, before)


class Scored(nn.Module):
    def __init__(self, queue_size: int) -> None:
        super().__init__()
        self.linear, self.loss_fn = nn.Linear(8, 3), SmoothAPLoss(3, queue_size, 0.1)

    def forward(self, features: Tensor, targets: Tensor) -> Tensor:
        loss: Tensor = self.loss_fn(self.linear(features), targets)
        return loss


@pytest.mark.parametrize("queue_size", [0, 32])
@pytest.mark.parametrize("training", [True, False])
def test_export(queue_size: int, training: bool) -> None:
    module = Scored(queue_size).train(training)
    beside = copy.deepcopy(module)
    features, targets = batches(3)[1]
    exported = torch.export.export(module, (features, targets)).module()
    for _ in range(2):
        torch.testing.assert_close(exported(features, targets), beside(features, targets))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", [*LOSSES, "cross-entropy"])
def test_export_of_a_batch_of_any_length(name: str, strict: bool, training: bool) -> None:
    loss_fn = (LOSSES | {"cross-entropy": lambda: CrossEntropy(3)})[name]().train(training)
    beside = copy.deepcopy(loss_fn)
    num_classes = classes(loss_fn)
    shape = (20, num_classes) if loss_fn_is_multilabel(loss_fn) else (20,)
    logits, targets = torch.randn(20, num_classes, generator=seeded(0)), torch.arange(20) % 2
    targets = targets.view(-1, *(1,) * (len(shape) - 1)).expand(shape).clone()
    rows = {0: torch.export.Dim("rows", min=2, max=64)}
    exported = torch.export.export(
        loss_fn, (logits, targets), dynamic_shapes=(rows, rows), strict=strict
    ).module()
    for length in (20, 9):
        batch = logits[:length], targets[:length]
        torch.testing.assert_close(exported(*batch), beside(*batch))


def test_what_is_traced() -> None:
    assert is_on_host(torch.ones(2))
    assert not is_traced(torch.ones(2))
    with FakeTensorMode():
        fake = torch.ones(2)
    for tensor in (torch.ones(2, device="meta"), fake):
        assert is_traced(tensor)
        assert not is_on_host(tensor)


@pytest.mark.parametrize("queue_size", [0, 32])
def test_tensors_without_values(queue_size: int) -> None:
    with FakeTensorMode():
        logits = torch.randn(20, 3, requires_grad=True)
        loss = SmoothAPLoss(3, queue_size)(logits, torch.arange(20) % 3)
        loss.backward()
        assert loss.shape == ()
        assert logits.grad is not None
    logits = torch.randn(20, 3, device="meta", requires_grad=True)
    targets = torch.zeros(20, device="meta", dtype=torch.int64)
    loss, per_class, valid = SmoothAPLoss(3, queue_size).to("meta")(logits, targets, True)
    loss.backward()
    assert (per_class.shape, valid.dtype, logits.grad.shape) == ((3,), torch.bool, (20, 3))


def test_functions_of_tensors_without_values() -> None:
    with FakeTensorMode():
        scores = torch.randn(3, 20, requires_grad=True)
        ap, valid = smooth_ap(scores, scores > 0, 0.1)
        ap.sum().backward()
        assert (ap.shape, valid.shape) == ((3,), (3,))
        assert scores.grad is not None


@pytest.mark.parametrize("backend", ["dense", "panel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("queries", "among"),
    [("positives", "all,positives"), ("negatives", "positives"), ("all", "negatives,all")],
)
def test_operators_are_registered_as_they_should_be(
    queries: str, among: str, dtype: torch.dtype, backend: str
) -> None:
    scores = torch.randn(3, 30, generator=seeded(0), dtype=dtype).requires_grad_()
    is_positive = torch.rand(3, 30, generator=seeded(1)) < 0.3
    weights = torch.rand(3, 30, generator=seeded(2), dtype=dtype)
    tau = torch.tensor([0.1, 0.2, 0.3], dtype=dtype).requires_grad_()
    value = torch.rand(3, 30, generator=seeded(3), dtype=dtype)
    sets = (queries, among, backend, False, (queries, among) == ("negatives", "positives"))
    fixed = (scores, is_positive, None, None, value, None, 0.1, False, 20, *sets)
    by_problem = (scores, is_positive, tau, weights, value, None, 0.0, True, 30, *sets)
    without = (scores.detach(), *fixed[1:])
    rows = [one.reshape(1, 90) for one in (scores, is_positive)]
    ragged = (*rows, tau, None, None, torch.tensor([20, 0, 70]), 0.0, True, 90, *sets)
    for arguments in (fixed, by_problem, without, ragged):
        torch.library.opcheck(OPERATORS.soft_ranks.default, arguments)
        constants = [a.detach() if isinstance(a, Tensor) else a for a in arguments]
        ranks = OPERATORS.soft_ranks(*constants)
        gradient = OPERATORS.soft_ranks_gradient.default  # nothing is differentiated twice
        torch.library.opcheck(gradient, (torch.ones_like(ranks), *constants))


def test_what_a_temperature_moves_is_told_from_all_rows() -> None:
    """Also where only the first need a gradient, those of the batch before those of the queue."""
    scores = torch.randn(12, generator=seeded(0), dtype=torch.float64)
    is_positive = torch.arange(12) % 3 == 0

    def slope(num_live: int | None) -> Tensor:
        tau = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        ap = average_precision(Problems(scores, tau, is_positive, num_live=num_live))
        return torch.autograd.grad(ap, tau)[0]

    torch._dynamo.reset()
    whole, compiled = slope(None), torch.compile(slope, backend="aot_eager")
    assert whole.abs() > 0.01
    assert slope(5).equal(whole)
    torch.testing.assert_close(compiled(5), whole)


@pytest.mark.parametrize("mapped", ["scores", "labels", "weights", "temperature"])
@pytest.mark.parametrize("is_outer", [False, True], ids=["vmap", "vmap of grad"])
def test_vmap_over_problems_is_refused(is_outer: bool, mapped: str) -> None:
    """Whatever of them is mapped; problems have a dimension of their own."""
    scores = torch.randn(4, 30, generator=seeded(0), dtype=torch.float64)
    is_positive = torch.rand(4, 30, generator=seeded(1)) < 0.3
    weights = torch.rand(4, 30, generator=seeded(2), dtype=torch.float64)
    given = {"scores": scores, "labels": is_positive, "weights": weights}
    given["temperature"] = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    batch = [value if name == mapped else value[0] for name, value in given.items()]

    def ap(s: Tensor, p: Tensor, w: Tensor, t: Tensor) -> Tensor:
        return smooth_ap(s, p, t, sample_weight=w).ap

    function = torch.func.grad(ap) if is_outer else ap
    dims = tuple(0 if name == mapped else None for name in given)
    with pytest.raises(NotImplementedError, match="stack the problems along the dimension C"):
        torch.func.vmap(function, dims)(*batch)


@pytest.mark.parametrize("backend", ["dense", "panel"])
def test_stacked_problems_are_what_vmap_would_give(backend: Backend) -> None:
    """Gradients, and those of their norm, of each problem by itself."""
    scores = torch.randn(4, 30, generator=seeded(0), dtype=torch.float64)
    is_positive = torch.rand(4, 30, generator=seeded(1)) < 0.3
    is_positive[2] = False  # a problem that is not valid

    def ap(s: Tensor, p: Tensor) -> Tensor:
        return smooth_ap(s, p, 0.1 * score_spread(s), backend=backend).ap.sum()

    gradient = torch.func.grad(ap)
    of_norm = torch.func.grad(lambda s, p: gradient(s, p).square().sum())
    for function in (gradient, of_norm):
        expected = torch.stack([function(*one) for one in zip(scores, is_positive, strict=True)])
        assert expected.abs().max() > 0.01
        torch.testing.assert_close(function(scores, is_positive), expected, rtol=1e-10, atol=1e-14)
