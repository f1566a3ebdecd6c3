"""Trainers of torch.distributed: their gradient beside that of one process with all rows."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections import OrderedDict, UserDict, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.nn.parallel import DistributedDataParallel

from imbalanced_losses import SmoothAPLoss, distributed
from imbalanced_losses._rows.gather import Gather
from imbalanced_losses.distributed import even_steps
from tests.helpers.ranks import WORLD_SIZE, Failure, Ranks
from tests.helpers.rows import make_batch, numbers_of, state_of

NUM_STEPS = 3


class Setup(NamedTuple):
    """One way to train."""

    trainer: str = "ddp"  # or "fsdp"; test_worlds.py sums gradients by hand
    ddp: dict[str, Any] = {}  # noqa: RUF012, never changed
    micro_batches: int = 1  # of a step; all but the last without synchronisation
    is_inside: bool = False  # the loss is part of the wrapped module
    is_copied: bool = False  # the loss is a deepcopy
    is_used_before: bool = False  # the loss has made an eval pass before
    clipped: bool = False
    cross_entropy: float = 0.0  # weight of a second term
    loss: dict[str, Any] = {"queue_size": 20}  # noqa: RUF012, never changed
    sizes: tuple[int, ...] = (9, 4)  # rows of each rank in each micro-batch


class Model(nn.Module):
    """A small network that may hold its loss, and a parameter that nothing uses."""

    def __init__(self, setup: Setup, loss_fn: SmoothAPLoss) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1)).double()
        for parameter in self.net.parameters():
            nn.init.normal_(parameter, generator=generator)
        if setup.ddp.get("find_unused_parameters"):
            self.unused = nn.Linear(3, 3).double()
        self.loss_fn = loss_fn if setup.is_inside else None

    def forward(self, features: Tensor, targets: Tensor) -> Tensor:
        logits: Tensor = self.net(features)
        return logits if self.loss_fn is None else self.loss_fn(logits, targets)


class Trained(NamedTuple):
    losses: list[float]
    gradients: list[list[Tensor]]  # of each step and parameter
    state: dict[str, Tensor]  # of the loss


def train(setup: Setup, rank: int | None) -> Trained:
    """Steps on a rank's rows of every batch; on all rows and in one process for None."""
    start = 0 if rank is None else sum(setup.sizes[:rank])
    rows = slice(None) if rank is None else slice(start, start + setup.sizes[rank])
    trainer = "none" if rank is None else setup.trainer
    loss_fn = SmoothAPLoss(1, temperature=0.3, **setup.loss)
    if loss_fn.gather == "sums":
        loss_fn.backend = "panel"  # in one process as well
    if setup.is_used_before:
        make_batch(6, dtype=torch.float64).through(loss_fn.eval())
        loss_fn.train()
    if setup.is_copied:
        loss_fn = copy.deepcopy(loss_fn)
    plain = Model(setup, loss_fn)
    model = wrapped(plain, trainer, setup)
    parameters = [p for name, p in plain.named_parameters() if name.startswith("net.")]

    losses, gradients = [], []
    for step in range(NUM_STEPS):
        model.zero_grad()
        for part in range(setup.micro_batches):
            seed = 100 + step * setup.micro_batches + part
            features = make_batch(sum(setup.sizes), 5, seed=seed, dtype=torch.float64).logits[rows]
            targets = make_batch(sum(setup.sizes)).targets[rows]
            is_last = part == setup.micro_batches - 1
            with nullcontext() if is_last or trainer != "ddp" else model.no_sync():
                output = model(features, targets)
                loss = output if setup.is_inside else loss_fn(output, targets)
                losses.append(loss.item())
                if setup.cross_entropy:
                    labels = targets.double()[:, None]
                    loss = loss + setup.cross_entropy * binary_cross_entropy_with_logits(
                        output, labels
                    )
                loss.backward()
        if setup.clipped:
            nn.utils.clip_grad_norm_(parameters, 1e-3)
        gradients.append([whole(p.grad) for p in parameters])
        with torch.no_grad():
            for parameter in parameters:
                parameter.sub_(0.1 * parameter.grad)
    return Trained(losses, gradients, state_of(loss_fn))


