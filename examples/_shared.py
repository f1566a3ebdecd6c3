"""What the examples with several processes share: data, a network, training in one process."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from imbalanced_losses import SmoothAPLoss

STEPS, ROWS_A_RANK, LEARNING_RATE = 5, 128, 0.1
TOLERANCE = 1e-12  # of float64 gradients


def load_rows() -> TensorDataset:
    """Is a digit an eight? Pixels [1797, 64] float64, labels [1797], 10 % positive, row numbers."""
    pixels, digits = load_digits(return_X_y=True)
    labels = torch.from_numpy(digits == 8).long()
    return TensorDataset(torch.from_numpy(pixels) / 16, labels, torch.arange(len(labels)))


def make_model() -> nn.Sequential:
    """The same on every process."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 1)).double()


def make_loss(**options: Any) -> SmoothAPLoss:
    """Nothing in it is about processes: it finds them by itself while training."""
    return SmoothAPLoss(1, queue_size=512, temperature=0.1, temperature_unit="spread", **options)


class OneProcess:
    """The same training with the rows of all processes in one, to compare with.

    Real training has no use for it.
    """

    def __init__(self, name: str, model: nn.Module, data: TensorDataset):
        self.name, self.data = name, data
        self.model, self.loss_fn = copy.deepcopy(model), make_loss(gather_distributed=False)
        self.optimizer = torch.optim.SGD(self.model.parameters(), LEARNING_RATE)
        self.losses: list[float] = []
        self.largest = 0.0

    def compare(self, loss: Tensor, gradients: Iterable[Any], rows: Tensor) -> None:
        """Make this step as well, and assert that loss and gradient are the same.

        Args:
            loss: of this process.
            gradients: of the parameters in order, after the trainer has averaged them.
            rows: the rows that this process had.
        """
        of_all: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(of_all, rows.tolist())
        features, labels, _ = self.data[[row for of_rank in of_all for row in of_rank]]
        self.optimizer.zero_grad()
        alone = self.loss_fn(self.model(features), labels)
        alone.backward()
        expected = torch.cat([p.grad.flatten() for p in self.model.parameters()])
        found = torch.cat([gradient.detach().flatten() for gradient in gradients])
        difference = float((found - expected).abs().max() / expected.abs().max())
        assert difference <= TOLERANCE, f"the gradient differs by {difference:.1e}"
        assert abs(loss.item() - alone.item()) <= TOLERANCE, (loss, alone)
        self.largest = max(self.largest, difference)
        self.losses.append(alone.item())
        self.optimizer.step()

    def report(self) -> None:
        assert len(self.losses) == STEPS, f"{len(self.losses)} steps"
        if dist.get_rank() == 0:
            print(
                f"{self.name}: {STEPS} steps on {dist.get_world_size()} processes, loss "
                f"{self.losses[0]:.3f} -> {self.losses[-1]:.3f}; the gradient is that of one "
                f"process, largest relative difference {self.largest:.0e}",
                flush=True,
            )
