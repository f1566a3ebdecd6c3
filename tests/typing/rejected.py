"""Mistakes that the type checkers have to find: an ignore that is not needed is an error."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import Unpack

from imbalanced_losses import CrossEntropy, MixedLoss, SmoothAPLoss
from imbalanced_losses.accumulation import backward_in_micro_batches
from imbalanced_losses.extending import Problems, RankingLoss, RankingOptions, Ranks
from imbalanced_losses.functional import prior_weights, smooth_ap


def constructors() -> None:
    SmoothAPLoss()  # type: ignore[call-arg]
    SmoothAPLoss("3")  # type: ignore[arg-type]
    SmoothAPLoss(3, reduction="avg")  # type: ignore[arg-type]
    SmoothAPLoss(3, temperature_unit="sd")  # type: ignore[arg-type]
    SmoothAPLoss(3, grad_reduce="none")  # type: ignore[arg-type]
    SmoothAPLoss(3, gather="all")  # type: ignore[arg-type]
    SmoothAPLoss(3, temperature="0.1")  # type: ignore[arg-type]
    SmoothAPLoss(3, max_pool_size=0.5)  # type: ignore[arg-type]
    SmoothAPLoss(3, target_prior="0.1")  # type: ignore[arg-type]
    SmoothAPLoss(3, weight=None)  # type: ignore[call-arg]
    SmoothAPLoss(3, 8, 0.1, "mean", -100, False, None, None, True)  # type: ignore[call-arg]
    CrossEntropy(1, class_weight=10.0)  # type: ignore[arg-type]
    CrossEntropy(1, None, -100, True)  # type: ignore[call-arg]


def calls(loss_fn: SmoothAPLoss, logits: Tensor, targets: Tensor) -> None:
    loss_fn(logits)  # type: ignore[call-overload]
    loss_fn(logits, [0, 1])  # type: ignore[call-overload]
    loss_fn(logits, targets, sample_weight=1.0)  # type: ignore[call-overload]
    loss_fn(logits, targets, False, logits)  # type: ignore[call-overload]
    loss_fn(logits, targets, reduction="sum")  # type: ignore[call-overload]
    _loss, _per_class = loss_fn(logits, targets, return_per_class=True)  # type: ignore[misc]
    loss_fn(logits, targets, return_per_class=True).backward()  # type: ignore[attr-defined]
    loss_fn.temperature = "0.1"  # type: ignore[assignment]
    loss_fn.backend = "triton"  # type: ignore[assignment]
    loss_fn.process_group = None  # type: ignore[misc]
    loss_fn.diagnose(logits, targets, True)  # type: ignore[call-arg, arg-type]


def mixed(logits: Tensor, targets: Tensor) -> None:
    MixedLoss(CrossEntropy(1), CrossEntropy(1), main_weight=0.5)  # type: ignore[arg-type]
    MixedLoss(CrossEntropy(1), SmoothAPLoss(1), 0.5)  # type: ignore[call-arg]
    MixedLoss(
        CrossEntropy(1),
        SmoothAPLoss(1),
        main_weight=0.5,
        temperature=(0.5, 0.05),  # type: ignore[arg-type]
    )
    mix = MixedLoss(CrossEntropy(1), SmoothAPLoss(1), main_weight=0.5)
    mix(logits, targets, return_per_class=True)  # type: ignore[call-arg]
    mix.main_weight = 0.1  # type: ignore[misc]
    CrossEntropy(1)(logits, [0, 1])  # type: ignore[arg-type]


def functions(scores: Tensor, is_positive: Tensor) -> None:
    smooth_ap(scores, is_positive, backend="triton")  # type: ignore[arg-type]
    smooth_ap(scores, [True, False])  # type: ignore[arg-type]
    smooth_ap(scores, is_positive, 0.1, None)  # type: ignore[call-arg]
    prior_weights(is_positive, "0.1")  # type: ignore[arg-type]
    backward_in_micro_batches(scores, SmoothAPLoss(1), [scores], scores)  # type: ignore[arg-type]


class Own(RankingLoss):
    def __init__(self, num_classes: int, **options: Unpack[RankingOptions]) -> None:
        super().__init__(num_classes, **options)

    def metric(self, problems: Problems) -> Tensor:
        def worth(ranks: Ranks) -> float:
            return ranks.among("everybody").sum().item()  # type: ignore[arg-type]

        problems.mass("none")  # type: ignore[arg-type]
        problems.ranked_sum(lambda ranks: ranks.among("all"), among=("every",))  # type: ignore[arg-type]
        return problems.ranked_sum(worth)  # type: ignore[arg-type]


def own(logits: Tensor, targets: Tensor) -> None:
    Own(1, queue_sise=8)  # type: ignore[call-arg]
    Own(1, gather="all")  # type: ignore[arg-type]
    Own(1, 8)  # type: ignore[call-arg]
    Own(1)(logits, [0, 1])  # type: ignore[call-overload]
