"""torchmetrics: AP of binary, multi-class and multi-label scores, and what it does to raw logits.

python examples/torchmetrics_eval.py
"""

from __future__ import annotations

import torch
from _data import Part, long_tailed_digits, rare_eights
from sklearn.metrics import average_precision_score
from torch import Tensor, nn
from torchmetrics.classification import (
    BinaryAveragePrecision,
    MulticlassAveragePrecision,
    MultilabelAveragePrecision,
)

from imbalanced_losses import CrossEntropy, SmoothAPLoss


def in_unit_interval(scores: Tensor) -> Tensor:
    """[...] float64 in 0..1, in the same order, without ties that were not there.

    torchmetrics takes a batch with any value outside 0..1 for logits, and applies a sigmoid (or a
    softmax over classes). In float32 the sigmoid of 17 and above is 1, and of some batches alone
    it mixes two scales. Scores in 0..1 it leaves as they are.
    """
    scores = scores.double()
    return 0.5 + 0.5 * scores / (1 + scores.abs())


def scores_of_trained(loss_fn: nn.Module, training: Part, test: Part, num_outputs: int) -> Tensor:
    """The test rows' logits [n, num_outputs] of a network trained with a loss."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, num_outputs))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        loss_fn(model(training.inputs), training.labels).backward()
        optimizer.step()
    with torch.no_grad():
        return model.eval()(test.inputs)


def binary() -> None:
    training, _, test = rare_eights()
    ranking = SmoothAPLoss(1, queue_size=0, temperature=0.1, temperature_unit="spread")
    for name, loss_fn in {"SmoothAP": ranking, "BCE": CrossEntropy(1)}.items():
        logits = scores_of_trained(loss_fn, training, test, num_outputs=1).squeeze(1)
        metric = BinaryAveragePrecision()  # thresholds=None: exact; a number of them: binned
        for rows in torch.arange(len(logits)).split(100):
            metric.update(in_unit_interval(logits[rows]), test.labels[rows])
        ap = metric.compute().item()
        print(f"torchmetrics_eval: {name}: test AP {ap:.3f}")
        assert ap > 0.7  # 3 % are positive
        assert abs(ap - average_precision_score(test.labels, logits)) < 1e-6

        # A ranking loss leaves the scale and the offset of the logits free. AP does not ask for
        # them, but what torchmetrics does to raw logits depends on them.
        moved = 10 * logits + 40
        exact = BinaryAveragePrecision()(in_unit_interval(moved), test.labels).item()
        raw = BinaryAveragePrecision()(moved, test.labels).item()
        print(f"torchmetrics_eval: {name}: of 10 · logits + 40: {exact:.3f}, passed raw {raw:.3f}")
        assert abs(exact - ap) < 1e-6
        assert raw < ap - 0.1


def one_vs_rest() -> None:
    training, _, test = long_tailed_digits()
    ranking = SmoothAPLoss(10, queue_size=0, temperature=0.1, temperature_unit="spread")
    one = scores_of_trained(ranking, training, test, num_outputs=10)
    other = scores_of_trained(CrossEntropy(10), training, test, num_outputs=10)
    # Trained on raw logits, each class has a scale of its own: a label of its own here too.
    labels = nn.functional.one_hot(test.labels, 10)
    of_labels = MultilabelAveragePrecision(10)(in_unit_interval(one), labels).item()
    softmaxed = MulticlassAveragePrecision(10)(one, test.labels).item()
    print(
        f"torchmetrics_eval: SmoothAP: macro test AP {of_labels:.3f}; "
        f"as multi-class, with a softmax that it never saw, {softmaxed:.3f}"
    )
    # Cross-entropy trained a softmax: it has to be ranked by it.
    softmaxed = MulticlassAveragePrecision(10)(other.double().softmax(1), test.labels).item()
    of_labels = MultilabelAveragePrecision(10)(in_unit_interval(other), labels).item()
    print(
        f"torchmetrics_eval: CE: macro test AP {softmaxed:.3f}; "
        f"by raw logits, without its softmax, {of_labels:.3f}"
    )
    assert of_labels < softmaxed


if __name__ == "__main__":
    binary()
    one_vs_rest()
