"""Lightning: the loss is a part of the module, so that its queue is in Lightning's checkpoints.

python examples/lightning_ddp.py
"""

from __future__ import annotations

import logging
import warnings

import lightning
import torch
from _shared import LEARNING_RATE, ROWS_A_RANK, STEPS, OneProcess, load_rows, make_loss, make_model
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset


class Classifier(lightning.LightningModule):
    def __init__(self, data: TensorDataset) -> None:
        super().__init__()
        self.model, self.loss_fn = make_model(), make_loss()
        self._compared = [OneProcess("lightning", self.model, data)]  # no submodule

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        features, labels, self._rows = batch
        self._loss: Tensor = self.loss_fn(self.model(features), labels)  # of all rows
        self.log("loss", self._loss)  # the same on every process: sync_dist is not needed
        return self._loss

    def on_before_optimizer_step(self, _: torch.optim.Optimizer) -> None:
        gradients = (p.grad for p in self.model.parameters())
        self._compared[0].compare(self._loss, gradients, self._rows)

    def on_train_end(self) -> None:
        self._compared[0].report()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), LEARNING_RATE)


def main() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    data = load_rows()
    # Lightning gives every process a sampler of its own; drop_last keeps the steps even.
    loader = DataLoader(data, batch_size=ROWS_A_RANK, shuffle=True, drop_last=True)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=lightning.pytorch.strategies.DDPStrategy(process_group_backend="gloo"),
        precision="64-true",
        max_steps=STEPS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(data), loader)


if __name__ == "__main__":
    main()
