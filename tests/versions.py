"""What differs between the versions of torch that the tests run on."""

from __future__ import annotations

import torch

TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])
# Beginnings, as patterns, of what torch says of its own calls of its own deprecated names.
OWN_WARNINGS = ("Please use .torch.vmap. instead", ".torch.cpu.amp.autocast") * (TORCH < (2, 5))
