"""Everything public, as a strict project uses it: every line here has to be accepted."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from typing_extensions import Unpack, assert_type

from imbalanced_losses import (
    CrossEntropy,
    Diagnostics,
    GroupBatchSampler,
    MixedLoss,
    SmoothAPLoss,
    functional,
)
from imbalanced_losses.accumulation import backward_in_micro_batches
from imbalanced_losses.distributed import even_steps
from imbalanced_losses.extending import PerClass as Losses
from imbalanced_losses.extending import (
    Problems,
    QueuedRankingLoss,
    RankingLoss,
    RankingOptions,
    Ranks,
    sigmoid_sums,
)
from imbalanced_losses.functional import Backend, SmoothAP, prior_weights, score_spread, smooth_ap

PerClass = tuple[Tensor, Tensor, Tensor]


def every_argument() -> SmoothAPLoss:
    return SmoothAPLoss(
        num_classes=4,
        queue_size=512,
        temperature=0.1,
        reduction="sum",
        ignore_index=-1,
        update_queue_in_eval=True,
        gather_distributed=False,
        max_pool_size=4096,
        multilabel=True,
        temperature_unit="spread",
        queue_follows_shift=True,
        process_group=None,
        grad_reduce="sum",
        gather="rows",
        target_prior=(0.1, 0.01, 0.2, 0.3),
    )


def every_prior() -> None:
    SmoothAPLoss(1, target_prior=0.01)
    SmoothAPLoss(2, target_prior=[0.1, 0.9])
    SmoothAPLoss(2, target_prior=torch.tensor([0.1, 0.9]))


def calls(loss_fn: SmoothAPLoss, logits: Tensor, targets: Tensor, flag: bool) -> None:
    assert_type(loss_fn(logits, targets), Tensor)
    assert_type(loss_fn(logits, targets, sample_weight=logits[:, 0]), Tensor)
    assert_type(loss_fn(logits, targets, False), Tensor)
    assert_type(loss_fn(logits, targets, True), PerClass)
    assert_type(loss_fn(logits, targets, return_per_class=True), PerClass)
    assert_type(loss_fn(logits, targets, return_per_class=flag), Tensor | PerClass)
    assert_type(loss_fn.forward(logits, targets), Tensor)
    loss, per_class, valid = loss_fn(logits, targets, return_per_class=True)
    assert_type(loss + per_class[valid].mean(), Tensor)


def attributes(loss_fn: SmoothAPLoss) -> None:
    loss_fn.temperature = 0.05
    loss_fn.backend = "panel"
    loss_fn.check_values = False
    loss_fn.sampling_seed = 3
    loss_fn.reset_queue()
    assert_type(loss_fn.temperature, float)
    assert_type(loss_fn.num_classes, int)
    assert_type(loss_fn.max_pool_size, int | None)
    assert_type(loss_fn.target_prior, tuple[float, ...] | None)


def diagnosed(loss_fn: SmoothAPLoss, logits: Tensor, targets: Tensor) -> list[str]:
    found = loss_fn.diagnose(logits, targets, sample_weight=None)
    assert_type(found, Diagnostics)
    assert_type(found.gap, Tensor)
    assert_type(found.queue_age, int)
    return found.advice()


def as_functions(scores: Tensor, is_positive: Tensor, backend: Backend) -> Tensor:
    ap, valid = smooth_ap(scores, is_positive, 0.1 * score_spread(scores), backend=backend)
    weights = prior_weights(is_positive, 0.01)
    found = functional.smooth_ap(scores, is_positive, 0.1, sample_weight=weights)
    assert_type(found, SmoothAP)
    return torch.where(valid, 1 - ap, found.ap)


def focal(logits: Tensor, targets: Tensor) -> Tensor:
    loss_fn = CrossEntropy(1, torch.tensor([10.0]), ignore_index=-1, multilabel=False, gamma=2.0)
    return assert_type(loss_fn(logits, targets, sample_weight=logits[:, 0]), Tensor)


def mixed(logits: Tensor, targets: Tensor) -> Tensor:
    loss_fn = MixedLoss(
        CrossEntropy(1),
        SmoothAPLoss(1),
        main_weight=0.9,
        warmup_steps=100,
        blend_steps=10,
        temperature=(0.5, 0.05, 1000),
        refit_temperature=True,
        calls_per_step=None,
    )
    loss_fn.step()
    assert_type(loss_fn.main_weight, float)
    assert_type(loss_fn.in_warmup or loss_fn.in_blend, bool)
    assert_type(loss_fn.current_temperature, float)
    return assert_type(loss_fn(logits, targets), Tensor)


def in_groups(group: Tensor, data: Dataset[Tensor]) -> DataLoader[Tensor]:
    batches = GroupBatchSampler(
        group,
        groups_per_batch=8,
        max_group_size=64,
        is_positive=group == 0,
        shuffle=True,
        seed=1,
        num_replicas=2,
        rank=0,
        drop_last=True,
    )
    batches.set_epoch(1)
    batches.load_state_dict(batches.state_dict(num_consumed=0))
    assert_type(batches.weights, Tensor)
    assert_type(next(iter(batches)), list[int])
    return DataLoader(data, batch_sampler=batches)


def partner(logits: Tensor, targets: Tensor) -> Tensor:
    return (logits - targets).square().mean()


class Classifier(nn.Module):
    """A module with a loss of its own, trained for a step."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(8, 1)
        self.loss_fn = MixedLoss(partner, SmoothAPLoss(1), main_weight=0.5)

    def training_step(self, features: Tensor, targets: Tensor) -> Tensor:
        return self.loss_fn(self.body(features), targets)


