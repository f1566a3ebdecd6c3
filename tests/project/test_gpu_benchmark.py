"""The benchmark of CUDA devices, without one: timing on a stand-in, tables of made-up rows."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import _gpu_worker, _measure, gpu
from benchmarks._contenders import Case, Step

pytest.importorskip("triton", minversion="3.2")

pytestmark = pytest.mark.slow
RATES = {
    "device": "Made Up 3000 (80 GB)",
    "bytes_per_s": 3e12,
    "sigmoids_per_s": 1e12,
}


class StandIn:
    """The host in the place of a device: its memory counts the calls."""

    name = "cuda" if torch.cuda.is_available() else "cpu"  # where the loops of `rates` run
    last_peak_bytes = 0

    def __init__(self) -> None:
        self.calls = 0

    def elapsed_ms(self, step: Step, calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            step()
        self.calls += calls
        return max(1.0, (time.perf_counter() - start) / calls * 1e3)

    def peak_bytes(self, step: Step) -> int:
        self.last_peak_bytes = 123
        step()
        return self.last_peak_bytes

    def captured(self, step: Step) -> Step:
        return step

    def facts(self) -> dict[str, Any]:
        return {"device": "stand-in", "multiprocessors": 1}


@pytest.fixture
def _few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_gpu_worker, "ROUNDS", 2)
    monkeypatch.setattr(_gpu_worker, "MOST_CALLS", 2)


@pytest.mark.usefixtures("_few_rounds")
@pytest.mark.parametrize("series", ["ours", "ours, dense", "ours, panel", "ours, loss"])
def test_a_series_of_ours(series: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from imbalanced_losses import SmoothAPLoss

    monkeypatch.setattr(SmoothAPLoss, "check_values", True)  # which the series sets to False
    queue = 32 if series == "ours, loss" else 0
    cases = [Case(size, num_classes=2, queue_size=queue) for size in (64, 128)]
    rows = list(_gpu_worker.measured(series, cases, StandIn()))
    assert [row["num_rows"] for row in rows] == [64, 128]
    for row in rows:
        assert row["outcome"] == "ok", row
        assert row["peak_bytes"] == 123
        assert row["eager_ms"] > 0
        is_linear = series == "ours, panel"
        assert row["backend"] == ("panel" if is_linear else "dense")
        assert row["graph_ms"] != ""
        assert set(row) <= set(gpu.COLUMNS)


def row(series: str, num_rows: int, eager_ms: float | str, **more: Any) -> dict[str, Any]:
    backend = series.removeprefix("ours, ") if "," in series else "dense"
    blank = dict.fromkeys(gpu.COLUMNS, "") | {"num_classes": 1, "queue_size": 0, "outcome": "ok"}
    blank |= {"series": series, "num_rows": num_rows, "eager_ms": eager_ms}
    return blank | {"positive_rate": 0.1, "backend": backend, "peak_bytes": 1 << 20} | more


def made_up(series: str) -> list[dict[str, Any]]:
    rows = [row(series, 1 << power, math.sqrt(2.0**power) / 100) for power in (10, 12, 20)]
    if series == "ours":
        rows[1]["graph_ms"] = 0.05
        return rows
    return [*rows[:2], row(series, 1 << 18, "", outcome="out of memory", peak_bytes=70 << 30)]


def test_a_whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Processes that answer with made-up rows, one that dies: CSV, table, goals, plot."""
    pytest.importorskip("matplotlib")

    def asked(request: dict[str, Any], timeout_s: float) -> list[dict[str, Any]]:
        if request["series"] == "rates":
            return [RATES]
        if request["series"] == "libauc APLoss":
            return [row("libauc APLoss", 1024, 3.0), {"outcome": "more than 1 s"}]
        return made_up(request["series"])

    monkeypatch.setattr(gpu, "asked", asked)
    monkeypatch.setattr(_measure, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu._peers, "is_there", lambda name: True)
    path = gpu.run(gpu.all_series(quick=False), 1.0, tmp_path / "plots", "")
    assert path.name.endswith("-made-up-3000-80-gb-gpu.csv")
    rows = _measure.read_csv(path)
    assert list(rows[0]) == list(gpu.COLUMNS)
    assert '"bytes_per_s": 3000000000000.0' in path.read_text()
    ours = [one for one in rows if one["series"] == "ours"]
    assert [one["num_rows"] for one in ours] == ["1024", "4096", "1048576"]
    assert float(ours[1]["operations_bound_ms"]) == pytest.approx(3.36e-3, rel=0.01)
    printed = capsys.readouterr().out
    assert "goal: M = 1,048,576, call by call: at most 1.0 ms; 10.240 ms" in printed
    assert "goal: M = 4,096, as a CUDA graph: at most 0.1 ms; 0.050 ms" in printed
    assert "predecessor ended at 262,144 rows: out of memory, 70.0 GiB held" in printed
    assert "libauc APLoss ended at 2,048 rows: more than 1 s" in printed
    assert (tmp_path / "plots" / "gpu.png").stat().st_size > 10_000
    gpu.figure(rows, "read from the file", tmp_path / "again.png")  # from text as well
    assert gpu.goals([]) == [line for line in gpu.goals([]) if line.endswith("not measured")]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_it_says_so() -> None:
    for options in ([], ["--is-there"]):
        command = [sys.executable, "-m", "benchmarks.gpu", *options]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        assert done.returncode == 3
        assert "no CUDA device" in done.stderr
        assert "nothing was measured" in done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_device() -> None:
    device = _gpu_worker.CudaDevice()
    x = torch.zeros(1 << 20, device="cuda")
    assert device.peak_bytes(lambda: x + 1) == x.nbytes
    assert device.elapsed_ms(device.captured(lambda: x.add_(1)), 2) > 0
    assert float(x[0]) > 0
