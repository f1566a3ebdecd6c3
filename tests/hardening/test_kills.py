"""Processes and ranks that die in training: runs go on bit for bit, and no rank hangs."""

from __future__ import annotations

import io
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from imbalanced_losses import SmoothAPLoss
from imbalanced_losses._rows import gather as _gather
from tests.hardening import faulty
from tests.hardening.faulty import assert_same
from tests.helpers.ranks import Failure, Ranks, free_port, packed
from tests.helpers.rows import make_batch

# --- Processes that die --------------------------------------------------------------------------

STEPS, EVERY = 60, 4


def start(folder: Path, *rank_and_port: int) -> subprocess.Popen[str]:
    arguments = [str(folder), str(STEPS), str(EVERY), *map(str, rank_and_port)]
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "tests.hardening.faulty", *arguments],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def killed_at_random(processes: list[subprocess.Popen[str]], generator: random.Random) -> bool:
    """Whether they were killed: at a moment after some step, unless they ended before."""
    moment = generator.randrange(1, STEPS // 2)
    for process in processes:
        assert process.stdout is not None
        for _ in range(moment):
            if process.stdout.readline() == "":
                break
    time.sleep(generator.random() * 0.02)  # in the middle of a step, or of a checkpoint
    for process in processes:
        process.send_signal(signal.SIGKILL)
    codes = [process.wait() for process in processes]
    for process in processes:
        assert process.stdout is not None
        process.stdout.close()
    assert all(code in (0, -signal.SIGKILL) for code in codes)
    return -signal.SIGKILL in codes


def start_all(folder: Path, num_ranks: int) -> list[subprocess.Popen[str]]:
    """One process by itself, or ranks that find each other."""
    port = free_port()
    return [start(folder, *((rank, port) if num_ranks > 1 else ())) for rank in range(num_ranks)]


def assert_ends(processes: list[subprocess.Popen[str]]) -> None:
    for process in processes:
        process.communicate()
        assert process.returncode == 0


def assert_survives_kills(folder: Path, num_ranks: int, num_kills: int, seed: int) -> None:
    generator, kills = random.Random(seed), 0
    while kills < num_kills:
        kills += killed_at_random(start_all(folder, num_ranks), generator)
        if (folder / "run.pt").exists():
            made = len(torch.load(folder / "run.pt", weights_only=True)["losses"])
            assert made % EVERY == 0
            if made == STEPS:
                break
    assert_ends(start_all(folder, num_ranks))
    assert kills > 0


def test_killed_at_any_moment_training_resumes_bit_for_bit(tmp_path: Path) -> None:
    assert_survives_kills(tmp_path, num_ranks=1, num_kills=1, seed=0)
    whole = faulty.train(tmp_path / "none.pt", STEPS, 10 * STEPS)
    assert_same(torch.load(tmp_path / "end0.pt", weights_only=True), whole.state())
    ranking = whole.loss_fn.main_loss
    assert whole.loss_fn.num_steps == STEPS
    assert ranking._queue.num_steps == STEPS - 5
    assert ranking.temperature == pytest.approx(0.1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_killed_many_times_training_resumes_bit_for_bit(
    tmp_path: Path, num_ranks: int, seed: int
) -> None:
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    for folder in (broken, whole):
        folder.mkdir()
    assert_survives_kills(broken, num_ranks, num_kills=5, seed=seed)
    assert_ends(start_all(whole, num_ranks))
    ends = [
        [torch.load(folder / f"end{rank}.pt", weights_only=True) for rank in range(num_ranks)]
        for folder in (broken, whole)
    ]
    assert_same(ends[0][0], ends[1][0])
    for found in (*ends[0], *ends[1]):
        for part in ("model", "loss", "optimizer"):
            assert_same(found[part], ends[1][0][part])


# --- Ranks that die ------------------------------------------------------------------------------


def die(*arguments: Any) -> Any:
    os._exit(9)


MOMENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "before-the-header": ("_exchanged_headers", {}),
    "before-the-payload": ("_rows_of_all", {}),
    "before-a-sum": ("Shards.sum", {"gather": "sums", "queue_size": 0}),
    "before-a-maximum": ("Shards.max", {"gather": "sums", "queue_size": 0}),
}


def step_in_which_the_last_rank_dies(rank: int, moment: str, last: int) -> float:
    name, options = MOMENTS[moment]
    loss_fn = SmoothAPLoss(1, **{"queue_size": 8, **options})
    make_batch(5, seed=rank).through(loss_fn)
    if rank == last:
        owner: Any = _gather
        *path, attribute = name.split(".")
        for part in path:
            owner = getattr(owner, part)
        setattr(owner, attribute, die)
    return make_batch(5, seed=rank).through(loss_fn).item()


def run_to_the_end(pool: Ranks, job: Callable[..., Any], *arguments: Any) -> Iterator[Any]:
    """The result of each rank, None where it died; fails if one neither answers nor dies."""
    for connection in pool.connections:
        connection.send_bytes(packed((job, arguments)))
    for rank, connection in enumerate(pool.connections):
        assert connection.poll(60), f"rank {rank} hangs"
        try:
            answer = connection.recv_bytes()
        except (EOFError, ConnectionResetError):
            yield None
        else:
            yield torch.load(io.BytesIO(answer), weights_only=False)


def assert_others_raise(num_ranks: int, moment: str) -> None:
    pool = Ranks(num_ranks, timeout_s=8)
    try:
        last = num_ranks - 1
        found = list(run_to_the_end(pool, step_in_which_the_last_rank_dies, moment, last))
    finally:
        pool.kill()
    assert found[last] is None
    for rank, failure in enumerate(found[:last]):
        assert isinstance(failure, Failure)
        assert failure.error == "RuntimeError"
        assert "not all of them took part" in failure.message
        assert f"this is rank {rank} of {num_ranks}" in failure.message


def test_where_a_rank_dies_the_other_says_so() -> None:
    assert_others_raise(2, "before-the-payload")


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_where_a_rank_dies_at_any_moment_the_others_say_so(num_ranks: int, moment: str) -> None:
    assert_others_raise(num_ranks, moment)
