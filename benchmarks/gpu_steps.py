"""What a training step on a CUDA device consists of: launches, and where its time goes.

    python -m benchmarks.gpu_steps [--into FOLDER]

One forward and backward pass of each configuration, float32, τ = 0.01, 10 % positive for one class.
Counted by the profiler: kernels, copies and fills, and the time that the device spends in them.
Beside it the time of a pass called one by one (wall, the median of some), and as a CUDA graph, of
which it is first shown that a replay gives what the calls give. The last column is the wall time of
`BCEWithLogitsLoss` on the same rows of the same device.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import _contenders
from benchmarks._contenders import Case
from benchmarks._gpu_worker import CudaDevice, what_went_wrong
from benchmarks.gpu import is_there

WARM_UPS, ROUNDS, CALLS = 3, 9, 10
COLUMNS = (
    *("step", "rows", "classes", "queue", "backend", "checked", "with", "launches", "wall_ms"),
    *("device_ms", "graph_ms", "bce_ms", "note"),
)


class Configuration(NamedTuple):
    """A step of ours; rows of the batch, beside those in the queue."""

    step: str  # "loss" or "functional", or the name of a loss
    rows: int
    classes: int = 1
    queue: int = 0
    backend: str = "auto"
    checked: bool = False
    with_: str = ""  # "groups", "value", "spread" or "prior"


FAMILY: dict[str, dict[str, Any]] = {
    "SmoothAPLoss": {},
    "RecallAtKLoss": {"k": 0.01},
    "RecallAtFPRLoss": {"max_fpr": 0.01},
    "PartialAUCLoss": {"max_fpr": 0.05},
    "NDCGLoss": {},
}


def configurations() -> Iterator[Configuration]:
    """Those that goals are about first."""
    for checked in (False, True):
        yield Configuration("SmoothAPLoss", 1024, checked=checked)
        for classes in (1, 10, 100):
            yield Configuration("SmoothAPLoss", 3072, classes, 1024, checked=checked)
    yield Configuration("functional", 4096)
    yield Configuration("functional", 1 << 20)
    for with_ in ("groups", "value", "spread", "prior"):
        yield Configuration("SmoothAPLoss", 4096, with_=with_)
    for kind in FAMILY:
        yield Configuration(kind, 4096)
        yield Configuration(kind, 1 << 20)
    for backend in ("dense", "panel"):
        for power in (12, 14, 15, 16, 17):
            yield Configuration("functional", 1 << power, backend=backend)
        for power in (12, 14, 15):
            yield Configuration("functional", 1 << power, 10, backend=backend)
        yield Configuration("SmoothAPLoss", 3072, 100, 1024, backend)


def step_of(configuration: Configuration) -> tuple[Callable[[], Tensor], Tensor]:
    """A pass that returns its loss, and the leaf that it gives a gradient."""
    import imbalanced_losses
    from imbalanced_losses.functional import smooth_ap

    kind, rows, classes, queue, backend, checked, with_ = configuration
    case = Case(rows, num_classes=classes, queue_size=queue, device="cuda")
    logits, targets = _contenders.rows(case)
    if kind == "functional":
        leaf = logits.T.contiguous().requires_grad_()
        is_positive = targets == torch.arange(classes, device="cuda")[:, None]
        if classes == 1:
            is_positive = (targets == 1)[None]

        def loss() -> Tensor:
            return 1 - smooth_ap(leaf, is_positive, 0.01, backend=backend).ap.mean()  # type: ignore[arg-type]
    else:
        own = FAMILY[kind] | ({"temperature_unit": "spread"} if with_ == "spread" else {})
        own |= {"target_prior": 0.01} if with_ == "prior" else {}
        loss_fn = getattr(imbalanced_losses, kind)(
            num_classes=classes, queue_size=queue, temperature=0.01, **own
        ).cuda()
        fields: dict[str, Tensor] = {}
        if with_ == "groups":
            fields["group"] = torch.arange(rows, device="cuda") % 100
        elif with_ == "value":
            fields["value"] = torch.rand(rows, device="cuda")
        loss_fn.check_values, loss_fn.backend = checked, backend
        if queue:
            with torch.no_grad():
                loss_fn(*_contenders.rows(case, queue))
        leaf = logits.requires_grad_()

        def loss() -> Tensor:
            found: Tensor = loss_fn(leaf, targets, **fields)
            return found

    return _pass(loss, leaf), leaf


def _pass(loss: Callable[[], Tensor], leaf: Tensor) -> Callable[[], Tensor]:
    def step() -> Tensor:
        leaf.grad = None
        found = loss()
        found.backward()
        return found.detach()

    return step


def cross_entropy_step(configuration: Configuration) -> Callable[[], Tensor]:
    """`BCEWithLogitsLoss` of as many rows and classes."""
    logits = torch.randn(configuration.rows, configuration.classes, device="cuda")
    labels = (logits > 1).float()
    leaf, loss_fn = logits.requires_grad_(), torch.nn.BCEWithLogitsLoss()
    return _pass(lambda: loss_fn(leaf, labels), leaf)


def wall_ms(step: Callable[[], object]) -> float:
    """Of one call, the device waited for after some: the median of rounds."""
    found = []
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            step()
        torch.cuda.synchronize()
        found.append((time.perf_counter() - start) / CALLS * 1e3)
    return statistics.median(found)


def profiled(step: Callable[[], object]) -> tuple[int, float, list[tuple[str, float]]]:
    """Launches of one call, the time they take, and each of them."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        step()
        torch.cuda.synchronize()
    events = [
        (event.name, event.time_range.elapsed_us() / 1e3)
        for event in found.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
        and not getattr(event, "is_user_annotation", False)
    ]
    return len(events), sum(ms for _, ms in events), events


