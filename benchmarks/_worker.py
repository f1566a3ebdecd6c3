"""The process in which a contender runs: requests on stdin, replies on stdout, one JSON a line.

    {"do": "memory", "contender": ..., "case": {...}, "limit_bytes": ...}
        -> {"peak_bytes": ..., "elapsed_ms": ...}
    {"do": "build", "contender": ..., "case": {...}} -> {}
    {"do": "time", "calls": ...} -> {"elapsed_ms": ...}, the mean of that many calls

Whatever goes wrong is a reply as well: {"error": ...}, or {"died": ...} when memory ran out.
"""

from __future__ import annotations

import contextlib
import gc
import json
import re
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks._contenders import Case, Step, build

Reply = dict[str, Any]
MAX_CALLS, MAX_TIMED_S = 5, 2.0
# Threads that have just computed for another process still spin for some milliseconds.
SETTLING_S = 0.01


def main() -> None:
    """Answer requests until stdin ends."""
    replies, sys.stdout = sys.stdout, sys.stderr  # so that no peer's print can be taken for one
    torch.set_num_threads(int(sys.argv[1]))
    step: Step | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["do"] == "build":
                step = None  # before the new one, so that both need not fit
                step = build(request["contender"], Case(**request["case"]))
                step()
                reply: Reply = {}
            elif request["do"] == "time":
                assert step is not None, "nothing was built"
                time.sleep(SETTLING_S)
                step()
                reply = {"elapsed_ms": mean_elapsed_ms(step, request["calls"])}
            else:
                case = Case(**request["case"])
                reply = measure_memory(request["contender"], case, request["limit_bytes"])
        except Exception as error:
            what = f"{type(error).__name__}: {error}".splitlines()[0]
            reply = {"died": "out of memory"} if ran_out(error) else {"error": what}
        print(json.dumps(reply), file=replies, flush=True)


def mean_elapsed_ms(step: Step, calls: int) -> float:
    """Mean wall-clock time of some calls in a row."""
    start = time.perf_counter()
    for _ in range(calls):
        step()
    return (time.perf_counter() - start) / calls * 1e3


def measure_memory(contender: str, case: Case, limit_bytes: int) -> Reply:
    """Peak of the first pass over what inputs, libraries and a warm-up hold, then its time."""
    build(contender, case.tiny())()
    step = build(contender, case)
    gc.collect()
    limit_address_space(limit_bytes)
    _reset_peak()
    before = _status_bytes("VmRSS")
    elapsed_ms = [mean_elapsed_ms(step, 1)]
    peak = _status_bytes("VmHWM")
    while len(elapsed_ms) < MAX_CALLS and sum(elapsed_ms) < MAX_TIMED_S * 1e3:
        elapsed_ms.append(mean_elapsed_ms(step, 1))
    return {"peak_bytes": max(0, peak - before), "elapsed_ms": statistics.median(elapsed_ms)}


def _status_bytes(field: str) -> int:
    """A line of the kernel's account of this process: memory resident now, or at its highest.

    Not `ru_maxrss`, which a process inherits from the one that started it.
    """
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"{field}:\s+(\d+) kB", status)
    if found is None:
        raise RuntimeError("memory is measured on Linux only")
    return int(found[1]) * 1024


def _reset_peak() -> None:
    with contextlib.suppress(OSError):  # without it the peak of the imports stays in: an overcount
        Path("/proc/self/clear_refs").write_text("5")


def limit_address_space(limit_bytes: int) -> None:
    """Make an allocation fail, rather than the machine, beyond so much more than now."""
    limit = _status_bytes("VmSize") + limit_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


def ran_out(error: Exception) -> bool:
    words = ("can't allocate memory", "out of memory", "not enough memory")
    return isinstance(error, MemoryError) or any(word in str(error).lower() for word in words)


if __name__ == "__main__":
    main()
