"""The losses of `benchmarks.quality`: the BCE family, the peers, and the recipes that were tried.

Each is made from the training labels, and gives the loss of a batch from its logits.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits as bce

from benchmarks import _peers, ap_variants

BATCH_SIZE, STEPS = 1024, 500
SECOND_MOMENT = 0.999  # of AdamW
AVERAGING = 0.98  # of the weights, where they are averaged

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # logits [n] or [n, C], labels, rows [n] -> []
Make = Callable[[Tensor], Loss]  # of the training labels [N]


def _weighted(power: float) -> Make:
    def make(labels: Tensor) -> Loss:
        weight = ((labels == 0).sum() / (labels == 1).sum()) ** power
        return lambda logits, y, _: bce(logits, y.float(), pos_weight=weight)

    return make


def _focal(labels: Tensor) -> Loss:
    """Lin et al. 2017, γ = 2, without α."""

    def loss(logits: Tensor, y: Tensor, _: Tensor) -> Tensor:
        each = bce(logits, y.float(), reduction="none")
        return ((1 - torch.exp(-each)).square() * each).mean()

    return loss


def _hard_negatives(labels: Tensor) -> Loss:
    """BCE on all positives and the tenth of the negatives that has the highest scores."""

    def loss(logits: Tensor, y: Tensor, _: Tensor) -> Tensor:
        negatives = logits[y == 0]
        hardest = negatives.topk(max(1, len(negatives) // 10)).values
        kept = torch.cat((logits[y == 1], hardest))
        is_positive = torch.arange(len(kept)) < len(kept) - len(hardest)
        return bce(kept, is_positive.float())

    return loss


class Recipe(NamedTuple):
    """Smooth-AP of the batch, in units of the spread, beside another loss; no queue."""

    temperature: float
    main_weight: float = 1.0
    auxiliary: str = "focal"  # a key of PARTNERS
    sampled_positive: float | None = None  # share of positives in a batch; None: as they come
    at_prior: bool = False  # rank at the prevalence of the training rows all the same
    unit: Literal["score", "spread"] = "spread"
    queue_size: int = 0
    upper_bound: bool = False  # SupAP in place of Smooth-AP
    batch_size: int = BATCH_SIZE
    second_moment: float = SECOND_MOMENT
    last_temperature: float | None = None  # approached geometrically over the whole training
    warmup: int = 0  # steps with the other loss alone, and as many to blend over
    averaging: float | None = None  # decay of the mean of the weights that is evaluated
    # As in `ap_variants.powered`.
    power: float = 1.0
    count: str = "sigmoid"
    margin: float = 0.0
    last_weight: float | None = None  # of the main loss, approached linearly over the training

    def name(self) -> str:
        temperature = f"τ {self.temperature:g}"
        if self.last_temperature is not None:
            temperature += f" to {self.last_temperature:g}"
        parts = ["SupAP" if self.upper_bound else "SmoothAP", temperature]
        if self.power != 1:
            parts[0] += f" q {self.power:g}"
        if self.count != "sigmoid":
            parts[0] += f" {self.count}"
        if self.unit == "score":
            parts[-1] += " raw"
        if self.main_weight < 1:
            parts += [f"w {self.main_weight:g}", self.auxiliary]
        if self.queue_size:
            parts.append(f"queue {self.queue_size}")
        if self.sampled_positive is not None:
            parts.append(f"{self.sampled_positive:.0%} positives")
        if self.at_prior:
            parts.append("at prior")
        if self.warmup:
            parts.append(f"warm-up {self.warmup}")
        if self.last_weight is not None:
            parts.append(f"w to {self.last_weight:g}")
        if self.margin:
            parts.append(f"margin {self.margin:g}")
        return _trained_name(", ".join(parts), self.batch_size, self.second_moment)

    def __call__(self, labels: Tensor) -> Loss:
        from imbalanced_losses import MixedLoss, SmoothAPLoss

        ranking = SmoothAPLoss(
            1,
            queue_size=self.queue_size,
            queue_follows_shift=self.queue_size > 0,
            temperature=self.temperature,
            temperature_unit=self.unit,
            target_prior=labels.double().mean().item() if self.at_prior else None,
        )
        pointwise = PARTNERS[self.auxiliary](labels)
        if self._is_variant():
            return _mixed(self._variant, pointwise, self.main_weight, self.last_weight)
        if self.main_weight == 1 and not self.warmup and self.last_temperature is None:
            return lambda logits, y, _: ranking(logits[:, None], y)
        mixed = MixedLoss(
            lambda logits, y: pointwise(logits.squeeze(1), y, y),
            ranking,
            main_weight=self.main_weight,
            warmup_steps=self.warmup,
            blend_steps=self.warmup,
            temperature=None
            if self.last_temperature is None
            else (self.temperature, self.last_temperature, STEPS),
        )
        return lambda logits, y, _: mixed(logits[:, None], y)

    def _is_variant(self) -> bool:
        is_smooth_ap = self.power == 1 and self.count == "sigmoid" and self.margin == 0
        return self.upper_bound or not is_smooth_ap or self.last_weight is not None

    def _variant(self, logits: Tensor, y: Tensor) -> Tensor:
        if self.upper_bound:
            return ap_variants.upper_bound(logits, y, self.temperature)
        unit = logits.std() if self.unit == "spread" else 1.0
        return ap_variants.powered(
            logits,
            y,
            self.temperature * unit,
            power=self.power,
            count=self.count,
            margin=self.margin,
        )


def _mixed(
    main: Callable[[Tensor, Tensor], Tensor], other: Loss, start: float, end: float | None
) -> Loss:
    """w · main + (1 − w) · other, where w goes from start to end over the training."""
    calls = itertools.count()

    def loss(logits: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        done = next(calls) / STEPS
        w = start if end is None else start * (1 - done) + end * done
        return w * main(logits, y) + (1 - w) * other(logits, y, rows)

    return loss


def _trained_name(name: str, batch_size: int, second_moment: float) -> str:
    if batch_size != BATCH_SIZE:
        name += f", batch {batch_size}"
    if second_moment != SECOND_MOMENT:
        name += f", β₂ {second_moment:g}"
    return name


class Trained(NamedTuple):
    """A loss with batches or an optimiser of its own."""

    make: Make
    sampled_positive: float | None = None
    batch_size: int = BATCH_SIZE
    second_moment: float = SECOND_MOMENT
    averaging: float | None = None

    def __call__(self, labels: Tensor) -> Loss:
        return self.make(labels)


def _predecessor(labels: Tensor) -> Loss:
    """With its own defaults: raw logits, τ = 0.01, a queue of 1,024."""
    loss_fn = _peers.load("predecessor").SmoothAPLoss(1)
    return lambda logits, y, _: loss_fn(logits[:, None], y)


def _libauc(labels: Tensor) -> Loss:
    loss_fn = _peers.load("libauc").APLoss(data_len=len(labels))
    return lambda logits, y, rows: loss_fn(torch.sigmoid(logits)[:, None], y[:, None], rows)


BCE_FAMILY: dict[str, Make] = {
    "BCE": _weighted(0.0),
    "sqrt-weighted BCE": _weighted(0.5),
    "weighted BCE": _weighted(1.0),
    "focal": _focal,
    "hard-negative BCE": _hard_negatives,
}
SQRT, BCE, HARD = "sqrt-weighted BCE", "BCE", "hard-negative BCE"
BOTH = f"{SQRT} and {HARD}"


def _both(labels: Tensor) -> Loss:
    """The mean of two members of the family."""
    weighted, hard = BCE_FAMILY[SQRT](labels), _hard_negatives(labels)
    return lambda logits, y, rows: (weighted(logits, y, rows) + hard(logits, y, rows)) / 2


PARTNERS: dict[str, Make] = {**BCE_FAMILY, BOTH: _both}
# The one recipe for all tasks, chosen on development splits among CANDIDATES.
OURS = "SmoothAP + BCE"
RECIPE = Recipe(0.3, 0.8, SQRT)
LOSSES: dict[str, Make] = {
    **BCE_FAMILY,
    "LibAUC APLoss": _libauc,
    OURS: RECIPE,
    "SmoothAP": Recipe(0.1),
    "predecessor": _predecessor,
}
CANDIDATES: dict[str, Make] = (
    {
        recipe.name(): recipe
        for recipe in (
            # On all tasks.
            *(Recipe(tau, w, SQRT) for tau, w in ((0.1, 0.2), (0.1, 0.5), (0.1, 0.8))),
            *(Recipe(tau, w, SQRT) for tau, w in ((0.3, 0.5), (0.3, 0.8))),
            *(Recipe(tau, w, BCE) for tau, w in ((0.1, 0.5), (0.3, 0.5), (0.3, 0.9))),
            *(Recipe(0.3, w) for w in (0.5, 0.8, 0.9, 0.95)),
            *(Recipe(tau, w) for tau, w in ((0.1, 0.8), (0.1, 0.95), (1.0, 0.8), (1.0, 0.9))),
            Recipe(0.3, 0.8, HARD),
            Recipe(0.3, 0.8, sampled_positive=0.1, at_prior=True),
            Recipe(0.1, 0.8, upper_bound=True),
            # On the two tasks with the fewest positives, and given up there.
            *(Recipe(0.3, w, SQRT) for w in (0.02, 0.1, 0.3, 0.95)),
            *(Recipe(0.3, w) for w in (0.02, 0.1, 0.3)),
            *(Recipe(0.3, w, BCE) for w in (0.02, 0.1)),
            *(Recipe(1.0, w, SQRT) for w in (0.1, 0.8)),
            *(Recipe(tau, w) for tau, w in ((0.1, 0.1), (1.0, 0.3))),
            Recipe(0.3, 0.3, HARD),
            *(Recipe(0.3, 0.8, BCE, sampled_positive=share) for share in (0.1, 0.25)),
            Recipe(0.3, 0.8, sampled_positive=0.1),
            Recipe(0.3, 0.8, BCE, sampled_positive=0.1, at_prior=True),
            Recipe(0.1, 0.3, BCE, sampled_positive=0.25, at_prior=True),
            Recipe(1.0, 0.5, BCE, unit="score"),
            # Later, on all tasks: pools of 4,096, what Adam remembers, schedules.
            *(
                Recipe(tau, w, SQRT, batch_size=4096)
                for tau, w in ((0.1, 0.8), (0.3, 0.8), (0.3, 0.5))
            ),
            Recipe(0.1, batch_size=4096),
            *(Recipe(0.3, w, SQRT, second_moment=0.95) for w in (0.5, 0.8)),
            Recipe(0.1, second_moment=0.95),
            Recipe(0.3, 0.8, SQRT, queue_size=4096),
            Recipe(1.0, 0.8, SQRT, last_temperature=0.1),
            *(Recipe(tau, 0.8, SQRT, warmup=100) for tau in (0.1, 0.3)),
        )
    }
    | {
        _trained_name(name, 4096, SECOND_MOMENT): Trained(make, batch_size=4096)
        for name, make in BCE_FAMILY.items()
    }
    | {
        _trained_name(name, BATCH_SIZE, 0.95): Trained(make, second_moment=0.95)
        for name, make in BCE_FAMILY.items()
    }
)
# Tried on the first of those splits, with one weight decay, and given up on a few tasks.
SCREENED: dict[str, Make] = {
    recipe.name(): recipe
    for recipe in (
        *(Recipe(0.3, power=q) for q in (0, 2)),
        *(Recipe(0.3, 0.8, SQRT, power=q) for q in (0, 0.5, 2, 3)),
        Recipe(1.0, 0.8, SQRT, power=0),
        *(Recipe(1.0, unit="score", power=q) for q in (0, 0.5)),
        *(Recipe(1.0, 0.5, SQRT, unit="score", power=q) for q in (0, 0.5)),
        *(Recipe(1.0, unit="score", power=0, count=count) for count in ("softplus", "softmax")),
        *(Recipe(0.3, 0.8, SQRT, margin=m) for m in (1, 2, 3)),
        *(Recipe(0.3, 0.8, partner, margin=2) for partner in (BCE, "focal")),
        Recipe(0.1, 0.8, SQRT, margin=5),
        Recipe(0.3, margin=2),
        Recipe(0.3, 0.8, SQRT, power=2, margin=1),
        Recipe(0.3, 0.5, BOTH),
        Recipe(0.3, 0.9, SQRT, last_weight=0.2),
    )
}
# The mean of the weights over the last fifty steps or so, in place of the weights.
AVERAGED: dict[str, Make] = {
    f"{name}, mean {AVERAGING:g}": make._replace(averaging=AVERAGING)
    if isinstance(make, Recipe)
    else Trained(make, averaging=AVERAGING)
    for name, make in LOSSES.items()
    if name in BCE_FAMILY or isinstance(make, Recipe)
}
# As many positives as negatives in every batch, and the prevalence known or not.
REBALANCED: dict[str, Make] = {
    f"{name}, {how}": contender
    for how, share in (("as they come", None), ("50 % positives", 0.5))
    for name, contender in (
        ("BCE", Trained(_weighted(0.0), share)),
        ("SmoothAP", Recipe(0.1, sampled_positive=share)),
        (OURS, Recipe(0.3, 0.8, SQRT, sampled_positive=share)),
    )
} | {
    "SmoothAP, 50 % positives, target_prior": Recipe(0.1, sampled_positive=0.5, at_prior=True),
    f"{OURS}, 50 % positives, target_prior": Recipe(
        0.3, 0.8, SQRT, sampled_positive=0.5, at_prior=True
    ),
}
REBALANCED_TASKS = ("protein", "chess")
ALL = {**LOSSES, **CANDIDATES, **SCREENED, **AVERAGED, **REBALANCED}