def wrapped(model: Model, trainer: str, setup: Setup) -> Any:
    if trainer == "ddp":
        return DistributedDataParallel(model, **setup.ddp)
    if trainer == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        return fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return model


def whole(gradient: Any) -> Tensor:
    """The gradient, gathered where it is sharded."""
    full = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
    return full.detach().clone()


def train_rank(rank: int, setup: Setup) -> Trained:
    return train(setup, rank)


SETUPS = {
    "plain": Setup(),
    "static-graph": Setup(ddp={"static_graph": True}),
    "find-unused": Setup(ddp={"find_unused_parameters": True}),
    "gradient-views": Setup(ddp={"gradient_as_bucket_view": True}),
    "accumulated": Setup(micro_batches=3),
    "inside": Setup(is_inside=True),
    "inside-static-graph": Setup(is_inside=True, ddp={"static_graph": True}),
    "copied": Setup(is_copied=True),
    "used-before": Setup(is_used_before=True),
    "clipped": Setup(clipped=True),
    "mixed": Setup(cross_entropy=0.5, sizes=(6, 6)),
    "mixed-accumulated": Setup(cross_entropy=0.5, sizes=(6, 6), micro_batches=2),
    "fsdp": Setup(trainer="fsdp"),
    "fsdp-without-rows": Setup(trainer="fsdp", sizes=(12, 0)),
    "fsdp-capped": Setup(trainer="fsdp", loss={"queue_size": 20, "max_pool_size": 8}),
}
SUMS = {"queue_size": 0, "gather": "sums"}
SETUPS |= {
    f"sums-{name}": SETUPS[name]._replace(loss=SUMS)
    for name in SETUPS
    if name not in ("used-before", "fsdp-capped")
}


def assert_as_alone(found: list[Any], setup: Setup) -> None:
    alone = train(setup, None)
    for outcome in found:
        assert isinstance(outcome, Trained), outcome
        assert outcome.losses == pytest.approx(alone.losses, rel=1e-12)
        for got, expected in zip(outcome.gradients, alone.gradients, strict=True):
            one, other = (torch.cat([g.flatten() for g in each]) for each in (got, expected))
            assert float((one - other).abs().max()) <= 1e-12 * float(other.abs().max())
            assert float(torch.cosine_similarity(one, other, dim=0)) >= 1 - 1e-12
        numbers = numbers_of(outcome.state), numbers_of(alone.state)
        torch.testing.assert_close(*numbers, rtol=1e-12, atol=1e-12)
    for name, value in found[0].state.items():
        assert all(value.equal(other.state[name]) for other in found), name


@pytest.mark.parametrize("setup", SETUPS.values(), ids=SETUPS)
def test_two_ranks_have_the_gradient_of_one_process(ranks: Ranks, setup: Setup) -> None:
    assert_as_alone(ranks.run(train_rank, setup), setup)


@pytest.fixture(scope="module")
def four_ranks() -> Iterator[Ranks]:
    pool = Ranks(4)
    yield pool
    pool.close()


# --- Another number of ranks, another group, a rank that is gone ----------------------------------


def resumed(rank: int | None, setup: Setup, state: dict[str, Tensor] | None) -> Trained:
    """Two steps, or the third one from the state after them; on all rows in one process for None.

    Scores instead of a model: what a checkpoint of the loss has to carry shows in them alone.
    """
    start = 0 if rank is None else sum(setup.sizes[:rank])
    rows = slice(None) if rank is None else slice(start, start + setup.sizes[rank])
    loss_fn = SmoothAPLoss(1, temperature=0.3, **setup.loss)
    if state is not None:
        loss_fn.load_state_dict(state)
    losses, gradients = [], []
    for step in [2] if state is not None else [0, 1]:
        batch = make_batch(sum(setup.sizes), seed=step, dtype=torch.float64)
        logits = batch.logits[rows].clone().requires_grad_()
        loss = loss_fn(logits, batch.targets[rows])
        loss.backward()
        losses.append(loss.item())
        gradients.append([logits.grad])
    return Trained(losses, gradients, state_of(loss_fn))


