"""Batches of whole groups: each group once, whole, in as many batches on every process."""

from __future__ import annotations

from itertools import chain
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from imbalanced_losses import GroupBatchSampler
from tests.helpers.ranks import WORLD_SIZE, Ranks

GROUP = torch.tensor([5, -1, 5, 8, 8, 8, 8, 8, -1, 2, 2, 3, 40, 41, 42, 43, 44])  # 10 groups
POSITIVE = torch.arange(17) == 5

Batches = list[list[int]]
groups = st.lists(st.integers(-2, 9), min_size=1, max_size=40).map(torch.tensor)
large_groups = st.lists(st.integers(-1, 1), min_size=9, max_size=40).map(torch.tensor)


def epoch_of(sampler: GroupBatchSampler, epoch: int = 0) -> Batches:
    sampler.set_epoch(epoch)
    return list(sampler)


def rows_by_group(group: Tensor) -> set[tuple[int, ...]]:
    return {tuple((group == value).nonzero()[:, 0].tolist()) for value in group.unique()}


def cut(batch: list[int], group: Tensor) -> list[tuple[int, ...]]:
    """The batch as groups, which follow each other."""
    values, lengths = group[batch].unique_consecutive(return_counts=True)
    assert len(values) == len(values.unique())
    return [tuple(rows) for rows in torch.tensor(batch).split(lengths.tolist())]


# --- Which rows are in which batch ----------------------------------------------------------------


@given(groups, st.integers(1, 4), st.integers(1, 5), st.booleans(), st.booleans(), st.integers(0))
def test_every_group_once_whole_and_as_many_batches_on_each_process(
    group: Tensor, size: int, world: int, drop_last: bool, shuffle: bool, epoch: int
) -> None:
    options: dict[str, Any] = {"shuffle": shuffle, "drop_last": drop_last, "num_replicas": world}
    samplers = [GroupBatchSampler(group, size, rank=rank, **options) for rank in range(world)]
    there = rows_by_group(group)
    if drop_last and len(there) < size * world:
        with pytest.raises(ValueError, match=f"group must hold >= {size * world} groups"):
            len(samplers[0])
        return
    of_process = [epoch_of(sampler, epoch) for sampler in samplers]
    assert {len(batches) for batches in of_process} == {len(samplers[0])}
    given_out = [
        [tuple(map(int, rows)) for rows in cut(batch, group)] for own in of_process for batch in own
    ]
    lengths = sorted(map(len, given_out))
    found = [rows for batch in given_out for rows in batch]
    assert lengths[0] >= 1
    assert lengths[-1] <= size
    assert lengths[-1] - lengths[0] <= 1
    if drop_last:
        assert lengths[0] == size
        assert set(found) <= there
        assert len(set(found)) == len(found) > len(there) - size * world
    else:
        assert set(found) == there
        assert len(found) == max(len(there), len(given_out))
        assert len(samplers[0]) == -(-len(there) // (size * world))


def test_without_shuffling_groups_come_by_their_first_row() -> None:
    assert epoch_of(GroupBatchSampler(GROUP, 3, shuffle=False), 7) == [
        [0, 2, 1, 8, 3, 4, 5, 6, 7],
        [9, 10, 11, 12],
        [13, 14],
        [15, 16],
    ]


@pytest.mark.parametrize(
    "name", [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)]
)
def test_integers_of_every_dtype(name: str) -> None:
    dtype = getattr(torch, name)
    ids = torch.tensor([torch.iinfo(dtype).max, 0, 7, 0, 7], dtype=dtype)
    assert epoch_of(GroupBatchSampler(ids, 2, shuffle=False)) == [[0, 1, 3], [2, 4]]


def test_neither_the_global_state_nor_the_default_device_matters() -> None:
    before = torch.get_rng_state()
    wanted = epoch_of(GroupBatchSampler(GROUP, 2, max_group_size=3))
    with torch.device("meta"):
        assert epoch_of(GroupBatchSampler(GROUP, 2, max_group_size=3)) == wanted
    assert torch.get_rng_state().equal(before)


# --- Draws of large groups ------------------------------------------------------------------------


