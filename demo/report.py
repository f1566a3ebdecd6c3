"""What the runs show: a table, a verdict in words, two plots and two files of numbers."""

from __future__ import annotations

import csv
import json
import math
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.table import Table
from scipy.stats import t as student_t
from torch import Tensor

import imbalanced_losses
from demo.train import BASELINES, Run

# Okabe and Ito's palette, which colour-blind readers can tell apart; baselines are dashed too.
STYLES: dict[str, dict[str, Any]] = {
    "BCE": {"color": "#7F7F7F", "linestyle": (0, (4, 2))},
    "sqrt-weighted BCE": {"color": "#E69F00", "linestyle": (0, (4, 2))},
    "SmoothAP": {"color": "#0072B2", "linestyle": "-"},
    "SmoothAP + BCE": {"color": "#CC79A7", "linestyle": "-"},
}


class Difference(NamedTuple):
    """The paired difference in test AP of one loss to a baseline.

    Attributes:
        mean: over seeds, positive when the loss is better.
        half_width: of the 95 % interval of the mean (Student's t over the paired differences).
        wins: seeds on which the loss is better.
        seeds: how many there are.
    """

    mean: float
    half_width: float
    wins: int
    seeds: int

    @property
    def verdict(self) -> str:
        """Better or worse only where the interval excludes zero."""
        if abs(self.mean) <= self.half_width:
            return "not clearly different"
        return "better" if self.mean > 0 else "worse"

    def __str__(self) -> str:
        return f"{self.mean:+.3f} ± {self.half_width:.3f}  {self.wins}/{self.seeds}"


def paired_difference(runs: Sequence[Run], loss: str, baseline: str) -> Difference:
    """Compare two losses seed by seed: same split, same initial weights, same batches."""
    ours, theirs = test_aps(runs, loss), test_aps(runs, baseline)
    differences = np.array([ours[seed] - theirs[seed] for seed in sorted(ours)])
    num = len(differences)
    error = float(differences.std(ddof=1)) / math.sqrt(num)
    half_width = float(student_t.ppf(0.975, num - 1)) * error
    return Difference(float(differences.mean()), half_width, int((differences > 0).sum()), num)


def test_aps(runs: Sequence[Run], loss: str) -> dict[int, float]:
    """Test AP of one loss by seed."""
    return {run.seed: run.test_ap for run in runs if run.loss == loss}


def losses_of(runs: Sequence[Run]) -> list[str]:
    """The losses in the order of their first runs."""
    return list(dict.fromkeys(run.loss for run in runs))


def make_table(runs: Sequence[Run]) -> Table:
    """One row a loss: test AP and its paired difference to each baseline."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("\nloss", no_wrap=True)
    table.add_column("\ntest AP ± sd", justify="right", no_wrap=True)
    for baseline in BASELINES:
        table.add_column(f"against\n{baseline}", justify="right", no_wrap=True)
    for loss in losses_of(runs):
        aps = np.array(list(test_aps(runs, loss).values()))
        cells = [
            "" if loss == baseline else str(paired_difference(runs, loss, baseline))
            for baseline in BASELINES
        ]
        table.add_row(loss, f"{aps.mean():.3f} ± {aps.std(ddof=1):.3f}", *cells)
    return table


def verdict(runs: Sequence[Run]) -> str:
    """What the table shows, one sentence a baseline, the stronger baseline first."""
    sentences = []
    for baseline in reversed(BASELINES):
        clauses = []
        for loss in losses_of(runs):
            if loss not in BASELINES:
                d = paired_difference(runs, loss, baseline)
                clauses.append(
                    f"{loss} is {d.verdict} ({d.mean:+.3f} test AP, {d.wins} of {d.seeds} seeds)"
                )
        sentences.append(f"Against {baseline}, {' and '.join(clauses)}.")
    return " ".join(sentences)


def write_files(
    runs: Sequence[Run],
    test_labels: Callable[[int], Tensor],
    arguments: dict[str, Any],
    folder: Path,
) -> list[Path]:
    """Write plots and numbers.

    Args:
        runs: every run.
        test_labels: the labels [n] of the test rows of a seed's split.
        arguments: what to record beside the numbers; values that JSON can hold.
        folder: created if need be; files in it are overwritten.

    Returns:
        The paths written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    curves = folder / "precision_recall.png"
    _precision_recall(runs, test_labels, str(arguments["split"])).savefig(curves, dpi=150)
    progress = folder / "training_curve.png"
    _training_curve(runs, str(arguments["split"])).savefig(progress, dpi=150)
    return [curves, progress, *_write_numbers(runs, arguments, folder)]


