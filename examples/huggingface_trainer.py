"""Hugging Face Trainer: `compute_loss`, gradient accumulation, AP as metric, the loss's state.

At the end the same without a subclass, by `compute_loss_func`.

A transformer of 0.2 million weights, built here, learns to tell animated films (6 %) by the title.
Nothing is fetched from a hub. The titles are those of multilabel.py.

python examples/huggingface_trainer.py
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _data import GENRES, Part, film_titles
from sklearn.metrics import average_precision_score
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    EvalPrediction,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from imbalanced_losses import CrossEntropy, MixedLoss, SmoothAPLoss

EPOCHS = 3


class RankingTrainer(Trainer):
    """A Trainer with a loss that has a state of its own.

    The loss is beside the model here, so that its state goes into a file of its own.
    """

    def __init__(self, *args: Any, loss_fn: nn.Module, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.loss_fn = loss_fn.to(self.args.device)
        self.add_callback(SaveLoss(loss_fn))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        self.loss_fn.train(model.training)  # nothing else does it; evaluation must not fill a queue
        loss = self.loss_fn(outputs.logits, labels)
        if num_items_in_batch is not None:
            # Then Trainer adds micro-batches up and expects shares of the whole batch, where
            # without it divides by their number.
            loss = loss * len(labels) / num_items_in_batch
        return (loss, outputs) if return_outputs else loss


def as_function(loss_fn: nn.Module) -> Callable[..., Tensor]:
    """The same loss for `Trainer(compute_loss_func=…)`, where no subclass is needed."""

    def compute_loss(
        outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        # The model isn't here to ask, and no callback comes before the first validation batch; but
        # Trainer evaluates without gradient.
        loss_fn.train(torch.is_grad_enabled())
        loss: Tensor = loss_fn(outputs.logits, labels)
        if num_items_in_batch is not None:
            loss = loss * len(labels) / num_items_in_batch
        return loss

    return compute_loss


class SaveLoss(TrainerCallback):
    """Queue and schedule into each checkpoint's folder."""

    def __init__(self, loss_fn: nn.Module) -> None:
        self.loss_fn = loss_fn

    def on_save(self, args: TrainingArguments, state: Any, *_: Any, **__: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        torch.save(self.loss_fn.state_dict(), folder / "loss.pt")


class Titles(Dataset[dict[str, Tensor]]):
    """Is it animated?"""

    def __init__(self, part: Part) -> None:
        self.words = part.inputs
        self.labels = part.labels[:, GENRES.index("Animation")]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        words = self.words[row]
        return {"input_ids": words, "attention_mask": words != 0, "labels": self.labels[row]}


def average_precision(prediction: EvalPrediction) -> dict[str, float]:
    logits, labels = prediction.predictions, prediction.label_ids  # logits: no sigmoid is needed
    return {"ap": float(average_precision_score(labels, logits[:, 0]))}


def make_model() -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=5000,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=12,
        num_labels=1,
    )
    return BertForSequenceClassification(config)


def make_trainer(
    loss_fn: nn.Module, parts: tuple[Part, ...], folder: str, *, is_function: bool = False
) -> Trainer:
    arguments = TrainingArguments(
        folder,
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=64,  # as large as fits: each is a ranking of its own
        gradient_accumulation_steps=2,
        average_tokens_across_devices=False,  # compute_loss divides by the rows of its own process
        per_device_eval_batch_size=1000,
        learning_rate=5e-3,
        weight_decay=0.01,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="ap",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
    )
    others: dict[str, Any] = {
        "train_dataset": Titles(parts[0]),
        "eval_dataset": Titles(parts[1]),
        "compute_metrics": average_precision,
    }
    if is_function:
        trainer = Trainer(make_model(), arguments, compute_loss_func=as_function(loss_fn), **others)
    else:
        trainer = RankingTrainer(make_model(), arguments, loss_fn=loss_fn, **others)
    trainer.remove_callback(PrinterCallback)
    return trainer


def make_loss() -> MixedLoss:
    ranking = SmoothAPLoss(1, queue_size=512, temperature=0.1, temperature_unit="spread")
    # A step of the schedule is an optimizer step: two micro-batches.
    return MixedLoss(CrossEntropy(1), ranking, main_weight=0.9, warmup_steps=4, calls_per_step=2)


def assert_same_state(loss_fn: nn.Module, state: dict[str, Any]) -> None:
    for key, value in loss_fn.state_dict().items():
        assert torch.equal(value, state[key]), key


def main() -> None:
    parts = film_titles()
    test = Titles(parts[2])
    for name, loss_fn in {"SmoothAP + BCE": make_loss(), "BCE": CrossEntropy(1)}.items():
        with tempfile.TemporaryDirectory() as folder:
            trainer = make_trainer(loss_fn, parts, folder)
            trainer.train()
            ap = trainer.evaluate(test)["eval_ap"]
            print(f"huggingface_trainer: {name}: test AP {ap:.3f}")
            assert ap > 0.12  # a random order has 0.06

            if isinstance(loss_fn, MixedLoss):
                after_two = Path(folder) / f"checkpoint-{trainer.state.max_steps // EPOCHS * 2}"
                resumed = make_trainer(fresh := make_loss(), parts, folder)
                fresh.load_state_dict(torch.load(after_two / "loss.pt"))
                resumed.train(resume_from_checkpoint=str(after_two))
                assert_same_state(loss_fn, fresh.state_dict())
                by_subclass = loss_fn
    print("huggingface_trainer: resumed before the last epoch, the loss ends in the same state")

    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(loss_fn := make_loss(), parts, folder, is_function=True)
        trainer.train()
        assert_same_state(loss_fn, by_subclass.state_dict())
        before = copy.deepcopy(loss_fn.state_dict())
        trainer.evaluate(test)
        assert_same_state(loss_fn, before)
    print("huggingface_trainer: by function the same, and evaluation leaves the queue as it was")


if __name__ == "__main__":
    main()
