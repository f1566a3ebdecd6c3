"""The process that measures the steps of one library on a CUDA device.

    python -m benchmarks.gpu.worker ours '[["ours", "SmoothAPLoss", 1024, 1, 0, "auto", ""], …]'

The device's rates come first, then each step: one JSON object a line, printed as soon as it is
known, so that what was measured before a process dies is not lost.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks import _peers, _worker
from benchmarks._measure import Row
from benchmarks.gpu import steps
from benchmarks.gpu.steps import MODES, Run, Step

WARM_UPS, ROUNDS, CALLS = 3, 9, 10
OUT_OF_MEMORY = "out of memory"
COPIED_BYTES, BLOCK, RATE_ROUNDS = 1 << 30, 1024, 4096


class Device(Protocol):
    """Where steps run, and how they are measured."""

    name: str  # as `torch.device` takes it

    def wall_ms(self, run: Any, rounds: int = ROUNDS, calls: int = CALLS) -> float:
        """Of one call among some in a row, the device waited for at the end: median of rounds."""

    def profiled(self, run: Run) -> tuple[int, float]:
        """Kernels, copies and fills that one call launches; the ms that the device is in them."""

    def peak_bytes(self, run: Run) -> int:
        """The most memory that one call takes beyond what is held before."""

    def captured(self, run: Run) -> Callable[[], object]:
        """A call that replays the step as one CUDA graph."""

    def facts(self) -> Row:
        """What the device says of itself."""


class CudaDevice:
    """The first CUDA device."""

    name = "cuda"

    def wall_ms(self, run: Any, rounds: int = ROUNDS, calls: int = CALLS) -> float:
        found = []
        for _ in range(rounds):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                run()
            torch.cuda.synchronize()
            found.append((time.perf_counter() - start) / calls * 1e3)
        return statistics.median(found)

    def profiled(self, run: Run) -> tuple[int, float]:
        from torch.profiler import ProfilerActivity, profile

        for _ in range(2):  # the first is not like others
            with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
                run()
                torch.cuda.synchronize()
        elapsed_us = [
            event.time_range.elapsed_us()
            for event in found.events()
            if event.device_type == torch.autograd.DeviceType.CUDA
            and not getattr(event, "is_user_annotation", False)
        ]
        return len(elapsed_us), sum(elapsed_us) / 1e3

    def peak_bytes(self, run: Run) -> int:
        torch.cuda.synchronize()
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def captured(self, run: Run) -> Callable[[], object]:
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(WARM_UPS):
                run()
        torch.cuda.current_stream().wait_stream(beside)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    def facts(self) -> Row:
        properties = torch.cuda.get_device_properties(0)
        return {
            "device": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "capability": f"{properties.major}.{properties.minor}",
        }


def measured(wanted: list[Step], library: Any, device: Device) -> Iterator[Row]:
    """A row a step; what was too large once is not tried with more rows."""
    too_large: set[Step] = set()
    for step in wanted:
        row: Row = step._asdict()
        if (kind := step._replace(rows=0)) in too_large:
            yield row | {"outcome": "out of memory with fewer rows"}
            continue
        try:
            row |= measure(step, library, device)
        except Exception as error:
            row["outcome"] = what_went_wrong(error)
            too_large |= {kind} if row["outcome"] == OUT_OF_MEMORY else set()
        yield row
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # where an error stays, another process goes on


def measure(step: Step, library: Any, device: Device) -> Row:
    """Launches, times and memory of one step; the time as a CUDA graph where it can be one."""
    run, leaf = steps.built(step, library, device.name)
    for _ in range(WARM_UPS):
        run()
    row: Row = {"peak_bytes": device.peak_bytes(run), "wall_ms": device.wall_ms(run)}
    row["launches"], row["device_ms"] = device.profiled(run)
    row["bce_ms"] = device.wall_ms(steps.cross_entropy(step, device.name))
    row["outcome"] = "ok"
    if step.library == "ours" and step.option not in ("checked", *MODES):
        try:
            row["graph_ms"] = device.wall_ms(replayed(run, leaf, device))
        except Exception as error:
            row["outcome"] = f"ok; no graph: {what_went_wrong(error)}"
            if torch.cuda.is_available():
                torch.cuda.synchronize()
    return row


def replayed(run: Run, leaf: Tensor, device: Device) -> Callable[[], object]:
    """The step as a CUDA graph, found equal to the step."""
    found: list[Tensor] = []

    def kept() -> Tensor:
        found.append(run())
        return found[-1]

    replay = device.captured(kept)
    replay()
    assert leaf.grad is not None
    loss, gradient = found[-1].clone(), leaf.grad.clone()
    torch.testing.assert_close(loss, run())
    torch.testing.assert_close(gradient, leaf.grad)
    return replay


def what_went_wrong(error: Exception) -> str:
    """One line."""
    if _worker.ran_out(error):
        return OUT_OF_MEMORY
    return f"{type(error).__name__}: {error}".splitlines()[0]


def rates(device: Device, copied_bytes: int, programs: int, rounds: int) -> Row:
    """Bytes a second of a copy, sigmoids a second of a bare loop."""
    from benchmarks.gpu.rates import sigmoids

    source = torch.ones(copied_bytes // 4, device=device.name)
    target = torch.empty_like(source)
    out = torch.empty(programs * BLOCK, device=device.name)

    def copies() -> Tensor:
        return target.copy_(source)

    def loops() -> Tensor:
        sigmoids[(programs,)](out, rounds, BLOCK=BLOCK, enable_fp_fusion=True)
        return out

    found = {}
    for name, count, run in (
        ("bytes_per_s", 2 * copied_bytes, copies),
        ("sigmoids_per_s", out.numel() * rounds, loops),
    ):
        device.wall_ms(run, 1, WARM_UPS)
        found[name] = count / (device.wall_ms(run) / 1e3)
    return found


def main() -> None:
    """Answer the request on the command line."""
    replies, sys.stdout = sys.stdout, sys.stderr  # so that no peer's print can be taken for one
    device, library = CudaDevice(), _peers.load(sys.argv[1])
    facts = device.facts()
    facts |= rates(device, COPIED_BYTES, 8 * 4 * facts["multiprocessors"], RATE_ROUNDS)
    print(json.dumps(facts), file=replies, flush=True)
    for row in measured([Step(*fields) for fields in json.loads(sys.argv[2])], library, device):
        print(json.dumps(row), file=replies, flush=True)


if __name__ == "__main__":
    main()
