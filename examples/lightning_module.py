"""Lightning: the AP of each class in the log, and the queue in the checkpoint.

python examples/lightning_module.py
"""

from __future__ import annotations

import logging
import tempfile
import warnings

import lightning
import torch
from _data import Part, long_tailed_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAveragePrecision

from imbalanced_losses import CrossEntropy, MixedLoss, SmoothAPLoss

EPOCHS, BATCH_SIZE = 30, 64


class Classifier(lightning.LightningModule):
    def __init__(self, loss_fn: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        # As a submodule the loss follows device, train() and eval(), and is in every checkpoint.
        self.loss_fn = loss_fn
        self.of_class = MulticlassAveragePrecision(num_classes=10, average=None)

    def forward(self, pixels: Tensor) -> Tensor:
        # Both the loss and the metric compare a class between rows: normalised scores, always.
        return self.network(pixels).log_softmax(1)

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        return self.loss_fn(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        self.of_class.update(self(batch[0]).exp(), batch[1])  # probabilities: nothing to guess

    def on_validation_epoch_end(self) -> None:
        found = self.of_class.compute()  # of all batches; a mean of their APs is not their AP
        self.log_dict({f"ap/{digit}": ap for digit, ap in enumerate(found)})
        self.log("ap", found.nanmean(), prog_bar=True)
        self.of_class.reset()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=5e-3)


def make_loss() -> MixedLoss:
    ranking = SmoothAPLoss(10, queue_size=256, temperature=0.1, temperature_unit="spread")
    return MixedLoss(CrossEntropy(10), ranking, main_weight=0.5)


def loader(part: Part, shuffle: bool = False) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(*part), batch_size=BATCH_SIZE, shuffle=shuffle)


def fit(
    loss_fn: nn.Module, parts: tuple[Part, ...], epochs: int, checkpoint: str | None = None
) -> tuple[Classifier, lightning.Trainer]:
    model = Classifier(loss_fn)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,  # here a logger of your own
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    lightning.seed_everything(epochs, verbose=False)
    trainer.fit(model, loader(parts[0], shuffle=True), loader(parts[1]), ckpt_path=checkpoint)
    return model, trainer


def main() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    parts = long_tailed_digits()
    for name, loss_fn in {"SmoothAP + CE": make_loss(), "CE": CrossEntropy(10)}.items():
        model, trainer = fit(loss_fn, parts, EPOCHS)
        (found,) = trainer.validate(model, loader(parts[2]), verbose=False)
        rarest = ", ".join(f"{found[f'ap/{digit}']:.2f}" for digit in (7, 8, 9))
        print(f"lightning_module: {name}: test AP {found['ap']:.3f}; of the rarest three {rarest}")
        assert found["ap"] > 0.7

    with tempfile.TemporaryDirectory() as folder:
        half, trainer = fit(make_loss(), parts, EPOCHS // 2)
        trainer.save_checkpoint(f"{folder}/half.ckpt")
        going_on, _ = fit(make_loss(), parts, EPOCHS // 2, f"{folder}/half.ckpt")
    for key, value in half.loss_fn.state_dict().items():
        assert torch.equal(value, going_on.loss_fn.state_dict()[key]), key
    print("lightning_module: the queue and the schedule are in the checkpoint")


if __name__ == "__main__":
    main()
