"""Accelerate: `prepare` the model, the optimizer and the loader; the loss needs nothing.

torchrun --nproc-per-node 2 examples/accelerate_ddp.py
"""

from __future__ import annotations

import torch
from _shared import LEARNING_RATE, ROWS_A_RANK, STEPS, OneProcess, load_rows, make_loss, make_model
from accelerate import Accelerator
from torch.utils.data import DataLoader


def main() -> None:
    accelerator = Accelerator(cpu=True)
    data = load_rows()
    plain, loss_fn = make_model(), make_loss()
    one_process = OneProcess("accelerate", plain, data)

    model, optimizer, loader = accelerator.prepare(
        plain,
        torch.optim.SGD(plain.parameters(), LEARNING_RATE),
        # drop_last: every process has to make the same number of steps.
        DataLoader(data, batch_size=ROWS_A_RANK, shuffle=True, drop_last=True),
    )
    for _, (features, labels, rows) in zip(range(STEPS), loader, strict=False):
        optimizer.zero_grad()
        loss = loss_fn(model(features), labels)  # ranks the rows of all processes
        accelerator.backward(loss)
        one_process.compare(loss, (p.grad for p in plain.parameters()), rows)
        optimizer.step()

    one_process.report()
    accelerator.wait_for_everyone()  # one that leaves early may take the others down
    accelerator.end_training()


if __name__ == "__main__":
    main()