@pytest.mark.parametrize("loss", [{"queue_size": 20}, {"queue_size": 20, "max_pool_size": 9}])
def test_a_checkpoint_resumes_on_another_number_of_ranks(
    ranks: Ranks, loss: dict[str, Any]
) -> None:
    setup = Setup(loss=loss)
    after_two_steps = resumed(None, setup, None)
    expected = resumed(None, setup, after_two_steps.state)
    for one in ranks.run(resumed, setup, None):
        for name, value in after_two_steps.state.items():
            assert value.equal(one.state[name]), name
        on_one_process = resumed(None, setup, one.state)
        assert on_one_process.losses == expected.losses
    on_two = ranks.run(resumed, setup, after_two_steps.state)
    whole_gradient = torch.cat([outcome.gradients[0][0] for outcome in on_two]) / WORLD_SIZE
    assert [outcome.losses for outcome in on_two] == [expected.losses] * WORLD_SIZE
    torch.testing.assert_close(whole_gradient, expected.gradients[0][0], rtol=1e-12, atol=1e-15)


def only_first(rank: int, gather: str) -> float:
    batch = make_batch(6, seed=rank)
    return batch.through(SmoothAPLoss(1, 0, 0.3, gather=gather)).item() if rank == 0 else 0.0


@pytest.mark.parametrize("gather", ["rows", "sums"])
def test_a_rank_that_stays_away_is_an_error_not_a_hang(gather: str) -> None:
    pool = Ranks(timeout_s=2)
    try:
        first, second = pool.run(only_first, gather)
    finally:
        pool.close()
    assert isinstance(first, Failure)
    assert first.error == "RuntimeError"
    assert "not all of them took part" in first.message
    assert second == 0.0


# --- Uneven numbers of batches --------------------------------------------------------------------


class Sample(NamedTuple):
    features: Tensor
    targets: Tensor


def uneven_batches(rank: int) -> list[dict[str, Any]]:
    """Three on the first rank, one on the others."""
    whole_batches = []
    for step in range(3 if rank == 0 else 1):
        batch = make_batch(7, 5, seed=10 * rank + step, dtype=torch.float64)
        whole_batches.append({"rows": Sample(batch.logits, make_batch(7).targets), "step": step})
    return whole_batches


def train_unevenly(rank: int | None, gather: str) -> list[Tensor]:
    """The gradients of every step: of a rank, or of one process that has the rows of all."""
    loss_fn = SmoothAPLoss(1, 0, 0.3, gather=gather)
    loss_fn.backend = "panel"
    plain = Model(Setup(), loss_fn)
    if rank is None:
        by_rank = [uneven_batches(r) for r in range(WORLD_SIZE)]
        steps = [[batches[k] for batches in by_rank if k < len(batches)] for k in range(3)]
        batches = [
            Sample(*(torch.cat(parts) for parts in zip(*(b["rows"] for b in step), strict=True)))
            for step in steps
        ]
        model: Any = plain
    else:
        model = DistributedDataParallel(plain)
        batches = [batch["rows"] for batch in even_steps(uneven_batches(rank))]
    gradients = []
    for batch in batches:
        model.zero_grad()
        loss_fn(model(batch.features, batch.targets), batch.targets).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in plain.parameters()]))
    return gradients


@pytest.mark.parametrize("gather", ["rows", "sums"])
def test_ranks_with_fewer_batches_go_on_without_rows(ranks: Ranks, gather: str) -> None:
    alone = train_unevenly(None, gather)
    assert len(alone) == 3
    for found in ranks.run(train_unevenly, gather):
        assert not isinstance(found, Failure), found
        for one, other in zip(found, alone, strict=True):
            assert float((one - other).abs().max()) <= 1e-12 * float(other.abs().max())


