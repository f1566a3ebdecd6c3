"""The benchmark of CUDA devices, without one: every step on a stand-in, a run of made-up rows."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import _measure, _peers
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import report, steps, worker
from benchmarks.gpu.steps import Step

pytest.importorskip("triton", minversion="3.2")

pytestmark = pytest.mark.slow
FACTS = {"device": "Made Up 3000 (80 GB)", "bytes_per_s": 3e12, "sigmoids_per_s": 1e12}


class StandIn:
    """The host in the place of a device: every measure calls the step once."""

    name = "cpu"

    def wall_ms(self, run: Any, rounds: int = 1, calls: int = 1) -> float:
        run()
        return 1.0

    def profiled(self, run: steps.Run) -> tuple[int, float]:
        run()
        return 20, 0.5

    def peak_bytes(self, run: steps.Run) -> int:
        run()
        return 1 << 20

    def captured(self, run: steps.Run) -> Callable[[], object]:
        run()
        return run

    def facts(self) -> dict[str, Any]:
        return {"device": "stand-in"}


def small(step: Step) -> Step:
    return step._replace(rows=min(step.rows, 64 * step.classes), queue=min(step.queue, 32))


def measured(library: str, only: Callable[[Step], bool]) -> list[dict[str, Any]]:
    wanted = dict.fromkeys(small(step) for step in steps.all_steps() if step.library == library)
    module = _peers.load(library) if library == "ours" else None
    return list(worker.measured([step for step in wanted if only(step)], module, StandIn()))


def test_every_step_of_ours_runs() -> None:
    rows = measured("ours", lambda step: step.option not in steps.MODES)
    assert {row["name"] for row in rows} == {*steps.FAMILY, steps.FUNCTION}
    for row in rows:
        assert row["outcome"] == "ok", row
        assert ("graph_ms" in row) == (row["option"] != "checked")
        full = report.finished(row, FACTS)
        assert list(full) == list(report.COLUMNS)
        assert (full["bytes_bound_ms"] != "") == (row["name"] == steps.FUNCTION)


def test_what_was_too_large_is_not_tried_with_more_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def built(step: Step, library: Any, device: str) -> Any:
        raise MemoryError if step.rows > 1024 else ValueError("no such loss")

    monkeypatch.setattr(steps, "built", built)
    wanted = [Step("libauc", "APLoss", rows) for rows in (1024, 4096, 8192)]
    rows = worker.measured(wanted, None, StandIn())
    assert [row["outcome"] for row in rows] == [
        "ValueError: no such loss",
        worker.OUT_OF_MEMORY,
        "out of memory with fewer rows",
    ]


def test_a_run_goes_on_where_it_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Processes that answer with made-up rows; one dies at a step, and the next goes on after."""
    pytest.importorskip("matplotlib")
    asked: list[list[Step]] = []

    def replies(library: str, wanted: list[Step], timeout_s: float) -> Iterator[dict[str, Any]]:
        asked.append(wanted)
        yield FACTS
        for step in wanted:
            if step.rows == 1 << 14 and step.library == "predecessor":
                return
            yield (
                step._asdict()
                | {"wall_ms": step.rows / 1e3, "bce_ms": 0.5, "launches": 18}
                | {
                    "graph_ms": 0.05 if step.library == "ours" else "",
                    "peak_bytes": 1 << 20,
                    "outcome": "ok",
                }
            )

    monkeypatch.setattr(gpu, "replies", replies)
    monkeypatch.setattr(_measure, "RESULTS", tmp_path)
    monkeypatch.setattr(_peers, "is_there", lambda name: True)
    wanted = list(steps.all_steps())
    path = gpu.run(wanted, str(FACTS["device"]), 1.0, tmp_path / "plots")
    assert path.name.endswith("-made-up-3000-80-gb-gpu.csv")
    rows = _measure.read_csv(path)
    assert len(rows) == len(wanted)
    assert [row["outcome"] for row in rows].count("died") == 1
    of_function = next(row for row in rows if row["backend"] == "auto: dense")
    assert float(of_function["operations_bound_ms"]) > 0
    printed = capsys.readouterr().out
    assert "SmoothAPLoss, 1,024 + 0 rows, C = 1: launches at most 25; found 18" in printed
    assert "SmoothAPLoss 1024 1 0 auto : 2.0 of the time of BCE, of 0.6 1.00" in printed
    assert "faster, C = 1: dense at every size" in printed
    assert (tmp_path / "plots" / "gpu.png").stat().st_size > 10_000
    asked.clear()
    gpu.run(wanted, str(FACTS["device"]), 1.0, tmp_path / "plots")
    assert not asked


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_it_says_so() -> None:
    for options in ([], ["--is-there"]):
        command = [sys.executable, "-m", "benchmarks.gpu", *options]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        assert done.returncode == 3
        assert "nothing was measured" in done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_device() -> None:
    device = worker.CudaDevice()
    x = torch.zeros(1 << 20, device="cuda")
    assert device.peak_bytes(lambda: x + 1) == x.nbytes
    assert device.wall_ms(device.captured(lambda: x.add_(1)), 2) > 0
    assert float(x[0]) > 0
    assert device.profiled(lambda: x + 1)[0] == 1
    assert worker.rates(device, 1 << 20, 32, 64)["bytes_per_s"] > 0
