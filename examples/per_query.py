"""Ranking per query: which of its candidates are homologous to each protein?

KDD Cup 2004: 145,751 candidates of 153 query proteins, 0.9 % homologous. What counts is the
ranking of each query's own candidates, so a row is ranked only within its query (`group=`). The
test queries are new to the network. Downloads 16 MB once.

python examples/per_query.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from _data import Ranked, protein_queries
from sklearn.metrics import average_precision_score
from torch import Tensor, nn

from imbalanced_losses import CrossEntropy, GroupBatchSampler, SmoothAPLoss

STEPS, QUERIES_A_BATCH, EVALUATE_EVERY = 300, 4, 50


def train(
    loss_fn: Callable[[Tensor, Ranked], Tensor], training: Ranked, validation: Ranked
) -> nn.Module:
    """The model with the best mean AP per query on validation queries."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(training.features.shape[1], 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(),
        nn.Linear(32, 1),
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=STEPS)
    best_ap, best = -1.0, model.state_dict()
    for step, rows in zip(range(1, STEPS + 1), batches(training), strict=False):
        batch = training.select(rows)
        loss = loss_fn(model(batch.features), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % EVALUATE_EVERY == 0:
            ap = ap_per_query(model, validation).mean().item()
            if ap > best_ap:
                best_ap, best = ap, {name: w.clone() for name, w in model.state_dict().items()}
    model.load_state_dict(best)
    return model


def batches(training: Ranked) -> Iterator[Tensor]:
    """Whole queries, some 3,800 rows at once, without end."""
    sampler = GroupBatchSampler(training.group, QUERIES_A_BATCH)
    for epoch in range(STEPS):
        sampler.set_epoch(epoch)
        yield from map(torch.tensor, sampler)


@torch.no_grad()
def ap_per_query(model: nn.Module, part: Ranked) -> Tensor:
    """[G], AP of each query's candidates."""
    scores = model.eval()(part.features).squeeze(1)
    of_query = [part.group == query for query in part.group.unique()]
    aps = [average_precision_score(part.labels[rows], scores[rows]) for rows in of_query]
    model.train()
    return torch.tensor(aps)


def main() -> None:
    training, validation, test = protein_queries()
    positives = int(training.labels.sum())
    weight = ((len(training.labels) - positives) / positives) ** 0.5
    ranking = SmoothAPLoss(1, queue_size=0, temperature=0.1, temperature_unit="spread")
    bce, weighted_bce = CrossEntropy(1), CrossEntropy(1, class_weight=torch.tensor([weight]))
    losses: dict[str, Callable[[Tensor, Ranked], Tensor]] = {
        "SmoothAP within queries": lambda x, rows: ranking(x, rows.labels, group=rows.group),
        "SmoothAP over all rows": lambda x, rows: ranking(x, rows.labels),
        "sqrt-weighted BCE": lambda x, rows: weighted_bce(x, rows.labels),
        "BCE": lambda x, rows: bce(x, rows.labels),
    }
    found = {}
    for name, loss_fn in losses.items():
        aps = ap_per_query(train(loss_fn, training, validation), test)
        found[name] = aps.mean().item()
        print(f"per_query: {name}: mean test AP {found[name]:.3f} over {len(aps)} queries")
    assert found["SmoothAP within queries"] > found["sqrt-weighted BCE"]


if __name__ == "__main__":
    main()
