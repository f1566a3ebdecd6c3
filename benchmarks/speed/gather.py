"""Gathering rows against adding up sums: time and bytes of `SmoothAPLoss` over processes.

    python -m benchmarks.speed.gather [--quick] [--processes 2]
        [--bandwidth 1.25e9] [--latency 1e-4]

Real processes over gloo on this machine, one thread each; one forward and backward pass of one
class, 10 % positive, float32 scores of unit spread, τ = 0.01, no queue. Both ways take turns.
Bytes are those that a ring sends from one process: (W − 1)·n for an all-gather of n bytes each,
2·(W − 1)/W·n for an all-reduce of n. Between them, how long it takes until every process has raised
the error of one. Then the same for more processes, from a model: the time of the smallest size as
what a pass costs anyhow, the measured time of each further row that a process ranks, the bytes over
a network of the given bandwidth (bytes a second and process), and a latency (seconds a collective
and doubling of the processes).
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks import _measure, _peers
from benchmarks._measure import Row
from imbalanced_losses import SmoothAPLoss

SIZES = (1_000, 10_000, 100_000, 1_000_000)
WAYS = ("rows", "sums")
MODELLED_RANKS = (64, 1024)
SECONDS_A_CELL = 3.0
FEWEST_TURNS, MOST_TURNS = 5, 200
ERROR_TURNS = 20


class Sent:
    """Counts what goes through the collectives of torch.distributed in this process."""

    def __init__(self) -> None:
        self.collectives, self.ring_bytes = 0, 0.0
        self._all_gather, self._all_reduce = dist.all_gather, dist.all_reduce

    def __enter__(self) -> Sent:
        dist.all_gather = partial(self._counted, self._all_gather, 1)
        dist.all_reduce = partial(self._counted, self._all_reduce, 0)
        return self

    def __exit__(self, *_: object) -> None:
        dist.all_gather, dist.all_reduce = self._all_gather, self._all_reduce

    def _counted(self, collective: Any, place: int, *args: Any, **kwargs: Any) -> Any:
        tensor, size = args[place], dist.get_world_size()
        sent = tensor.numel() * tensor.element_size() * (size - 1)
        self.collectives += 1
        self.ring_bytes += sent if place == 1 else 2 * sent / size
        return collective(*args, **kwargs)


class Rows(NamedTuple):
    logits: Tensor
    targets: Tensor


def rows_of(rank: int, num_rows: int) -> Rows:
    generator = torch.Generator().manual_seed(rank)
    targets = (torch.rand(num_rows, generator=generator) < 0.1).long()
    logits = torch.randn(num_rows, 1, generator=generator) + 1.5 * targets[:, None]
    return Rows(logits.requires_grad_(), targets)


def one_pass(loss_fn: SmoothAPLoss, rows: Rows) -> float:
    """Seconds from the moment when all processes are there until the last is done."""
    dist.barrier()
    start = time.perf_counter()
    loss_fn(*rows).backward()
    elapsed = torch.tensor(time.perf_counter() - start)
    dist.all_reduce(elapsed, dist.ReduceOp.MAX)
    rows.logits.grad = None
    return elapsed.item()


def measured(rank: int, num_rows: int) -> list[Row]:
    """Both ways in turns."""
    rows = rows_of(rank, num_rows)
    losses = {way: SmoothAPLoss(1, 0, 0.01, gather=way) for way in WAYS}
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    slowest = max(one_pass(loss_fn, rows) for loss_fn in losses.values())
    turns = round(min(MOST_TURNS, max(FEWEST_TURNS, SECONDS_A_CELL / slowest)))
    for _ in range(turns):
        for way, loss_fn in losses.items():
            times[way].append(one_pass(loss_fn, rows))
    found = []
    for way, loss_fn in losses.items():
        with Sent() as sent:
            loss_fn(*rows).backward()
        found.append(
            {
                "ranks": dist.get_world_size(),
                "rows_a_rank": num_rows,
                "gather": way,
                "elapsed_ms": f"{1e3 * statistics.median(times[way]):.4g}",
                "collectives": sent.collectives,
                "ring_bytes": round(sent.ring_bytes),
                "source": "measured",
            }
        )
    return found


def seconds_to_an_error(rank: int, what: str) -> float:
    """Until this process raises what is wrong in the last one: a label, or the dtype."""
    is_wrong = rank == dist.get_world_size() - 1
    rows = rows_of(rank, 64)
    targets = rows.targets + 7 if is_wrong and what == "label" else rows.targets
    logits = rows.logits.double() if is_wrong and what == "dtype" else rows.logits
    dist.barrier()
    start = time.perf_counter()
    try:
        SmoothAPLoss(1, 0)(logits, targets)
    except (ValueError, RuntimeError):
        return time.perf_counter() - start
    raise AssertionError("nothing was raised")


def serve(rank: int, size: int, folder: str, sizes: tuple[int, ...]) -> None:
    """What a process does; the first one writes down what was found."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
    found = [row for num_rows in sizes for row in measured(rank, num_rows)]
    for what in ("label", "dtype"):
        longest = torch.tensor([seconds_to_an_error(rank, what) for _ in range(ERROR_TURNS)])
        dist.all_reduce(longest, dist.ReduceOp.MAX)
        blank = dict.fromkeys(found[0], "")
        found.append(
            {
                **blank,
                "ranks": size,
                "gather": f"error: {what}",
                "elapsed_ms": f"{1e3 * longest.max().item():.4g}",
                "source": f"measured, longest of {ERROR_TURNS}",
            }
        )
    if rank == 0:
        torch.save(found, Path(folder) / "found")
    dist.destroy_process_group()


