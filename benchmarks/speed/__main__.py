"""Forward and backward time as a ratio, both sides measured alternately in one run.

    python -m benchmarks.speed [--quick] [--only kernel loss large peers]

Two processes are driven in turn (A B A B …), each timing inside itself; the ratio is the median of
the ratios of neighbouring turns, so that a busy machine slows both sides of it. Above 1: ours is
faster. scikit-learn and torch.sort compute no gradient; ours does.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks import _measure, _peers
from benchmarks._contenders import CONTENDERS, Case
from benchmarks._measure import Row

KERNEL_SIZES = (
    (32, 0.2),
    (64, 0.1),
    (256, 0.1),
    (1024, 0.02),
    (1024, 0.3),
    (4096, 0.01),
    (4096, 0.2),
    (16384, 0.1),
)
LARGE_SIZES = (65_536, 262_144, 1_048_576, 10_000_000)
CHOICE_SIZES = (256, 1024, 4096, 16_384)
CHOICE_RATES = (0.01, 0.1, 0.5)
CHOICE_CLASSES = (3, 10, 100)
SUITES = ("kernel", "loss", "large", "peers", "choice")
BLOCK_MS = 10.0  # calls too short to time alone are timed in blocks of about so much
MOST_ROUNDS, FEWEST_ROUNDS = 41, 3


class Duel(NamedTuple):
    """Two contenders on the same case."""

    suite: str
    ours: str
    other: str
    case: Case


class Limits(NamedTuple):
    """How long things may take."""

    budget_s: float  # spent on one duel, once both sides are built
    longest_pass_s: float  # one pass; sizes expected to be slower are left out
    num_threads: int


def duels(quick: bool) -> Iterator[Duel]:
    """Everything that is measured."""
    for size, rate in KERNEL_SIZES[: 4 if quick else None]:
        case = Case(size, rate)
        yield Duel("kernel", "ours, kernel", "predecessor, kernel", case)
    for num_classes in (1, 10) if quick else (1, 10, 100):
        case = Case(256, 0.1, num_classes, queue_size=1024)
        yield Duel("loss", "ours", "predecessor", case)
    for other in ("torch.sort", "sklearn AP"):
        for size in LARGE_SIZES[: 1 if quick else None]:
            yield Duel("large", "ours, kernel", other, Case(size))
    for size in CHOICE_SIZES[: 2 if quick else None]:
        for rate in CHOICE_RATES:
            yield Duel("choice", "ours, auto", "ours, dense", Case(size, rate))
        for num_classes in CHOICE_CLASSES[: 2 if size == CHOICE_SIZES[-1] else None]:
            case = Case(size, 0.1, num_classes)
            yield Duel("choice", "ours, auto", "ours, dense", case)
    for size in (256, 1024) if quick else (256, 1024, 4096):
        yield Duel("peers", "ours", "libauc APLoss", Case(size))
    for size in (64, 128) if quick else (64, 128, 256):
        yield Duel("peers", "ours, retrieval", "pml SmoothAPLoss", Case(size))
    for size in (64, 256) if quick else (64, 256, 1024):
        yield Duel("peers", "ours, retrieval", "pml FastAPLoss", Case(size))


class Ring:
    """The long-lived processes, one a library, and how long passes took so far."""

    def __init__(self, stack: ExitStack, limits: Limits) -> None:
        self.stack = stack
        self.limits = limits
        self.workers: dict[str, _measure.Worker] = {}
        self.largest: dict[tuple[str, str], tuple[int, float]] = {}  # (rows, elapsed_ms)

    def measure(self, duel: Duel) -> Row:
        """The row of one duel; without times where a side died or would take too long."""
        row: Row = {"suite": duel.suite, "ours": duel.ours, "other": duel.other}
        row |= asdict(duel.case) | {"rounds": "", "ours_ms": "", "other_ms": ""}
        row |= {"ratio": "", "ratio_low": "", "ratio_high": ""}
        names = (duel.ours, duel.other)
        too_long = [name for name in names if self._expected_s(duel, name) > self._longest_s()]
        if too_long:
            return row | {"outcome": "too slow" if too_long[0] == duel.ours else "other too slow"}
        calls = []
        for name in names:
            elapsed_ms = self._build(duel, name)
            if isinstance(elapsed_ms, str):
                return row | {"outcome": f"{name}: {elapsed_ms}"}
            calls.append(min(100, max(1, round(BLOCK_MS / elapsed_ms))))
            self.largest[duel.suite, name] = (duel.case.num_rows, elapsed_ms)
        return row | self._alternate(names, calls)

    def _expected_s(self, duel: Duel, name: str) -> float:
        """From the last size, taking the time to grow with its square."""
        rows, elapsed_ms = self.largest.get((duel.suite, name), (duel.case.num_rows, 0.0))
        return elapsed_ms / 1e3 * max(1.0, duel.case.num_rows / rows) ** 2

    def _longest_s(self) -> float:
        return self.limits.longest_pass_s

    def _worker(self, name: str) -> _measure.Worker:
        peer = CONTENDERS[name].peer
        if peer not in self.workers or self.workers[peer].process.poll() is not None:
            worker = _measure.Worker(self.limits.num_threads)
            self.workers[peer] = self.stack.enter_context(worker)
        return self.workers[peer]

    def _build(self, duel: Duel, name: str) -> float | str:
        """Time of one pass after the first, or what went wrong."""
        timeout_s = 60 + 4 * self._longest_s()
        for request in (
            {"do": "build", "contender": name, "case": asdict(duel.case)},
            {"do": "time", "calls": 1},
        ):
            reply = self._worker(name).ask(timeout_s, **request)
            if "error" in reply or "died" in reply:
                return str(reply.get("died") or reply["error"])
        return float(reply["elapsed_ms"])

    def _alternate(self, names: tuple[str, str], calls: list[int]) -> Row:
        spent_ms = 0.0
        turns: list[list[float]] = []
        while len(turns) < MOST_ROUNDS and (
            len(turns) < FEWEST_ROUNDS or spent_ms < self.limits.budget_s * 1e3
        ):
            replies = [
                self._worker(name).ask(600, do="time", calls=number)
                for name, number in zip(names, calls, strict=True)
            ]
            if not all("elapsed_ms" in reply for reply in replies):
                return {"outcome": "died between two turns"}
            turn = [reply["elapsed_ms"] for reply in replies]
            spent_ms += sum(elapsed * number for elapsed, number in zip(turn, calls, strict=True))
            turns.append(turn)
        low, middle, high = statistics.quantiles([other / ours for ours, other in turns], n=4)
        return {
            "rounds": len(turns),
            "ours_ms": round(statistics.median(turn[0] for turn in turns), 4),
            "other_ms": round(statistics.median(turn[1] for turn in turns), 4),
            "ratio": _significant(middle),
            "ratio_low": _significant(low),
            "ratio_high": _significant(high),
            "outcome": "ok",
        }


def _significant(ratio: float) -> float:
    return float(f"{ratio:.3g}")


def show(results: list[Row]) -> None:
    """A table a suite."""
    console = Console()
    for suite in dict.fromkeys(row["suite"] for row in results):
        here = [row for row in results if row["suite"] == suite]
        table = Table(title=f"{suite}: time of the other ÷ time of ours")
        table.add_column("size", no_wrap=True)
        for column in ("ours, ms", "other, ms", "ratio", "quartiles"):
            table.add_column(column, justify="right", no_wrap=True)
        for other in dict.fromkeys(row["other"] for row in here):
            table.add_section()
            table.add_row(f"[bold]{other}")
            for row in here:
                if row["other"] == other:
                    table.add_row(_size(row), *_times(row))
        console.print(table)


def _size(row: Row) -> str:
    if "retrieval" in row["ours"]:
        return f"  N = {row['num_rows']}"
    queue = f" + {row['queue_size']:,} queued" if row["queue_size"] else ""
    kind = f"{row['positive_rate']:.0%}" if row["num_classes"] == 1 else f"C = {row['num_classes']}"
    return f"  {row['num_rows']:,}{queue}, {kind}"


def _times(row: Row) -> tuple[str, ...]:
    if row["outcome"] != "ok":
        return "–", "–", "–", row["outcome"]
    quartiles = f"{row['ratio_low']:.2g} … {row['ratio_high']:.2g}"
    return f"{row['ours_ms']:,.3f}", f"{row['other_ms']:,.3f}", f"{row['ratio']:g}", quartiles


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, under a minute")
    parser.add_argument("--only", nargs="+", choices=SUITES, default=SUITES, metavar="SUITE")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="CPU threads of each process"
    )
    parser.add_argument("--longest", type=float, default=20.0, help="seconds a pass may take")
    return parser.parse_args()


def main() -> None:
    """Measure, print, write."""
    options = parse()
    limits = Limits(0.5 if options.quick else 3.0, options.longest, options.threads)
    wanted = [
        duel for duel in duels(options.quick) if duel.suite in options.only and _is_measurable(duel)
    ]
    with ExitStack() as stack:
        ring = Ring(stack, limits)
        results = [ring.measure(duel) for duel in track(wanted, "measuring")]
    show(results)
    part = [] if set(options.only) == set(SUITES) else options.only
    name = "-".join(["speed", *part, *(["quick"] if options.quick else [])])
    lines = _measure.header(options.threads)
    path = _measure.write_csv(results, f"cpu-{name}", lines)
    print(f"written: {path.relative_to(_peers.ROOT)}")


def _is_measurable(duel: Duel) -> bool:
    peers = (CONTENDERS[name].peer for name in (duel.ours, duel.other))
    return all(peer == "none" or _peers.is_there(peer) for peer in peers)


if __name__ == "__main__":
    main()
