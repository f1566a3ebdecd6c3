"""What the runs show: one table, a verdict in words, one figure and a file of numbers."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from rich import box
from rich.table import Table
from scipy.stats import t as student_t

import imbalanced_losses
from demo.train import SMOOTH_AP, SMOOTH_AP_BLOCKS, SQRT_BCE, SQRT_BCE_BLOCKS, Run


class Story(NamedTuple):
    """One of the two ways in which rankings are judged.

    Attributes:
        measure: a field of `Judged`.
        title: what the measure is called.
        opening: of the verdict.
        ours: the loss that is made for it.
        rivals: what it is compared with.
    """

    measure: str
    title: str
    opening: str
    ours: str
    rivals: tuple[str, ...]


STORIES = (
    Story("ap", "AP over all rows", "All rows as one list", SMOOTH_AP, (SQRT_BCE,)),
    Story(
        *("block_ap", "mean AP per block", "Each block as its own list", SMOOTH_AP_BLOCKS),
        (SQRT_BCE, SQRT_BCE_BLOCKS),
    ),
)
# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = {SMOOTH_AP: "#0072B2", SMOOTH_AP_BLOCKS: "#0072B2", SQRT_BCE_BLOCKS: "#E69F00"}


class Difference(NamedTuple):
    """The paired difference of one loss to another in one measure.

    Attributes:
        mean: over splits, positive when the loss is better.
        half_width: of the 95 % interval of the mean (Student's t over the paired differences).
        wins: splits on which the loss is better.
        splits: how many there are.
    """

    mean: float
    half_width: float
    wins: int
    splits: int

    @property
    def verdict(self) -> str:
        """Better or worse only where the interval excludes zero."""
        if abs(self.mean) <= self.half_width:
            return "not clearly different from"
        return "better than" if self.mean > 0 else "worse than"


def values_of(runs: Sequence[Run], loss: str, measure: str) -> np.ndarray:
    """A test measure of one loss, split by split."""
    own = sorted((run for run in runs if run.loss == loss), key=lambda run: run.seed)
    return np.array([getattr(run.test, measure) for run in own])


def losses_of(runs: Sequence[Run]) -> list[str]:
    """The losses in the order of their first runs."""
    return list(dict.fromkeys(run.loss for run in runs))


def paired_difference(runs: Sequence[Run], measure: str, loss: str, rival: str) -> Difference:
    """Compare two losses split by split, each from the same initial weights."""
    differences = values_of(runs, loss, measure) - values_of(runs, rival, measure)
    num = len(differences)
    error = float(differences.std(ddof=1)) / math.sqrt(num)
    half_width = float(student_t.ppf(0.975, num - 1)) * error
    return Difference(float(differences.mean()), half_width, int((differences > 0).sum()), num)


def make_table(runs: Sequence[Run]) -> Table:
    """One row a loss, judged in both ways, each beside sqrt-weighted BCE."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("trained with\n", no_wrap=True)
    for story in STORIES:
        table.add_column(f"{story.title}\n", justify="right", no_wrap=True)
    table.add_column("TOP1\n", justify="right", no_wrap=True)
    table.add_column("last\nhomologue", justify="right", no_wrap=True)
    for loss in losses_of(runs):
        cells = []
        for story in STORIES:
            values = values_of(runs, loss, story.measure)
            d = paired_difference(runs, story.measure, loss, SQRT_BCE)
            beside = "" if loss == SQRT_BCE else f"\nbetter on {d.wins} of {d.splits}"
            cells.append(f"{values.mean():.3f} ± {values.std(ddof=1):.3f}{beside}")
        top1, last = (values_of(runs, loss, name).mean() for name in ("top1", "last"))
        table.add_row(
            loss.replace(", ", ",\n").replace(" within", "\nwithin"),
            *cells,
            f"{top1:.3f}",
            f"{last:.0f}",
        )
    return table


def legend(runs: Sequence[Run]) -> str:
    """How to read the table."""
    num = len({run.seed for run in runs})
    return (
        f"Means ± standard deviations over {num} splits. “Better on 3 of {num}”: on three of the\n"
        f"{num} splits the value is higher than that of {SQRT_BCE}.\n"
        "TOP1: the share of blocks whose highest row is a homologue. Last homologue: its\n"
        "mean place in its block; lower is better. Checkpoints were chosen by validation\n"
        "alone: by AP over all rows for the first number, by mean AP per block for the\n"
        "others."
    )


def verdict(runs: Sequence[Run]) -> str:
    """What the table shows, one sentence a comparison."""
    sentences = []
    for story in STORIES:
        for rival in story.rivals:
            d = paired_difference(runs, story.measure, story.ours, rival)
            sentences.append(
                f"{story.opening}: {story.ours} is {d.verdict} {rival} ({d.mean:+.3f} ± "
                f"{d.half_width:.3f} {story.title}; higher on {d.wins} of {d.splits} splits)."
            )
    return "\n".join(sentences)


def write_files(runs: Sequence[Run], arguments: dict[str, Any], folder: Path) -> list[Path]:
    """Write the figure and the numbers.

    Args:
        runs: every run.
        arguments: what to record beside the numbers; values that JSON can hold.
        folder: created if need be; files in it are overwritten.

    Returns:
        The paths written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    figure, numbers = folder / "demo.png", folder / "metrics.json"
    _figure(runs).savefig(figure, dpi=150)
    content = {
        "arguments": arguments,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "imbalanced_losses": imbalanced_losses.__version__,
        },
        "differences": [
            {"measure": story.measure, "loss": loss, "rival": rival}
            | paired_difference(runs, story.measure, loss, rival)._asdict()
            for story in STORIES
            for loss in losses_of(runs)
            for rival in (SQRT_BCE, SQRT_BCE_BLOCKS)
            if loss != rival
        ],
        "verdict": verdict(runs),
        "runs": [run._asdict() | {"test": run.test._asdict()} for run in runs],
    }
    numbers.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return [figure, numbers]


def _figure(runs: Sequence[Run]) -> Figure:
    """A panel a story: the difference to sqrt-weighted BCE on each split, and its mean."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    losses = [loss for loss in losses_of(runs) if loss != SQRT_BCE][::-1]
    panels = figure.subplots(1, len(STORIES), sharey=True)
    for axes, story in zip(panels, STORIES, strict=True):
        baseline = values_of(runs, SQRT_BCE, story.measure)
        for height, loss in enumerate(losses):
            colour = COLOURS.get(loss, "#7F7F7F")
            each = values_of(runs, loss, story.measure) - baseline
            d = paired_difference(runs, story.measure, loss, SQRT_BCE)
            axes.plot(each, np.full(len(each), height - 0.2), "o", ms=4, alpha=0.5, color=colour)
            axes.errorbar(d.mean, height, xerr=d.half_width, fmt="D", capsize=4, color=colour)
        axes.axvline(0, color="0.3", linewidth=1)
        axes.set(xlabel=f"gain over {SQRT_BCE}", ylim=(-0.6, len(losses) - 0.5))
        axes.set_title(story.title, loc="left")
        axes.locator_params(axis="x", nbins=5)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", color="0.92")
        axes.set_axisbelow(True)
    panels[0].set_yticks(range(len(losses)), losses)
    figure.supxlabel(
        "diamond: mean and its 95 % interval; dots: one split each", fontsize="small", color="0.3"
    )
    return figure
