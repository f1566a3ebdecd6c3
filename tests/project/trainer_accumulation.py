"""One step of both Trainers of examples/huggingface_trainer.py, beside the same step by hand."""

import sys
from pathlib import Path

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
from _data import Part
from huggingface_trainer import RankingTrainer, Titles, as_function, make_model

from imbalanced_losses import CrossEntropy

ROWS, MICRO_BATCH, RATE = 20, 8, 0.1  # 8 + 8 + 4 rows


def without_dropout() -> nn.Module:
    model = make_model()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(1, 5000, (ROWS, 12), generator=generator)
    part = Part(words, torch.randint(0, 2, (ROWS, 7), generator=generator))
    rows = Titles(part)

    expected = without_dropout()
    loss_fn = CrossEntropy(1)
    loss_fn(expected(words, attention_mask=words != 0).logits, rows.labels).backward()
    torch.optim.SGD(expected.parameters(), RATE).step()

    arguments = TrainingArguments(
        sys.argv[1],
        num_train_epochs=1,
        per_device_train_batch_size=MICRO_BATCH,
        gradient_accumulation_steps=3,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    for trainer in (
        RankingTrainer(without_dropout(), arguments, train_dataset=rows, loss_fn=loss_fn),
        Trainer(
            without_dropout(),
            arguments,
            train_dataset=rows,
            compute_loss_func=as_function(loss_fn),
        ),
    ):
        trainer.train()
        for found, wanted in zip(trainer.model.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(found, wanted)


if __name__ == "__main__":
    main()