@given(large_groups, st.integers(2, 6), st.data())
def test_a_draw_has_its_size_keeps_positives_and_counts_all_by_weights(
    group: Tensor, cap: int, data: st.DataObject
) -> None:
    flags = data.draw(st.lists(st.booleans(), min_size=len(group), max_size=len(group)))
    positive = torch.tensor(flags)
    sampler = GroupBatchSampler(group, 2, max_group_size=cap, is_positive=positive)
    assert sampler.weights.dtype == torch.float32
    assert bool((sampler.weights >= 1).all())
    for epoch in range(2):
        drawn = torch.tensor(list(chain(*epoch_of(sampler, epoch))))
        assert len(drawn.unique()) == len(drawn)
        for value in group.unique():
            rows, all_rows = drawn[group[drawn] == value], (group == value).nonzero()[:, 0]
            assert len(rows) == min(len(all_rows), cap)
            positives = all_rows[positive[all_rows]]
            most = max(cap // 2, cap - len(all_rows) + len(positives))
            assert int(positive[rows].sum()) == min(len(positives), most)
            for is_positive in (False, True):  # none of either is lost
                counted = sampler.weights[rows][positive[rows] == is_positive].sum()
                expected = int((positive[all_rows] == is_positive).sum())
                assert float(counted) == pytest.approx(expected)


def test_weights_are_one_over_the_chance_of_a_row() -> None:
    sampler = GroupBatchSampler(GROUP, 2, max_group_size=3, is_positive=POSITIVE)
    assert sampler.weights.tolist() == [2 if row in (3, 4, 6, 7) else 1 for row in range(17)]
    counts = torch.zeros(17)
    for epoch in range(2000):
        for batch in epoch_of(sampler, epoch):
            counts[batch] += 1
    torch.testing.assert_close(counts / 2000, 1 / sampler.weights, atol=0.04, rtol=0)


# --- Going on in the middle of an epoch -----------------------------------------------------------


def make_loader(num_workers: int = 0) -> tuple[GroupBatchSampler, DataLoader[Any]]:
    sampler = GroupBatchSampler(GROUP, 2, max_group_size=3)
    sampler.set_epoch(3)
    options: dict[str, Any] = {"num_workers": num_workers}
    if num_workers:
        options |= {"multiprocessing_context": "spawn", "prefetch_factor": 2}
    return sampler, DataLoader(TensorDataset(torch.arange(17)), batch_sampler=sampler, **options)


def batches_of(loader: DataLoader[Any]) -> Batches:
    return [rows.tolist() for (rows,) in loader]


@pytest.mark.parametrize("num_consumed", [0, 2, 5])
def test_what_was_left_of_the_epoch_comes(num_consumed: int) -> None:
    sampler, loader = make_loader()
    wanted, iterator = batches_of(loader), iter(loader)
    consumed = [next(iterator)[0].tolist() for _ in range(num_consumed)]
    state = sampler.state_dict(num_consumed)
    assert num_consumed == 0 or sampler.state_dict() == state
    again, loader = make_loader()
    again.load_state_dict(state)
    assert again.state_dict() == state
    again.set_epoch(3)  # as a loop over epochs does
    assert consumed + batches_of(loader) == wanted
    assert batches_of(loader) == wanted  # only once
    again.load_state_dict(state)
    again.set_epoch(4)
    assert len(batches_of(loader)) == len(again) == 5


# --- Wrong arguments ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"group": [1, 2]}, TypeError, r"group must be a torch.Tensor, got list; use"),
        ({"group": torch.rand(3)}, TypeError, "group must be integers, got torch.float32"),
        ({"group": POSITIVE}, TypeError, "group must be integers, got torch.bool"),
        ({"group": GROUP[:, None]}, ValueError, r"group must be \[N\] with N > 0, got \[17, 1\]"),
        ({"group": GROUP[:0]}, ValueError, r"group must be \[N\] with N > 0, got \[0\]"),
        ({"groups_per_batch": 0}, ValueError, "groups_per_batch must be an int >= 1, got 0"),
        ({"groups_per_batch": 2.0}, TypeError, r"groups_per_batch must be .*, got 2.0 \(float\)"),
        ({"max_group_size": 1}, ValueError, "max_group_size must be an int >= 2, got 1"),
        ({"is_positive": GROUP}, TypeError, "is_positive must be bool, got torch.int64"),
        ({"is_positive": POSITIVE[1:]}, ValueError, r"is_positive must be \[17\] .*, got \[16\]"),
        ({"shuffle": 1}, TypeError, "shuffle must be True or False, got 1"),
        ({"seed": -1}, ValueError, "seed must be an int >= 0, got -1"),
        ({"drop_last": None}, TypeError, "drop_last must be True or False, got None"),
        ({"rank": 0}, ValueError, "num_replicas and rank must be given together, got None and 0"),
        ({"num_replicas": 2, "rank": 2}, ValueError, r"rank must be in 0..1 .*, got 2"),
        ({"num_replicas": 0, "rank": 0}, ValueError, "num_replicas must be an int >= 1, got 0"),
    ],
)
def test_bad_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        GroupBatchSampler(**{"group": GROUP, "groups_per_batch": 2, **options})


def test_bad_states() -> None:
    sampler = GroupBatchSampler(GROUP, 2)
    with pytest.raises(ValueError, match=r"num_consumed must be in 0..5, .*, got 6"):
        sampler.state_dict(6)
    with pytest.raises(ValueError, match="epoch must be an int >= 0, got -1"):
        sampler.set_epoch(-1)
    for other in (GroupBatchSampler(GROUP, 3), GroupBatchSampler(GROUP, 2, seed=1)):
        with pytest.raises(
            ValueError, match=r"state_dict must be of a sampler with \w+=\d, .* got"
        ):
            sampler.load_state_dict(other.state_dict())


# --- Trainers -------------------------------------------------------------------------------------


def train(rank: int, num_groups: int) -> tuple[Batches, Tensor]:
    """Two epochs of DistributedDataParallel: it hangs where a process has fewer batches."""
    group = torch.arange(3 * num_groups) % num_groups
    sampler = GroupBatchSampler(group, 2)
    loader = DataLoader(TensorDataset(torch.arange(len(group))), batch_sampler=sampler)
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(1, 1))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    seen: Batches = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        for (rows,) in loader:
            seen.append(rows.tolist())
            optimizer.zero_grad()
            model(rows[:, None] / len(group)).square().mean().backward()
            optimizer.step()
    dist.barrier()
    return seen, model.module.weight.detach()


@pytest.mark.parametrize("num_groups", [1, 2, 7, 8, 9])
def test_two_processes_of_ddp(ranks: Ranks, num_groups: int) -> None:
    (first, weight), (second, other) = ranks.run(train, num_groups)
    assert torch.equal(weight, other)
    assert len(first) == len(second)
    half = len(first) // 2
    for epoch in (slice(0, half), slice(half, None)):
        found = sorted(chain(*first[epoch], *second[epoch]))
        expected = list(range(3 * num_groups)) * (2 if num_groups < WORLD_SIZE else 1)
        assert found == sorted(expected)
