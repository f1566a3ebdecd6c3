"""Uses that people reported in public as failing, of other libraries most of them, tried here.

Two losses are in the same state where they make the same of the steps to come (`future`).
"""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from imbalanced_losses import CrossEntropy, MixedLoss, SmoothAPLoss
from imbalanced_losses.functional import smooth_ap
from tests.helpers.cases import seeded
from tests.helpers.ranks import Ranks
from tests.helpers.rows import Batch, make_batch

LOSSES: dict[str, Callable[[], Any]] = {
    "binary": lambda: SmoothAPLoss(1, 8, 0.2),
    "capped": lambda: SmoothAPLoss(3, 8, 0.2, max_pool_size=6),
    "multilabel": lambda: SmoothAPLoss(3, 8, 0.2, multilabel=True),
    "mix": lambda: MixedLoss(
        CrossEntropy(1),
        SmoothAPLoss(1, 8, 0.2),
        main_weight=0.9,
        warmup_steps=1,
        blend_steps=9,
        temperature=(0.3, 0.1, 9),
    ),
}
EACH_LOSS = pytest.mark.parametrize("name", LOSSES)
OF_TOOLS = pytest.mark.filterwarnings("ignore")  # of other packages, about themselves


def ranking(loss_fn: Any) -> SmoothAPLoss:
    found: SmoothAPLoss = getattr(loss_fn, "main_loss", loss_fn)
    return found


def steps_of(loss_fn: Any, seeds: range, num_rows: int = 5) -> list[float]:
    own = ranking(loss_fn)
    found = []
    for seed in seeds:
        batch = make_batch(num_rows, own.num_classes, seed=seed, multilabel=own.multilabel)
        found.append(float(batch.through(loss_fn)))
    return found


def future(loss_fn: Any) -> list[float]:
    """The temperature, then what a copy makes of training steps to come."""
    copied = copy.deepcopy(loss_fn).train()
    return [ranking(copied).temperature, *steps_of(copied, range(900, 906))]


def used(name: str, **settings: float) -> Any:
    """A loss in the middle of training."""
    loss_fn = LOSSES[name]()
    steps_of(loss_fn, range(3))
    for key, value in settings.items():
        setattr(ranking(loss_fn), key, value)
    return loss_fn


