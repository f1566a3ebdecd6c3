"""The numbers that people are judged by, of scores [n] and the rows that were scored.

All are exact, in 0..1, and the higher the better. Metrics are scikit-learn's where it has them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from sklearn.metrics import average_precision_score, ndcg_score, roc_auc_score, roc_curve
from torch import Tensor
from torch.nn.functional import one_hot

from benchmarks.quality.tasks import Rows

Number = Callable[[Tensor, Rows], float]


def ap(scores: Tensor, rows: Rows) -> float:
    """Average Precision."""
    return float(average_precision_score(rows.labels, scores))


def macro_ap(logits: Tensor, rows: Rows) -> float:
    """Mean over classes of the AP of logits [n, C], ranked by log-softmax.

    By its raw logits cross-entropy is not meant to rank rows.
    """
    is_class = one_hot(rows.labels, logits.shape[1])
    return float(average_precision_score(is_class, logits.double().log_softmax(1)))


def partial_auc(max_fpr: float) -> Number:
    """Area under the ROC curve up to a false positive rate, over that rate."""

    def number(scores: Tensor, rows: Rows) -> float:
        standardised = roc_auc_score(rows.labels, scores, max_fpr=max_fpr)
        smallest, largest = max_fpr**2 / 2, max_fpr  # McClish's formula, undone
        area = smallest + (2 * standardised - 1) * (largest - smallest)
        return float(area / max_fpr)

    return number


def recall_at_fpr(max_fpr: float) -> Number:
    """The share of the positives above a threshold that passes max_fpr of the negatives."""

    def number(scores: Tensor, rows: Rows) -> float:
        rates, recalls, _ = roc_curve(rows.labels, scores, drop_intermediate=False)
        return float(recalls[rates <= max_fpr].max())

    return number


def recall_at_k(share: float, *, by_value: bool = False) -> Number:
    """The share of the positives, or of what they are worth, among the highest rows."""

    def number(scores: Tensor, rows: Rows) -> float:
        found = scores.topk(round(share * len(scores))).indices
        worth = rows.labels * rows.value if by_value else rows.labels
        return float(worth[found].sum() / worth.sum())

    return number


def alerts(k: int) -> Number:
    """The share of all positives that are among the k highest rows of their group."""

    def number(scores: Tensor, rows: Rows) -> float:
        found = sum(
            labels[own.topk(min(k, len(own))).indices].sum()
            for own, labels in _of_groups(scores, rows)
        )
        return float(found / rows.labels.sum())

    return number


def mean_ap(scores: Tensor, rows: Rows) -> float:
    """Mean Average Precision over the groups with a positive and a negative.

    scikit-learn's of each group, computed for thousands of groups at once.
    """
    assert rows.group is not None
    order = np.lexsort((-scores.numpy(), rows.group.numpy()))
    own, label, group = (column.numpy()[order] for column in (scores, rows.labels, rows.group))
    row = np.arange(len(own))
    starts = np.append(True, np.diff(group) != 0)
    first = np.maximum.accumulate(np.where(starts, row, 0))  # of each row's group
    ends = np.append(starts[1:] | (np.diff(own) != 0), True)  # of equal scores
    last = np.minimum.accumulate(np.where(ends, row, len(own))[::-1])[::-1]
    found = np.append(0, label.cumsum())
    precision = (found[last + 1] - found[first]) / (last + 1 - first)
    number = starts.cumsum() - 1
    size, positives = np.bincount(number), np.bincount(number, label)
    valid = (positives > 0) & (positives < size)
    return float((np.bincount(number, precision * label)[valid] / positives[valid]).mean())


def top_1(scores: Tensor, rows: Rows) -> float:
    """The share of the groups with a positive whose highest row is one."""
    return float(
        np.mean([labels[own.argmax()] for own, labels in _of_groups(scores, rows) if labels.any()])
    )


def last_positive(scores: Tensor, rows: Rows) -> float:
    """The mean place of the lowest positive of a group: 1 is the highest row. Lower is better."""
    places = [
        (own >= own[labels == 1].min()).sum()
        for own, labels in _of_groups(scores, rows)
        if labels.any()
    ]
    return float(np.mean(places))


def ndcg_at(k: int) -> Number:
    """Mean NDCG in the first k rows over the groups whose grades differ; gain 2^grade - 1."""

    def number(scores: Tensor, rows: Rows) -> float:
        found = [
            ndcg_score([2.0 ** labels.numpy() - 1], [own.numpy()], k=k)
            for own, labels in _of_groups(scores, rows)
            if labels.min() < labels.max()
        ]
        return float(np.mean(found))

    return number


def _of_groups(scores: Tensor, rows: Rows) -> Iterator[tuple[Tensor, Tensor]]:
    """Scores and labels of each group."""
    assert rows.group is not None
    order = rows.group.argsort(stable=True)
    sizes = torch.unique_consecutive(rows.group[order], return_counts=True)[1].tolist()
    return zip(scores[order].split(sizes), rows.labels[order].split(sizes), strict=True)


NUMBERS: dict[str, Number] = {
    "AP": ap,
    "macro AP": macro_ap,
    "mean AP": mean_ap,
    "TOP1": top_1,
    "last positive": last_positive,
    "NDCG@10": ndcg_at(10),
    "20 alerts a day": alerts(20),
    "recall at 1 %": recall_at_k(0.01),
    "money at 5 %": recall_at_k(0.05, by_value=True),
    "recall at FPR 1 %": recall_at_fpr(0.01),
    "recall at FPR 0.1 %": recall_at_fpr(0.001),
    "pAUC to FPR 1 %": partial_auc(0.01),
}
# Reported with the checkpoint and the settings that another number chose.
CHOSEN_BY = {"TOP1": "mean AP", "last positive": "mean AP"}
