"""When ranking within groups pays: a synthetic task with one knob, the offset of a group.

    python -m benchmarks.quality.offsets

Labels follow from eight signals of a row. Of four of them the model sees the signal plus an offset
of the row's group, `offset` times as large as the signal: the level of a site, a season, a user. It
tells nothing about the label. Across groups these four features are noisy, within a group they are
as good as the others. A linear scorer is trained on 300 groups of 100 rows, 5 % positive, and
judged by mean AP within 300 new groups, for three losses and, for one, features that were
standardised within their group. Mean and standard deviation over five seeds; under a minute.
"""

from __future__ import annotations

import statistics

import torch
from rich.console import Console
from rich.table import Table as Grid
from torch import nn

from benchmarks.quality.losses import Contender, cross_entropy, ranking
from benchmarks.quality.numbers import mean_ap
from benchmarks.quality.report import ASSETS
from benchmarks.quality.tasks import Rows
from benchmarks.quality.training import (
    Budget,
    Parts,
    Setting,
    scores_of,
    train,
    within_groups,
)

OFFSETS = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)
GROUPS, ROWS, SIGNALS, SHARE = 300, 100, 8, 0.05
SEEDS = range(5)


def drawn(offset: float, seed: int) -> Rows:
    """Fresh groups."""
    generator = torch.Generator().manual_seed(seed)
    signals = torch.randn(GROUPS, ROWS, SIGNALS, generator=generator)
    logit = 1.2 * signals.sum(2) + torch.randn(GROUPS, ROWS, generator=generator)
    labels = (logit > logit.flatten().quantile(1 - SHARE)).long()
    levels = offset * torch.randn(GROUPS, 1, SIGNALS, generator=generator)
    levels[:, :, SIGNALS // 2 :] = 0
    features = (signals + levels).flatten(0, 1)
    group = torch.arange(GROUPS).repeat_interleave(ROWS)
    return Rows(features / features.std(0), labels.flatten(), group)


CONTENDERS = {
    "SmoothAP within groups": Contender(ranking()._replace(within=True), "groups"),
    "SmoothAP over all rows": Contender(ranking(), "groups"),
    "sqrt-weighted BCE": Contender(cross_entropy(0.5)),
}
STANDARDISED = "sqrt-weighted BCE, features standardised within groups"


def mean_ap_of(contender: Contender, parts: Parts, seed: int) -> float:
    """Of a linear scorer, on the test groups."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(SIGNALS, 1), nn.Flatten(0))
    best = train(
        contender,
        model,
        parts,
        Setting(3e-2),
        {"mean AP": mean_ap},
        seed=seed,
        budget=Budget(steps=200, batch_size=2000),
    )
    model.load_state_dict(best["mean AP"][2])
    return mean_ap(scores_of(model, parts.test), parts.test)


def measured(offset: float) -> dict[str, list[float]]:
    """A value for each seed."""
    found: dict[str, list[float]] = {name: [] for name in (*CONTENDERS, STANDARDISED)}
    for seed in SEEDS:
        parts = Parts(*(drawn(offset, 3 * seed + k) for k in range(3)))
        for name, contender in CONTENDERS.items():
            found[name].append(mean_ap_of(contender, parts, seed))
        contender = CONTENDERS["sqrt-weighted BCE"]
        found[STANDARDISED].append(mean_ap_of(contender, within_groups(parts), seed))
    return found


def main() -> None:
    """Measure, print, draw."""
    from matplotlib import pyplot as plt

    torch.set_num_threads(1)
    found = {offset: measured(offset) for offset in OFFSETS}
    grid = Grid("offset", *found[0.0])
    figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for offset, values in found.items():
        grid.add_row(
            f"{offset:g}",
            *(f"{statistics.mean(v):.3f} ± {statistics.stdev(v):.3f}" for v in values.values()),
        )
    for name in found[0.0]:
        means = [statistics.mean(found[offset][name]) for offset in OFFSETS]
        deviations = [statistics.stdev(found[offset][name]) for offset in OFFSETS]
        axis.errorbar(range(len(OFFSETS)), means, deviations, marker="o", capsize=2, label=name)
    axis.set_xticks(range(len(OFFSETS)), [f"{offset:g}" for offset in OFFSETS])
    axis.set_xlabel("size of the groups' offset, beside a signal of size 1")
    axis.set_ylabel("mean AP within new groups")
    axis.legend(fontsize="small")
    figure.savefig(ASSETS / "quality-offsets.png", dpi=150)
    Console(width=110).print(grid)


if __name__ == "__main__":
    main()
