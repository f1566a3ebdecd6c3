"""Batches of whole groups under Lightning and Trainer, stopped and gone on; run by torchrun."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Any

import lightning
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, default_collate
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from imbalanced_losses import GroupBatchSampler

EPOCHS, STOP = 3, 4  # in the middle of the second epoch
RANK, WORLD_SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
ROWS = torch.arange(60)
GROUP = ROWS * 7 % 11
Batches = list[list[int]]


def expected() -> Batches:
    """The batches of this process in all epochs."""
    sampler = GroupBatchSampler(GROUP, 2, num_replicas=WORLD_SIZE, rank=RANK)
    found: Batches = []
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        found += sampler
    return found


class Seeing(nn.Module):
    """A network that notes the rows it gets."""

    def __init__(self, seen: Batches) -> None:
        super().__init__()
        self.net, self.seen = nn.Linear(1, 1), seen

    def forward(self, row: Tensor) -> dict[str, Tensor]:
        self.seen.append(row.tolist())
        return {"loss": self.net(row[:, None] / 60).square().mean()}


class Classifier(lightning.LightningModule):
    def __init__(self, seen: Batches, checkpoint: str) -> None:
        super().__init__()
        self.model, self.checkpoint = Seeing(seen), checkpoint
        self.batches = GroupBatchSampler(GROUP, 2)  # made before Lightning starts the processes

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(ROWS), batch_sampler=self.batches)

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        return self.model(batch[0])["loss"]

    def on_train_batch_end(self, *_: Any) -> None:
        if self.global_step == STOP:
            self.trainer.save_checkpoint(self.checkpoint)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        progress = self.trainer.fit_loop.epoch_loop.batch_progress
        checkpoint["batches"] = self.batches.state_dict(progress.current.ready)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.batches.load_state_dict(checkpoint["batches"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def by_lightning(folder: str, is_resumed: bool) -> Batches:
    seen: Batches = []
    checkpoint = f"{folder}/lightning.ckpt"
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=WORLD_SIZE,
        strategy=DDPStrategy(process_group_backend="gloo"),
        use_distributed_sampler=False,
        max_epochs=EPOCHS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = Classifier(seen, checkpoint)
    trainer.fit(model, ckpt_path=checkpoint if is_resumed else None, weights_only=False)
    return seen


class GroupTrainer(Trainer):
    def get_train_dataloader(self) -> DataLoader[Any]:
        self.batches = GroupBatchSampler(GROUP, 2, num_replicas=1, rank=0)
        collate = self.data_collator
        loader = DataLoader(self.train_dataset, batch_sampler=self.batches, collate_fn=collate)
        return self.accelerator.prepare(loader)  # deals out the batches over the processes


class SetEpoch(TrainerCallback):
    trainer: GroupTrainer

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.trainer.batches.set_epoch(int(state.epoch))


def by_trainer(folder: str, is_resumed: bool) -> Batches:
    seen: Batches = []
    arguments = TrainingArguments(
        folder,
        num_train_epochs=EPOCHS,
        save_strategy="steps",
        save_steps=STOP,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        ddp_backend="gloo",
        ddp_find_unused_parameters=False,
    )
    rows = [{"row": row} for row in range(60)]
    callback = SetEpoch()
    callback.trainer = GroupTrainer(
        Seeing(seen), arguments, default_collate, rows, callbacks=[callback]
    )
    checkpoint = f"{folder}/checkpoint-{STOP}" if is_resumed else None
    callback.trainer.train(resume_from_checkpoint=checkpoint)
    return seen


def main() -> None:
    warnings.filterwarnings("ignore")
    wanted = expected()
    for train in (by_lightning, by_trainer):
        assert train(sys.argv[1], False) == wanted, train
        assert train(sys.argv[1], True) == wanted[STOP:], train
    print(f"rank {RANK}: as expected")


if __name__ == "__main__":
    main()
