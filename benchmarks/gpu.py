"""Time and memory on a CUDA device, beside the predecessor, LibAUC and what the device could do.

    python -m benchmarks.gpu [--quick] [--timeout 120]
    python -m benchmarks.gpu --is-there     # says whether there is a device, and nothing else

One forward and backward pass of one class, 10 % positive, float32 scores of unit spread, τ = 0.01.
Each library has a process of its own, and goes on to larger sizes until it runs out of memory. Two
bounds stand beside each time of ours: the bytes that its algorithm has to move, at the rate at
which the device copies, and the operations that it has to do, at the rate of a bare loop of them.
Dense and linear are both measured where either may be faster, to say where the choice should be.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import _measure, _peers
from benchmarks._contenders import Case

Row = dict[str, Any]
NAME = "gpu"
COLUMNS = (
    *("series", "backend", "num_rows", "num_classes", "queue_size", "positive_rate"),
    *("eager_ms", "graph_ms", "bytes_bound_ms", "operations_bound_ms", "peak_bytes"),
    *("outcome", "note"),
)
SIZES = tuple(1 << power for power in range(10, 21))
CROSSING_SIZES = tuple(1 << power for power in range(12, 18))
PEER_SIZES = tuple(1 << power for power in range(10, 20))
GOALS = ((1 << 20, "eager_ms", 1.0), (4096, "graph_ms", 0.1))

# What one row costs. Dense: scores and labels in, the gradient out. Linear: beside them scores,
# sides and order made ready, a radix sort of four passes over scores and row numbers (int64), and
# four kernels that read a score, its row and its side in this order; σ′ sums out and in.
BYTES_OF_A_ROW = {"dense": 4 + 1 + 4, "panel": 9 + 13 + 96 + 4 * 16 + 16}
# Sigmoids of a pair of a positive and a row, once for ranks and once for slopes; linear, those of
# a block alone, and of each row three times 32 exponentials, half a sigmoid each.
SIGMOIDS_OF_A_PAIR = 2
ROWS_OF_A_BLOCK = 256
SIGMOIDS_OF_A_ROW = 48


class Series(NamedTuple):
    """What one process measures."""

    name: str
    peer: str
    cases: list[Case]


def all_series(quick: bool) -> list[Series]:
    """Everything that is measured, what matters most first."""

    def of(name: str, sizes: Sequence[int], num_classes: int = 1) -> Series:
        sizes = sizes[:2] if quick else sizes
        peer = name if name == "predecessor" else "libauc" if "libauc" in name else "ours"
        cases = [Case(size, num_classes=num_classes, device="cuda") for size in sizes]
        return Series(name, peer, cases)

    beside_queue = [
        Case(3072, num_classes=classes, queue_size=1024, device="cuda") for classes in (1, 10, 100)
    ]
    return [
        of("ours", SIZES),
        Series("ours, loss", "ours", beside_queue),
        of("predecessor", PEER_SIZES),
        of("ours, dense", CROSSING_SIZES),
        of("ours, panel", CROSSING_SIZES),
        of("ours, dense", CROSSING_SIZES[:-2], num_classes=10),
        of("ours, panel", CROSSING_SIZES[:-2], num_classes=10),
        of("libauc APLoss", PEER_SIZES),
    ]


def asked(request: Row, timeout_s: float) -> list[Row]:
    """The rows of a process of `_gpu_worker`; what it wrote before it died is kept."""
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks._gpu_worker", json.dumps(request)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=_peers.ROOT,
    )
    why = ""
    try:
        out, errors = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        out, errors = process.communicate()
        why = f"more than {timeout_s:.0f} s"
    found = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    if process.returncode and not why:
        why = (errors.strip().splitlines() or [f"ended with {process.returncode}"])[-1]
    return [*found, {"outcome": why}] if why else found


def measured(series: Series, timeout_s: float) -> list[Row]:
    """The rows of a series, each with every column."""
    request = {"series": series.name, "cases": [asdict(case) for case in series.cases]}
    rows = asked(request, timeout_s)
    for row in rows:
        if "num_rows" not in row:  # the process ended before this size
            case = series.cases[min(len(rows), len(series.cases)) - 1]
            row |= {"series": series.name, "num_rows": case.num_rows}
            row |= {"num_classes": case.num_classes, "queue_size": case.queue_size}
    return [dict.fromkeys(COLUMNS, "") | row for row in rows]


def with_bounds(row: Row, rates: Row) -> Row:
    """A row of ours with what its algorithm costs at the rates of the device."""
    if row["backend"] not in BYTES_OF_A_ROW or "bytes_per_s" not in rates:
        return row
    rows = int(row["num_rows"]) + int(row["queue_size"] or 0)
    scores = rows * int(row["num_classes"])
    positives = scores * float(row["positive_rate"])
    if row["backend"] == "dense":
        if int(row["num_classes"]) > 1:
            positives = rows  # one class is positive in each row
        sigmoids = SIGMOIDS_OF_A_PAIR * positives * rows
    else:
        sigmoids = SIGMOIDS_OF_A_PAIR * positives * ROWS_OF_A_BLOCK + SIGMOIDS_OF_A_ROW * scores
    operations = sigmoids / rates["sigmoids_per_s"]
    moved = BYTES_OF_A_ROW[row["backend"]] * scores / rates["bytes_per_s"]
    return row | {"bytes_bound_ms": 1e3 * moved, "operations_bound_ms": 1e3 * operations}


def crossing(rows: Iterable[Row], num_classes: int) -> float | None:
    """C·M² from which the linear kernels are faster, between the sizes measured; None if unseen.

    Times are interpolated in logarithms. 0 if linear is faster at every size.
    """
    times: dict[int, dict[str, float]] = {}
    for row in rows:
        is_ours = row["series"] in ("ours, dense", "ours, panel")
        if is_ours and row["outcome"] == "ok" and int(row["num_classes"]) == num_classes:
            times.setdefault(int(row["num_rows"]), {})[row["backend"]] = float(row["eager_ms"])
    points = [
        (size, math.log(both["dense"] / both["panel"]))
        for size, both in sorted(times.items())
        if len(both) == 2
    ]
    if points and points[0][1] > 0:
        return 0.0
    for (size, before), (next_size, after) in itertools.pairwise(points):
        if before <= 0 < after:
            share = -before / (after - before)
            at = math.exp((1 - share) * math.log(size) + share * math.log(next_size))
            return num_classes * at**2
    return None


def advice(rows: list[Row], constant: int) -> list[str]:
    """What `_ranking/choose.py` should say."""
    lines = [f"choice: up to C·M² = 2^{math.log2(constant):.1f} all pairs are compared now"]
    for num_classes in (1, 10):
        pairs = crossing(rows, num_classes)
        if pairs is None:
            lines.append(f"  C = {num_classes}: dense was faster at every size measured")
        elif pairs == 0:
            lines.append(f"  C = {num_classes}: linear was faster at every size measured")
        else:
            at = math.sqrt(pairs / num_classes)
            lines.append(
                f"  C = {num_classes}: as fast at M = {at:,.0f}, "
                f"MOST_FUSED_PAIRS = 1 << {round(math.log2(pairs))} (2^{math.log2(pairs):.1f})"
            )
    return lines


def goals(rows: list[Row]) -> list[str]:
    """The times that were promised, and those found."""
    lines = []
    for size, column, goal_ms in GOALS:
        found = [row for row in rows if row["series"] == "ours" and int(row["num_rows"]) == size]
        value = found[0][column] if found else ""
        text = "not measured" if value == "" else f"{float(value):.3f} ms"
        how = "as a CUDA graph" if column == "graph_ms" else "call by call"
        lines.append(f"goal: M = {size:,}, {how}: at most {goal_ms} ms; {text}")
    return lines


def table(rows: list[Row]) -> list[str]:
    """Lines of text, a size each: ours with its bounds, then the others."""
    lines = [
        f"{'':26}{'rows':>9}{'ms':>11}{'as graph':>10}{'bytes':>9}{'operations':>11}"
        f"{'MiB':>9}  backend"
    ]
    for row in rows:
        label = row["series"]
        if int(row["num_classes"] or 1) > 1:
            label += f", C = {row['num_classes']}"
        size = f"{int(row['num_rows']) + int(row['queue_size'] or 0):,}"
        times = (row[name] for name in COLUMNS if name.endswith("_ms"))
        first, second, third, fourth = ("–" if ms == "" else f"{float(ms):.4f}" for ms in times)
        mib = f"{float(row['peak_bytes']) / 2**20:,.1f}" if row["peak_bytes"] != "" else "–"
        end = row["backend"] if row["outcome"] == "ok" else row["outcome"]
        if row["note"]:
            end += f" ({row['note']})"
        lines.append(
            f"{label:26}{size:>9}{first:>11}{second:>10}{third:>9}{fourth:>11}{mib:>9}  {end}"
        )
    return lines


def deaths(rows: list[Row]) -> list[str]:
    """At which size, and with how much memory asked for, a library ended."""
    lines = []
    for row in rows:
        if row["outcome"] != "ok":
            held = ""
            if row["peak_bytes"] not in ("", 0):
                held = f", {float(row['peak_bytes']) / 2**30:,.1f} GiB held"
            lines.append(
                f"{row['series']} ended at {int(row['num_rows']):,} rows: {row['outcome']}{held}"
            )
    return lines


def figure(rows: list[Row], device: str, path: Path) -> None:
    """Time and memory against rows: ours, its bounds, the others."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    from benchmarks.plots import NAMES, STYLES

    fig, (time, memory) = plt.subplots(1, 2, figsize=(10.5, 4.2))
    for axes, column, unit in ((time, "eager_ms", 1.0), (memory, "peak_bytes", 2**20)):
        for series, style in STYLES.items():
            here = [row for row in rows if row["series"] == series]
            points = points_of(here, column, unit)
            if points:
                died = [int(row["num_rows"]) for row in here if row["outcome"] == "out of memory"]
                label = NAMES[series] + (f", died at {died[0]:,}" if died else "")
                axes.plot(*zip(*points, strict=True), label=label, **style)
    ours = [row for row in rows if row["series"] == "ours"]
    for column, label, dashes in (
        ("graph_ms", "this library, CUDA graph", "--"),
        ("bytes_bound_ms", "bytes ÷ bandwidth", ":"),
        ("operations_bound_ms", "operations ÷ rate", "-."),
    ):
        points = points_of(ours, column, 1.0)
        if points:
            time.plot(*zip(*points, strict=True), label=label, color="0.4", linestyle=dashes)
    for axes, label in ((time, "forward + backward, ms"), (memory, "peak memory, MiB")):
        axes.set(xscale="log", yscale="log", xlabel="rows ranked, M", ylabel=label)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
    fig.suptitle(f"{device}: one class, 10 % positive")
    fig.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=150)
    plt.close(fig)