def _write_numbers(runs: Sequence[Run], arguments: dict[str, Any], folder: Path) -> list[Path]:
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "imbalanced_losses": imbalanced_losses.__version__,
    }
    numbers = ("loss", "seed", "test_ap", "validation_ap", "best_step", "seconds")
    rows = [{name: getattr(run, name) for name in numbers} for run in runs]
    as_json = folder / "metrics.json"
    content = {
        "arguments": arguments,
        "versions": versions,
        "differences": [
            {"loss": loss, "baseline": baseline} | paired_difference(runs, loss, baseline)._asdict()
            for loss in losses_of(runs)
            for baseline in BASELINES
            if loss != baseline
        ],
        "verdict": verdict(runs),
        "runs": [row | {"curve": run.curve} for row, run in zip(rows, runs, strict=True)],
    }
    as_json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    as_csv = folder / "metrics.csv"
    with as_csv.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*numbers, *arguments, *versions])
        writer.writeheader()
        writer.writerows(row | arguments | versions for row in rows)
    return [as_json, as_csv]


def _precision_recall(
    runs: Sequence[Run], test_labels: Callable[[int], Tensor], split: str
) -> Figure:
    """Precision at each recall on the test rows, averaged over seeds."""
    recalls = np.linspace(0.005, 1, 400)
    figure, axes = _figure()
    for loss in losses_of(runs):
        precisions = [
            _precision_at(recalls, run.test_scores, test_labels(run.seed))
            for run in runs
            if run.loss == loss
        ]
        mean_ap = np.mean(list(test_aps(runs, loss).values()))
        axes.plot(
            recalls, np.mean(precisions, axis=0), label=f"{loss} (AP {mean_ap:.3f})", **STYLES[loss]
        )
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall", ylabel="precision")
    seeds = len({run.seed for run in runs})
    axes.set_title(f"Test precision and recall, mean of {seeds} splits by {split}", loc="left")
    axes.legend(loc="lower left", frameon=False)
    return figure


def _precision_at(recalls: np.ndarray, scores: Tensor, labels: Tensor) -> np.ndarray:
    """Precision where recall first reaches each given value."""
    from sklearn.metrics import precision_recall_curve

    precision, recall, _ = precision_recall_curve(labels.numpy(), scores.numpy())
    precision, recall = precision[::-1], recall[::-1]  # recall now rises
    return precision[np.searchsorted(recall, recalls - 1e-9)]


def _training_curve(runs: Sequence[Run], split: str) -> Figure:
    """Validation AP against the step: mean over seeds and its standard error within splits."""
    steps = [step for step, _ in runs[0].curve]
    losses, seeds = losses_of(runs), len({run.seed for run in runs})
    aps = np.array(
        [[[ap for _, ap in run.curve] for run in runs if run.loss == loss] for loss in losses]
    )  # [losses, seeds, evaluations]
    means = aps.mean(1)
    # Some splits are easier than others for every loss; the comparison is within splits.
    errors = (aps - aps.mean((0, 2), keepdims=True)).std(1, ddof=1) / math.sqrt(seeds)
    figure, axes = _figure()
    for loss, mean, error in zip(losses, means, errors, strict=True):
        axes.plot(steps, mean, label=loss, **STYLES[loss])
        axes.fill_between(
            steps, mean - error, mean + error, color=STYLES[loss]["color"], alpha=0.15, linewidth=0
        )
    axes.set(xlabel="training step", ylabel="validation AP")
    axes.set_xlim(left=0)
    # The steep start would flatten the rest.
    axes.set_ylim(bottom=max(0.0, means[:, len(steps) // 5 :].min() - 0.05))
    axes.set_title(
        f"Validation AP, mean of {seeds} splits by {split}\n"
        "band: ± one standard error within splits",
        loc="left",
    )
    axes.legend(loc="lower right", frameon=False)
    return figure


def _figure() -> tuple[Figure, Axes]:
    """An empty plot in the style both plots share."""
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    return figure, axes
