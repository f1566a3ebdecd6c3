"""`make soak`: long training with a queue, draws and checkpoints; memory flat, ranks equal.

    python -m tests.hardening.soak [--steps 100000] [--rank-steps 20000]

In chunks of 1,000 steps (ranks: 200), each of which begins with fresh modules that load the
checkpoint of the last one. Asserts that losses are finite, that memory, tensors and objects do not
grow over the last 90 % of the chunks, and that all ranks hold the same bits after each. Reads
/proc, so Linux only.
"""

from __future__ import annotations

import argparse
import gc
import io
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from imbalanced_losses import CrossEntropy, MixedLoss, SmoothAPLoss
from tests.hardening.faulty import assert_same
from tests.helpers.cases import seeded
from tests.helpers.ranks import Failure, Ranks
from tests.helpers.rows import IGNORED

NUM_ROWS, NUM_FEATURES = 32, 8
# By the straight line through the chunks. The allocator's own noise is some hundred KiB.
MOST_GROWTH_MIB = 4.0
MOST_NEW_TENSORS = 0.5
MOST_NEW_OBJECTS = 200.0


class Chunk(NamedTuple):
    """Where a chunk of training has come to, and what the process holds then."""

    checkpoint: bytes
    mean_loss: float
    rss_mib: float
    num_tensors: int
    num_objects: int


class Training:
    """A model, its loss and its optimiser."""

    def __init__(self) -> None:
        self.model = nn.Linear(NUM_FEATURES, 1)
        nn.init.zeros_(self.model.weight)
        nn.init.zeros_(self.model.bias)
        ranking = SmoothAPLoss(
            1, 256, 0.1, temperature_unit="spread", max_pool_size=128, queue_follows_shift=True
        )
        self.loss_fn = MixedLoss(CrossEntropy(1), ranking, main_weight=0.9, warmup_steps=100)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.parts: dict[str, Any] = {
            "model": self.model,
            "loss": self.loss_fn,
            "optimizer": self.optimizer,
        }

    def load(self, checkpoint: bytes) -> None:
        state = torch.load(io.BytesIO(checkpoint), weights_only=True)
        for name, part in self.parts.items():
            part.load_state_dict(state[name])

    def saved(self) -> bytes:
        file = io.BytesIO()
        torch.save({name: part.state_dict() for name, part in self.parts.items()}, file)
        return file.getvalue()

    def step(self, step: int, rank: int | None) -> float:
        features, targets = rows(step, rank)
        self.optimizer.zero_grad()
        logits = self.model(features)
        if step % 50 == 0:  # now and then what must not stay
            logits[targets == IGNORED] = math.nan
        loss = self.loss_fn(logits, targets)
        loss.backward()
        if rank is not None:
            for parameter in self.model.parameters():
                assert parameter.grad is not None
                dist.all_reduce(parameter.grad)
                parameter.grad /= dist.get_world_size()
        self.optimizer.step()
        return loss.item()


def rows(step: int, rank: int | None) -> tuple[Tensor, Tensor]:
    """A batch with a positive in eleven, and a row in twenty that is ignored."""
    generator = seeded(7 * step + (rank or 0))
    features = torch.randn(NUM_ROWS, NUM_FEATURES, generator=generator)
    noise = torch.randn(NUM_ROWS, generator=generator)
    targets = (features[:, 0] - features[:, 1] + noise > 2.4).long()
    targets[torch.rand(NUM_ROWS, generator=generator) < 0.05] = IGNORED
    return features, targets


def chunk(rank: int | None, checkpoint: bytes | None, first: int, count: int) -> Chunk:
    training = Training()
    if checkpoint is not None:
        training.load(checkpoint)
    total = 0.0
    for step in range(first, first + count):
        loss = training.step(step, rank)
        assert math.isfinite(loss), f"loss {loss} at step {step}"
        total += loss
    saved = training.saved()
    del training
    gc.collect()
    objects = gc.get_objects()
    num_tensors = sum(issubclass(type(thing), Tensor) for thing in objects)  # left behind
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return Chunk(saved, total / count, pages * 4096 / 2**20, num_tensors, len(objects))


def growth(values: list[float]) -> float:
    """How much a straight line through the last nine tenths of the values rises over them."""
    kept = torch.tensor(values[len(values) // 10 :], dtype=torch.float64)
    place = torch.arange(len(kept), dtype=torch.float64)
    place -= place.mean()
    slope = (place * (kept - kept.mean())).sum() / place.square().sum().clamp(min=1)
    return float(slope) * (len(kept) - 1)


def report(name: str, chunks: list[Chunk], steps: int, seconds: float) -> None:
    columns = {
        "RSS MiB": (MOST_GROWTH_MIB, [c.rss_mib for c in chunks]),
        "tensors left": (MOST_NEW_TENSORS, [float(c.num_tensors) for c in chunks]),
        "objects": (MOST_NEW_OBJECTS, [float(c.num_objects) for c in chunks]),
    }
    print(f"{name}: {steps} steps, {len(chunks)} checkpoints, {seconds:.0f} s")
    print(f"  loss    {chunks[0].mean_loss:12.4f} -> {chunks[-1].mean_loss:12.4f}")
    for label, (_, values) in columns.items():
        print(
            f"  {label} {values[0]:12.1f} -> {values[-1]:12.1f}, "
            f"growth over the last 90 %: {growth(values):+.2f}"
        )
    for label, (most, values) in columns.items():
        assert growth(values) <= most, f"{name}: {label} grew by {growth(values):.2f}"


def soak_alone(steps: int, size: int = 1000) -> None:
    start = time.perf_counter()
    chunks: list[Chunk] = []
    for first in range(0, steps, size):
        chunks.append(chunk(None, chunks[-1].checkpoint if chunks else None, first, size))
        chunks[:-1] = [one._replace(checkpoint=b"") for one in chunks[:-1]]
        if len(chunks) % 5 == 0:
            now = chunks[-1]
            print(f"  {first + size}: {now.rss_mib:.1f} MiB, loss {now.mean_loss:.4f}", flush=True)
    report("one process", chunks, steps, time.perf_counter() - start)


def soak_ranks(steps: int, size: int = 200) -> None:
    start = time.perf_counter()
    ranks = Ranks(2, timeout_s=200)
    chunks: list[list[Chunk]] = []
    checkpoint = None
    try:
        for first in range(0, steps, size):
            found = ranks.run(chunk, checkpoint, first, size)
            assert not any(isinstance(one, Failure) for one in found), found
            checkpoint = found[0].checkpoint
            bits = (torch.load(io.BytesIO(each.checkpoint), weights_only=True) for each in found)
            assert_same(*bits)  # weights, moments, queue, counters and temperature
            chunks.append([c._replace(checkpoint=b"") for c in found])
    finally:
        ranks.close()
    seconds = time.perf_counter() - start
    for rank in range(2):
        report(f"rank {rank} of 2", [found[rank] for found in chunks], steps, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description="Long training; memory flat, ranks equal.")
    parser.add_argument("--steps", type=int, default=100_000, help="of one process, or 0")
    parser.add_argument("--rank-steps", type=int, default=20_000, help="of two ranks, or 0")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.steps:
        soak_alone(arguments.steps)
    if arguments.rank_steps:
        soak_ranks(arguments.rank_steps)


if __name__ == "__main__":
    main()
