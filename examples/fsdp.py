"""FSDP2: `fully_shard` averages gradients over processes like DDP, and keeps a piece of each.

torchrun --nproc-per-node 2 examples/fsdp.py
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from _shared import LEARNING_RATE, ROWS_A_RANK, STEPS, OneProcess, load_rows, make_loss, make_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler


def main() -> None:
    dist.init_process_group("gloo")
    data = load_rows()
    # drop_last: every process has to make the same number of steps.
    sampler: DistributedSampler[object] = DistributedSampler(data, seed=1, drop_last=True)
    loader = DataLoader(data, batch_size=ROWS_A_RANK, sampler=sampler, drop_last=True)
    model, loss_fn = make_model(), make_loss()
    one_process = OneProcess("fsdp", model, data)

    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)
    for _, (features, labels, rows) in zip(range(STEPS), loader, strict=False):
        optimizer.zero_grad()
        loss = loss_fn(model(features), labels)  # ranks the rows of all processes
        loss.backward()
        whole = [p.grad.full_tensor() for p in model.parameters()]  # only to compare
        one_process.compare(loss, whole, rows)
        optimizer.step()

    one_process.report()
    dist.barrier()  # one that leaves early may take the others down
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
