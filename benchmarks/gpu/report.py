"""The table of what was measured, the bounds and aims beside it, and the plot."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks._measure import Row
from benchmarks.gpu.steps import FUNCTION, Step

COLUMNS = (
    *Step._fields,
    *("launches", "wall_ms", "device_ms", "graph_ms", "bytes_bound_ms", "operations_bound_ms"),
    *("bce_ms", "peak_bytes", "outcome"),
)
WIDTHS = (11, 16, 8, 4, 6, 12, 27, 9, *(9,) * 5, 8, 9, 0)
HEADINGS = (
    *("library", "step", "rows", "C", "queue", "by", "with", "launches", "wall ms", "device"),
    *("graph", "bytes", "sigmoids", "BCE ms", "MiB", ""),
)
AIMS: tuple[tuple[Step, str, float], ...] = (
    (Step("ours", "SmoothAPLoss", 1024), "launches", 25),
    *(
        (Step("ours", "SmoothAPLoss", 3072, classes, 1024), "launches", most)
        for classes, most in ((1, 35), (10, 35), (100, 45))
    ),
    *((Step("ours", name, 4096), "launches", 50) for name in ("PartialAUCLoss", "NDCGLoss")),
    (Step("ours", FUNCTION, 4096), "graph_ms", 0.06),
    *(
        (Step("ours", FUNCTION, 1 << 20), column, most)
        for column, most in (
            *(("launches", 40), ("device_ms", 0.35), ("wall_ms", 1.0), ("graph_ms", 0.4)),
        )
    ),
)

# What one row costs. Dense: scores and labels in, the gradient out. Panels: beside them scores,
# sides and order made ready, a radix sort of four passes over scores and row numbers (int64), and
# four kernels that read a score, its row and its side in this order; σ′ sums out and in.
BYTES_OF_A_ROW = {"dense": 4 + 1 + 4, "panel": 9 + 13 + 96 + 4 * 16 + 16}
# Sigmoids of a pair of a positive and a row, once for ranks and once for slopes; panels, those of
# a block alone, and of each row three times 32 exponentials, half a sigmoid each.
SIGMOIDS_OF_A_PAIR = 2
ROWS_OF_A_BLOCK = 256
SIGMOIDS_OF_A_ROW = 48
POSITIVE_RATE = 0.1


def finished(row: Row, facts: Row) -> Row:
    """A row with every column; of `smooth_ap` with the backend and its least time on the device."""
    row = dict.fromkeys(COLUMNS, "") | row
    if row["library"] != "ours" or row["name"] != FUNCTION:
        return row
    scores = row["rows"] * row["classes"]
    if row["backend"] == "auto":
        from imbalanced_losses._ranking.choose import choose_fused

        row["backend"] = f"auto: {choose_fused(row['classes'], row['rows'])}"
    backend = row["backend"].removeprefix("auto: ")
    # Of several classes one is positive in each row.
    positives = scores * POSITIVE_RATE if row["classes"] == 1 else row["rows"]
    if backend == "dense":
        sigmoids = SIGMOIDS_OF_A_PAIR * positives * row["rows"]
    else:
        sigmoids = SIGMOIDS_OF_A_PAIR * positives * ROWS_OF_A_BLOCK + SIGMOIDS_OF_A_ROW * scores
    row["bytes_bound_ms"] = 1e3 * BYTES_OF_A_ROW[backend] * scores / facts["bytes_per_s"]
    row["operations_bound_ms"] = 1e3 * sigmoids / facts["sigmoids_per_s"]
    return row


def line(values: Iterable[Any]) -> str:
    """One line of the table."""
    return "".join(
        f"{value:<{width}}" if k < 2 or k == 6 or not width else f"{value:>{width - 1}} "
        for k, (value, width) in enumerate(zip(values, WIDTHS, strict=True))
    ).rstrip()


def cells(row: Row) -> Iterable[str]:
    """The text of each column."""
    for name in COLUMNS:
        value = row[name]
        if value == "":
            yield ""
        elif name.endswith("_ms"):
            yield f"{float(value):.4f}"
        elif name == "peak_bytes":
            yield f"{float(value) / 2**20:,.1f}"
        else:
            yield f"{value:,}" if isinstance(value, int) else str(value)


def crossing(rows: Iterable[Row], classes: int) -> float | None:
    """C·M² from which panels are faster, between the sizes measured; None if unseen.

    Times are interpolated in logarithms. 0 if panels are faster at every size.
    """
    times: dict[int, dict[str, float]] = {}
    for row in rows:
        if row["name"] == FUNCTION and row["outcome"] == "ok" and int(row["classes"]) == classes:
            times.setdefault(int(row["rows"]), {})[row["backend"]] = float(row["wall_ms"])
    points = [
        (size, math.log(both["dense"] / both["panel"]))
        for size, both in sorted(times.items())
        if both.keys() >= {"dense", "panel"}
    ]
    if points and points[0][1] > 0:
        return 0.0
    for (size, before), (next_size, after) in itertools.pairwise(points):
        if before <= 0 < after:
            share = -before / (after - before)
            at = math.exp((1 - share) * math.log(size) + share * math.log(next_size))
            return classes * at**2
    return None


def summary(rows: list[Row]) -> Iterable[str]:
    """The aims and what was found; what `_ranking/choose.py` should say; ratios to the others."""
    found = {Step(*(str(row[name]).split(":")[0] for name in Step._fields)): row for row in rows}

    def value(step: Step, column: str) -> float | None:
        row = found.get(Step(*map(str, step)))
        return float(row[column]) if row is not None and row[column] != "" else None

    for step, column, most in AIMS:
        got = value(step, column)
        text = "not measured" if got is None else f"{got:g}"
        what = f"{step.name}, {step.rows:,} + {step.queue:,} rows, C = {step.classes}"
        yield f"aim: {what}: {column} at most {most:g}; found {text}"
    for row in rows:
        step = Step(*(row[name] for name in Step._fields))
        if row["library"] == "ours" and row["name"] == "SmoothAPLoss" and row["wall_ms"] != "":
            theirs = value(step._replace(library="predecessor"), "wall_ms")
            ratio = float(row["wall_ms"]) / float(row["bce_ms"])
            beside = "" if theirs is None else f", of 0.6 {float(row['wall_ms']) / theirs:.2f}"
            yield f"{' '.join(map(str, step))}: {ratio:.1f} of the time of BCE{beside}"
    for classes in (1, 10):
        pairs = crossing(rows, classes)
        text = "dense at every size" if pairs is None else "panels at every size"
        if pairs:
            text = f"dense up to C·M² = 2^{math.log2(pairs):.1f}"
        yield f"faster, C = {classes}: {text}"


def figure(rows: list[Row], device: str, path: Path) -> None:
    """Time and memory against rows: `smooth_ap`, its bounds, the other libraries."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    from benchmarks.speed.plots import NAMES, STYLES

    fig, (time, memory) = plt.subplots(1, 2, figsize=(10.5, 4.2), layout="constrained")
    curves = [
        *(
            (axes, library, column, unit, STYLES[name] | {"label": NAMES[name]})
            for axes, column, unit in ((time, "wall_ms", 1.0), (memory, "peak_bytes", 2**20))
            for name, library in zip(STYLES, ("ours", "predecessor", "libauc"), strict=True)
        ),
        *(
            (time, "ours", column, 1.0, {"label": label, "color": "0.4", "ls": dashes})
            for column, label, dashes in (
                ("graph_ms", "this library, CUDA graph", "--"),
                ("bytes_bound_ms", "bytes ÷ bandwidth", ":"),
                ("operations_bound_ms", "operations ÷ rate", "-."),
            )
        ),
    ]
    for axes, library, column, unit, style in curves:
        points = sorted(
            (int(row["rows"]), float(row[column]) / unit)
            for row in rows
            if row["library"] == library and row[column] not in ("", 0)
            if row["name"] in (FUNCTION, "APLoss") and int(row["classes"]) == 1
            if str(row["backend"]).startswith("auto")
        )
        if points:
            axes.plot(*zip(*points, strict=True), **style)
    for axes, label in ((time, "forward + backward, ms"), (memory, "peak memory, MiB")):
        axes.set(xscale="log", yscale="log", xlabel="rows ranked, M", ylabel=label)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    fig.suptitle(f"{device}: one class, 10 % positive")
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=150)
    plt.close(fig)
