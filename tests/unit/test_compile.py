"""torch.compile, torch.export, tensors without values: the same results, in one graph. No vmap."""

from __future__ import annotations

import copy
import io
import itertools
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from imbalanced_losses import CrossEntropy, MixedLoss, NDCGLoss, SmoothAPLoss, functional
from imbalanced_losses._checks.tracing import is_on_host, is_traced
from imbalanced_losses._ranking import Problems
from imbalanced_losses._ranking.average_precision import average_precision
from imbalanced_losses._ranking.canonical import compute_dtype
from imbalanced_losses.functional import Backend, score_spread, smooth_ap
from tests.helpers.cases import seeded
from tests.helpers.rows import IGNORED, assert_same_state, state_of
from tests.project.compile_matrix import MOST_GRAPHS, Configuration, all_configurations, graphs_of

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch's compiler, about itself

OPERATORS = torch.ops.imbalanced_losses

LOSSES: dict[str, Any] = {
    "binary": lambda: SmoothAPLoss(1, 0, 0.1),
    "classes-queue": lambda: SmoothAPLoss(10, 150, 0.1),
    "labels-queue": lambda: SmoothAPLoss(3, 150, 0.1, multilabel=True),
    "spread": lambda: SmoothAPLoss(1, 150, 0.1, temperature_unit="spread"),
    "prior": lambda: SmoothAPLoss(1, 150, 0.1, target_prior=0.1, queue_follows_shift=True),
    "mixed": lambda: MixedLoss(CrossEntropy(1), SmoothAPLoss(1, 50, 0.1), main_weight=0.5),
}
FUNCTIONS: dict[str, Any] = {
    "smooth_ap": smooth_ap,
    "recall_at_k": partial(functional.recall_at_k, k=5),
    "recall_at_fpr": partial(functional.recall_at_fpr, max_fpr=0.2),
    "partial_auc": partial(functional.partial_auc, max_fpr=1.0),
    "partial_auc, to": partial(functional.partial_auc, max_fpr=0.3),
    "partial_auc, from": partial(functional.partial_auc, max_fpr=1.0, min_fpr=0.2),
    "partial_auc, from and to": partial(functional.partial_auc, max_fpr=0.5, min_fpr=0.2),
    "ndcg": functional.ndcg,
    "ndcg, k": partial(functional.ndcg, k=5),
}
FAST = (14, 22, 33, 44, 55)  # each metric; with and without queue, groups, classes, training


@pytest.mark.parametrize(
    "one",
    [
        pytest.param(one, marks=() if number in FAST else pytest.mark.slow, id=str(one))
        for number, one in enumerate(all_configurations())
    ],
)
def test_a_metric_in_one_graph(one: Configuration) -> None:
    """With the results of eager code, over steps whose numbers of rows and positives change."""
    assert graphs_of(one) <= MOST_GRAPHS


