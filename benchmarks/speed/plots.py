"""Time and memory against the number of rows, from the newest results, into docs/assets.

python -m benchmarks.speed.plots [--quick] [--into docs/assets]
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from benchmarks import _measure, _peers

# Colours of Okabe and Ito, told apart by every kind of colour vision; shape and dash say it again.
STYLES: dict[str, dict[str, Any]] = {
    "ours": {"color": "#0072B2", "marker": "o", "linestyle": "-", "linewidth": 2.5},
    "predecessor": {"color": "#D55E00", "marker": "s", "linestyle": "--"},
    "libauc APLoss": {"color": "#009E73", "marker": "^", "linestyle": ":"},
}
NAMES = {"ours": "this library", "predecessor": "imbalanced-losses 0.6", "libauc APLoss": "LibAUC"}
# Of the family: what is measured, its name and style.
FAMILY: dict[str, tuple[str, dict[str, Any]]] = {
    "smooth_ap": ("AP", {"color": "#0072B2", "marker": "o", "linewidth": 2.5}),
    "recall_at_k, 1 %": ("recall at 1 %", {"color": "#56B4E9", "marker": "s"}),
    "recall_at_fpr, 1 %": ("recall at an FPR of 1 %", {"color": "#000000", "marker": "x"}),
    "partial_auc, to 1 %": ("partial AUC to 1 %", {"color": "#009E73", "marker": "^"}),
    "ndcg": ("NDCG", {"color": "#D55E00", "marker": "v"}),
    "LibAUC pAUC_CVaR_Loss, to 1 %": (
        "LibAUC, partial AUC",
        {"color": "#009E73", "marker": "^", "linestyle": ":"},
    ),
    "LibAUC NDCGLoss": ("LibAUC, NDCG", {"color": "#D55E00", "marker": "v", "linestyle": ":"}),
    "allRank approxNDCGLoss": (
        "allRank, NDCG",
        {"color": "#CC79A7", "marker": "D", "linestyle": "--"},
    ),
}
FITTED_FROM = 4096  # below, fixed costs bend the curve


class Quantity(NamedTuple):
    """What is on the vertical axis."""

    name: str
    column: str
    unit: float
    label: str
    floor: float  # smaller values are measurement noise


QUANTITIES = (
    Quantity("time", "elapsed_ms", 1.0, "forward + backward, ms", 1e-3),
    Quantity("memory", "peak_bytes", 2**20, "peak memory over the inputs, MiB", 0.5),
)


def slope(points: list[tuple[float, float]]) -> float | None:
    """Least-squares exponent of y ~ xᵃ over the larger sizes; None below two of them."""
    logs = [(math.log(x), math.log(y)) for x, y in points if x >= FITTED_FROM]
    if len(logs) < 2:
        return None
    mean_x = sum(x for x, _ in logs) / len(logs)
    mean_y = sum(y for _, y in logs) / len(logs)
    covariance = sum((x - mean_x) * (y - mean_y) for x, y in logs)
    return covariance / sum((x - mean_x) ** 2 for x, _ in logs)


def draw(axes: Axes, rows: list[dict[str, str]], quantity: Quantity) -> None:
    """One line a contender, its slope and the size that it died at in the legend."""
    for contender, style in STYLES.items():
        here = [row for row in rows if row["contender"] == contender]
        points = [
            (float(row["num_rows"]), float(row[quantity.column]) / quantity.unit)
            for row in here
            if row["outcome"] == "ok"
        ]
        points = [(x, y) for x, y in points if y >= quantity.floor]
        if not points:
            continue
        exponent = slope(points)
        label = NAMES[contender] + ("" if exponent is None else f", $M^{{{exponent:.1f}}}$")
        died = [row for row in here if row["outcome"] != "ok"]
        if died:
            label += f", died at {int(died[0]['num_rows']):,}"
        axes.plot(*zip(*points, strict=True), label=label, **style)


def figure(rows: list[dict[str, str]], quantity: Quantity, problems: list[str], path: Path) -> None:
    """One panel a problem, axes shared."""
    panels = plt.subplots(
        1, len(problems), figsize=(4.6 * len(problems), 4), sharex=True, sharey=True, squeeze=False
    )
    fig, all_axes = panels[0], panels[1][0]
    for axes, problem in zip(all_axes, problems, strict=True):
        draw(axes, [row for row in rows if row["problem"] == problem], quantity)
        axes.set(xscale="log", yscale="log", title=problem, xlabel="rows ranked, M")
        sizes = sorted({int(row["num_rows"]) for row in rows if row["problem"] == problem})
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=9, loc="upper left")
        axes.spines[["top", "right"]].set_visible(False)
    bottom, top = all_axes[0].get_ylim()
    all_axes[0].set(ylabel=quantity.label, ylim=(bottom, top * 20))  # room for the legend
    fig.tight_layout()
    fig.savefig(path, dpi=150)
    plt.close(fig)


def family(rows: list[dict[str, str]], path: Path) -> None:
    """One line a metric, and one a loss of another library, up to where memory ran out."""
    fig, axes = plt.subplots(figsize=(9.2, 4.2))
    for name, (label, style) in FAMILY.items():
        # Ours have been measured beside other libraries' as well.
        ours = [row for row in rows if row["name"] == name and row["what"] == "members"]
        here = ours or [row for row in rows if row["name"] == name]
        points = [(int(r["num_rows"]), float(r["cpu_ms"])) for r in here if r["outcome"] == "ok"]
        if points:
            died = [int(row["num_rows"]) for row in here if row["outcome"] != "ok"]
            end = f", died at {min(died):,}" if died else ""
            axes.plot(*zip(*points, strict=True), label=label + end, **style)
    sizes = sorted({int(row["num_rows"]) for row in rows if row["what"] == "members"})
    axes.set(xscale="log", yscale="log", xlabel="rows ranked, M, 1 % positive")
    axes.set(ylabel="forward + backward, ms of CPU")
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.spines[["top", "right"]].set_visible(False)
    fig.tight_layout()
    fig.savefig(path, dpi=150)
    plt.close(fig)


def main() -> None:
    """Draw them all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="from the newest quick result")
    parser.add_argument("--into", type=Path, default=_peers.ROOT / "docs" / "assets")
    options = parser.parse_args()

    source = _measure.newest("cpu-memory-quick" if options.quick else "cpu-memory")
    if source is None:
        parser.error("no result yet: run `python -m benchmarks.speed.memory` first")
    mpl.use("agg")
    options.into.mkdir(parents=True, exist_ok=True)
    rows = _measure.read_csv(source)
    problems = ["C = 1, 1% positive", "C = 1, 50% positive", "C = 10, balanced"]
    for quantity in QUANTITIES:
        path = options.into / f"{quantity.name}.png"
        figure(rows, quantity, problems, path)
        print(f"written: {path.name}")
    source = _measure.newest("cpu-family")
    if source is not None:
        path = options.into / "family.png"
        family(_measure.read_csv(source), path)
        print(f"written: {path.name}")


if __name__ == "__main__":
    main()