def counted(rank: int, numbers: list[int]) -> list[int]:
    """Rows of each batch that a rank gets."""
    return [len(batch[0]) for batch in even_steps([(torch.zeros(2),)] * numbers[rank])]


def test_even_steps(ranks: Ranks) -> None:
    assert ranks.run(counted, [3, 1]) == [[2, 2, 2], [2, 0, 0]]
    assert ranks.run(counted, [2, 2]) == [[2, 2], [2, 2]]
    assert ranks.run(counted, [0, 0]) == [[], []]
    for found in ranks.run(counted, [1, 0]):
        assert isinstance(found, Failure)
        assert found.error == "RuntimeError"
        assert found.message.startswith("1 of 2 processes have no batch at all")


@dataclasses.dataclass(frozen=True)
class Frozen:
    rows: Any
    name: str = "a"
    number: int = dataclasses.field(default=3, init=False)


@dataclasses.dataclass
class Slotted:
    __slots__ = ("rows",)
    rows: Any


class Rows(list[Any]):
    pass


CONTAINERS: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda rows: rows,
    "tuple": lambda rows: (rows, 3),
    "list": lambda rows: Rows([rows, torch.tensor(1.0)]),
    "named tuple": lambda rows: Sample(rows, rows),
    "dict": lambda rows: {"rows": [rows], "step": torch.tensor(4), "texts": ["a", "b"]},
    "OrderedDict": lambda rows: OrderedDict(rows=rows),
    "defaultdict": lambda rows: defaultdict(list, rows=rows),
    "UserDict": lambda rows: UserDict(rows=rows),
    "frozen dataclass": Frozen,
    "dataclass with slots": Slotted,
    "numpy": lambda rows: {"rows": rows.numpy(), "scalar": np.float32(2)},
    "nested": lambda rows: {"a": Slotted([Sample(rows, {"b": rows})]), "b": None},
}


def form(batch: Any) -> Any:
    """Its types, the shapes of its arrays and its other values."""
    if hasattr(batch, "dtype"):
        return type(batch), batch.dtype, batch.shape, batch.tolist()
    if isinstance(batch, Mapping):
        return type(batch), [(name, form(part)) for name, part in batch.items()]
    if dataclasses.is_dataclass(batch):
        fields = dataclasses.fields(batch)
        return type(batch), [(field.name, form(getattr(batch, field.name))) for field in fields]
    if isinstance(batch, (tuple, list)):
        return type(batch), [form(part) for part in batch]
    return batch


class OneBatchMore:
    """A group of two ranks, of which the other has a second batch."""

    num_asked = 0

    def size(self) -> int:
        return 2

    def summed(self, numbers: list[bool], device: Any) -> list[int]:
        self.num_asked += 1
        return [numbers[0] + (self.num_asked < 3), *map(int, numbers[1:])]


@pytest.mark.parametrize("name", CONTAINERS)
def test_batches_without_rows_keep_their_type(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "Group", lambda process_group: OneBatchMore())
    rows = torch.arange(6.0).reshape(3, 2)
    batch = CONTAINERS[name](rows)
    first, second = even_steps([batch])
    assert first is batch
    assert form(batch) == form(CONTAINERS[name](rows))
    assert form(second) == form(CONTAINERS[name](rows[:0]))
    if name == "defaultdict":
        assert second["new"] == []


def steps_and_error(rank: int, batches: list[list[Any]]) -> tuple[int, str]:
    num_steps = 0
    try:
        for _ in even_steps(batches[rank]):
            num_steps += 1
    except TypeError as error:
        return num_steps, str(error)
    return num_steps, ""