def points_of(rows: list[Row], column: str, unit: float) -> list[tuple[float, float]]:
    """(rows, value) of the sizes that have one."""
    return [
        (float(row["num_rows"]), float(row[column]) / unit)
        for row in rows
        if row["outcome"] == "ok" and row[column] != "" and float(row[column]) > 0
    ]


def slug(device: str) -> str:
    """The name of a device as part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def header(rates: Row) -> list[str]:
    """Lines that say where and how a result came about."""
    return [*_measure.header(1, "cpu"), f"# device: {json.dumps(rates)}"]


def is_there() -> str:
    """ "" where there is a CUDA device, else why not, and what to do."""
    if torch.cuda.is_available():
        return ""
    if torch.version.cuda is None:
        return (
            f"no CUDA device: torch {torch.__version__} is built without CUDA. Install a CUDA "
            "build of it on a machine with such a device; nothing was measured"
        )
    return "no CUDA device: torch is built for CUDA, but finds no device; nothing was measured"


def main() -> None:
    """Measure, write, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two sizes of each")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds a library may take")
    parser.add_argument("--is-there", action="store_true", help="only look for a device")
    parser.add_argument("--into", type=Path, default=_peers.ROOT / "docs" / "assets")
    options = parser.parse_args()
    why_not = is_there()
    if why_not:
        parser.exit(3, f"{why_not}\n")
    if options.is_there:
        return
    run(all_series(options.quick), options.timeout, options.into, "quick" if options.quick else "")


def run(wanted: list[Series], timeout_s: float, into: Path, kind: str) -> Path:
    """Measure every series and write after each, so that a run cut short leaves what it has."""
    rates = asked({"series": "rates", "cases": []}, timeout_s)[0]
    print(f"device: {json.dumps(rates)}", flush=True)
    device = str(rates.get("device", "unknown"))
    name = "-".join(filter(None, [NAME, kind]))
    rows: list[Row] = []
    for series in wanted:
        if not _peers.is_there(series.peer):
            print(f"{series.name}: left out, fetch it with `make peers`", flush=True)
            continue
        found = [with_bounds(row, rates) for row in measured(series, timeout_s)]
        rows += [{column: row[column] for column in COLUMNS} for row in found]
        print("\n".join(table(found)), flush=True)
        path = _measure.write_csv(rows, name, slug(device), header(rates))
    from imbalanced_losses._ranking.choose import MOST_FUSED_PAIRS

    for line in (*deaths(rows), *goals(rows), *advice(rows, MOST_FUSED_PAIRS)):
        print(line, flush=True)
    print(f"written: {path.name}", flush=True)
    figure(rows, device, into / "gpu.png")
    return path


if __name__ == "__main__":
    main()