def modelled(found: list[Row], bandwidth: float, latency: float) -> list[Row]:
    """The same rows for more processes."""
    own = [row for row in found if row["source"] == "measured"]
    num_ranks = own[0]["ranks"]
    first, last = ({row["gather"]: row for row in rows} for rows in (own[::-1], own))
    seconds = {row["gather"]: float(row["elapsed_ms"]) / 1e3 for row in first.values()}
    grown_s = float(last["sums"]["elapsed_ms"]) / 1e3 - seconds["sums"]
    seconds_a_row = grown_s / (last["sums"]["rows_a_rank"] - first["sums"]["rows_a_rank"])
    rows = []
    for size in MODELLED_RANKS:
        for row in own:
            way = row["gather"]
            share = [(w - 1 if way == "rows" else 2 * (w - 1) / w) for w in (size, num_ranks)]
            sent = row["ring_bytes"] * share[0] / share[1]
            ranked = row["rows_a_rank"] * (size if way == "rows" else 1)
            hops = math.log2(size / num_ranks)
            total = seconds[way] + seconds_a_row * ranked + sent / bandwidth
            total += row["collectives"] * latency * hops
            rows.append(
                {
                    **row,
                    "ranks": size,
                    "elapsed_ms": f"{1e3 * total:.4g}",
                    "ring_bytes": round(sent),
                    "source": f"modelled: {bandwidth:.3g} B/s, {latency:.3g} s",
                }
            )
    return rows


def show(found: list[Row]) -> None:
    table = Table("processes", "rows of each", "", "collectives", "bytes sent by each", "time")
    for row in found:
        sent = f"{int(row['ring_bytes']):,}" if row["ring_bytes"] != "" else ""
        num_rows = f"{row['rows_a_rank']:,}" if row["rows_a_rank"] != "" else ""
        cells = (str(row["ranks"]), num_rows, row["gather"], str(row["collectives"]), sent)
        table.add_row(*cells, f"{float(row['elapsed_ms']):,.4g} ms")
    Console(width=100).print(table)


def main() -> None:
    """Measure, extrapolate, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, a few seconds")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--bandwidth", type=float, default=1.25e9, help="of the model, bytes/s")
    parser.add_argument("--latency", type=float, default=1e-4, help="of the model, seconds")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sizes = SIZES[: 2 if options.quick else None]
        mp.spawn(serve, (options.processes, folder, sizes), nprocs=options.processes)
        found = torch.load(Path(folder) / "found")
    found += modelled(found, options.bandwidth, options.latency)
    show(found)
    name = "gather-quick" if options.quick else "gather"
    path = _measure.write_csv(found, f"cpu-{name}", _measure.header(1))
    print(f"written: {path.relative_to(_peers.ROOT)}")


if __name__ == "__main__":
    main()