class Net(nn.Module):
    """A model that holds its loss."""

    def __init__(self, loss_fn: Any = None, seed: int = 7) -> None:
        super().__init__()
        self.loss = LOSSES["binary"]() if loss_fn is None else loss_fn
        self.linear = nn.Linear(4, ranking(self.loss).num_classes)
        for parameter in self.linear.parameters():
            nn.init.normal_(parameter, generator=seeded(seed))

    def forward(self, features: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        logits = self.linear(features)
        loss: Tensor = self.loss(logits, targets, sample_weight=weights)
        return loss


def fed(net: Net, seed: int) -> tuple[Tensor, Tensor]:
    """Six rows for such a model."""
    own = ranking(net.loss)
    targets = make_batch(6, own.num_classes, multilabel=own.multilabel).targets
    return torch.randn(6, 4, generator=seeded(seed)), targets


def trained(net: Net, seeds: range, after: Callable[[], Any] = lambda: None) -> Net:
    for seed in seeds:
        net.zero_grad()
        net(*fed(net, seed)).backward()
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.sub_(0.1 * parameter.grad)
        after()
    return net


# --- State is no weight: tools that average, broadcast, cast or share ----------------------------


@EACH_LOSS
def test_the_state_of_a_loss_is_one_tensor_that_is_no_weight(name: str) -> None:
    """Its size is set by the arguments alone, so that no tool meets another; bl0/moco #15."""
    loss_fn = used(name)
    assert list(loss_fn.buffers()) == list(loss_fn.parameters()) == []
    new, old = LOSSES[name]().state_dict(), loss_fn.state_dict()
    keys = ["_extra_state"] if name != "mix" else ["_extra_state", "main_loss._extra_state"]
    assert sorted(old) == keys
    for key, value in old.items():
        assert value.dtype == torch.uint8
        assert value.shape == new[key].shape
    partner = CrossEntropy(3, class_weight=torch.ones(3))
    assert list(partner.buffers()) == list(partner.state_dict()) == []


AVERAGES: dict[str, dict[str, Any]] = {
    "ema": {"multi_avg_fn": get_ema_multi_avg_fn(0.9), "use_buffers": True},
    "ema-by-tensor": {"avg_fn": get_ema_avg_fn(0.9), "use_buffers": True},
    "swa": {"use_buffers": True},
}


@pytest.mark.parametrize("average", AVERAGES.values(), ids=AVERAGES)
@EACH_LOSS
def test_averaging_the_weights_of_a_model_that_holds_the_loss(
    name: str, average: dict[str, Any]
) -> None:
    """The average loads, and nothing is done to the queue it is taken of; pytorch/pytorch #84053"""
    net = Net(LOSSES[name]())
    averaged = AveragedModel(net, **average)
    trained(net, range(4), after=lambda: averaged.update_parameters(net))
    assert future(net.loss) == future(trained(Net(LOSSES[name]()), range(4)).loss)

    loaded = trained(Net(LOSSES[name]()), range(2))
    loaded.load_state_dict(averaged.module.state_dict())
    assert loaded.linear.weight.equal(averaged.module.linear.weight)
    assert future(loaded.loss) == future(averaged.module.loss) == future(LOSSES[name]())


MEANS: dict[str, Callable[[Tensor], Tensor]] = {
    "float32": lambda stack: stack.float().mean(0),
    "float64": lambda stack: stack.double().mean(0),
    "bfloat16": lambda stack: stack.to(torch.bfloat16).mean(0),
    "as-before": lambda stack: stack.double().mean(0).to(stack.dtype),
    "ema": lambda stack: 0.9 * stack[0] + 0.1 * stack[-1],
}


@pytest.mark.parametrize("mean", MEANS.values(), ids=MEANS)
@EACH_LOSS
def test_the_mean_of_checkpoints(name: str, mean: Callable[[Tensor], Tensor]) -> None:
    """The loss goes on without a queue, and says so once; pytorch/pytorch #84053."""
    saved = [trained(Net(LOSSES[name]()), range(n)).state_dict() for n in (2, 3, 5)]
    averaged = {key: mean(torch.stack([state[key] for state in saved])) for key in saved[0]}
    net = trained(Net(LOSSES[name]()), range(20, 24))
    ranking(net.loss).temperature = 0.17
    expected = copy.deepcopy(net.loss)
    ranking(expected).reset_queue()
    with pytest.warns(UserWarning, match=r"loss\.(main_loss\.)?_extra_state") as said:
        net.load_state_dict(averaged)
    assert len(said) == sum(key.endswith("_extra_state") for key in saved[0])
    assert future(net.loss) == future(expected)


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "half": lambda module: module.half(),
    "bfloat16": lambda module: module.bfloat16(),
    "double": lambda module: module.double(),
    "type": lambda module: module.type(torch.float64),
    "share_memory": lambda module: module.share_memory(),
    "initialise": lambda module: [nn.init.zeros_(b) for b in module.buffers()],
    "roll": lambda module: [b.data.copy_(b.data.flip(0)) for b in module.buffers() if b.dim()],
    "low-precision-buffers": lambda module: [
        setattr(b, "data", b.data.bfloat16()) for b in module.buffers() if b.is_floating_point()
    ],
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@EACH_LOSS
def test_what_is_done_to_all_tensors_of_a_model(
    name: str, change: Callable[[nn.Module], Any]
) -> None:
    """Casts, shared memory, initialisation, buffers by the list; huggingface/transformers #30709"""
    loss_fn = used(name)
    expected = future(loss_fn)
    change(nn.ModuleList([loss_fn]))
    assert future(loss_fn) == expected
    loaded = LOSSES[name]()
    loaded.load_state_dict(loss_fn.state_dict())
    assert future(loaded) == expected


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


CONTEXTS: dict[str, Callable[[], Any]] = {
    "inference": torch.inference_mode,
    **{f"{t}": partial(default_dtype, t) for t in (torch.bfloat16, torch.float16, torch.float64)},
}


@EACH_LOSS
def test_a_loss_built_without_memory_and_given_a_checkpoint(name: str) -> None:
    """The meta device and assign=True, diagnosed too; pytorch/pytorch #102212."""
    loss_fn = used(name)
    with torch.device("meta"):
        loaded = LOSSES[name]()
    loaded.load_state_dict(loss_fn.state_dict(), assign=True)
    assert future(loaded) == future(loss_fn)
    own = ranking(loss_fn)
    batch = make_batch(5, own.num_classes, multilabel=own.multilabel)
    found, expected = (
        ranking(each).diagnose(batch.logits, batch.targets) for each in (loaded, loss_fn)
    )
    assert found.ap.equal(expected.ap)
    assert found.pool_size.equal(expected.pool_size)


@pytest.mark.parametrize("assign", [None, False, True], ids=["built", "loaded", "assigned"])
@pytest.mark.parametrize("within", CONTEXTS.values(), ids=CONTEXTS)
@EACH_LOSS
def test_a_loss_built_in_a_mode_that_ends_trains(
    name: str, within: Callable[[], Any], assign: bool | None
) -> None:
    """As trainers in low precision build their models, and servers that also learn;
    huggingface/transformers #30709, sgl-project/sglang #33470.
    """
    with within():
        loss_fn = copy.deepcopy(LOSSES[name]()).double()
        if assign is not None:
            loss_fn.load_state_dict(LOSSES[name]().state_dict(), assign=assign)
    steps_of(loss_fn, range(3))
    assert future(loss_fn) == future(used(name))


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda loss_fn: pickle.loads(pickle.dumps(loss_fn)),
    "torch.multiprocessing": lambda loss_fn: pickle.loads(ForkingPickler.dumps(loss_fn)),
}