def in_micro_batches(model: Classifier, features: Tensor, targets: Tensor) -> float:
    for loss_fn in (SmoothAPLoss(1), CrossEntropy(1), model.loss_fn):
        backward_in_micro_batches(model.body, loss_fn, features.chunk(4), targets)
    loss = backward_in_micro_batches(
        model.body, partner, [features], targets, sample_weight=features[:, 0], scale=torch.exp
    )
    return loss.item()


def batches(pairs: list[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    steps = even_steps(pairs, device="cpu")
    assert_type(steps, Iterator[tuple[Tensor, Tensor]])
    return steps


class MeanRank(RankingLoss):
    """A loss of one's own: less the mean soft rank of the positives, as a share of all rows."""

    def __init__(
        self, num_classes: int, power: float = 1.0, **options: Unpack[RankingOptions]
    ) -> None:
        super().__init__(num_classes, **options)
        self.power = power

    def metric(self, problems: Problems) -> Tensor:
        def worth(ranks: Ranks) -> Tensor:
            return (ranks.among("all") / ranks.of_problem(problems.mass("all"))) ** self.power

        assert_type(problems.valid, Tensor)
        return -problems.ranked_sum(worth, among=("all",)) / problems.mass("positives")


class Older(QueuedRankingLoss):
    """The same hook as in version 0.9."""

    def _per_class(self, problems: Problems) -> Losses:
        scores, problem = problems.scores, torch.zeros_like(problems.scores[0], dtype=torch.int64)
        ones, tau = torch.ones_like(scores)[..., None], problems.temperature
        sums = sigmoid_sums(scores[0], problem, scores, ones, tau)
        return Losses(sums.mean().expand(len(scores)), problems.is_positive.any(1))


def own_loss(logits: Tensor, targets: Tensor) -> MixedLoss:
    loss_fn = MeanRank(1, 2.0, temperature_unit="spread", gather="sums", target_prior=0.1)
    assert_type(loss_fn(logits, targets, True), PerClass)
    assert_type(loss_fn.diagnose(logits, targets), Diagnostics)
    Older(1)(logits, targets)
    return MixedLoss(CrossEntropy(1), MeanRank(1), main_weight=0.5)
