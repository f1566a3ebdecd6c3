"""Trainers of torch.distributed: their gradient beside that of one process with all rows."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.nn.parallel import DistributedDataParallel

from imbalanced_losses import SmoothAPLoss
from tests.ranks import WORLD_SIZE, Failure, Ranks
from tests.rows import make_batch, state_of

NUM_STEPS = 3


class Setup(NamedTuple):
    """One way to train."""

    trainer: str = "ddp"  # "ddp", "fsdp" or "sum": gradients are summed by hand
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
    loss_fn = SmoothAPLoss(
        1, temperature=0.3, grad_reduce="sum" if trainer == "sum" else "mean", **setup.loss
    )
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
        if trainer == "sum":
            for parameter in parameters:
                dist.all_reduce(parameter.grad)
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
    "summed": Setup(trainer="sum"),
    "summed-without-rows": Setup(trainer="sum", sizes=(0, 12)),
    "fsdp": Setup(trainer="fsdp"),
    "fsdp-without-rows": Setup(trainer="fsdp", sizes=(12, 0)),
    "fsdp-capped": Setup(trainer="fsdp", loss={"queue_size": 20, "max_pool_size": 8}),
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
        for name, value in alone.state.items():
            torch.testing.assert_close(outcome.state[name], value, rtol=1e-12, atol=1e-12)
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


@pytest.mark.parametrize("trainer", ["ddp", "sum", "fsdp"])
@pytest.mark.parametrize("sizes", [(3, 4, 5, 6), (0, 9, 1, 2)], ids=["unequal", "one empty"])
def test_four_ranks_have_the_gradient_of_one_process(
    four_ranks: Ranks, trainer: str, sizes: tuple[int, ...]
) -> None:
    setup = Setup(trainer=trainer, sizes=sizes)
    assert_as_alone(four_ranks.run(train_rank, setup), setup)


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


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match=r"process_group must be a .*ProcessGroup.* got 3"):
        SmoothAPLoss(1, process_group=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="grad_reduce must be one of 'mean', 'sum', got 'avg'"):
        SmoothAPLoss(1, grad_reduce="avg")  # type: ignore[arg-type]