@pytest.mark.parametrize("way", COPIES.values(), ids=COPIES)
@EACH_LOSS
def test_a_copy_trains_by_itself(name: str, way: Callable[[Any], Any]) -> None:
    """A copy starts where the loss is and leaves it there, one that another process gets too;
    pytorch/pytorch #84053, Lightning-AI/pytorch-lightning #18238.
    """
    loss_fn = used(name)
    expected = future(loss_fn)
    copied = way(loss_fn)
    assert future(copied) == expected
    steps_of(copied, range(50, 53))
    assert future(loss_fn) == expected
    assert future(copied) != expected


# --- Tools that save and load models -------------------------------------------------------------


@EACH_LOSS
def test_calling_a_model_with_its_own_state_dict(name: str) -> None:
    """functional_call takes what state_dict gives; Lightning-AI/pytorch-lightning #21124."""
    net = trained(Net(LOSSES[name]()), range(3)).eval()
    given = fed(net, 9)
    found = torch.func.functional_call(net, net.state_dict(), given)
    assert found.equal(net(*given))
    torch.func.functional_call(net, net.state_dict(), given)
    assert set(net.state_dict()) == set(Net(LOSSES[name]()).state_dict())


def by_dcp(source: Net, target: Net, folder: Path) -> None:
    dcp.save({"model": get_model_state_dict(source)}, checkpoint_id=folder / "dcp")
    state = {"model": get_model_state_dict(target)}
    dcp.load(state, checkpoint_id=folder / "dcp")
    set_model_state_dict(target, state["model"])


def by_dcp_of_modules(source: Net, target: Net, folder: Path) -> None:
    dcp.save({"model": source}, checkpoint_id=folder / "dcp")
    dcp.load({"model": target}, checkpoint_id=folder / "dcp")


