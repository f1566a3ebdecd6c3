"""The five ways to train the network and one training run."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from demo.data import Protein, Split
from demo.measures import Judged, judge
from demo.model import make_model
from imbalanced_losses import GroupBatchSampler, SmoothAPLoss

LossFunction = Callable[[Tensor, Tensor, Tensor], Tensor]  # of logits, labels and blocks, each [n]


class Recipe(NamedTuple):
    """What all losses share. A batch of whole blocks has almost four times the rows of others."""

    steps: int = 1500
    batch_size: int = 1024
    block_steps: int = 600
    blocks_per_batch: int = 4
    learning_rate: float = 1e-2
    weight_decay: float = 1e-4
    evaluate_every: int = 50


class Part(NamedTuple):
    """Standardised features [n, F] float32, labels [n] and blocks [n] int64."""

    features: Tensor
    labels: Tensor
    blocks: Tensor


class Task(NamedTuple):
    """The three parts of one split."""

    train: Part
    validation: Part
    test: Part


class Run(NamedTuple):
    """What one training run leaves.

    Attributes:
        loss: a key of `LOSSES`.
        seed: of the split, the initial weights and the batches.
        ap_step: the step with the best validation AP over all rows.
        block_step: the step with the best validation mean AP per block.
        test: the AP over all rows of the one checkpoint, the other measures of the other.
        seconds: training and evaluation together.
    """

    loss: str
    seed: int
    ap_step: int
    block_step: int
    test: Judged
    seconds: float


def bce(train_labels: Tensor) -> LossFunction:
    """Binary cross-entropy."""
    return lambda logits, labels, _: binary_cross_entropy_with_logits(logits, labels.float())


def sqrt_weighted_bce(train_labels: Tensor) -> LossFunction:
    """Binary cross-entropy, positives weighted by √(negatives / positives)."""
    positives = train_labels.sum()
    weight = ((len(train_labels) - positives) / positives).sqrt()
    return lambda logits, labels, _: binary_cross_entropy_with_logits(
        logits, labels.float(), pos_weight=weight
    )


def smooth_ap(train_labels: Tensor) -> LossFunction:
    """One minus the smoothed Average Precision of the batch."""
    loss_fn = _smooth_ap_loss()
    return lambda logits, labels, _: loss_fn(logits.unsqueeze(1), labels)


def smooth_ap_within_blocks(train_labels: Tensor) -> LossFunction:
    """One minus the mean over blocks of the smoothed Average Precision within the block."""
    loss_fn = _smooth_ap_loss()
    return lambda logits, labels, blocks: loss_fn(logits.unsqueeze(1), labels, group=blocks)


def _smooth_ap_loss() -> SmoothAPLoss:
    # No queue: 1,024 rows hold about nine positives of their own. The temperature was chosen by
    # validation on other seeds than the demo's.
    return SmoothAPLoss(num_classes=1, queue_size=0, temperature=0.1, temperature_unit="spread")


SQRT_BCE, SMOOTH_AP = "sqrt-weighted BCE", "SmoothAP"
SQRT_BCE_BLOCKS, SMOOTH_AP_BLOCKS = "sqrt-weighted BCE, whole blocks", "SmoothAP within blocks"
LOSSES: dict[str, Callable[[Tensor], LossFunction]] = {
    "BCE": bce,
    SQRT_BCE: sqrt_weighted_bce,
    SMOOTH_AP: smooth_ap,
    SQRT_BCE_BLOCKS: sqrt_weighted_bce,
    SMOOTH_AP_BLOCKS: smooth_ap_within_blocks,
}
ON_WHOLE_BLOCKS = (SQRT_BCE_BLOCKS, SMOOTH_AP_BLOCKS)  # the others: on random rows


def make_task(data: Protein, split: Split) -> Task:
    """Standardise by the mean and deviation of the training rows and cut into parts."""
    train = data.features[split.train]
    mean, deviation = train.mean(0), train.std(0).clamp(min=1e-6)
    features = (data.features - mean) / deviation
    return Task(*(Part(features[rows], data.labels[rows], data.blocks[rows]) for rows in split))


def steps_of(loss: str, recipe: Recipe) -> int:
    """The steps of a loss."""
    return recipe.block_steps if loss in ON_WHOLE_BLOCKS else recipe.steps


def train(
    task: Task,
    loss: str,
    seed: int,
    recipe: Recipe,
    on_steps: Callable[[int], None] = lambda steps: None,
) -> Run:
    """Train one network; test it at its best validation AP over all rows, and per block.

    Args:
        task: the parts; test rows are scored at the end alone.
        loss: a key of `LOSSES`.
        seed: fixes initial weights and batches.
        recipe: the budget.
        on_steps: called with the number of steps done since the last call.
    """
    started = time.perf_counter()
    model = make_model(task.train.features.shape[1], seed)
    best = _fit(model, loss, task, seed, recipe, on_steps)
    tested = {}
    for measure, (_, _, weights) in best.items():
        model.load_state_dict(weights)
        tested[measure] = _judge(model, task.test)
    test = tested["block_ap"]._replace(ap=tested["ap"].ap)
    steps = best["ap"].step, best["block_ap"].step
    return Run(loss, seed, *steps, test, time.perf_counter() - started)


class _Best(NamedTuple):
    step: int
    value: float
    weights: dict[str, Tensor]


def _fit(
    model: nn.Module,
    loss: str,
    task: Task,
    seed: int,
    recipe: Recipe,
    on_steps: Callable[[int], None],
) -> dict[str, _Best]:
    """Train in place; the first maximum of both validation measures."""
    loss_fn, steps = LOSSES[loss](task.train.labels), steps_of(loss, recipe)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=recipe.learning_rate, total_steps=steps
    )
    best = dict.fromkeys(("ap", "block_ap"), _Best(0, -1.0, {}))
    batches = _batches(task.train, loss in ON_WHOLE_BLOCKS, seed, recipe)
    for step, rows in zip(range(1, steps + 1), batches, strict=False):
        features, labels, blocks = (column[rows] for column in task.train)
        optimizer.zero_grad()
        loss_fn(model(features), labels, blocks).backward()
        optimizer.step()
        schedule.step()
        if step % recipe.evaluate_every == 0:
            on_steps(recipe.evaluate_every)
            judged = _judge(model, task.validation)
            for measure, so_far in best.items():
                value = getattr(judged, measure)
                if value > so_far.value:
                    best[measure] = _Best(step, value, copy.deepcopy(model.state_dict()))
    return best


def _batches(part: Part, whole_blocks: bool, seed: int, recipe: Recipe) -> Iterator[Tensor]:
    """The row indices of step after step: epochs shuffled anew, without end."""
    if whole_blocks:
        sampler = GroupBatchSampler(part.blocks, recipe.blocks_per_batch, seed=seed)
        for epoch in count():
            sampler.set_epoch(epoch)
            yield from map(torch.tensor, sampler)
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(part.labels), generator=generator)
        full = max(1, len(order) // recipe.batch_size)
        yield from order.split(recipe.batch_size)[:full]


@torch.no_grad()
def _judge(model: nn.Module, part: Part) -> Judged:
    return judge(model(part.features), part.labels, part.blocks)
