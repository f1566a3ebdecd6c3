"""The benchmark of CUDA devices, without one: timing on a stand-in, tables of made-up rows."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import _gpu_worker, _measure, gpu
from benchmarks._contenders import Case, Contender, Step

pytest.importorskip("triton", minversion="3.2")

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


class Full(StandIn):
    """A device that has no memory for large steps, and captures nothing."""

    def peak_bytes(self, step: Step) -> int:
        self.last_peak_bytes = 456
        if self.calls > 0:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB")
        return super().peak_bytes(step)

    def captured(self, step: Step) -> Step:
        raise RuntimeError("operation not permitted when stream is capturing\nmore lines")


@pytest.mark.usefixtures("_few_rounds")
def test_a_series_ends_where_memory_does() -> None:
    cases = [Case(size) for size in (64, 128, 256)]
    first, second = _gpu_worker.measured("ours", cases, Full())
    assert first["outcome"] == "ok"
    assert first["graph_ms"] == ""
    assert first["note"].endswith("operation not permitted when stream is capturing")
    assert (second["num_rows"], second["outcome"]) == (128, "out of memory")
    assert (second["peak_bytes"], second["eager_ms"]) == (456, "")


def test_every_series_has_a_worker_and_the_sizes_of_the_goals() -> None:
    wanted = gpu.all_series(quick=False)
    assert {series.name for series in wanted} == set(_gpu_worker.SERIES)
    assert all(isinstance(found[0], Contender) for found in _gpu_worker.SERIES.values())
    sizes = {case.num_rows for case in wanted[0].cases}
    assert wanted[0].name == "ours"
    assert {size for size, *_ in gpu.GOALS} <= sizes
    assert all(len(series.cases) <= 3 for series in gpu.all_series(quick=True))


def test_rates() -> None:
    found = _gpu_worker.rates(StandIn(), 1 << 12, programs=1, rounds=2)
    assert set(found) == {"bytes_per_s", "sigmoids_per_s"}
    assert all(rate > 0 for rate in found.values())


def test_the_loops_compute_what_they_claim() -> None:
    from benchmarks import _gpu_rates

    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.arange(64, dtype=torch.float64)
    out = torch.empty(64, device=device)
    _gpu_rates.sigmoids[(2,)](out, 3, BLOCK=32, enable_fp_fusion=True)
    expected = sum(torch.sigmoid(1e-6 * x + 1e-3 * r) for r in range(3))
    torch.testing.assert_close(out.cpu().double(), expected, rtol=1e-6, atol=0)


def row(series: str, num_rows: int, eager_ms: float | str, **more: Any) -> dict[str, Any]:
    backend = series.removeprefix("ours, ") if "," in series else "dense"
    blank = dict.fromkeys(gpu.COLUMNS, "") | {"num_classes": 1, "queue_size": 0, "outcome": "ok"}
    blank |= {"series": series, "num_rows": num_rows, "eager_ms": eager_ms}
    return blank | {"positive_rate": 0.1, "backend": backend, "peak_bytes": 1 << 20} | more


def test_bounds() -> None:
    dense = gpu.with_bounds(row("ours", 4096, 0.1), RATES)
    assert dense["bytes_bound_ms"] == pytest.approx(4096 * 9 / 3e12 * 1e3)
    assert dense["operations_bound_ms"] == pytest.approx(2 * 409.6 * 4096 / 1e12 * 1e3)
    linear = gpu.with_bounds(row("ours, panel", 1 << 20, 0.1, num_classes=3), RATES)
    scores = 3 * (1 << 20)
    assert linear["bytes_bound_ms"] == pytest.approx(scores * 198 / 3e12 * 1e3)
    sigmoids = scores * (48 + 2 * 0.1 * 256)
    assert linear["operations_bound_ms"] == pytest.approx(sigmoids / 1e12 * 1e3)
    case = {"num_classes": 10, "queue_size": 1024, "backend": "dense"}
    classes = gpu.with_bounds(row("ours, loss", 3072, 1, **case), RATES)
    assert classes["operations_bound_ms"] == pytest.approx(2 * 4096 * (4096 / 1e12) * 1e3)
    other = row("predecessor", 4096, 0.1, backend="")
    assert gpu.with_bounds(other, RATES) == other
    assert gpu.with_bounds(row("ours", 4096, 0.1), {"outcome": "died"})["bytes_bound_ms"] == ""


def test_crossing_is_where_both_are_as_fast() -> None:
    """Dense (M / 8000)² ms, linear 1 ms: at M = 8,000, whatever sizes were measured."""
    rows = [
        row(f"ours, {name}", size, ms)
        for size in gpu.CROSSING_SIZES
        for name, ms in (("dense", (size / 8000) ** 2), ("panel", 1.0))
    ]
    assert gpu.crossing(rows, 1) == pytest.approx(8000**2)
    assert gpu.crossing(rows, 10) is None
    assert gpu.crossing(rows[:2], 1) is None
    assert gpu.crossing(rows[4:], 1) == 0
    for_ten = [one | {"num_classes": 10} for one in rows]
    assert gpu.crossing(for_ten, 10) == pytest.approx(10 * 8000**2)
    lines = "\n".join(gpu.advice([*rows, *for_ten[4:]], 1 << 29))
    assert "2^29.0" in lines
    assert "C = 1: as fast at M = 8,000, MOST_FUSED_PAIRS = 1 << 26 (2^25.9)" in lines
    assert "C = 10: linear was faster" in lines


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


def test_a_process_that_dies_keeps_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    script = "import sys; print('{\"num_rows\": 7}', flush=True); sys.exit('it broke')"
    monkeypatch.setattr(gpu.sys, "executable", "true")
    assert gpu.asked({"series": "ours"}, 60) == []

    class Script(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, command: list[str], **options: Any) -> None:
            assert json.loads(command[-1]) == {"series": "ours"}
            super().__init__(["python3", "-c", script], **options)

    monkeypatch.setattr(gpu.subprocess, "Popen", Script)
    assert gpu.asked({"series": "ours"}, 60) == [{"num_rows": 7}, {"outcome": "it broke"}]
    script = "import time; print('{\"num_rows\": 7}', flush=True); time.sleep(60)"
    assert gpu.asked({"series": "ours"}, 1) == [{"num_rows": 7}, {"outcome": "more than 1 s"}]


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