def by_full_state_dict(source: Net, target: Net, folder: Path) -> None:
    options = StateDictOptions(full_state_dict=True)
    torch.save(get_model_state_dict(source, options=options), folder / "model.pt")
    set_model_state_dict(target, torch.load(folder / "model.pt"), options=options)


def by_broadcast(source: Net, target: Net, folder: Path) -> None:
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    state = get_model_state_dict(source, options=options)
    set_model_state_dict(target, state if dist.get_rank() == 0 else {}, options=options)


def by_safetensors(source: Net, target: Net, folder: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_model(source, str(folder / "model.safetensors"))
    safetensors.load_model(target, str(folder / "model.safetensors"))


def by_accelerate(source: Net, target: Net, folder: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    torch.save(source.state_dict(), folder / "pytorch_model.bin")
    accelerate.load_checkpoint_in_model(target, str(folder), strict=True)


OF_PACKAGES = [pytest.param(way, marks=pytest.mark.slow) for way in (by_safetensors, by_accelerate)]
WAYS = [by_dcp, by_dcp_of_modules, by_full_state_dict, *OF_PACKAGES]


@OF_TOOLS
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", [*LOSSES, "no-queue"])
def test_checkpoints_of_a_model_that_holds_the_loss(
    name: str, way: Callable[[Net, Net, Path], None], tmp_path: Path
) -> None:
    """What saves and loads a model carries the loss; Lightning-AI/pytorch-lightning #21124."""
    make = LOSSES.get(name, lambda: SmoothAPLoss(1, 0, 0.2, max_pool_size=4))
    net, loaded = trained(Net(make()), range(4)), Net(make(), seed=8)
    ranking(net.loss).temperature = 0.11
    way(net, loaded, tmp_path)
    assert loaded.linear.weight.equal(net.linear.weight)
    assert future(loaded.loss) == future(net.loss)


def resume_sharded(rank: int, name: str, way: Callable[..., None], folder: Path) -> Any:
    from torch.distributed.fsdp import fully_shard

    warnings.simplefilter("ignore")
    net, loaded = Net(LOSSES[name]()), Net(LOSSES[name](), seed=8)
    for each in (net, loaded):
        fully_shard(each)
    for seed in range(3):
        net(*fed(net, 10 * rank + seed)).backward()
    folder = folder if way is not by_full_state_dict else folder / f"of_{rank}"
    folder.mkdir(exist_ok=True)
    way(net, loaded, folder)
    same = loaded.linear.weight.full_tensor().equal(net.linear.weight.full_tensor())
    return same, future(loaded.loss) == future(net.loss)


@pytest.mark.parametrize("way", [by_dcp, by_dcp_of_modules, by_full_state_dict, by_broadcast])
def test_checkpoints_of_a_sharded_model(
    way: Callable[[Net, Net, Path], None], tmp_path: Path, ranks: Ranks
) -> None:
    """FSDP2 with the loss inside; Lightning-AI/pytorch-lightning #21124."""
    assert ranks.run(resume_sharded, "mix", way, tmp_path) == [(True, True)] * 2


# --- Processes -----------------------------------------------------------------------------------

SETTINGS: dict[str, dict[str, Any]] = {
    "sums": {"gather": "sums"},
    "not-gathered": {"gather_distributed": False},
}


def train_inside_and_outside(rank: int, setting: str, is_weighted: bool) -> list[list[Tensor]]:
    """Losses and gradients of a model that holds its loss, and of one beside its loss."""
    found = []
    for is_inside in (True, False):
        plain = Net(SmoothAPLoss(1, 8, 0.1, **SETTINGS[setting]))
        loss_fn = plain.loss
        if not is_inside:
            plain.loss, plain.forward = None, plain.linear.forward  # type: ignore[method-assign]
        wrapped = DistributedDataParallel(plain)
        steps = []
        for seed in range(4):
            wrapped.zero_grad()
            features, targets = fed(Net(), 100 * rank + seed)
            targets[1] = rank % 2  # another share of positives
            weights = torch.arange(1.0, 7.0) if is_weighted and rank % 2 == 1 else None
            if is_inside:
                loss = wrapped(features, targets, weights)
            else:
                loss = loss_fn(wrapped(features), targets, sample_weight=weights)
            loss.backward()
            steps += [loss.detach(), *(p.grad.clone() for p in plain.parameters())]
        found.append(steps)
    return found


@pytest.mark.parametrize("is_weighted", [False, True], ids=["", "weights-on-one"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_loss_inside_a_ddp_module(setting: str, is_weighted: bool, ranks: Ranks) -> None:
    """Queues that differ by process, with the default broadcast_buffers=True; bl0/moco #15."""
    for inside, outside in ranks.run(train_inside_and_outside, setting, is_weighted):
        torch.testing.assert_close(inside, outside, rtol=0, atol=0)


# --- Arguments of a call -------------------------------------------------------------------------


class Scan(Tensor):
    """A tensor that carries something along, as MONAI's MetaTensor does."""

    note: str

    @classmethod
    def of(cls, tensor: Tensor) -> Any:
        made = tensor.as_subclass(cls)
        made.note = "spacing 1 mm"
        return made


class Labels(Scan):
    """Another one, which does not know the first, as fastai's TensorCategory."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind is Scan for kind in types):
            return NotImplemented
        return super().__torch_function__(func, types, args, kwargs)


CALLS: dict[str, tuple[dict[str, Any], Callable[[], Any]]] = {
    "binary": ({}, lambda: SmoothAPLoss(1, 0, 0.2)),
    "queue": ({}, lambda: SmoothAPLoss(1, 8, 0.2, max_pool_size=4)),
    "classes": ({"num_classes": 3}, lambda: SmoothAPLoss(3, 8, 0.2)),
    "multilabel": (
        {"num_classes": 3, "multilabel": True},
        lambda: SmoothAPLoss(3, 8, 0.2, multilabel=True, temperature_unit="spread"),
    ),
    "mix": (
        {"num_classes": 3},
        lambda: MixedLoss(CrossEntropy(3), SmoothAPLoss(3), main_weight=0.5),
    ),
    "cross-entropy": ({"num_classes": 3}, lambda: CrossEntropy(3)),
    "binary-cross-entropy": ({}, lambda: CrossEntropy(1)),
}
SUBCLASSES: dict[str, tuple[type[Scan] | None, ...]] = {
    "logits": (Scan, None, None),
    "targets": (None, Scan, None),
    "weights": (None, None, Scan),
    "all": (Scan, Scan, Scan),
    "strangers": (Scan, Labels, None),
}


@pytest.mark.parametrize("kinds", SUBCLASSES.values(), ids=SUBCLASSES)
@pytest.mark.parametrize("name", CALLS)
def test_tensor_subclasses(name: str, kinds: tuple[type[Scan] | None, ...]) -> None:
    """The tensors of imaging libraries are tensors; Project-MONAI/MONAI #4699, fastai #3110."""
    shape, make = CALLS[name]
    loss_fn, plain = make(), make()
    for seed in range(2):
        batch = make_batch(6, **shape, seed=seed)._replace(weights=torch.arange(1.0, 7.0)).leaf()
        given = [
            part if kind is None else kind.of(part) for part, kind in zip(batch, kinds, strict=True)
        ]
        loss = loss_fn(given[0], given[1], sample_weight=given[2])
        loss.backward()
        assert type(loss) is Tensor
        beside = batch.leaf()
        expected = beside.through(plain)
        expected.backward()
        assert loss.equal(expected)
        assert batch.logits.grad is not None
        assert type(batch.logits.grad) is Tensor
        assert batch.logits.grad.equal(beside.logits.grad)
    assert pickle.loads(pickle.dumps(copy.deepcopy(loss_fn)))(*batch[:2]).equal(plain(*batch[:2]))


def test_tensor_subclasses_in_the_functional_form() -> None:
    """Scores and labels as imaging libraries have them; Project-MONAI/MONAI #4699."""
    batch = make_batch(9, 3).leaf()
    scores, is_positive = batch.logits.T, (batch.targets == torch.arange(3)[:, None])
    found = smooth_ap(Scan.of(scores), Scan.of(is_positive), 0.2).ap
    expected = smooth_ap(scores, is_positive, 0.2).ap
    assert type(found) is Tensor
    assert found.equal(expected)
    own, other = (torch.autograd.grad(ap.sum(), batch.logits)[0] for ap in (found, expected))
    assert own.equal(other)


BY_LABEL: dict[str, Callable[..., Any]] = {
    "ranking": lambda *classes, **options: SmoothAPLoss(*classes, 64, 0.2, **options),
    "cross-entropy": CrossEntropy,
}


@pytest.mark.parametrize("name", BY_LABEL)
def test_a_weight_for_each_label(name: str) -> None:
    """[N, C] weights are those of C problems, in the queue too; the use: multi-label data."""
    make = BY_LABEL[name]
    loss_fn, singles = make(3, multilabel=True), [make(1) for _ in range(3)]
    for seed in range(4):
        batch = make_batch(6, 3, seed=seed, multilabel=True)
        weights = torch.rand(6, 3, generator=seeded(seed)) * 3
        weights[seed, 1] = 0
        found = loss_fn(batch.logits, batch.targets, sample_weight=weights)
        each = [
            single(batch.logits[:, c : c + 1], batch.targets[:, c], sample_weight=weights[:, c])
            for c, single in enumerate(singles)
        ]
        # Of cross-entropy the mean over labels, not over classes.
        share = weights.sum(0) / weights.sum() if name == "cross-entropy" else 1 / 3
        torch.testing.assert_close(found, (torch.stack(each) * share).sum())
        saved, loss_fn = loss_fn.state_dict(), make(3, multilabel=True)
        loss_fn.load_state_dict(saved)


@pytest.mark.parametrize("make", [*LOSSES.values(), lambda: CrossEntropy(1)])
def test_settings_assigned_later(make: Callable[[], Any]) -> None:
    """As fastai's NoneReduce sets reduction: refused, not half taken; TabularVAE #2."""
    loss_fn = make()
    modules = {name for name, _ in loss_fn.named_children()}
    for name in {*inspect.signature(type(loss_fn)).parameters} - modules - {"temperature"}:
        before = getattr(loss_fn, name)
        with pytest.raises(AttributeError, match=name):
            setattr(loss_fn, name, 2)
        assert getattr(loss_fn, name) is before


def test_settings_that_may_be_assigned_later() -> None:
    """The temperature, documented attributes, and what others write on a module; fastai."""
    loss_fn, partner = used("binary"), CrossEntropy(1)
    for name, value in {
        "temperature": 0.5,
        "backend": "panel",
        "check_values": False,
        "sampling_seed": 3,
        "note_of_the_user": "kept",
    }.items():
        setattr(loss_fn, name, value)
        assert getattr(loss_fn, name) == value
    partner.check_values = False
    assert steps_of(loss_fn, range(2))


# --- What surrounds a call -----------------------------------------------------------------------

SCHEDULE: dict[str, Any] = {"main_weight": 0.5, "warmup_steps": 2}
STATELESS: dict[str, Callable[[], Any]] = {
    "no-queue": lambda: SmoothAPLoss(1, 0, 0.2),
    "constant-mix": lambda: MixedLoss(CrossEntropy(1), SmoothAPLoss(1, 0, 0.2), main_weight=0.5),
    "cross-entropy": lambda: CrossEntropy(1),
}
STATEFUL: dict[str, Callable[[], Any]] = {
    "queue": lambda: SmoothAPLoss(1, 8, 0.2),
    "cap": lambda: SmoothAPLoss(1, 0, 0.2, max_pool_size=4),
    "schedule": lambda: MixedLoss(CrossEntropy(1), SmoothAPLoss(1, 0, 0.2), **SCHEDULE),
    "mix-with-queue": lambda: MixedLoss(CrossEntropy(1), SmoothAPLoss(1, 8, 0.2), main_weight=0.5),
}


def in_backward(loss_fn: Any, batch: Batch) -> Tensor:
    """Call the loss from a tensor's hook."""
    found: list[Tensor] = []
    start = torch.ones(1, requires_grad=True)
    middle = start * 2
    middle.register_hook(lambda gradient: found.append(batch.through(loss_fn)))
    middle.sum().backward()
    return found[0]


OUTSIDE = "outside the checkpointed function"
REFUSED: dict[str, tuple[Callable[[Any, Batch], Callable[[], Any]], str]] = {
    "hook": (lambda it, batch: partial(in_backward, it, batch), "backward pass"),
    "checkpoint": (lambda it, batch: recomputed(it, batch.leaf(), False).backward, OUTSIDE),
    "reentrant": (lambda it, batch: recomputed(it, batch.leaf(), True).backward, OUTSIDE),
    "gradient": (lambda it, batch: partial(gradient_of(it, batch), batch.logits), r"eval\(\)"),
}


def recomputed(loss_fn: Any, batch: Batch, use_reentrant: bool) -> Tensor:
    """A loss of which the backward pass makes the forward pass again."""
    loss: Tensor = checkpoint(loss_fn, *batch[:2], use_reentrant=use_reentrant)
    return loss


def gradient_of(loss_fn: Any, batch: Batch) -> Any:
    return torch.func.grad(lambda logits: loss_fn(logits, batch.targets))


@pytest.mark.parametrize("calls_before", [0, 3])
@pytest.mark.parametrize("refused", REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("make", STATEFUL.values(), ids=STATEFUL)
def test_where_state_would_move_twice_or_unseen(
    make: Callable[[], Any],
    refused: tuple[Callable[[Any, Batch], Callable[[], Any]], str],
    calls_before: int,
) -> None:
    """It says so, and nothing moves; the uses: Tensor.register_hook, torch.utils.checkpoint,
    torch.func, lightgbm-org/LightGBM #3026.
    """
    loss_fn, (way, message) = make(), refused
    steps_of(loss_fn, range(calls_before))
    call = way(loss_fn, make_batch(5))
    expected = future(loss_fn)
    with pytest.raises(RuntimeError, match=message):
        call()
    assert future(loss_fn) == expected


@pytest.mark.parametrize("make", STATELESS.values(), ids=STATELESS)
def test_a_stateless_loss_in_a_backward_pass(make: Callable[[], Any]) -> None:
    """Hooks may compute losses, and a head and its loss may be one checkpointed block."""
    batch = make_batch(6)
    assert in_backward(make(), batch).equal(batch.through(make()))
    plain, *others = (batch.leaf() for _ in range(3))
    losses = [make() for _ in range(3)]
    for _ in range(2):
        losses[0](*plain[:2]).backward()
        for loss_fn, leaf, use_reentrant in zip(losses[1:], others, (False, True), strict=True):
            recomputed(loss_fn, leaf, use_reentrant).backward()
            assert leaf.logits.grad.equal(plain.logits.grad)


@pytest.mark.parametrize("make", STATEFUL.values(), ids=STATEFUL)
def test_torch_func_grad_of_a_loss_that_evaluates(make: Callable[[], Any]) -> None:
    """lightgbm-org/LightGBM #3026."""
    loss_fn, batch = make(), make_batch(5)
    steps_of(loss_fn, range(3))
    expected, beside = future(loss_fn), batch.leaf()
    beside.through(loss_fn.eval()).backward()
    torch.testing.assert_close(gradient_of(loss_fn, batch)(batch.logits), beside.logits.grad)
    assert future(loss_fn) == expected


def test_a_loss_keeps_no_more_than_its_rows() -> None:
    """Two columns of a wide output are not the whole output; the use: a head of many parts."""
    loss_fn = SmoothAPLoss(2, 8)
    wide = torch.randn(1000, 500, generator=seeded(0))
    loss_fn(wide[:, :2], torch.arange(1000) % 2)
    assert len(pickle.dumps(loss_fn)) < 20_000
    assert len(pickle.dumps(copy.deepcopy(loss_fn))) < 20_000


def test_a_buffer_that_is_filled_anew_holds_another_batch() -> None:
    """A buffer is a place, not a batch; the use: static inputs, as of captured graphs."""
    loss_fn, first, second = SmoothAPLoss(1, 12, 0.2), make_batch(6), make_batch(6, seed=1)
    buffer = first.logits.clone()
    loss_fn(buffer, first.targets)
    buffer.copy_(second.logits)
    found = loss_fn.diagnose(buffer, first.targets)
    expected = loss_fn.diagnose(second.logits.clone(), first.targets)
    assert found.pool_size.tolist() == expected.pool_size.tolist() == [12]
    assert found.smooth_ap.equal(expected.smooth_ap)


# --- Compilers -----------------------------------------------------------------------------------


@OF_TOOLS
def test_mixing_with_a_compiled_loss() -> None:
    """torch.compile(loss) in the place of the loss; the use: OptimizedModule."""
    torch._dynamo.reset()

    def mix(compiled: Callable[[Any], Any]) -> MixedLoss:
        main = compiled(SmoothAPLoss(1, 8, 0.2))
        return MixedLoss(CrossEntropy(1), main, main_weight=0.9, warmup_steps=1, blend_steps=2)

    plain, found = mix(lambda it: it), mix(lambda it: torch.compile(it, backend="eager"))
    for seed in range(6):
        batch, beside = make_batch(6, seed=seed).leaf(), make_batch(6, seed=seed).leaf()
        loss, expected = batch.through(found), beside.through(plain)
        loss.backward()
        expected.backward()
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(batch.logits.grad, beside.logits.grad)
    plain.load_state_dict(
        {key.replace("_orig_mod.", ""): value for key, value in found.state_dict().items()}
    )


def test_two_names_for_one_loss() -> None:
    """A copy of the model keeps that they are one (the use: `AveragedModel`, `deepcopy`)."""
    net = nn.Module()
    net.ap = SmoothAPLoss(1, 8)
    net.mix = MixedLoss(CrossEntropy(1), net.ap, main_weight=0.9)
    for copied in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), AveragedModel(net).module):
        assert copied.ap is copied.mix.main_loss is not net.ap


def scheduled_mix() -> MixedLoss:
    return MixedLoss(CrossEntropy(1), SmoothAPLoss(1, 0), main_weight=0.9, blend_steps=3)


@pytest.mark.parametrize("make", [lambda: SmoothAPLoss(1, 8), scheduled_mix])
def test_a_replica_for_data_parallel(make: Callable[[], Any]) -> None:
    """lightly-ai/lightly #968."""
    with pytest.raises(RuntimeError, match="keep the loss outside the wrapped module"):
        make()._replicate_for_data_parallel()
    SmoothAPLoss(1, 0)._replicate_for_data_parallel()


def test_weights_of_classes_are_no_weights_of_a_model() -> None:
    """huggingface/transformers #30709, of a setting that is a tensor."""
    with torch.device("meta"):
        built = CrossEntropy(2, [1.0, 1e5])
    for loss_fn in (built, CrossEntropy(2, torch.tensor([1.0, 1e5])).half()):
        assert loss_fn.class_weight is not None
        assert loss_fn.class_weight.tolist() == [1.0, 1e5]
        assert list(loss_fn.buffers()) == []
