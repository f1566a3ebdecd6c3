"""What the benchmarks share: processes to measure in, the header of a result, its CSV."""

from __future__ import annotations

import csv
import datetime
import json
import os
import platform
import re
import select
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from benchmarks import _peers
from benchmarks._contenders import Case

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]


class Worker:
    """A process of `benchmarks._worker`, asked one thing at a time."""

    def __init__(self, num_threads: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks._worker", str(num_threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=_peers.ROOT,
        )

    def ask(self, timeout_s: float, **request: Any) -> Row:
        """The reply, or {"died": ...} when there is none in time; the process has ended then."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        self.process.stdin.flush()
        answered, _, _ = select.select([self.process.stdout], [], [], timeout_s)
        line = self.process.stdout.readline() if answered else b""
        if line:
            reply: Row = json.loads(line)
            return reply
        self.close()
        return {"died": "the process was killed" if answered else f"more than {timeout_s:.0f} s"}

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def run_cell(
    contender: str, case: Case, *, num_threads: int, timeout_s: float, limit_bytes: int
) -> Row:
    """Memory and time of one pass in a fresh process."""
    with Worker(num_threads) as worker:
        return worker.ask(
            timeout_s, do="memory", contender=contender, case=asdict(case), limit_bytes=limit_bytes
        )


def header(num_threads: int) -> list[str]:
    """Lines that say where and how a result came about."""
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    machine = f"{_cpu_model()}, {os.cpu_count()} cores, {memory_gib:.0f} GiB RAM"
    present = [name for name in _peers.PEERS if _peers.is_there(name)]
    versions = ", ".join(_peers.describe(name) for name in present)
    parts = Path(sys.argv[0]).with_suffix("").parts
    start = parts.index("benchmarks") if "benchmarks" in parts else -2
    module = ".".join(parts[start:]).removesuffix(".__main__")
    return [
        f"# machine: {machine}; threads: {num_threads}",
        f"# python {platform.python_version()}, torch {torch.__version__}, {versions}",
        f"# command: {' '.join(['python -m', module, *sys.argv[1:]])}",
    ]


def write_csv(rows: Sequence[Mapping[str, Any]], name: str, lines: list[str]) -> Path:
    """Write benchmarks/results/<date>-<name>.csv."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{_today()}-{name}.csv"
    with path.open("w", newline="") as file:
        file.writelines(line + "\n" for line in lines)
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a result, its header left out."""
    with path.open() as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))


def newest(name: str, *, today: bool = False) -> Path | None:
    """The latest result of a benchmark, or that of today; None if there is none."""
    found: Iterable[Path] = RESULTS.glob(f"{_today() if today else '????-??-??'}-{name}.csv")
    return max(found, default=None)


def _today() -> str:
    return datetime.date.today().isoformat()


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"model name\s*:\s*(.+)", text)
    return found[1].strip() if found else platform.machine()
