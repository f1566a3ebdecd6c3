"""The process that measures one library on a CUDA device: a series of growing sizes, or rates.

    python -m benchmarks._gpu_worker '{"series": "ours", "cases": [{...}, ...]}'

It prints one JSON object a line, as soon as it is known, so that what was measured before a process
dies is not lost. Times are between CUDA events, of a few calls in a row; their median is taken.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch

from benchmarks import _contenders, _peers, _worker
from benchmarks._contenders import Case, Contender, Step

Row = dict[str, Any]
ROUNDS, BLOCK_MS, MOST_CALLS = 15, 5.0, 200
WARM_UPS = 3
SLOWEST_PASS_MS = 5e3
COPIED_BYTES = 1 << 30
BLOCK, RATE_ROUNDS = 1024, 4096


class Device(Protocol):
    """Where steps run, and how they are measured."""

    name: str  # as `torch.device` takes it
    last_peak_bytes: int  # of the last call measured, whether it ended or not

    def elapsed_ms(self, step: Step, calls: int) -> float:
        """The mean of some calls in a row."""

    def peak_bytes(self, step: Step) -> int:
        """The most memory that one call takes beyond what is held before."""

    def captured(self, step: Step) -> Step:
        """A call that replays the step as one CUDA graph."""

    def facts(self) -> Row:
        """What the device says of itself."""


class CudaDevice:
    """The first CUDA device."""

    name = "cuda"
    last_peak_bytes = 0

    def elapsed_ms(self, step: Step, calls: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(calls):
            step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / calls

    def peak_bytes(self, step: Step) -> int:
        torch.cuda.synchronize()
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        try:
            step()
            torch.cuda.synchronize()
        finally:
            self.last_peak_bytes = torch.cuda.max_memory_allocated() - before
        return self.last_peak_bytes

    def captured(self, step: Step) -> Step:
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(WARM_UPS):
                step()
        torch.cuda.current_stream().wait_stream(beside)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return graph.replay

    def facts(self) -> Row:
        properties = torch.cuda.get_device_properties(0)
        return {
            "device": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "clock_mhz": getattr(properties, "clock_rate", 0) // 1000 or "unknown",
            "capability": f"{properties.major}.{properties.minor}",
        }


def _loss_step(module: Any, case: Case) -> Step:
    """The whole loss, beside a full queue, without the check of values."""
    module.SmoothAPLoss.check_values = False
    return _contenders._smooth_ap_loss(module, case)


# Which library each series loads, what its step is, and whether that can be a CUDA graph.
SERIES: dict[str, tuple[Contender, bool]] = {
    "ours": (_contenders.CONTENDERS["ours, kernel"], True),
    "ours, dense": (Contender("ours", _contenders._our_kernel("dense")), True),
    "ours, panel": (Contender("ours", _contenders._our_kernel("panel")), True),
    "ours, loss": (Contender("ours", _loss_step), True),
    "predecessor": (_contenders.CONTENDERS["predecessor, kernel"], False),
    "libauc APLoss": (_contenders.CONTENDERS["libauc APLoss"], False),
}


def measured(series: str, cases: list[Case], device: Device) -> Iterator[Row]:
    """A row a size, up to the first that dies or is too slow."""
    contender, has_graph = SERIES[series]
    module = _peers.load(contender.peer)
    contender.build(module, cases[0].tiny())()  # what libraries hold on to is no part of a peak
    for case in cases:
        row: Row = {"series": series, "num_rows": case.num_rows, "num_classes": case.num_classes}
        row |= {"queue_size": case.queue_size, "positive_rate": case.positive_rate}
        try:
            step = contender.build(module, case)
            row |= measure(step, device, has_graph)
        except Exception as error:
            row |= {"outcome": what_went_wrong(error), "peak_bytes": device.last_peak_bytes}
            row |= {"eager_ms": "", "graph_ms": "", "note": ""}
        yield row | {"backend": backend_of(series, case)}
        if row["outcome"] != "ok" or row["eager_ms"] > SLOWEST_PASS_MS:
            return


def measure(step: Step, device: Device, has_graph: bool) -> Row:
    """Peak memory and time of one pass; the time as a CUDA graph too, where it can be one."""
    row: Row = {"peak_bytes": device.peak_bytes(step)}
    device.elapsed_ms(step, WARM_UPS)
    row |= {"eager_ms": median_ms(step, device), "graph_ms": "", "outcome": "ok", "note": ""}
    if has_graph:
        try:
            row["graph_ms"] = median_ms(device.captured(step), device)
        except Exception as error:
            row["note"] = f"no graph: {what_went_wrong(error)}"
    return row


def median_ms(step: Step, device: Device) -> float:
    """Of one call, over rounds of some calls each."""
    calls = min(MOST_CALLS, max(1, round(BLOCK_MS / max(1e-3, device.elapsed_ms(step, 1)))))
    return statistics.median(device.elapsed_ms(step, calls) for _ in range(ROUNDS))


def backend_of(series: str, case: Case) -> str:
    """The backend of a series of ours, "" for others."""
    if not series.startswith("ours"):
        return ""
    if series in ("ours, dense", "ours, panel"):
        return series.removeprefix("ours, ")
    from imbalanced_losses._ranking.choose import choose_fused

    return choose_fused(case.num_classes, case.num_rows + case.queue_size)


def what_went_wrong(error: Exception) -> str:
    """One line."""
    if _worker.ran_out(error):
        return "out of memory"
    return f"{type(error).__name__}: {error}".splitlines()[0]


def rates(device: Device, copied_bytes: int, programs: int, rounds: int) -> Row:
    """Bytes a second of a copy, sigmoids a second of a bare loop."""
    from benchmarks import _gpu_rates

    source = torch.ones(copied_bytes // 4, device=device.name)
    target = torch.empty_like(source)
    out = torch.empty(programs * BLOCK, device=device.name)

    def loops() -> None:
        _gpu_rates.sigmoids[(programs,)](out, rounds, BLOCK=BLOCK, enable_fp_fusion=True)

    return {
        "bytes_per_s": _rate(2 * copied_bytes, lambda: target.copy_(source), device),
        "sigmoids_per_s": _rate(out.numel() * rounds, loops, device),
    }


def _rate(count: int, step: Step, device: Device) -> float:
    device.elapsed_ms(step, WARM_UPS)
    return count / (min(device.elapsed_ms(step, 1) for _ in range(ROUNDS)) / 1e3)


def main(print_row: Callable[[Row], None], device: Device) -> None:
    """Answer the request on the command line."""
    request = json.loads(sys.argv[1])
    if request["series"] == "rates":
        programs = 8 * 4 * device.facts()["multiprocessors"]
        print_row(device.facts() | rates(device, COPIED_BYTES, programs, RATE_ROUNDS))
        return
    for row in measured(request["series"], [Case(**case) for case in request["cases"]], device):
        print_row(row)


if __name__ == "__main__":
    replies, sys.stdout = sys.stdout, sys.stderr  # so that no peer's print can be taken for one
    main(lambda row: print(json.dumps(row), file=replies, flush=True), CudaDevice())