@pytest.mark.parametrize(
    ("batch", "got"),
    [
        (None, "got NoneType: nothing in it has rows"),
        ({"text": ["a", "b"], "number": torch.tensor(1.0)}, "got dict: nothing in it has rows"),
        (torch.eye(2).to_sparse(), "got Tensor: "),
    ],
    ids=["None", "values", "sparse"],
)
def test_a_batch_that_cannot_be_cut_is_refused_on_every_rank(
    batch: Any, got: str, ranks: Ranks
) -> None:
    """In the step where it comes, though the other rank has no batch left."""
    (steps, message), other = ranks.run(
        steps_and_error, [[torch.zeros(2), batch], [torch.zeros(2)]]
    )
    assert other == (1, message)
    assert steps == 1
    assert message.startswith("on rank 0: every batch must hold tensors or other arrays of rows")
    assert got in message


# --- Groups ---------------------------------------------------------------------------------------


def losses_by_group(rank: int) -> list[float]:
    """Of the same rows: a group of this rank alone, one of all, their copies and a pickled one."""
    alone = [dist.new_group([r]) for r in range(WORLD_SIZE)][rank]
    together = dist.new_group(list(range(WORLD_SIZE)))
    options = {"num_classes": 1, "queue_size": 0, "temperature": 0.3}
    own, all_ = (SmoothAPLoss(**options, process_group=group) for group in (alone, together))
    assert own.process_group is alone
    batch = make_batch(6, seed=rank)
    losses = [own, all_, copy.deepcopy(own), copy.deepcopy(all_), pickle.loads(pickle.dumps(own))]
    found = [batch.through(loss_fn).item() for loss_fn in losses]
    dist.destroy_process_group(alone)
    dist.destroy_process_group(together)
    return found


def test_only_the_ranks_of_the_group_are_ranked_together(ranks: Ranks) -> None:
    found = ranks.run(losses_by_group)
    local = [make_batch(6, seed=r).through(SmoothAPLoss(1, 0, 0.3)).item() for r in range(2)]
    assert [own for own, *_ in found] == local
    assert local[0] != local[1]
    (_, together, *_), (_, other, *_) = found
    assert together == other
    assert together not in local
    for own, all_, own_copy, all_copy, unpickled in found:
        assert (own_copy, all_copy, unpickled) == (own, all_, all_)


def other_group(rank: int) -> None:
    group = dist.new_group([0])
    if rank == 0:
        dist.destroy_process_group(group)
    else:
        SmoothAPLoss(1, process_group=group)


def test_a_group_without_this_rank_is_an_error(ranks: Ranks) -> None:
    first, second = ranks.run(other_group)
    assert first is None
    assert isinstance(second, Failure)
    assert second.error == "TypeError"
    assert "process_group" in second.message


def in_a_group_of_the_last(rank: int, gather: Gather, bad: bool) -> float | None:
    """The loss over a group whose ranks are not numbered as those of the world; None outside."""
    size = dist.get_world_size()
    group = dist.new_group([size - 2, size - 1])
    if rank < size - 2:
        return None
    batch = make_batch(4, 2, seed=rank)
    targets = batch.targets + 7 if bad and rank == size - 1 else batch.targets
    loss_fn = SmoothAPLoss(2, 0, 0.3, process_group=group, gather=gather)
    return loss_fn(batch.logits, targets).item()


@pytest.mark.parametrize("gather", ["rows", "sums"])
def test_a_group_numbers_its_ranks_by_itself(four_ranks: Ranks, gather: Gather) -> None:
    batches = [make_batch(4, 2, seed=rank) for rank in (2, 3)]
    together = (torch.cat(fields) for fields in zip(*(batch[:2] for batch in batches), strict=True))
    alone = SmoothAPLoss(2, 0, 0.3)(*together).item()
    found = four_ranks.run(in_a_group_of_the_last, gather, False)
    assert found == [None, None, *[pytest.approx(alone, rel=1e-6)] * 2]
    *outside, first, second = four_ranks.run(in_a_group_of_the_last, gather, True)
    assert outside == [None, None]
    assert first == second
    assert first.error == "ValueError"
    assert first.message.startswith("on rank 1: targets must ")
