"""Alerts a day: which flights of a day will be cancelled, if one can look at 20?

Flights from New York in 2013: 336,776 of them on 365 days, 2.5 % cancelled. What counts is how many
of a day's cancelled flights are among the 20 highest scores of that day, so `k=20` and rows are
ranked only within their day (`group=`). The scorer is linear: one weight for each airline, airport,
weekday, hour and number of the weather. Downloads 9 MB once (CC0).

python examples/alerts_per_day.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from _data import Ranked, flights
from torch import Tensor, nn

from imbalanced_losses import CrossEntropy, GroupBatchSampler, RecallAtKLoss, SmoothAPLoss

STEPS, DAYS_A_BATCH, EVALUATE_EVERY = 200, 3, 25
ALERTS = 20


def scorecard(num_features: int) -> nn.Module:
    return nn.Linear(num_features, 1)


def network(num_features: int) -> nn.Module:
    return nn.Sequential(nn.Linear(num_features, 64), nn.ReLU(), nn.Linear(64, 1))


def train(
    make_model: Callable[[int], nn.Module],
    loss_fn: Callable[[Tensor, Ranked], Tensor],
    training: Ranked,
    validation: Ranked,
) -> nn.Module:
    """The model that finds most on validation days."""
    torch.manual_seed(0)
    model = make_model(training.features.shape[1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=STEPS)
    most, best = -1.0, model.state_dict()
    for step, rows in zip(range(1, STEPS + 1), batches(training), strict=False):
        batch = training.select(rows)
        loss = loss_fn(model(batch.features), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % EVALUATE_EVERY == 0:
            recall, _ = found(model, validation)
            if recall > most:
                most, best = recall, {name: w.clone() for name, w in model.state_dict().items()}
    model.load_state_dict(best)
    return model


def batches(training: Ranked) -> Iterator[Tensor]:
    """Whole days, some 2,800 rows at once, without end."""
    sampler = GroupBatchSampler(training.group, DAYS_A_BATCH)
    for epoch in range(STEPS):
        sampler.set_epoch(epoch)
        yield from map(torch.tensor, sampler)


@torch.no_grad()
def found(model: nn.Module, part: Ranked) -> tuple[float, float]:
    """Recall in a day's 20 highest scores, the mean over days, and the flights found a day."""
    scores = model.eval()(part.features).squeeze(1)
    model.train()
    recalls, hits = [], []
    for day in part.group.unique():
        rows = part.group == day
        cancelled, alerts = part.labels[rows], scores[rows].topk(ALERTS).indices
        hits.append(cancelled[alerts].sum())
        if cancelled.any():
            recalls.append(hits[-1] / cancelled.sum())
    return torch.stack(recalls).mean().item(), torch.stack(hits).double().mean().item()


def main() -> None:
    training, validation, test = flights()
    options = {"queue_size": 0, "temperature": 0.1, "temperature_unit": "spread"}
    # A wide step: cancelled flights far below the 20 highest have a gradient too.
    at_k = RecallAtKLoss(1, k=ALERTS, softness=1.0, **options)
    ap, bce = SmoothAPLoss(1, **options), CrossEntropy(1)

    def within_days(logits: Tensor, rows: Ranked) -> Tensor:
        return at_k(logits, rows.labels, group=rows.group)

    def cross_entropy(logits: Tensor, rows: Ranked) -> Tensor:
        return bce(logits, rows.labels)

    runs = {
        "recall at 20 within days": (scorecard, within_days),
        "SmoothAP within days": (
            scorecard,
            lambda x, rows: ap(x, rows.labels, group=rows.group),
        ),
        "BCE": (scorecard, cross_entropy),
        "a network, recall at 20 within days": (network, within_days),
        "a network, BCE": (network, cross_entropy),
    }
    recalls = {}
    for name, (make_model, loss_fn) in runs.items():
        recalls[name], hits = found(train(make_model, loss_fn, training, validation), test)
        print(
            f"alerts_per_day: {name}: test recall at {ALERTS} a day {recalls[name]:.3f}, "
            f"{hits:.2f} flights found a day"
        )
    assert recalls["recall at 20 within days"] > recalls["BCE"]


if __name__ == "__main__":
    main()
