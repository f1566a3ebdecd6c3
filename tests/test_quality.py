"""What the quality benchmark computes beside training: batches, choices, formulas."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from benchmarks import quality
from benchmarks.quality import Tuned
from sklearn.metrics import average_precision_score

from tests.cases import seeded


def row(loss: str, validation_ap: float, test_ap: float, split: int = 0) -> dict[str, str]:
    numbers = {"validation_ap": validation_ap, "test_ap": test_ap, "seconds": 1, "split": split}
    return {"task": "t", "loss": loss, **{k: str(v) for k, v in numbers.items()}}


def test_settings_are_chosen_by_validation() -> None:
    rows = [row("BCE", 0.5, 0.9), row("BCE", 0.6, 0.1), row("BCE", 0.4, 0.8, split=1)]
    found = quality.tuned(rows)
    assert found == {("t", "BCE"): {0: Tuned(0.6, 0.1, 1), 1: Tuned(0.4, 0.8, 1)}}


def test_the_rival_is_chosen_by_validation() -> None:
    rows = [row("BCE", 0.6, 0.1), row("focal", 0.5, 0.9), row(quality.OURS, 0.9, 0.9)]
    assert quality.rival_of(quality.tuned(rows), "t") == "BCE"


def test_what_is_done_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [quality.Job("t", 0, "BCE", rate, 0.1) for rate in (1e-3, 1e-2)]
    path = tmp_path / "runs.csv"
    path.write_text("task,split,loss,learning_rate,weight_decay\nt,0,BCE,0.001,0.1\n")
    asked: list[quality.Job] = []

    class Inline:
        """A pool of workers without processes."""

        def __init__(self, *_: object) -> None: ...
        def __enter__(self) -> Inline:
            return self

        def __exit__(self, *_: object) -> None: ...
        def submit(self, _: object, chunk: list[quality.Job]) -> None:
            asked.extend(chunk)

    monkeypatch.setattr(quality, "ProcessPoolExecutor", Inline)
    monkeypatch.setattr(quality, "as_completed", lambda futures: [])
    quality.run_all(jobs, path, 1)
    assert asked == jobs[1:]


def test_batches() -> None:
    labels = (torch.arange(5000) % 50 == 0).long()
    epoch = [
        rows
        for rows, _ in zip(quality._batches(5000, quality.BATCH_SIZE, 3), range(4), strict=False)
    ]
    assert len(torch.cat(epoch).unique()) == 4 * quality.BATCH_SIZE
    for rows, _ in zip(
        quality._quota_batches(labels, 0.25, quality.BATCH_SIZE, 3), range(3), strict=False
    ):
        assert len(rows) == quality.BATCH_SIZE
        assert labels[rows].sum() == quality.BATCH_SIZE / 4


@pytest.mark.parametrize("seed", range(5))
def test_supap_is_an_upper_bound(seed: int) -> None:
    scores = torch.randn(80, generator=seeded(seed))
    labels = (torch.rand(80, generator=seeded(seed + 9)) < 0.3).long()
    true_loss = 1 - average_precision_score(labels, scores)
    for temperature in (0.01, 0.1, 0.5):
        assert quality._upper_bound(scores, labels, temperature).item() >= true_loss - 1e-6


ALL = {**quality.LOSSES, **quality.CANDIDATES, **quality.REBALANCED}
PEERS = {"predecessor", "LibAUC APLoss"}  # each needs a process of its own


@pytest.mark.parametrize("name", sorted(ALL.keys() - PEERS))
def test_every_contender_has_a_gradient(name: str) -> None:
    labels = (torch.arange(256) % 8 == 0).long()
    logits = torch.randn(256, generator=seeded(0)).requires_grad_()
    loss = ALL[name](labels)(logits, labels, torch.arange(256))
    loss.backward()
    assert loss.isfinite()
    assert logits.grad is not None
    assert logits.grad[labels == 1].sum() < 0
