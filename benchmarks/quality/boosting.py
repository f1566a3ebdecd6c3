"""LightGBM on the same splits, its rounds chosen like the checkpoints of the network."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from benchmarks.quality.numbers import CHOSEN_BY, NUMBERS
from benchmarks.quality.tasks import Rows
from benchmarks.quality.training import Found, Parts

ROUNDS, EVALUATE_EVERY = 400, 50


class Leaves(NamedTuple):
    """What is tuned for every objective alike."""

    leaves: int
    within: bool = False

    def __str__(self) -> str:
        return f"leaves {self.leaves}" + " within" * self.within


def run(
    objective: str, parts: Parts, setting: Leaves, numbers: tuple[str, ...], *, seed: int
) -> dict[str, Found]:
    """Boost once; each number has the rounds of its best validation value."""
    import lightgbm

    options = {
        "objective": objective,
        "num_leaves": setting.leaves,
        "learning_rate": 0.05,
        "min_data_in_leaf": 50,
        "num_threads": 1,
        "seed": seed,
        "verbose": -1,
    }
    training = parts.train
    grouped: dict[str, Any] = {}
    if objective != "binary":
        assert training.group is not None
        order = training.group.argsort(stable=True)
        training = training.select(order)
        grouped["group"] = torch.unique_consecutive(training.group, return_counts=True)[1].numpy()
    data = lightgbm.Dataset(training.features.numpy(), training.labels.numpy(), **grouped)
    booster = lightgbm.train(options, data, ROUNDS)

    def scores(rows: Rows, rounds: int) -> torch.Tensor:
        found = booster.predict(rows.features.numpy(), num_iteration=rounds, raw_score=True)
        return torch.from_numpy(found)

    checkpoints = range(EVALUATE_EVERY, ROUNDS + 1, EVALUATE_EVERY)
    validation = {rounds: scores(parts.validation, rounds) for rounds in checkpoints}
    best = {
        name: max((NUMBERS[name](own, parts.validation), -n) for n, own in validation.items())
        for name in numbers
        if name not in CHOSEN_BY
    }
    found = {}
    for name in numbers:
        value, rounds = best[CHOSEN_BY.get(name, name)]
        found[name] = Found(-rounds, value, NUMBERS[name](scores(parts.test, -rounds), parts.test))
    return found
