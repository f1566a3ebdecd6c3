"""The network that every loss trains, in the demo and in the benchmarks."""

from __future__ import annotations

import torch
from torch import nn


def make_model(num_features: int, seed: int) -> nn.Sequential:
    """MLP F-64-32-1 whose initial weights depend on the seed alone."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(num_features, 64),
        nn.ReLU(),
        nn.Linear(64, 32),
        nn.ReLU(),
        nn.Linear(32, 1),
        nn.Flatten(0),  # [n, 1] -> [n]
    )