def rows(loss_fn: Any, num_rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Logits and targets for a loss, one row in ten ignored."""
    own = getattr(loss_fn, "main_loss", loss_fn)
    shape = (num_rows, own.num_classes) if own.multilabel else (num_rows,)
    num_labels = 2 if own.multilabel else max(2, own.num_classes)
    targets = torch.randint(0, num_labels, shape, generator=seeded(seed))
    targets[seed::10] = IGNORED
    return torch.randn(num_rows, own.num_classes, generator=seeded(seed + 1)), targets


@pytest.mark.parametrize("name", ["labels-queue", "prior", "mixed"])
def test_the_options_of_a_loss_in_one_graph(name: str) -> None:
    torch._dynamo.reset()
    eager = LOSSES[name]()
    compiled = torch.compile(copy.deepcopy(eager), fullgraph=True, backend="aot_eager")
    for seed in range(4):
        results = []
        for loss_fn in (eager, compiled):
            logits, targets = rows(eager, 64, seed)
            loss = loss_fn(logits.requires_grad_(), targets)
            loss.backward()
            results.append((loss.detach(), logits.grad))
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
    # Compiled code counts no steps.
    owns = (getattr(one, "main_loss", one) for one in (compiled._orig_mod, eager))
    saved, other = (own._saved()._replace(num_steps=0) for own in owns)
    torch.testing.assert_close(saved, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_in_one_graph(name: str) -> None:
    """Value, and gradients in scores and in a temperature for each problem, of rows with weights
    and positives with values.
    """
    torch._dynamo.reset()
    scores = torch.randn(2, 40, generator=seeded(0), dtype=torch.float64)
    labels = torch.rand(2, 40, generator=seeded(1)) < 0.3
    weights, values = torch.rand(2, 2, 40, generator=seeded(2), dtype=torch.float64)

    def found(scores: Tensor, tau: Tensor) -> Tensor:
        given = labels.long() if name.startswith("ndcg") else labels
        fields = {"sample_weight": weights, "value": values}
        result: Tensor = FUNCTIONS[name](scores, given, temperature=tau, **fields)[0]
        return result

    results = []
    for function in (found, torch.compile(found, fullgraph=True, backend="aot_eager")):
        leaves = [scores.clone(), torch.tensor([0.3, 0.5], dtype=torch.float64)]
        value = function(*(leaf.requires_grad_() for leaf in leaves))
        results.append((value.detach(), *torch.autograd.grad(value @ value, leaves)))
    assert all(gradient.any() for gradient in results[0][1:])
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-14)


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


def exports() -> list[Any]:
    """Of several labels with a queue in the fast suite."""
    each = itertools.product([*LOSSES, "cross-entropy"], (True, False), (True, False))
    return [
        pytest.param(*one, marks=() if one[0] == "labels-queue" else pytest.mark.slow)
        for one in each
    ]


@pytest.mark.parametrize(("name", "strict", "training"), exports())
def test_export_of_a_batch_of_any_length(name: str, strict: bool, training: bool) -> None:
    """And what is exported can be saved, and has left the state alone."""
    loss_fn = (LOSSES | {"cross-entropy": lambda: CrossEntropy(3)})[name]().train(training)
    beside, before = copy.deepcopy(loss_fn), state_of(loss_fn)
    batch = rows(loss_fn, 20, 0)
    dim = {0: torch.export.Dim("rows", min=2, max=64)}
    program = torch.export.export(loss_fn, batch, dynamic_shapes=(dim, dim), strict=strict)
    torch.export.save(program, io.BytesIO())
    assert_same_state(loss_fn, before)
    exported = program.module()
    for length in (20, 9):
        part = [field[:length] for field in batch]
        torch.testing.assert_close(exported(*part), beside(*part))


@pytest.mark.parametrize("strict", [True, False])
def test_what_is_exported_can_be_trained(strict: bool) -> None:
    """Though the batch that it was exported with needed no gradient; once, not twice."""
    loss_fn = SmoothAPLoss(1, 0, 0.3)
    logits, targets = torch.randn(20, 1, generator=seeded(0)), torch.arange(20) % 4 == 0
    exported = torch.export.export(loss_fn, (logits, targets), strict=strict).module()
    gradients = []
    for function in (loss_fn, exported):
        leaf = logits.clone().requires_grad_()
        loss = function(leaf, targets)
        gradients += torch.autograd.grad(loss, leaf, retain_graph=True)
    torch.testing.assert_close(*gradients)
    with pytest.raises(RuntimeError, match="can't be differentiated again"):
        torch.autograd.grad(loss, leaf, create_graph=True)


def test_export_within_groups() -> None:
    """Of graded rows, whose best order is cumulated group by group."""
    loss_fn = NDCGLoss(1, queue_size=0).eval()
    logits, grades = torch.randn(20, 1, generator=seeded(0)), torch.arange(20) % 4
    batch, groups = (logits, grades), torch.arange(20) // 6
    dim = {0: torch.export.Dim("rows", min=4, max=64)}
    shapes = {"logits": dim, "targets": dim, "group": dim}
    exported = torch.export.export(
        loss_fn, batch, {"group": groups}, dynamic_shapes=shapes, strict=False
    ).module()
    torch.testing.assert_close(
        exported(logits[:9], grades[:9], group=groups[:9]),
        loss_fn(logits[:9], grades[:9], group=groups[:9]),
    )


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
    loss_fn = SmoothAPLoss(3, queue_size).to("meta")
    loss_fn(logits[:0], targets[:0], group=targets[:0])
    loss_fn.reset_queue()
    loss, per_class, valid = loss_fn(logits, targets, True)
    loss.backward()
    assert (per_class.shape, valid.dtype, logits.grad.shape) == ((3,), torch.bool, (20, 3))


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
    asked = (queries, among, (queries, among) == ("negatives", "positives"))
    fixed = (scores, is_positive, None, None, value, None, 0.1, False, 20, backend, False)
    by_problem = (scores, is_positive, tau, weights, value, None, 0.0, True, 30, backend, False)
    without = (scores.detach().bfloat16(), is_positive, None, None, None, *fixed[5:])
    rows = [one.reshape(1, 90) for one in (scores, is_positive)]
    ragged = (*rows, tau, None, None, torch.tensor([20, 0, 70]), 0.0, True, 90, backend, False)
    for problems in (fixed, by_problem, without, ragged):
        is_moved = problems is not without
        number = torch.tensor([3.0, 4.0, 5.0], dtype=compute_dtype(problems[0]))
        for known in ("mean precision", []), ("held among all", [number, number / 4]):
            known_sum = (*problems, *known, is_moved)
            torch.library.opcheck(OPERATORS.ranked_sum.default, known_sum)
        arguments = (*problems, *asked)
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