def captured(step: Callable[[], Tensor], leaf: Tensor) -> Callable[[], object]:
    """The step as a CUDA graph, replayed and found equal."""
    device = CudaDevice()
    found: list[Tensor] = []
    replay = device.captured(lambda: found.append(step()))
    replay()
    loss, gradient = found[-1], leaf.grad
    assert gradient is not None
    loss, gradient = loss.clone(), gradient.clone()
    torch.testing.assert_close(loss, step())
    assert leaf.grad is not None
    torch.testing.assert_close(gradient, leaf.grad)
    return replay


def measured(configuration: Configuration) -> tuple[dict[str, Any], list[tuple[str, float]]]:
    """A row, and the launches by name."""
    row: dict[str, Any] = dict.fromkeys(COLUMNS, "") | configuration._asdict()
    row["with"] = row.pop("with_")
    step, leaf = step_of(configuration)
    for _ in range(WARM_UPS):
        step()
    row["wall_ms"] = wall_ms(step)
    profiled(step)  # the first is not like others
    row["launches"], row["device_ms"], events = profiled(step)
    row["bce_ms"] = wall_ms(cross_entropy_step(configuration))
    if not configuration.checked:
        try:
            row["graph_ms"] = wall_ms(captured(step, leaf))
        except Exception as error:
            row["note"] = f"no graph: {what_went_wrong(error)}"
            torch.cuda.synchronize()
    return row, events


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--into", type=Path)
    parser.add_argument("--quick", action="store_true", help="without the sweep over sizes")
    options = parser.parse_args()
    why_not = is_there()
    if why_not:
        parser.exit(3, f"{why_not}\n")
    print(f"device: {torch.cuda.get_device_name()}, torch {torch.__version__}")
    rows, lines = [], []
    for configuration in configurations():
        if options.quick and configuration.backend != "auto":
            continue
        row, events = measured(configuration)
        rows.append(row)
        lines += ["", str(configuration), *(f"{ms:9.4f} ms  {name[:100]}" for name, ms in events)]
        text = (
            f"{value:.4f}" if isinstance(value, float) else str(value) for value in row.values()
        )
        print(" ".join(f"{value:>10}" for value in text), flush=True)
    if options.into is not None:
        with (options.into / "gpu-steps.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
        (options.into / "gpu-steps.txt").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
