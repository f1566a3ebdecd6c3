"""Cross-entropies, losses of lists, the peers' and this library's, each from its training rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import CrossEntropyLoss
from torch.nn.functional import binary_cross_entropy_with_logits as bce
from torch.nn.functional import softplus

from benchmarks import _peers
from benchmarks.quality.tasks import Rows

Loss = Callable[[Tensor, Rows, Tensor], Tensor]  # logits [n] or [n, C], batch, its rows [n] -> []
Make = Callable[[Rows], Loss]  # of the training rows


class Contender(NamedTuple):
    """A loss, and the batches that it is trained on.

    `batches` are random rows, whole groups, or rows with that share of positives.
    """

    make: Make
    batches: Literal["rows", "groups"] | float = "rows"
    optimizer: Literal["AdamW", "SOAP"] = "AdamW"  # SOAP: LibAUC's for its AP loss


# --- Cross-entropies ------------------------------------------------------------------------------


def cross_entropy(power: float) -> Make:
    """Positives weigh (negatives / positives) ** power; a grade is its share of the best one."""

    def make(rows: Rows) -> Loss:
        is_positive = rows.labels > 0
        weight = ((~is_positive).sum() / is_positive.sum()) ** power
        best = float(rows.labels.max())
        return lambda logits, batch, _: bce(logits, batch.labels / best, pos_weight=weight)

    return make


def focal(rows: Rows) -> Loss:
    """Lin et al. 2017, γ = 2, without α."""

    def loss(logits: Tensor, batch: Rows, _: Tensor) -> Tensor:
        each = bce(logits, batch.labels.float(), reduction="none")
        return ((1 - torch.exp(-each)).square() * each).mean()

    return loss


def hard_negatives(rows: Rows) -> Loss:
    """BCE on all positives and the tenth of the negatives that has the highest scores."""

    def loss(logits: Tensor, batch: Rows, _: Tensor) -> Tensor:
        negatives = logits[batch.labels == 0]
        hardest = negatives.topk(max(1, len(negatives) // 10)).values
        kept = torch.cat((logits[batch.labels == 1], hardest))
        is_positive = torch.arange(len(kept)) < len(kept) - len(hardest)
        return bce(kept, is_positive.float())

    return loss


def value_weighted(rows: Rows) -> Loss:
    """BCE whose positives weigh what they are worth."""

    def loss(logits: Tensor, batch: Rows, _: Tensor) -> Tensor:
        weight = torch.where(batch.labels == 1, batch.value, 1.0)
        return bce(logits, batch.labels.float(), weight)

    return loss


def class_entropy(power: float) -> Make:
    """Softmax cross-entropy, class c weighted by (N / N_c) ** power."""

    def make(rows: Rows) -> Loss:
        entropy = CrossEntropyLoss((len(rows.labels) / rows.labels.bincount()) ** power)
        return lambda logits, batch, _: entropy(logits, batch.labels)

    return make


# --- Losses of lists ------------------------------------------------------------------------------


def _lists(logits: Tensor, batch: Rows) -> list[tuple[Tensor, Tensor]]:
    """Scores and gains 2^grade - 1 of each group whose rows lie side by side and differ."""
    sizes = torch.unique_consecutive(batch.group, return_counts=True)[1].tolist()
    gains = 2.0**batch.labels - 1
    lists = zip(logits.split(sizes), gains.split(sizes), strict=True)
    return [(own, gain) for own, gain in lists if gain.min() < gain.max()]


def list_net(rows: Rows) -> Loss:
    """Cross-entropy over the list: Cao et al. 2007, with the share of the gains as the target."""

    def loss(logits: Tensor, batch: Rows, _: Tensor) -> Tensor:
        each = [
            -(own.log_softmax(0) * gain).sum() / gain.sum() for own, gain in _lists(logits, batch)
        ]
        return sum(each, 0 * logits.sum()) / max(1, len(each))

    return loss


def pairwise(rows: Rows) -> Loss:
    """RankNet: the logistic loss of each pair of a list in which one row is better."""

    def loss(logits: Tensor, batch: Rows, _: Tensor) -> Tensor:
        each = []
        for own, gain in _lists(logits, batch):
            better = (gain > 0).nonzero().squeeze(1)
            is_pair = gain[better, None] > gain  # [Q, M]
            each.append(softplus(own - own[better, None])[is_pair].mean())
        return sum(each, 0 * logits.sum()) / max(1, len(each))

    return loss


# --- This library's -------------------------------------------------------------------------------


class Ranking(NamedTuple):
    """A ranking loss in units of the spread, without a queue, and what stands beside it.

    Of several classes it ranks log-softmax, one-vs-rest.
    """

    name: str = "SmoothAPLoss"
    own: tuple[tuple[str, Any], ...] = ()  # its own arguments
    temperature: float = 0.1
    within: bool = False  # groups
    by_value: bool = False
    weight: float = 1.0  # of it, beside the partner
    partner: Make | None = None
    at_prior: bool = False  # as common as in the training rows, where batches are balanced
    num_classes: int = 1

    def __call__(self, rows: Rows) -> Loss:
        import imbalanced_losses

        loss_fn = getattr(imbalanced_losses, self.name)(
            num_classes=self.num_classes,
            **dict(self.own),
            queue_size=0,
            temperature=self.temperature,
            temperature_unit="spread",
            target_prior=rows.labels.double().mean().item() if self.at_prior else None,
        )
        beside = None if self.partner is None else self.partner(rows)

        def loss(logits: Tensor, batch: Rows, numbers: Tensor) -> Tensor:
            group = batch.group if self.within else None
            value = batch.value if self.by_value else None
            scores = logits[:, None] if self.num_classes == 1 else logits.log_softmax(1)
            ranked: Tensor = loss_fn(scores, batch.labels, group=group, value=value)
            if beside is None:
                return ranked
            return self.weight * ranked + (1 - self.weight) * beside(logits, batch, numbers)

        return loss


def ranking(name: str = "SmoothAPLoss", temperature: float = 0.1, **own: Any) -> Ranking:
    return Ranking(name, tuple(own.items()), temperature)


# --- The peers ------------------------------------------------------------------------------------


def predecessor(name: str, **own: Any) -> Make:
    """With its own defaults: raw logits, its temperature, a queue of 1,024."""

    def make(rows: Rows) -> Loss:
        loss_fn = getattr(_peers.load("predecessor"), name)(1, **own)
        return lambda logits, batch, _: loss_fn(logits[:, None], batch.labels)

    return make


def libauc_ap(rows: Rows) -> Loss:
    loss_fn = _peers.load("libauc").APLoss(data_len=len(rows.labels))
    return lambda logits, batch, numbers: loss_fn(
        torch.sigmoid(logits)[:, None], batch.labels[:, None], numbers
    )


def libauc_partial_auc(rows: Rows) -> Loss:
    num_positives = int(rows.labels.sum())
    loss_fn = _peers.load("libauc").pAUC_CVaR_Loss(
        data_len=len(rows.labels), pos_len=num_positives, beta=0.01
    )
    return lambda logits, batch, numbers: loss_fn(
        torch.sigmoid(logits)[:, None], batch.labels[:, None], numbers
    )
