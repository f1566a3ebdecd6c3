"""Rows ranked within groups, and values: what a loop over groups says, whatever the loss."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from imbalanced_losses import CrossEntropy, MixedLoss, NDCGLoss, SmoothAPLoss, functional
from imbalanced_losses.accumulation import backward_in_micro_batches
from tests.helpers.cases import seeded
from tests.helpers.ranks import Failure, Ranks
from tests.helpers.rows import IGNORED
from tests.metrics.test_table import EACH_MEMBER, MEMBERS, Member

INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint32)


def rows(
    member: Member, num_rows: int, num_classes: int = 1, seed: int = 0
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Logits [N, C] float64, targets, and group, value and sample_weight."""
    generator = seeded(seed)
    logits = torch.randn(num_rows, num_classes, generator=generator, dtype=torch.float64)
    grades = torch.randint(-1, 4, (num_rows, num_classes), generator=generator).clamp(min=0)
    grades[::7] = IGNORED
    targets = member.targets(grades)
    weight, value = torch.rand(2, num_rows, generator=generator, dtype=torch.float64)
    group = torch.randint(-2, 5, (num_rows,), generator=generator)
    values = {"group": group, "value": value, "sample_weight": weight}
    return logits, targets if num_classes > 1 else targets[:, 0], values


def loop(
    make: Callable[[], Any], logits: Tensor, targets: Tensor, values: dict[str, Tensor]
) -> Tensor:
    """The loss of every group by itself; for a class the mean, then the mean over classes."""
    found: list[list[Tensor]] = [[] for _ in range(logits.shape[1])]
    group = values["group"]
    for one in group.unique():
        own = {name: field[group == one] for name, field in values.items() if name != "group"}
        _, per_class, valid = make()(logits[group == one], targets[group == one], True, **own)
        for c in valid.nonzero().squeeze(1).tolist():
            found[c].append(per_class[c])
    return torch.stack([torch.stack(own).mean() for own in found if own]).mean()


@pytest.mark.parametrize("num_classes", [1, 3])
@pytest.mark.parametrize("options", [{}, {"temperature_unit": "spread"}, {"target_prior": 0.1}])
@EACH_MEMBER
def test_as_a_loop_over_groups(member: Member, options: dict[str, Any], num_classes: int) -> None:
    """Value, gradient, and the derivative of that."""
    options = dict(options)
    if "target_prior" in options:
        if member.is_graded:
            return
        options["target_prior"] = [0.1] * num_classes

    def make() -> Any:
        return member.make(num_classes, **options)

    logits, targets, values = rows(member, 90, num_classes)
    values["sample_weight"][::5] *= 1e-25  # light rows are not lost beside other groups
    leaf = logits.requires_grad_()
    both = make()(leaf, targets, **values), loop(make, leaf, targets, values)
    torch.testing.assert_close(*both, rtol=1e-11, atol=0)
    slopes = [torch.autograd.grad(loss, leaf, create_graph=True)[0] for loss in both]
    torch.testing.assert_close(*slopes, rtol=1e-8, atol=1e-12)
    pull = torch.randn(leaf.shape, generator=seeded(3), dtype=torch.float64)
    curves = [torch.autograd.grad((own * pull).sum(), leaf)[0] for own in slopes]
    torch.testing.assert_close(*curves, rtol=1e-6, atol=1e-9)


@EACH_MEMBER
def test_the_functional_form(member: Member) -> None:
    """One entry for every id, in ascending order."""
    logits, targets, values = rows(member, 60, 2)
    labels = targets.clamp(min=0).T
    labels = labels if member.is_graded else labels > 0
    group = values["group"]
    scores, tau = logits.T, torch.tensor([0.3, 0.5], dtype=torch.float64)
    metric, valid = member.function(scores, labels, tau, group=group, **member.own)
    for g, one in enumerate(group.unique()):
        own = (field[:, group == one] for field in (scores, labels))
        alone = member.function(*own, tau, **member.own)
        torch.testing.assert_close(metric[:, g], alone[0], rtol=1e-12, atol=1e-14)
        assert valid[:, g].equal(alone[1])
    of_one = member.function(scores[0], labels[0], 0.3, group=group, **member.own)[0]
    torch.testing.assert_close(of_one, metric[0], rtol=1e-12, atol=1e-14)


