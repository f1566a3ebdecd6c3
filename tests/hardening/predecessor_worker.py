"""Run recorded cases through one implementation of SmoothAPLoss.

The predecessor has the import name of this library, so it can only be loaded in a process of its
own: `python predecessor_worker.py FOLDER CASES RESULTS`, with FOLDER the place it was installed to.
The test imports `run_case` from here as well, so that both sides are driven by the same lines.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Case = dict[str, Any]
Outcome = dict[str, Any]


def run_case(loss_class: type[nn.Module], case: Case) -> list[Outcome]:
    """Build the loss of a case and feed it the batches one after the other.

    Args:
        loss_class: SmoothAPLoss, of either library.
        case: "arguments" of the constructor and "steps", each with "logits", "targets",
            "training" and, where used, "sample_weight". The predecessor takes the loss that
            "loss" names.

    Returns:
        One outcome a step: "loss", "gradient" of the sum of its valid entries, "per_class",
        "valid", "warnings", "state_dict" afterwards; or "error", the type of what was raised.
    """
    torch.manual_seed(0)  # the predecessor draws from the global generator
    loss_fn = loss_class(**case["arguments"])
    return [run_step(loss_fn, step) for step in case["steps"]]


def run_step(loss_fn: nn.Module, step: Case) -> Outcome:
    """One forward and backward pass."""
    loss_fn.train(step["training"])
    logits = step["logits"].clone().requires_grad_()
    weight = step.get("sample_weight")
    keywords = {} if weight is None else {"sample_weight": weight}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            out = loss_fn(logits, step["targets"], return_per_class=True, **keywords)
        except (ValueError, TypeError, RuntimeError) as error:
            return {"error": type(error).__name__}
    loss, per_class, valid = out
    return {
        "loss": loss.detach(),
        "gradient": _gradient(loss, logits),
        "per_class": per_class.detach(),
        "valid": valid,
        "warnings": [str(warning.message) for warning in caught],
        "state_dict": {name: value.clone() for name, value in loss_fn.state_dict().items()},
    }


def _gradient(loss: Tensor, logits: Tensor) -> Tensor:
    if not loss.requires_grad:  # the predecessor's `none` where no class is valid
        return torch.zeros_like(logits)
    torch.where(loss.isnan() & (loss.dim() == 1), 0.0, loss).sum().backward()
    assert logits.grad is not None
    return logits.grad


def main(folder: str, cases_file: str, results_file: str) -> None:
    """Run every case of a file with the library in a folder."""
    sys.path.insert(0, folder)
    import imbalanced_losses

    loaded_from = Path(imbalanced_losses.__file__).resolve()
    if not loaded_from.is_relative_to(Path(folder).resolve()):
        raise SystemExit("the library was not loaded from the folder given: nothing compared")
    torch.set_num_threads(1)
    cases = torch.load(cases_file, weights_only=True)
    results = [
        run_case(getattr(imbalanced_losses, case.get("loss", "SmoothAPLoss")), case)
        for case in cases
    ]
    torch.save(results, results_file)


if __name__ == "__main__":
    main(*sys.argv[1:])
