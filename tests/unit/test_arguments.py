"""Bad input: the error that it gives, and that it changes nothing; good input: what it becomes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

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


class Bad(NamedTuple):
    """A call, and what its error must say: the argument first, then each of `says`.

    Calls of a loss get one of the `kind` in LOSSES.
    """

    call: Callable[..., Any]
    error: type[Exception]
    name: str
    says: tuple[str, ...]
    kind: str = "classes"


def table(**rows: Bad) -> Any:
    return pytest.mark.parametrize("bad", [pytest.param(bad, id=id_) for id_, bad in rows.items()])


def assert_raises(bad: Bad, *args: Any) -> None:
    with pytest.raises(bad.error, match=rf"^{bad.name} must ") as caught:
        bad.call(*args)
    assert type(caught.value) is bad.error
    message = str(caught.value)
    for part in bad.says:
        assert part in message, message


# --- The constructor -----------------------------------------------------------------------------


def new(name: str, value: Any, error: type[Exception], *says: str, **others: Any) -> Bad:
    arguments = {"num_classes": 3, **others, name: value}
    return Bad(lambda: SmoothAPLoss(**arguments), error, name, says)


@table(
    num_classes_zero=new("num_classes", 0, ValueError, "an int >= 1", "got 0"),
    num_classes_bool=new("num_classes", True, TypeError, "an int >= 1", "got True (bool)"),
    num_classes_float=new("num_classes", 2.0, TypeError, "an int >= 1", "got 2.0 (float)"),
    queue_size_negative=new("queue_size", -1, ValueError, "an int >= 0", "got -1"),
    queue_size_float=new("queue_size", 8.0, TypeError, "an int >= 0", "got 8.0 (float)"),
    temperature_zero=new("temperature", 0, ValueError, "finite and > 0", "got 0"),
    temperature_nan=new("temperature", NAN, ValueError, "finite and > 0", "got nan"),
    temperature_inf=new("temperature", INF, ValueError, "finite and > 0", "got inf"),
    temperature_str=new("temperature", "x", TypeError, "a float > 0", "got 'x' (str)"),
    temperature_complex=new("temperature", 1j, TypeError, "a float > 0", "got 1j (complex)"),
    reduction_unknown=new("reduction", "avg", ValueError, "'mean', 'sum', 'none'", "got 'avg'"),
    ignore_index_float=new("ignore_index", 1.5, TypeError, "must be an int, got 1.5 (float)"),
    ignore_index_0_binary=new("ignore_index", 0, ValueError, "num_classes=1", "got 0",
        num_classes=1),
    ignore_index_0_multilabel=new("ignore_index", 0, ValueError, "multilabel=True", "got 0",
        multilabel=True),
    update_queue_in_eval_int=new("update_queue_in_eval", 1, TypeError, "True or False",
        "got 1 (int)"),
    gather_distributed_str=new("gather_distributed", "yes", TypeError, "True or False",
        "got 'yes' (str)"),
    max_pool_size_one=new("max_pool_size", 1, ValueError, "an int >= 2", "got 1"),
    max_pool_size_float=new("max_pool_size", 2.5, TypeError, "an int >= 2", "got 2.5 (float)"),
    multilabel_int=new("multilabel", 1, TypeError, "True or False", "got 1 (int)"),
    temperature_unit_unknown=new("temperature_unit", "sd", ValueError, "'score', 'spread'",
        "got 'sd'"),
    queue_follows_shift_int=new("queue_follows_shift", 1, TypeError, "True or False",
        "got 1 (int)"),
)  # fmt: skip
def test_bad_constructor_argument(bad: Bad) -> None:
    assert_raises(bad)


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


@pytest.mark.parametrize((
    "value",
    "error",
), [
    (0.0, ValueError),
    (-0.1, ValueError),
    (NAN, ValueError),
    (INF, ValueError),
    ("0.1", TypeError),
    (None, TypeError),
    (True, TypeError),
    (torch.tensor(0.1), TypeError),
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


def call(
    name: str,
    value: Any,
    error: type[Exception],
    *says: str,
    kind: str = "classes",
    **others: Any,
) -> Bad:
    """A forward pass of four good rows but for one argument (`others` replaces more of them)."""
    options = LOSSES[kind]
    batch = make_batch(4, options["num_classes"], multilabel=kind == "multilabel")
    arguments = {"logits": batch.logits, "targets": batch.targets, **others, name: value}

    def forward(loss_fn: SmoothAPLoss) -> Any:
        return loss_fn(**arguments)

    return Bad(forward, error, name, says, kind)


def labels(*values: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(values, dtype=dtype)


GOOD = make_batch(4, 3)

BAD_LOGITS = {
    "list": call("logits", [[0.0] * 3] * 4, TypeError, "a torch.Tensor", "got list"),
    "int": call("logits", GOOD.logits.long(), TypeError, "floating point", "got torch.int64"),
    "complex": call("logits", GOOD.logits + 0j, TypeError, "floating point",
        "got torch.complex64"),
    "one-dimensional": call("logits", torch.zeros(4), ValueError, "[N, 3]", "got [4]"),
    "one-dimensional-binary": call("logits", torch.zeros(4), ValueError, "[N, 1]", "got [4]",
        "logits.unsqueeze(1)", kind="binary"),
    "sequences": call("logits", torch.zeros(2, 2, 3), ValueError, "[N, 3]", "got [2, 2, 3]",
        "logits.reshape(-1, num_classes)"),
    "wrong-classes": call("logits", torch.zeros(4, 2), ValueError, "[N, 3]", "got [4, 2]"),
}  # fmt: skip

IN_0_2 = ("integers in 0..2", "ignore_index=-100")
ZERO_OR_ONE = ("0 or 1", "ignore_index=-100")

BAD_TARGETS = {
    "list": call("targets", [0, 1, 2, 0], TypeError, "a torch.Tensor", "got list"),
    "complex": call("targets", GOOD.targets + 0j, TypeError, "integers", "got torch.complex64"),
    "soft": call("targets", labels(0, 0.25, 1, 2), ValueError, *IN_0_2, "got 0.25"),
    "nan": call("targets", labels(0, 1, NAN, 2), ValueError, *IN_0_2, "got nan"),
    "beyond-int64": call("targets", labels(0, 1, 2, 2.0**64), ValueError, *IN_0_2,
        "got 1.8446744"),
    "negative": call("targets", torch.tensor([0, -1, 1, 2]), ValueError, *IN_0_2, "got -1"),
    "num-classes": call("targets", torch.tensor([0, 3, 1, 2]), ValueError, *IN_0_2, "got 3"),
    "uint8-156": call("targets", labels(0, 1, 2, 156, dtype=torch.uint8), ValueError, *IN_0_2,
        "got 156"),
    "minus-one-and-one": call("targets", torch.tensor([-1, 1, 1, -1]), ValueError, *ZERO_OR_ONE,
        "got -1", kind="binary"),
    "two-in-multilabel": call("targets", torch.full((4, 3), 2), ValueError, *ZERO_OR_ONE, "got 2",
        kind="multilabel"),
    "too-few": call("targets", torch.zeros(3), ValueError, "[4]", "got [3]"),
    "column-of-classes": call("targets", torch.zeros(4, 1), ValueError, "[4]", "got [4, 1]"),
    "matrix": call("targets", torch.zeros(4, 3), ValueError, "[4]", "got [4, 3]",
        "multilabel=True"),
    "vector-in-multilabel": call("targets", torch.zeros(4), ValueError, "[4, 3]", "got [4]",
        kind="multilabel"),
    "beyond-int64-in-uint64": call("targets", torch.tensor([0, 1, 2, 2**64 - 100],
        dtype=torch.uint64), ValueError, *IN_0_2, f"got {2**64 - 100}"),
    "other-device": call("targets", GOOD.targets.to("meta"), ValueError, "device", "cpu",
        "got meta"),
}  # fmt: skip

BAD_WEIGHTS = {
    "list": call("sample_weight", [1.0] * 4, TypeError, "a torch.Tensor", "got list"),
    "complex": call("sample_weight", torch.ones(4) + 0j, TypeError, "real", "got torch.complex64"),
    "negative": call("sample_weight", labels(1, -2, 1, 1), ValueError, "finite and >= 0",
        "got -2"),
    "nan": call("sample_weight", labels(1, NAN, 1, 1), ValueError, "finite and >= 0", "got nan"),
    "beyond-float32": call("sample_weight", labels(1, 1e39, 1, 1, dtype=torch.float64), ValueError,
        "finite and >= 0", "got 1e+39"),
    "too-few": call("sample_weight", torch.ones(3), ValueError, "[4]", "got [3]"),
    "per-class": call("sample_weight", torch.ones(4, 3), ValueError, "[4]", "got [4, 3]"),
    "other-device": call("sample_weight", torch.ones(4, device="meta"), ValueError, "device",
        "cpu", "got meta"),
}  # fmt: skip

BAD_FLAGS = {
    "tensor": call("return_per_class", torch.ones(4), TypeError, "True or False", "(Tensor)"),
    "int": call("return_per_class", 1, TypeError, "True or False", "got 1 (int)"),
    "none": call("return_per_class", None, TypeError, "True or False", "got None"),
}

BAD_CALLS = [
    pytest.param(bad, id=f"{name}-{id_}")
    for name, group in (
        ("logits", BAD_LOGITS),
        ("targets", BAD_TARGETS),
        ("sample_weight", BAD_WEIGHTS),
        ("return_per_class", BAD_FLAGS),
    )
    for id_, bad in group.items()
]


@pytest.mark.parametrize("bad", BAD_CALLS)
def test_bad_call_changes_nothing(bad: Bad) -> None:
    loss_fn = SmoothAPLoss(queue_size=8, **LOSSES[bad.kind])
    make_batch(5, loss_fn.num_classes, multilabel=loss_fn.multilabel).through(loss_fn)
    before = state_of(loss_fn)
    assert_raises(bad, loss_fn)
    assert_same_state(loss_fn, before)


@pytest.mark.parametrize("targets", [[0, 5], [0, 0.5], [1, -1]], ids=["beyond", "soft", "negative"])
def test_float64_logits_of_a_refused_call_do_not_widen_the_queue(targets: list[float]) -> None:
    loss_fn = SmoothAPLoss(2, 8)
    before = state_of(loss_fn)
    with pytest.raises(ValueError, match=r"^targets must"):
        loss_fn(torch.zeros(2, 2, dtype=torch.float64), torch.tensor(targets))
    assert_same_state(loss_fn, before)


# --- functional.smooth_ap ------------------------------------------------------------------------


def function(name: str, value: Any, error: type[Exception], *says: str, **others: Any) -> Bad:
    scores = make_batch(4, 2).logits.T
    arguments = {"scores": scores, "is_positive": scores > 0, **others, name: value}
    return Bad(lambda: smooth_ap(**arguments), error, name, says)


@table(
    scores_list=function("scores", [1.0], TypeError, "a torch.Tensor", "got list"),
    scores_int=function("scores", torch.ones(2, 4).int(), TypeError, "floating",
        "got torch.int32"),
    scores_3d=function("scores", torch.ones(1, 2, 4), ValueError, "[C, M]", "got [1, 2, 4]"),
    is_positive_list=function("is_positive", [True], TypeError, "a torch.Tensor", "got list"),
    is_positive_int=function("is_positive", torch.ones(2, 4).int(), TypeError, "bool",
        "got torch.int32", "targets == 1"),
    is_positive_shape=function("is_positive", torch.ones(4).bool(), ValueError, "[2, 4]",
        "got [4]"),
    is_positive_device=function("is_positive", torch.ones(2, 4, device="meta").bool(), ValueError,
        "cpu", "got meta"),
    temperature_zero=function("temperature", 0.0, ValueError, "finite and > 0", "got 0.0"),
    temperature_str=function("temperature", "1", TypeError, "a float > 0", "got '1' (str)"),
    temperature_shape=function("temperature", torch.ones(3), ValueError, "[2] or []", "[3]"),
    temperature_int_tensor=function("temperature", torch.tensor(1), TypeError,
        "got torch.int64; use temperature.float()"),
    temperature_complex_tensor=function("temperature", torch.tensor(1j), TypeError, "float",
        "got torch.complex64"),
    sample_weight_list=function("sample_weight", [1.0], TypeError, "a torch.Tensor", "got list"),
    sample_weight_complex=function("sample_weight", torch.ones(4) + 0j, TypeError, "real",
        "got torch.complex64"),
    sample_weight_shape=function("sample_weight", torch.ones(2), ValueError,
        "[4] or [2, 4] to fit scores [2, 4], got [2]"),
    sample_weight_device=function("sample_weight", torch.ones(4, device="meta"), ValueError, "cpu",
        "got meta"),
    backend_unknown=function("backend", "cuda", ValueError, "'auto', 'dense'", "got 'cuda'"),
)  # fmt: skip
def test_bad_argument_of_smooth_ap(bad: Bad) -> None:
    assert_raises(bad)


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


class Trusting(SmoothAPLoss):
    check_values = False


@pytest.mark.parametrize(
    ("targets", "weights"),
    [([0, 1, 7, -3], None), ([0.0, 1, 0.5, 0], None), ([0, 1, 0, 0], [1.0, 1, -2, 1])],
    ids=["labels", "soft", "weights"],
)
def test_without_check_values_values_are_not_looked_at(
    targets: list[float], weights: list[float] | None
) -> None:
    logits = make_batch(4).logits
    sample_weight = None if weights is None else torch.tensor(weights)
    Trusting(1, 0)(logits, torch.tensor(targets), sample_weight=sample_weight)
    with pytest.raises(ValueError, match=r"^(targets|sample_weight) must"):
        SmoothAPLoss(1, 0)(logits, torch.tensor(targets), sample_weight=sample_weight)


def test_without_check_values_shapes_and_dtypes_still_are() -> None:
    with pytest.raises(ValueError, match=r"^targets must"):
        Trusting(1, 0)(torch.zeros(4, 1), torch.zeros(3))
    with pytest.raises(TypeError, match=r"^logits must"):
        Trusting(1, 0)(torch.zeros(4, 1).int(), torch.zeros(4))
