"""DistributedDataParallel: the loss is called as in one process.

torchrun --nproc-per-node 2 examples/ddp.py
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from _shared import LEARNING_RATE, ROWS_A_RANK, STEPS, OneProcess, load_rows, make_loss, make_model
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler


def main() -> None:
    dist.init_process_group("gloo")
    data = load_rows()
    # drop_last: every process has to make the same number of steps.
    sampler: DistributedSampler[object] = DistributedSampler(data, seed=1, drop_last=True)
    loader = DataLoader(data, batch_size=ROWS_A_RANK, sampler=sampler, drop_last=True)
    plain, loss_fn = make_model(), make_loss()
    one_process = OneProcess("ddp", plain, data)

    model = DistributedDataParallel(plain)
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)
    for _, (features, labels, rows) in zip(range(STEPS), loader, strict=False):
        optimizer.zero_grad()
        loss = loss_fn(model(features), labels)  # ranks the rows of all processes
        loss.backward()
        one_process.compare(loss, (p.grad for p in plain.parameters()), rows)
        optimizer.step()

    one_process.report()
    dist.barrier()  # one that leaves early may take the others down
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
