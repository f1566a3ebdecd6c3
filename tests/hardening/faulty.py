"""A real training run for tests that break it: small, deterministic, with checkpoints on disk."""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from imbalanced_losses import CrossEntropy, MixedLoss, SmoothAPLoss
from tests.helpers.rows import IGNORED, make_batch

NUM_ROWS, NUM_FEATURES = 16, 5


class Training:
    """A model, a mix with a schedule, a queue and draws, and an optimiser with moments."""

    def __init__(self) -> None:
        self.model = nn.Linear(NUM_FEATURES, 1)
        with torch.no_grad():
            self.model.weight.copy_(make_batch(1, NUM_FEATURES, seed=99).logits)
            self.model.bias.zero_()
        ranking = SmoothAPLoss(1, 40, 0.2, max_pool_size=32)
        self.loss_fn = MixedLoss(
            CrossEntropy(1),
            ranking,
            main_weight=0.8,
            warmup_steps=5,
            blend_steps=12,
            temperature=(0.5, 0.1, 30),
        )
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.02)
        self.losses: list[float] = []

    def step(self) -> None:
        """The next one: how many have been made says which rows it takes."""
        step = len(self.losses)
        features, targets = rows_of_rank(step)
        self.optimizer.zero_grad()
        loss = self.loss_fn(self.model(features), targets)
        loss.backward()
        if dist.is_initialized():
            for parameter in self.model.parameters():
                dist.all_reduce(parameter.grad)
                assert parameter.grad is not None
                parameter.grad /= dist.get_world_size()
        self.optimizer.step()
        self.losses.append(loss.item())

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "loss": self.loss_fn.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "losses": self.losses,
        }

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.loss_fn.load_state_dict(state["loss"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.losses = state["losses"]

    def save(self, path: Path) -> None:
        """All of it or nothing, whenever the process ends."""
        half = path.with_suffix(".half")
        torch.save(self.state(), half)
        os.replace(half, path)


def rows_of_rank(step: int) -> tuple[Tensor, Tensor]:
    rank = dist.get_rank() if dist.is_initialized() else 0
    batch = make_batch(NUM_ROWS, seed=1000 * rank + step)
    features = make_batch(NUM_ROWS, NUM_FEATURES, seed=1000 * rank + step).logits
    targets = batch.targets.roll(step)
    targets[step % NUM_ROWS] = IGNORED
    return features, targets


def train(path: Path, steps: int, every: int) -> Training:
    """Go on from the checkpoint, if there is one; the first rank writes it for all."""
    training = Training()
    if path.exists():
        training.load(path)
    while len(training.losses) < steps:
        training.step()
        done = len(training.losses)
        if done % every == 0 and is_first():
            training.save(path)
        print(done, flush=True)
    return training


def is_first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def make_mix(partner: nn.Module | None = None, **options: Any) -> MixedLoss:
    ranking = SmoothAPLoss(1, 10, 0.3, max_pool_size=12)
    return MixedLoss(partner or CrossEntropy(1), ranking, main_weight=0.8, **options)


def step_of(loss_fn: nn.Module, seed: int) -> Tensor:
    batch = make_batch(7, seed=seed)
    weights = torch.arange(7) / 2  # the first of weight 0, the others new to the queue
    loss: Tensor = loss_fn(batch.logits, batch.targets, sample_weight=weights)
    return loss


def assert_same(found: Any, expected: Any) -> None:
    """The same numbers in the same places, bit for bit."""
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        for name, value in expected.items():
            assert_same(found[name], value)
    elif isinstance(expected, Tensor):
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    else:
        assert found == expected


def main() -> None:
    """`python -m tests.hardening.faulty FOLDER STEPS EVERY [RANK PORT]`."""
    folder, steps, every, *ranks = sys.argv[1:]
    torch.set_num_threads(1)
    rank = 0
    if ranks:
        rank, port = map(int, ranks)
        dist.init_process_group(
            "gloo",
            init_method=f"tcp://127.0.0.1:{port}",
            rank=rank,
            world_size=2,
            timeout=timedelta(seconds=20),
        )
    training = train(Path(folder) / "run.pt", int(steps), int(every))
    training.save(Path(folder) / f"end{rank}.pt")


if __name__ == "__main__":
    main()