def test_ids_of_every_dtype() -> None:
    scores = torch.randn(8, generator=seeded(0))
    labels, group = torch.arange(8) % 4 == 0, torch.arange(8) // 4 % 2
    expected = functional.smooth_ap(scores, labels, group=group).ap
    for dtype in (*INTEGERS, torch.uint64):
        assert functional.smooth_ap(scores, labels, group=group.to(dtype)).ap.equal(expected)
    far = torch.where(group == 0, 7, 2**63 + 1 - 2**64).view(torch.uint64)
    assert functional.smooth_ap(scores, labels, group=far).ap.equal(expected)


@pytest.mark.parametrize("shift", [False, True])
@EACH_MEMBER
def test_queued_rows_join_their_group(member: Member, shift: bool) -> None:
    """As one batch, whose first rows have no gradient; of groups that occur in the last batch.

    Where they follow the shift, the gradient of a group that has live rows sums to zero.
    """
    logits, targets, values = rows(member, 60)
    loss_fn = member.make(queue_size=40, queue_follows_shift=shift)
    parts = [slice(40), slice(40, 60)]
    values["group"][parts[1]] = torch.arange(20) % 3  # others are in the queue alone
    leaf = logits.clone().requires_grad_()
    for part in parts:
        own = {name: field[part] for name, field in values.items()}
        loss = loss_fn(leaf[part], targets[part], **own)
    occurs = torch.isin(values["group"], values["group"][parts[1]])
    kept = {name: field[occurs] for name, field in values.items()}
    expected = loop(member.make, logits[occurs], targets[occurs], kept)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    (slopes,) = torch.autograd.grad(loss, leaf)
    if shift:
        of_groups = torch.zeros(3, dtype=torch.float64)
        of_groups.index_add_(0, values["group"][parts[1]], slopes[parts[1], 0])
        torch.testing.assert_close(of_groups, torch.zeros_like(of_groups), rtol=0, atol=1e-12)


