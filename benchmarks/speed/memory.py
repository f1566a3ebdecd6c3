"""Peak memory over the inputs, and time, of one forward and backward pass.

    python -m benchmarks.speed.memory [--quick] [--threads 2] [--timeout 60]

Each cell has a process of its own. A cell that needs more than 8 GiB over its inputs, or too long,
has died; larger sizes of the same row are then not tried.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks import _measure, _peers
from benchmarks._contenders import CONTENDERS, Case
from benchmarks._measure import Row

LIMIT_BYTES = 8 * 2**30
SIZES = (1024, 4096, 16384, 32768)
QUICK_SIZES = (1024, 4096)
RATES = (0.01, 0.1, 0.5)
CLASSIFIERS = ("ours", "predecessor", "libauc APLoss")
RETRIEVERS = ("ours, retrieval", "pml SmoothAPLoss", "pml FastAPLoss")
LARGE_SIZES = (100_000, 1_000_000, 10_000_000)
QUEUE_SIZES = (1024, 100_000, 1_000_000)
RETRIEVAL_SIZES = (128, 512, 1024, 4096)


class Series(NamedTuple):
    """One row of the table: a contender on growing sizes of one kind."""

    problem: str
    contender: str
    cases: list[Case]


def series(quick: bool) -> Iterator[Series]:
    """Everything that is measured."""
    sizes = QUICK_SIZES if quick else SIZES
    for rate in RATES:
        for contender in CLASSIFIERS:
            cases = [Case(size, rate) for size in sizes]
            yield Series(f"C = 1, {rate:.0%} positive", contender, cases)
    for contender in CLASSIFIERS:
        cases = [Case(size, num_classes=10) for size in sizes]
        yield Series("C = 10, balanced", contender, cases)
    if not quick:
        cases = [Case(size) for size in LARGE_SIZES]
        yield Series("C = 1, 10% positive, large", "ours, kernel", cases)
        cases = [Case(256, queue_size=size) for size in QUEUE_SIZES]
        yield Series("256 rows beside a full queue", "ours", cases)
    for contender in RETRIEVERS:
        sizes = RETRIEVAL_SIZES[:2] if quick else RETRIEVAL_SIZES
        cases = [Case(size) for size in sizes]
        yield Series("retrieval, N queries, 4 a label", contender, cases)


def measure(row: Series, num_threads: int, timeout_s: float) -> Iterator[Row]:
    """One result a size, up to the first that dies."""
    alive = True
    for case in row.cases:
        reply: Row = {"died": "a smaller size did"}
        if alive:
            reply = _measure.run_cell(
                row.contender,
                case,
                num_threads=num_threads,
                timeout_s=timeout_s,
                limit_bytes=LIMIT_BYTES,
            )
            alive = "peak_bytes" in reply
        yield {
            "problem": row.problem,
            "contender": row.contender,
            "num_rows": case.num_rows,
            "queue_size": case.queue_size,
            "num_classes": case.num_classes,
            "positive_rate": case.positive_rate if row.problem.startswith("C = 1,") else "",
            "peak_bytes": reply.get("peak_bytes", ""),
            "elapsed_ms": round(reply["elapsed_ms"], 3) if alive else "",
            "outcome": "ok" if alive else reply.get("died") or reply["error"],
        }


def show(results: list[Row]) -> None:
    """A table a kind of problem: contenders down, sizes across."""
    console = Console()
    for problem in dict.fromkeys(row["problem"] for row in results):
        here = [row for row in results if row["problem"] == problem]
        table = Table("peak over the inputs\ntime", title=problem, show_lines=True)
        for size in dict.fromkeys(row["queue_size"] or row["num_rows"] for row in here):
            table.add_column(f"{size:,}", justify="right")
        for contender in dict.fromkeys(row["contender"] for row in here):
            cells = [_cell(row) for row in here if row["contender"] == contender]
            table.add_row(contender, *cells)
        console.print(table)


def _cell(row: Row) -> str:
    if row["outcome"] != "ok":
        return "died" if row["outcome"] != "a smaller size did" else "–"
    elapsed_ms = row["elapsed_ms"]
    elapsed = f"{elapsed_ms / 1e3:.1f} s" if elapsed_ms > 1e3 else f"{elapsed_ms:.1f} ms"
    size = row["queue_size"] or row["num_rows"]
    a_row = f"{row['peak_bytes'] / size:,.0f} bytes a row\n" if size >= LARGE_SIZES[0] else ""
    return f"{row['peak_bytes'] / 2**20:,.0f} MiB\n{a_row}{elapsed}"


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes only, under a minute")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="CPU threads of each process"
    )
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds a cell may take")
    options = parser.parse_args()

    wanted = [
        row for row in series(options.quick) if _peers.is_there(CONTENDERS[row.contender].peer)
    ]
    results = [
        result
        for row in track(wanted, "measuring")
        for result in measure(row, options.threads, options.timeout)
    ]
    show(results)
    name = "memory-quick" if options.quick else "memory"
    lines = _measure.header(options.threads)
    path = _measure.write_csv(results, f"cpu-{name}", lines)
    print(f"written: {path.relative_to(_peers.ROOT)}")


if __name__ == "__main__":
    main()
