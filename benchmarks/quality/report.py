"""Tables and plots of what `benchmarks.quality` found: differences paired by split."""

from __future__ import annotations

import re
import statistics
from typing import NamedTuple

from benchmarks import _measure
from benchmarks._measure import Row
from benchmarks.quality.questions import QUESTIONS

ASSETS = _measure.RESULTS.parents[1] / "docs" / "assets"
LOWER_IS_BETTER = {"last positive"}


class Tuned(NamedTuple):
    """A loss on one split, with the setting of its best validation value."""

    validation: float
    test: float
    seconds: float  # of one run


class Compared(NamedTuple):
    """The recipe against one loss, paired by split.

    Attributes:
        gain: mean of the recipe's test value minus the loss's; the sign of "better" is +.
        half: of the 95 % t interval.
        wins, splits: on which the recipe is ahead, and all.
        p: of Wilcoxon's signed-rank test, after Holm's correction over the losses.
    """

    gain: float
    half: float
    wins: int
    splits: int
    p: float


def tuned(rows: list[Row]) -> dict[tuple[str, str, str], dict[int, Tuned]]:
    """(task, number, loss) -> split -> the run chosen."""
    found: dict[tuple[str, str, str], dict[int, Tuned]] = {}
    for row in rows:
        one = Tuned(*(float(row[name]) for name in Tuned._fields))
        splits = found.setdefault((row["task"], row["number"], row["loss"]), {})
        split = int(row["split"])
        splits[split] = max(splits.get(split, one), one, key=lambda run: run.validation)
    return found


def compared(
    runs: dict[str, dict[int, Tuned]], ours: str, value: str = "test", sign: int = 1
) -> dict[str, Compared]:
    """Every other loss that has two splits of the recipe's or more."""
    from scipy.stats import t, wilcoxon

    found: dict[str, Compared] = {}
    for loss, own in runs.items():
        both = sorted(own.keys() & runs[ours].keys())
        if loss == ours or len(both) < 2:
            continue
        gains = [sign * (getattr(runs[ours][k], value) - getattr(own[k], value)) for k in both]
        half = statistics.stdev(gains) / len(gains) ** 0.5 * t.ppf(0.975, len(gains) - 1)
        p = float(wilcoxon(gains).pvalue) if any(gains) else 1.0
        wins = sum(gain > 0 for gain in gains)
        found[loss] = Compared(statistics.mean(gains), half, wins, len(gains), p)
    return _by_holm(found)


def _by_holm(found: dict[str, Compared]) -> dict[str, Compared]:
    corrected, largest = {}, 0.0
    for place, (loss, one) in enumerate(sorted(found.items(), key=lambda item: item[1].p)):
        largest = max(largest, min(1.0, one.p * (len(found) - place)))
        corrected[loss] = one._replace(p=largest)
    return corrected


def report(
    name: str, rows: list[Row], *, by_validation: bool = False, with_gains: bool = False
) -> None:
    """Print a table in Markdown for each number of a question, and draw those with a recipe.

    A cell is the mean value, with ↑ where the loss is ahead of the recipe (p < .05), and ↓ where it
    is behind; or with the recipe's mean gain, * for p < .05, and the splits on which it is ahead.
    """
    chosen, question = tuned(rows), QUESTIONS[name]
    value = "validation" if by_validation else "test"
    for number in dict.fromkeys(row["number"] for row in rows):
        ours = question.ours.get(number, question.ours.get("mean AP", ""))
        sign = -1 if number in LOWER_IS_BETTER else 1
        names = list(dict.fromkeys(row["task"] for row in rows if row["number"] == number))
        shown = {*(question.rivals or {}).get(number, question.contenders), ours}
        by_task = {
            task: {
                loss: own
                for (t, n, loss), own in chosen.items()
                if (t, n) == (task, number) and loss in shown
            }
            for task in names
        }
        all_compared = {
            task: compared(runs, ours, value, sign) if ours in runs else {}
            for task, runs in by_task.items()
        }
        print(f"\n{number}, {value}; gain of {ours}\n")
        print("|".join(["", "loss", *names, "s a run", ""]))
        print("|---" * (2 + len(names)) + "|")
        for loss in question.contenders:
            if any(loss in runs for runs in by_task.values()):
                cells = _cells(loss, by_task, all_compared, value, sign, with_gains)
                print(f"| {' | '.join(cells)} |")
        if number in question.ours and not by_validation:
            _plot(all_compared, number, ours, f"quality-{name}-{_slug(number)}")


def _cells(
    loss: str,
    by_task: dict[str, dict[str, dict[int, Tuned]]],
    all_compared: dict[str, dict[str, Compared]],
    value: str,
    sign: int,
    with_gains: bool,
) -> list[str]:
    cells, seconds = [loss], []
    for task, runs in by_task.items():
        own = runs.get(loss, {})
        if not own:
            cells.append("–")
            continue
        seconds += [one.seconds for one in own.values()]
        mean = statistics.mean(getattr(one, value) for one in own.values())
        cell = (f"{mean:.4f}" if sign > 0 else f"{mean:.0f}").lstrip("0")
        one = all_compared[task].get(loss)
        if one is not None and not with_gains:
            cell += "" if one.p >= 0.05 else "↓" if one.gain > 0 else "↑"
        elif one is not None:
            gain = re.sub(r"^([+-])0\.", r"\1.", f"{one.gain:+.4f}").replace("-", "−")
            cell += f" {gain}{'*' * (one.p < 0.05)} {one.wins}/{one.splits}"
        cells.append(cell)
    return [*cells, f"{statistics.median(seconds):.1f}"]


def _slug(number: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in number.lower()).strip("-")


def _plot(all_compared: dict[str, dict[str, Compared]], number: str, ours: str, name: str) -> None:
    """Forest plot: the mean gain over each loss with its 95 % t interval, a panel for each task."""
    from matplotlib import pyplot as plt

    losses = sorted({loss for found in all_compared.values() for loss in found})
    if not losses:
        return
    columns = min(4, len(all_compared))
    figure, axes = plt.subplots(
        num_rows := -(-len(all_compared) // columns),
        columns,
        sharey=True,
        squeeze=False,
        figsize=(2.6 + 1.9 * columns, 0.6 + num_rows * (0.7 + 0.22 * len(losses))),
        layout="constrained",
    )
    heights = {loss: -k for k, loss in enumerate(losses)}
    for axis in axes.flat[len(all_compared) :]:
        axis.remove()
    for axis, (task, found) in zip(axes.flat, all_compared.items(), strict=False):
        for loss, one in found.items():
            color = "#0072B2" if one.p < 0.05 else "#888888"
            axis.errorbar(
                one.gain,
                heights[loss],
                xerr=one.half,
                fmt="o",
                capsize=2,
                markersize=4,
                color=color,
            )
        axis.axvline(0, color="#444444", linewidth=1)
        axis.set_title(task, fontsize="medium")
        axis.tick_params(labelsize="small")
        axis.locator_params(axis="x", nbins=4)
    axes[0][0].set_yticks(list(heights.values()), list(heights))
    label = f"{number}: gain of\n“{ours}” over each loss\n(blue: p < .05)"
    figure.supxlabel(label.replace("\n", " " if columns > 1 else "\n"), fontsize="small")
    figure.savefig(ASSETS / f"{name}.png", dpi=150)
    plt.close(figure)
