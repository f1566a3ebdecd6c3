"""One training run of the network: the same start and budget for every loss."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from demo.model import make_model
from torch import Tensor, nn

from benchmarks.quality.losses import Contender
from benchmarks.quality.numbers import CHOSEN_BY, NUMBERS, Number
from benchmarks.quality.tasks import Rows, Table

EVALUATE_EVERY = 50


class Parts(NamedTuple):
    """The three parts of one split, features standardised."""

    train: Rows
    validation: Rows
    test: Rows


class Budget(NamedTuple):
    """What all losses of a question share.

    Attributes:
        steps: of the optimiser.
        batch_size: rows in each, or about as many in whole groups.
        num_outputs: of the network, for several classes.
    """

    steps: int = 500
    batch_size: int = 1024
    num_outputs: int = 1


class Setting(NamedTuple):
    """What is tuned for every loss alike."""

    learning_rate: float = 1e-2
    weight_decay: float = 1e-4
    within: bool = False  # features standardised within each group

    def __str__(self) -> str:
        text = f"lr {self.learning_rate:g} wd {self.weight_decay:g}"
        return text + " within" * self.within


class Found(NamedTuple):
    """What a run reads: the checkpoint was chosen by the validation value."""

    best_step: int
    validation: float
    test: float


def parts_of(table: Table, split: int) -> Parts:
    """By mean and deviation of the training rows."""
    indices = table.split(split)
    training = table.rows.features[indices.train]
    mean, deviation = training.mean(0), training.std(0).clamp(min=1e-6)
    rows = table.rows._replace(features=(table.rows.features - mean) / deviation)
    return Parts(*(rows.select(part) for part in indices))


def within_groups(parts: Parts) -> Parts:
    """The same with features standardised within each group."""
    return Parts(*(part._replace(features=_standardised(part)) for part in parts))


def _standardised(rows: Rows) -> Tensor:
    assert rows.group is not None
    group = rows.group.unique(return_inverse=True)[1]  # [n]
    size = group.bincount()[:, None]

    def mean(values: Tensor) -> Tensor:
        total = values.new_zeros(len(size), values.shape[1]).index_add(0, group, values)
        return (total / size)[group]

    centred = rows.features - mean(rows.features)
    return centred / mean(centred.square()).sqrt().clamp(min=1e-3)


def run(
    contender: Contender,
    parts: Parts,
    setting: Setting,
    numbers: tuple[str, ...],
    *,
    seed: int,
    budget: Budget,
) -> dict[str, Found]:
    """Train once; each number has the checkpoint of its best validation value."""
    model = make_model(parts.train.features.shape[1], seed)
    if budget.num_outputs > 1:
        model = nn.Sequential(*model[:-2], nn.Linear(model[-2].in_features, budget.num_outputs))
    tracked = {name: NUMBERS[name] for name in numbers if name not in CHOSEN_BY}
    best = train(contender, model, parts, setting, tracked, seed=seed, budget=budget)
    found = {}
    for name in numbers:
        step, validation, weights = best[CHOSEN_BY.get(name, name)]
        model.load_state_dict(weights)
        found[name] = Found(
            step, validation, NUMBERS[name](scores_of(model, parts.test), parts.test)
        )
    return found


Best = tuple[int, float, dict[str, Tensor]]  # step, value and weights


def train(
    contender: Contender,
    model: nn.Module,
    parts: Parts,
    setting: Setting,
    numbers: dict[str, Number],
    *,
    seed: int,
    budget: Budget,
) -> dict[str, Best]:
    """Train in place; the best validation of each number."""
    loss_fn = contender.make(parts.train)
    optimizer = _optimizer(contender, model, setting)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=setting.learning_rate,
        total_steps=budget.steps,
        cycle_momentum=contender.optimizer == "AdamW",
    )
    start = {name: w.clone() for name, w in model.state_dict().items()}
    best: dict[str, Best] = dict.fromkeys(numbers, (0, -1.0, start))
    batches = _batches(contender, parts.train, budget, seed)
    for step, rows in zip(range(1, budget.steps + 1), batches, strict=False):
        batch = parts.train.select(rows)
        optimizer.zero_grad()
        loss_fn(model(batch.features), batch, rows).backward()
        optimizer.step()
        schedule.step()
        if step % EVALUATE_EVERY == 0:
            scores = scores_of(model, parts.validation)
            if not bool(scores.isfinite().all()):
                break
            weights = {name: w.clone() for name, w in model.state_dict().items()}
            for name, number in numbers.items():
                value = number(scores, parts.validation)
                if value > best[name][1]:
                    best[name] = step, value, weights
    return best


def _optimizer(contender: Contender, model: nn.Module, setting: Setting) -> torch.optim.Optimizer:
    rates = {"lr": setting.learning_rate, "weight_decay": setting.weight_decay}
    if contender.optimizer == "AdamW":
        return torch.optim.AdamW(model.parameters(), fused=True, **rates)
    from libauc.optimizers import SOAP

    own: torch.optim.Optimizer = SOAP(model.parameters(), mode="adam", verbose=False, **rates)
    return own


def _batches(contender: Contender, rows: Rows, budget: Budget, seed: int) -> Iterator[Tensor]:
    if contender.batches == "groups":
        return _groups(rows, budget, seed)
    if contender.batches == "rows":
        return _random(len(rows.labels), budget, seed)
    return _with_share(rows.labels, contender.batches, budget, seed)


def _random(num_rows: int, budget: Budget, seed: int) -> Iterator[Tensor]:
    """Whole epochs, shuffled anew, full batches only."""
    generator = torch.Generator().manual_seed(seed)
    size = min(budget.batch_size, num_rows)
    while True:
        order = torch.randperm(num_rows, generator=generator)
        yield from (rows for rows in order.split(size) if len(rows) == size)


def _with_share(labels: Tensor, share: float, budget: Budget, seed: int) -> Iterator[Tensor]:
    """A fixed share of positives in every batch, as LibAUC's samplers make them."""
    generator = torch.Generator().manual_seed(seed)
    rare, common = (labels == 1).nonzero().squeeze(1), (labels == 0).nonzero().squeeze(1)
    num_rare = round(share * budget.batch_size)
    while True:
        picks = [
            part[torch.randint(len(part), (number,), generator=generator)]
            for part, number in ((rare, num_rare), (common, budget.batch_size - num_rare))
        ]
        yield torch.cat(picks)


def _groups(rows: Rows, budget: Budget, seed: int) -> Iterator[Tensor]:
    from imbalanced_losses import GroupBatchSampler

    assert rows.group is not None
    mean_size = len(rows.group) / len(rows.group.unique())
    at_once = max(1, round(budget.batch_size / mean_size))
    sampler = GroupBatchSampler(rows.group, at_once, seed=seed)
    epoch = 0
    while True:
        sampler.set_epoch(epoch)
        yield from map(torch.tensor, sampler)
        epoch += 1


@torch.no_grad()
def scores_of(model: nn.Module, rows: Rows) -> Tensor:
    scores: Tensor = model(rows.features)
    return scores