def test_a_mean_over_groups_that_occur() -> None:
    """Ignored rows are enough, and rows that nobody gave a value are worth 1."""
    loss_fn = SmoothAPLoss(1, queue_size=20, temperature=0.3)
    logits, targets = torch.randn(12, 1, generator=seeded(0)), torch.arange(12) % 2
    first = loss_fn(logits, targets, group=torch.arange(12) // 6)
    alone = functional.smooth_ap(logits[:6, 0], targets[:6] > 0, 0.3).ap
    loss_fn.eval()
    only_ignored = torch.full((2,), IGNORED), torch.zeros(2, dtype=torch.int64)
    assert loss_fn(logits[:2], only_ignored[0], group=only_ignored[1]).item() == pytest.approx(
        1 - alone.item()
    )
    empty = loss_fn(logits[:0], targets[:0], group=targets[:0])
    assert empty.item() == 0
    assert first.item() != pytest.approx(1 - alone.item())
    loss_fn.train().reset_queue()
    loss_fn(logits, targets)
    worth = torch.arange(12.0)
    loss = loss_fn(-logits, targets, value=worth)
    both = functional.smooth_ap(
        torch.cat((-logits, logits))[:, 0],
        torch.cat((targets, targets)) > 0,
        0.3,
        value=torch.cat((worth, torch.ones(12))),
    )
    assert loss.item() == pytest.approx(1 - both.ap.item())


def test_the_gain_of_a_grade_unless_it_has_a_value() -> None:
    logits, grades = torch.randn(20, 1, generator=seeded(1)), torch.arange(20) % 4
    loss_fn = NDCGLoss(queue_size=20, temperature=0.3)
    loss_fn(logits, grades)
    worth = torch.rand(20, generator=seeded(2))
    gain = torch.where(grades > 0, worth, 0)
    expected = functional.ndcg(
        torch.cat((-logits, logits))[:, 0],
        torch.cat((grades, grades)),
        0.3,
        value=torch.cat((gain, 2.0**grades - 1)),
    )
    loss = loss_fn(-logits, grades, value=worth)
    assert loss.item() == pytest.approx(1 - expected.metric.item(), abs=1e-6)


@pytest.mark.parametrize("unit", ["score", "spread"])
def test_nothing_to_rank_in_any_group(unit: str) -> None:
    """0, and so are its first and second derivatives."""
    leaf = torch.randn(6, 1, generator=seeded(0), dtype=torch.float64).requires_grad_()
    loss_fn = SmoothAPLoss(1, 0, temperature_unit=unit)  # type: ignore[arg-type]
    loss = loss_fn(leaf, torch.zeros(6, dtype=torch.int64), group=torch.arange(6) // 3)
    (slopes,) = torch.autograd.grad(loss, leaf, create_graph=True)
    (curves,) = torch.autograd.grad(slopes.sum(), leaf)
    assert loss.item() == 0
    assert not slopes.any()
    assert not curves.any()


def test_with_and_without_groups_do_not_mix() -> None:
    """In eval() and after a checkpoint too; an empty queue takes either."""
    logits, targets = torch.randn(6, 1, generator=seeded(0)), torch.arange(6) % 2
    group = torch.arange(6) // 3
    for first, then in (({}, {"group": group}), ({"group": group}, {})):
        loss_fn = SmoothAPLoss(1, queue_size=8)
        loss_fn(logits[:0], targets[:0], **{name: own[:0] for name, own in then.items()})
        loss_fn(logits, targets, **first)
        resumed = SmoothAPLoss(1, queue_size=8)
        resumed.load_state_dict(loss_fn.state_dict())
        for one in (loss_fn, resumed.eval(), copy.deepcopy(loss_fn)):
            before = one.state_dict()["_extra_state"].clone()
            with pytest.raises(ValueError, match="reset_queue"):
                one(logits, targets, **then)
            assert one.state_dict()["_extra_state"].equal(before)
            one.reset_queue()
            one(logits, targets, **then)


def test_a_resumed_loss_goes_on_bit_for_bit() -> None:
    member = MEMBERS["NDCG"]
    logits, targets, values = rows(member, 60)
    values["group"] += 2**40
    first, resumed = (member.make(queue_size=30) for _ in range(2))
    for start in range(0, 60, 20):
        part = slice(start, start + 20)
        own = {name: field[part] for name, field in values.items()}
        expected = first(logits[part], targets[part], **own)
        if start > 0:
            assert resumed(logits[part], targets[part], **own).equal(expected)
        resumed.load_state_dict(first.state_dict())


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "column": ({"group": torch.zeros(4, 1, dtype=torch.int64)}, ValueError, r"group must be \[4\]"),
    "floating": ({"group": torch.zeros(4)}, TypeError, "group must be integers, got torch.float32"),
    "bool": ({"group": torch.zeros(4) > 0}, TypeError, "group must be integers, got torch.bool"),
    "few": ({"value": torch.ones(3)}, ValueError, r"value must be \[4\]"),
    "below": ({"value": -torch.ones(4)}, ValueError, "value of a positive must be finite and >= 0"),
    "nan": ({"value": torch.full((4,), torch.nan)}, ValueError, "value of a positive"),
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_bad_arguments(bad: tuple[dict[str, Any], type[Exception], str]) -> None:
    values, error, text = bad
    loss_fn = SmoothAPLoss(1, queue_size=4)
    before = loss_fn.state_dict()["_extra_state"]
    with pytest.raises(error, match=text):
        loss_fn(torch.zeros(4, 1), torch.tensor([0, 1, 0, 1]), **values)
    assert loss_fn.state_dict()["_extra_state"].equal(before)


def test_of_negatives_no_value_is_looked_at() -> None:
    logits, targets = torch.randn(6, 1, generator=seeded(0)), torch.tensor([1, 0, 1, 0, 0, 0])
    value = torch.where(targets > 0, 2.0, torch.nan)
    loss_fn = SmoothAPLoss(1, queue_size=6)
    assert loss_fn(logits, targets, value=value).equal(SmoothAPLoss(1)(logits, targets))
    assert loss_fn(logits, targets, value=value).isfinite()


def through_rank(rank: int | None, name: str, queue_size: int) -> tuple[Tensor, Tensor]:
    """The last of two steps: the loss, and the gradient of the rank's rows."""
    loss_fn = MEMBERS[name].make(queue_size=queue_size, grad_reduce="sum")
    logits, targets, values = rows(MEMBERS[name], 40)
    for step in range(2):
        leaf = (logits * (1 - step / 2)).requires_grad_()
        own = [slice(step * 20, step * 20 + 20), slice(20, 20), slice(0, 13), slice(13, 20)]
        part = (
            own[0]
            if rank is None
            else slice(step * 20, step * 20 + 13)
            if rank == 0
            else slice(step * 20 + 13, step * 20 + 20)
        )
        given = {name: field[part] for name, field in values.items()}
        if rank == 1:
            given.pop("value" if step == 0 else "sample_weight")
        elif rank is None:  # as if that one had sent ones
            given["value" if step == 0 else "sample_weight"][13:] = 1
        loss = loss_fn(leaf[part], targets[part], **given)
        (slopes,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), slopes


@pytest.mark.parametrize("queue_size", [0, 30])
@pytest.mark.parametrize("name", ["AP", "partial AUC"])
def test_two_processes_are_one(ranks: Ranks, name: str, queue_size: int) -> None:
    (one, first), (other, second) = ranks.run(through_rank, name, queue_size)
    expected, slopes = through_rank(None, name, queue_size)
    assert one.equal(other)
    torch.testing.assert_close(one, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(first + second, slopes, rtol=1e-10, atol=1e-13)


def grouped_on_one(rank: int) -> None:
    group = {"group": torch.arange(4)} if rank == 0 else {}
    SmoothAPLoss(1)(torch.zeros(4, 1), torch.tensor([0, 1, 0, 1]), **group)


def by_sums(rank: int) -> None:
    SmoothAPLoss(1, gather="sums")(
        torch.zeros(4, 1), torch.tensor([0, 1, 0, 1]), group=torch.arange(4)
    )


def test_processes_that_can_not_rank_within_groups(ranks: Ranks) -> None:
    for found in ranks.run(grouped_on_one):
        assert isinstance(found, Failure)
        assert "disagree on group" in found.message
    for found in ranks.run(by_sums):
        assert isinstance(found, Failure)
        assert 'use gather="rows"' in found.message


def test_they_reach_the_main_loss() -> None:
    member = MEMBERS["AP"]
    logits, targets, values = rows(member, 40)
    main = member.make()(logits, targets, **values)
    pointwise = CrossEntropy(1)(logits, targets, sample_weight=values["sample_weight"])
    mixed = MixedLoss(CrossEntropy(1), member.make(), main_weight=0.7)
    expected = 0.7 * main + 0.3 * pointwise
    torch.testing.assert_close(mixed(logits, targets, **values), expected)
    model = torch.nn.Linear(1, 1).double()
    in_parts = backward_in_micro_batches(
        model,
        member.make(),
        logits.split(15),
        targets,
        **values,  # type: ignore[arg-type]
    )
    torch.testing.assert_close(in_parts, member.make()(model(logits), targets, **values).detach())


def test_diagnosis_is_over_groups() -> None:
    member = MEMBERS["recall at rows"]
    logits, targets, values = rows(member, 60, 2)
    found = member.make(2).diagnose(logits, targets, **values)
    loss, per_class, _ = member.make(2)(logits, targets, True, **values)
    torch.testing.assert_close(found.metric, 1 - per_class)
    assert loss.isfinite()
    assert found.valid_groups is not None
    alone = functional.smooth_ap(
        *(logits.T, targets.clamp(min=0).T > 0, 0.3),
        sample_weight=torch.where(targets == IGNORED, 0, values["sample_weight"][:, None]).T,
        value=values["value"],
        group=values["group"],
    )
    assert found.valid_groups.equal(alone.valid.sum(1))
    torch.testing.assert_close(found.smooth_ap, alone.ap.sum(1) / alone.valid.sum(1))
