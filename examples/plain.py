"""A plain PyTorch loop: validation, the best weights, and a run that stops and goes on.

python examples/plain.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from _data import Part, rare_eights
from sklearn.metrics import average_precision_score
from torch import Tensor, nn

from imbalanced_losses import CrossEntropy, SmoothAPLoss

BATCH_SIZE, EPOCHS = 128, 30  # some four positives a batch, so that a queue has a use


def make_loss() -> SmoothAPLoss:
    return SmoothAPLoss(1, queue_size=256, temperature=0.1, temperature_unit="spread")


def train(loss_fn: nn.Module, parts: tuple[Part, ...], file: Path, epochs: int) -> nn.Module:
    """Train up to an epoch, from the checkpoint if there is one; the best weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    shuffle = torch.Generator().manual_seed(0)
    first_epoch, best_ap, best = 0, -1.0, model.state_dict()
    if file.exists():
        saved = torch.load(file, weights_only=True)
        model.load_state_dict(saved["model"])
        loss_fn.load_state_dict(saved["loss"])  # queue, temperature, counters
        optimizer.load_state_dict(saved["optimizer"])
        shuffle.set_state(saved["shuffle"])
        first_epoch, best_ap, best = saved["epochs"], saved["best_ap"], saved["best"]

    training, validation, _ = parts
    for epoch in range(first_epoch, epochs):
        model.train()
        for rows in torch.randperm(len(training.labels), generator=shuffle).split(BATCH_SIZE):
            loss = loss_fn(model(training.inputs[rows]), training.labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        ap = average_precision(model, validation)  # exact, of all rows; not the loss of batches
        if ap > best_ap:
            best_ap, best = ap, {name: w.clone() for name, w in model.state_dict().items()}
        checkpoint = {
            "model": model.state_dict(),
            "loss": loss_fn.state_dict(),
            "optimizer": optimizer.state_dict(),
            "shuffle": shuffle.get_state(),
            "epochs": epoch + 1,
            "best_ap": best_ap,
            "best": best,
        }
        torch.save(checkpoint, file)
    model.load_state_dict(best)
    return model


@torch.no_grad()
def average_precision(model: nn.Module, part: Part) -> float:
    model.eval()
    return float(average_precision_score(part.labels, model(part.inputs)))


def weights(file: Path) -> Tensor:
    return torch.cat([w.flatten() for w in torch.load(file)["model"].values()])


def main() -> None:
    parts = rare_eights()
    with tempfile.TemporaryDirectory() as folder:
        whole, in_two = Path(folder, "whole.pt"), Path(folder, "in_two.pt")
        models = {"SmoothAP": train(make_loss(), parts, whole, EPOCHS)}
        models["BCE"] = train(CrossEntropy(1), parts, Path(folder, "bce.pt"), EPOCHS)
        train(make_loss(), parts, in_two, EPOCHS // 2)
        train(make_loss(), parts, in_two, EPOCHS)  # a new loss, as in a new process
        assert torch.equal(weights(in_two), weights(whole))
    for name, model in models.items():
        print(f"plain: {name}: test AP {average_precision(model, parts[2]):.3f}")
    assert average_precision(models["SmoothAP"], parts[2]) > 0.7  # of 1; 3 % are positive
    print("plain: stopped and gone on, the weights are those of the run that was not stopped")


if __name__ == "__main__":
    main()
