"""Macro AP of cross-entropy with and without Smooth-AP on a task of 18 uneven classes.

    python -m benchmarks.multiclass [--splits 5] [--workers 2] [--report]

The moves to mate in the chess endgame of `benchmarks.tasks`, 4,553 to 27 rows a class; network,
budget and tuning are those of `benchmarks.quality`, by the macro AP of the validation rows. Every
model is ranked by log-softmax: by its raw logits, cross-entropy is not meant to rank rows.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from benchmarks import _measure, quality, tasks
from benchmarks._measure import Row
from benchmarks.quality import Job
from benchmarks.recipes import Loss, Make

TASK = "chess, 18 classes"
CE, SQRT_CE = "CE", "sqrt-weighted CE"


def _cross_entropy(power: float) -> Make:
    """Class c weighted by (N / N_c) ** power."""

    def make(labels: Tensor) -> Loss:
        weight = (len(labels) / labels.bincount()) ** power
        entropy = nn.CrossEntropyLoss(weight)
        return lambda logits, y, _: entropy(logits, y)

    return make


def _mixed(auxiliary: str | None) -> Make:
    """The recipe of `benchmarks.quality`, one-vs-rest on log-softmax; None: Smooth-AP alone."""

    def make(labels: Tensor) -> Loss:
        from imbalanced_losses import MixedLoss, SmoothAPLoss

        num_classes = int(labels.max()) + 1
        tau = 0.1 if auxiliary is None else 0.3
        ranking: Any = SmoothAPLoss(
            num_classes, queue_size=0, temperature=tau, temperature_unit="spread"
        )
        if auxiliary is not None:
            entropy = LOSSES[auxiliary](labels)
            ranking = MixedLoss(lambda x, y: entropy(x, y, y), ranking, main_weight=0.8)
        return lambda logits, y, _: ranking(logits.log_softmax(1), y)

    return make


LOSSES: dict[str, Make] = {
    CE: _cross_entropy(0.0),
    SQRT_CE: _cross_entropy(0.5),
    f"SmoothAP + {CE}": _mixed(CE),
    f"SmoothAP + {SQRT_CE}": _mixed(SQRT_CE),
    "SmoothAP": _mixed(None),
}


def macro_ap(logits: Tensor, labels: Tensor) -> float:
    """Mean over classes of the exact AP of logits [n, C], ranked by log-softmax."""
    from sklearn.metrics import average_precision_score

    is_class = one_hot(labels, logits.shape[1])
    return float(average_precision_score(is_class, logits.double().log_softmax(1)))


@functools.cache
def _task(split: int) -> Any:
    from demo import train

    table = tasks.chess_depths()
    return train.make_task(table, table.split(split))


def run(job: Job) -> Row:
    """Train one network and score the test rows once."""
    from demo import train

    torch.set_num_threads(1)
    task = _task(job.split)
    binary = train.make_model(task.train.features.shape[1], job.split)
    num_classes = int(task.train.labels.max()) + 1
    model = nn.Sequential(*binary[:-2], nn.Linear(binary[-2].in_features, num_classes))
    return quality.trained(job, LOSSES[job.loss], model, task, macro_ap)


def main() -> None:
    """Train what is left, then report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--splits", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--report", action="store_true", help="print what there is")
    options = parser.parse_args()
    path = _measure.RESULTS / "multiclass.csv"
    grid = itertools.product(
        [TASK], range(options.splits), LOSSES, quality.LEARNING_RATES, quality.WEIGHT_DECAYS
    )
    if not options.report:
        tasks.chess_depths()  # once, before the workers ask for it
        quality.run_all([Job(*cell) for cell in grid], path, options.workers, run)
    rows = quality.finished(path)
    rival = quality.rival_of(quality.tuned(rows), TASK, (CE, SQRT_CE))
    quality.report(rows, rival)


if __name__ == "__main__":
    main()
