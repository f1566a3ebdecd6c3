"""The runs of a question: what is left is done by some processes, and lands in its CSV at once."""

from __future__ import annotations

import csv
import itertools
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.progress import track

from benchmarks import _measure, _peers
from benchmarks._measure import Row
from benchmarks.quality import boosting, tasks, training
from benchmarks.quality.questions import QUESTIONS

_parts: dict[tuple[str, int], dict[bool, training.Parts]] = {}  # of one split, within or not


class Job(NamedTuple):
    """One run: a loss with one setting, of which there is a row for each number."""

    question: str
    task: str
    split: int
    loss: str
    setting: Any


def run(job: Job) -> list[Row]:
    """Train, and score the test rows once for each number."""
    torch.set_num_threads(1)
    question = QUESTIONS[job.question]
    contender, numbers = question.contenders[job.loss], question.numbers[job.task]
    parts = _parts_of(job)
    started = time.perf_counter()
    found = (
        boosting.run(contender, parts, job.setting, numbers, seed=job.split)
        if isinstance(contender, str)
        else training.run(
            contender, parts, job.setting, numbers, seed=job.split, budget=question.budget
        )
    )
    seconds = f"{time.perf_counter() - started:.1f}"
    return [
        {**_named(job), "number": number, "best_step": one.best_step}
        | {"validation": f"{one.validation:.6f}", "test": f"{one.test:.6f}", "seconds": seconds}
        for number, one in found.items()
    ]


def _parts_of(job: Job) -> training.Parts:
    key = job.task, job.split
    if key not in _parts:
        _parts.clear()
        _parts[key] = {False: training.parts_of(tasks.load(job.task), job.split)}
    if job.setting.within and True not in _parts[key]:
        _parts[key][True] = training.within_groups(_parts[key][False])
    return _parts[key][job.setting.within]


def _named(job: Job) -> Row:
    row = job._asdict() | {"setting": str(job.setting)}
    del row["question"]
    return row


def run_all(jobs: list[Job], path: Path, workers: int) -> None:
    """Run what is not in the file yet; the predecessor apart, for it has our import name."""
    keys = ("task", "split", "loss", "setting")
    done = {tuple(row[k] for k in keys) for row in finished(path)}
    left = [job for job in jobs if tuple(str(_named(job)[k]) for k in keys) not in done]
    context = multiprocessing.get_context("spawn")
    for peer in ("ours", "predecessor"):
        group = [job for job in left if ("predecessor" in job.loss) == (peer == "predecessor")]
        # One split after the other, for a worker keeps the data of one.
        chunks = [list(own) for _, own in itertools.groupby(group, key=lambda j: j[:4])]
        with ProcessPoolExecutor(workers, context, _peers.load, (peer,)) as pool:
            futures = [pool.submit(run_chunk, chunk) for chunk in chunks]
            for future in track(as_completed(futures), "training", total=len(futures)):
                append(future.result(), path)


def run_chunk(jobs: list[Job]) -> list[Row]:
    return [row for job in jobs for row in run(job)]


def append(rows: list[Row], path: Path) -> None:
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        if is_new:
            file.writelines(f"{line}\n" for line in _measure.header(1))
            writer.writeheader()
        writer.writerows(rows)


def finished(path: Path) -> list[Row]:
    return list(_measure.read_csv(path)) if path.exists() else []
