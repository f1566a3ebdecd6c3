"""Bad input: the error that it gives, and that it changes nothing; good input: what it becomes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributed import init_device_mesh
from torch.distributed.tensor import DTensor

from imbalanced_losses import CrossEntropy, SmoothAPLoss
from imbalanced_losses.functional import score_spread, smooth_ap
from tests.helpers.rows import IGNORED, assert_same_state, make_batch, queued_rows, state_of

NAN, INF = float("nan"), float("inf")


def assert_refused(
    error: type[Exception], name: str, got: str, call: Callable[..., Any], **arguments: Any
) -> None:
    """The message begins with the argument, says what was expected and ends with what came."""
    with pytest.raises(error, match=rf"^{name} must .*\bgot ") as caught:
        call(**arguments)
    assert type(caught.value) is error
    assert f"got {got}" in str(caught.value)


# --- The constructor -----------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "value", "error"), [
    ("num_classes", 0, ValueError),
    ("num_classes", True, TypeError),
    ("num_classes", 2.0, TypeError),
    ("queue_size", -1, ValueError),
    ("queue_size", 8.0, TypeError),
    ("temperature", 0, ValueError),
    ("temperature", NAN, ValueError),
    ("temperature", INF, ValueError),
    ("temperature", "x", TypeError),
    ("temperature", 1j, TypeError),
    ("reduction", "avg", ValueError),
    ("ignore_index", 1.5, TypeError),
    ("update_queue_in_eval", 1, TypeError),
    ("gather_distributed", "yes", TypeError),
    ("max_pool_size", 1, ValueError),
    ("max_pool_size", 2.5, TypeError),
    ("multilabel", 1, TypeError),
    ("temperature_unit", "sd", ValueError),
    ("queue_follows_shift", 1, TypeError),
])  # fmt: skip
def test_bad_constructor_argument(name: str, value: Any, error: type[Exception]) -> None:
    assert_refused(error, name, repr(value), SmoothAPLoss, **{"num_classes": 3, name: value})


@pytest.mark.parametrize("options", [{"num_classes": 1}, {"num_classes": 3, "multilabel": True}])
@pytest.mark.parametrize("loss_class", [SmoothAPLoss, CrossEntropy])
def test_a_binary_label_cannot_be_ignored(loss_class: Any, options: dict[str, Any]) -> None:
    for label in (0, 1):
        assert_refused(
            ValueError, "ignore_index", str(label), loss_class, **options, ignore_index=label
        )


@pytest.mark.parametrize("name", ["num_clases", "weight"])
def test_an_unknown_argument_is_refused(name: str) -> None:
    with pytest.raises(TypeError, match=name):
        SmoothAPLoss(**{"num_classes": 3, name: 1})


@pytest.mark.parametrize("ignore_index", [0, 1, 2])
def test_a_class_of_several_may_be_ignored(ignore_index: int) -> None:
    loss_fn = SmoothAPLoss(3, 8, ignore_index=ignore_index)
    batch = make_batch(9, 3)
    kept = batch.targets != ignore_index
    loss, per_class, valid = loss_fn(batch.logits, batch.targets, return_per_class=True)
    assert loss.isfinite()
    assert per_class[~valid].isnan().all()
    assert valid.tolist() == [c != ignore_index for c in range(3)]
    assert len(queued_rows(loss_fn)) == int(kept.sum())


# --- A later temperature -------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "error"), [
    (0.0, ValueError), (-0.1, ValueError), (NAN, ValueError), (INF, ValueError), ("0.1", TypeError),
    (None, TypeError), (True, TypeError), (torch.tensor(0.1), TypeError),
], ids=repr)  # fmt: skip
def test_bad_later_temperature(value: Any, error: type[Exception]) -> None:
    loss_fn = SmoothAPLoss(3, 8, 0.25)
    with pytest.raises(error, match=r"^temperature must be .*, got ") as caught:
        loss_fn.temperature = value
    assert type(caught.value) is error
    assert loss_fn.temperature == 0.25


# --- forward -------------------------------------------------------------------------------------

LOSSES = {
    "classes": {"num_classes": 3},
    "binary": {"num_classes": 1},
    "multilabel": {"num_classes": 3, "multilabel": True},
}


GOOD = make_batch(4, 3)
META = torch.ones(4, device="meta")


def labels(*values: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(values, dtype=dtype)


# Which of LOSSES, the argument, what is given for it in a call of four rows, and what comes of it.
BAD_CALLS: list[tuple[str, str, Any, type[Exception], str]] = [
    ("classes", "logits", [[0.0] * 3] * 4, TypeError, "list"),
    ("classes", "logits", GOOD.logits.long(), TypeError, "torch.int64"),
    ("classes", "logits", GOOD.logits + 0j, TypeError, "torch.complex64"),
    ("classes", "logits", torch.zeros(4), ValueError, "[4]"),
    ("binary", "logits", torch.zeros(4), ValueError, "[4]"),
    ("classes", "logits", torch.zeros(2, 2, 3), ValueError, "[2, 2, 3]"),
    ("classes", "logits", torch.zeros(4, 2), ValueError, "[4, 2]"),
    ("classes", "targets", [0, 1, 2, 0], TypeError, "list"),
    ("classes", "targets", GOOD.targets + 0j, TypeError, "torch.complex64"),
    ("classes", "targets", labels(0, 0.25, 1, 2), ValueError, "0.25"),
    ("classes", "targets", labels(0, 1, NAN, 2), ValueError, "nan"),
    ("classes", "targets", labels(0, 1, 2, 2.0**64), ValueError, "1.8446744"),
    ("classes", "targets", torch.tensor([0, -1, 1, 2]), ValueError, "-1"),
    ("classes", "targets", torch.tensor([0, 3, 1, 2]), ValueError, "3"),
    ("classes", "targets", labels(0, 1, 2, 156, dtype=torch.uint8), ValueError, "156"),
    ("classes", "targets", labels(0, 2**64 - 9, 2, 1, dtype=torch.uint64), ValueError,
        f"{2**64 - 9}"),
    ("binary", "targets", torch.tensor([-1, 1, 1, -1]), ValueError, "-1"),
    ("multilabel", "targets", torch.full((4, 3), 2), ValueError, "2"),
    ("classes", "targets", torch.zeros(3), ValueError, "[3]"),
    ("classes", "targets", torch.zeros(4, 1), ValueError, "[4, 1]"),
    ("classes", "targets", torch.zeros(4, 3), ValueError, "[4, 3]"),
    ("multilabel", "targets", torch.zeros(4), ValueError, "[4]"),
    ("classes", "targets", META, ValueError, "meta"),
    ("classes", "sample_weight", [1.0] * 4, TypeError, "list"),
    ("classes", "sample_weight", torch.ones(4) + 0j, TypeError, "torch.complex64"),
    ("classes", "sample_weight", labels(1, -2, 1, 1), ValueError, "-2"),
    ("classes", "sample_weight", labels(1, NAN, 1, 1), ValueError, "nan"),
    ("classes", "sample_weight", labels(1, 1e39, 1, 1, dtype=torch.float64), ValueError, "1e+39"),
    ("classes", "sample_weight", torch.ones(3), ValueError, "[3]"),
    ("classes", "sample_weight", torch.ones(4, 3), ValueError, "[4, 3]"),
    ("classes", "sample_weight", META, ValueError, "meta"),
    ("classes", "return_per_class", torch.ones(4), TypeError, ""),
    ("classes", "return_per_class", 1, TypeError, "1 (int)"),
    ("classes", "return_per_class", None, TypeError, "None"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "name", "value", "error", "got"), BAD_CALLS)
def test_bad_call_changes_nothing(
    kind: str, name: str, value: Any, error: type[Exception], got: str
) -> None:
    loss_fn = SmoothAPLoss(queue_size=8, **LOSSES[kind])
    more, good = (make_batch(n, loss_fn.num_classes, multilabel=loss_fn.multilabel) for n in (5, 4))
    more.through(loss_fn)
    before = state_of(loss_fn)
    arguments = {"logits": good.logits, "targets": good.targets, name: value}
    assert_refused(error, name, got, loss_fn, **arguments)
    assert_same_state(loss_fn, before)


@pytest.mark.parametrize("targets", [[0, 5], [0, 0.5], [1, -1]], ids=["beyond", "soft", "negative"])
def test_float64_logits_of_a_refused_call_do_not_widen_the_queue(targets: list[float]) -> None:
    loss_fn = SmoothAPLoss(2, 8)
    before = state_of(loss_fn)
    with pytest.raises(ValueError, match=r"^targets must"):
        loss_fn(torch.zeros(2, 2, dtype=torch.float64), torch.tensor(targets))
    assert_same_state(loss_fn, before)


# --- functional.smooth_ap ------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "value", "error", "got"), [
    ("scores", [1.0], TypeError, "list"),
    ("scores", torch.ones(2, 4).int(), TypeError, "torch.int32"),
    ("scores", torch.ones(1, 2, 4), ValueError, "[1, 2, 4]"),
    ("is_positive", [True], TypeError, "list"),
    ("is_positive", torch.ones(2, 4).int(), TypeError, "torch.int32"),
    ("is_positive", torch.ones(4).bool(), ValueError, "[4]"),
    ("is_positive", torch.ones(2, 4, device="meta").bool(), ValueError, "meta"),
    ("temperature", 0.0, ValueError, "0.0"),
    ("temperature", "1", TypeError, "'1' (str)"),
    ("temperature", torch.ones(3), ValueError, "[3]"),
    ("temperature", torch.tensor(1), TypeError, "torch.int64"),
    ("temperature", torch.tensor(1j), TypeError, "torch.complex64"),
    ("sample_weight", [1.0], TypeError, "list"),
    ("sample_weight", torch.ones(4) + 0j, TypeError, "torch.complex64"),
    ("sample_weight", torch.ones(2), ValueError, "[2]"),
    ("sample_weight", META, ValueError, "meta"),
    ("value", torch.ones(2), ValueError, "[2]"),
    ("backend", "cuda", ValueError, "'cuda'"),
])  # fmt: skip
def test_bad_argument_of_smooth_ap(name: str, value: Any, error: type[Exception], got: str) -> None:
    scores = make_batch(4, 2).logits.T
    assert_refused(
        error, name, got, smooth_ap, **{"scores": scores, "is_positive": scores > 0, name: value}
    )


def test_a_temperature_for_all_classes_may_be_on_the_host() -> None:
    scores = torch.zeros(2, 4, device="meta")
    assert smooth_ap(scores, scores > 0, torch.tensor(0.1)).ap.is_meta


# --- Tensors that are no dense ones --------------------------------------------------------------


def in_parts(tensor: Tensor, layout: torch.layout) -> Tensor:
    return torch.nested.nested_tensor([tensor[:1], tensor[1:]], layout=layout)


NOT_DENSE: dict[str, tuple[Callable[[Tensor], Tensor], str, str]] = {
    "sparse": (Tensor.to_sparse, "got layout torch.sparse_coo", ".to_dense()"),
    "mkldnn": (Tensor.to_mkldnn, "got layout torch._mkldnn", ".to_dense()"),
    "quantized": (lambda it: torch.quantize_per_tensor(it, 0.1, 0, torch.qint8),
        "got quantized torch.qint8", ".dequantize()"),
    "nested": (lambda it: in_parts(it, torch.strided), "got a nested one",
        "torch.cat({}.unbind())"),
    "jagged": (lambda it: in_parts(it, torch.jagged), "got a nested one",
        "torch.cat({}.unbind())"),
    "distributed": (lambda it: DTensor.from_local(it, init_device_mesh("cpu", (1,))),
        "got a DTensor", ".full_tensor()"),
}  # fmt: skip


@pytest.fixture
def _alone() -> Iterator[None]:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")  # that quantised and nested tensors will change
@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize("kind", NOT_DENSE)
def test_tensors_that_are_not_dense(kind: str) -> None:
    """In every place, and the fix is right: it gives a plain tensor of these values."""
    change, got, fix = NOT_DENSE[kind]
    rows = {"logits": GOOD.logits, "targets": GOOD.targets.float(), "sample_weight": torch.ones(4)}
    scores = {"scores": GOOD.logits.T.contiguous(), "is_positive": GOOD.logits.T > 0}
    calls: list[tuple[Any, dict[str, Tensor], str]] = [
        (loss_fn, rows, name) for loss_fn in (SmoothAPLoss(3), CrossEntropy(3)) for name in rows
    ]
    calls += [(smooth_ap, scores, "scores"), (score_spread, {}, "scores")]
    for called, others, name in calls:
        value = change((others or scores)[name])
        with pytest.raises(TypeError, match=f"^{name} must be a dense tensor, {got}; ") as caught:
            called(**{**others, name: value})
        code = str(caught.value).partition("; use ")[2]
        assert code == (fix.format(name) if "{}" in fix else name + fix)
        mended = eval(code, {"torch": torch, name: value})
        torch.testing.assert_close(mended, (others or scores)[name], atol=0.06, rtol=0)


# --- Conversions that are documented -------------------------------------------------------------

UNSIGNED = (torch.uint8, torch.uint16, torch.uint32, torch.uint64)
SIGNED = (torch.int8, torch.int16, torch.int32, torch.int64)
INTEGERS = (*UNSIGNED, *SIGNED)
FLOATS = (torch.float8_e5m2, torch.float16, torch.bfloat16, torch.float32, torch.float64)
KINDS = pytest.mark.parametrize("kind", LOSSES)


def loss_and_rows(kind: str, targets: Callable[[Tensor], Tensor]) -> tuple[float, list[Any]]:
    """The second of two losses, ranked with the queue, and the rows in the queue."""
    loss_fn = SmoothAPLoss(queue_size=16, temperature=0.2, **LOSSES[kind])
    for seed in range(2):
        batch = make_batch(6, loss_fn.num_classes, seed=seed, multilabel=loss_fn.multilabel)
        loss = loss_fn(batch.logits, targets(batch.targets))
    return loss.item(), queued_rows(loss_fn)


@KINDS
@pytest.mark.parametrize("dtype", [*INTEGERS, *FLOATS], ids=str)
def test_targets_of_any_dtype_agree(dtype: torch.dtype, kind: str) -> None:
    assert loss_and_rows(kind, lambda it: it.to(dtype)) == loss_and_rows(kind, lambda it: it)


@pytest.mark.parametrize("dtype", [*SIGNED, *FLOATS[1:]], ids=str)
@KINDS
def test_ignore_index_of_any_dtype_agrees(kind: str, dtype: torch.dtype) -> None:
    def with_ignored(targets: Tensor) -> Tensor:
        return targets.index_fill(0, torch.tensor([1, 4]), IGNORED)

    expected = loss_and_rows(kind, with_ignored)
    assert loss_and_rows(kind, lambda it: with_ignored(it).to(dtype)) == expected
    assert expected != loss_and_rows(kind, lambda it: it)


@pytest.mark.parametrize("integer", [np.int64, np.int32, np.uint8], ids=lambda it: it.__name__)
def test_numpy_integers_in_the_constructor(integer: Callable[[int], Any]) -> None:
    plain = SmoothAPLoss(3, 8, 0.2, ignore_index=7, max_pool_size=6)
    loss_fn = SmoothAPLoss(
        integer(3), integer(8), 0.2, ignore_index=integer(7), max_pool_size=integer(6)
    )
    assert repr(loss_fn) == repr(plain)
    for seed in range(3):
        batch, other = (make_batch(9, 3, seed=seed).leaf() for _ in range(2))
        batch.through(plain).backward()
        other.through(loss_fn).backward()
        torch.testing.assert_close(other.logits.grad, batch.logits.grad, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bool, *INTEGERS, *FLOATS], ids=str)
def test_weights_of_any_real_dtype_agree(dtype: torch.dtype) -> None:
    batch = make_batch(6)
    weights = torch.tensor([1, 0, 1, 1, 0, 1])
    kept = weights.nonzero().flatten()
    scores, is_positive = batch.logits.T, batch.targets[None] == 1
    for weighted, plain in (
        (SmoothAPLoss(1, 0, 0.2), SmoothAPLoss(1, 0, 0.2)),
        (CrossEntropy(1), CrossEntropy(1)),
    ):
        found = weighted(batch.logits, batch.targets, sample_weight=weights.to(dtype))
        torch.testing.assert_close(found, plain(batch.logits[kept], batch.targets[kept]))
    found, _ = smooth_ap(scores, is_positive, 0.2, sample_weight=weights.to(dtype))
    assert found == smooth_ap(scores[:, kept], is_positive[:, kept], 0.2).ap
    found = score_spread(scores, weights.to(dtype))
    torch.testing.assert_close(found, score_spread(scores[:, kept]))


@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.float8_e4m3fn], ids=str)
def test_float8_is_computed_in_float32(dtype: torch.dtype) -> None:
    batch = make_batch(9)
    logits, is_positive = batch.logits.to(dtype), batch.targets == 1
    for loss_fn in (SmoothAPLoss(1, 0, 0.2), CrossEntropy(1)):
        found = loss_fn(logits, batch.targets)
        assert found.dtype == torch.float32
        assert found == loss_fn(logits.float(), batch.targets)
    found, _ = smooth_ap(logits[:, 0], is_positive)
    assert found == smooth_ap(logits[:, 0].float(), is_positive).ap


# --- Value checks can be turned off --------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "weights"),
    [([0, 1, 7, -3], None), ([0.0, 1, 0.5, 0], None), ([0, 1, 0, 0], [1.0, 1, -2, 1])],
    ids=["labels", "soft", "weights"],
)
@pytest.mark.parametrize("loss_class", [SmoothAPLoss, CrossEntropy])
def test_without_check_values_values_are_not_looked_at(
    loss_class: Any, targets: list[float], weights: list[float] | None
) -> None:
    """Shapes and dtypes still are."""
    logits, trusting = make_batch(4).logits, loss_class(1)
    trusting.check_values = False
    sample_weight = None if weights is None else torch.tensor(weights)
    trusting(logits, torch.tensor(targets), sample_weight=sample_weight)
    with pytest.raises(ValueError, match=r"^(targets|sample_weight) must"):
        loss_class(1)(logits, torch.tensor(targets), sample_weight=sample_weight)
    with pytest.raises(ValueError, match=r"^targets must"):
        trusting(logits, torch.zeros(3))
    with pytest.raises(TypeError, match=r"^logits must"):
        trusting(logits.int(), torch.zeros(4))
