"""torch.compile of the losses on whatever torch is installed: needs nothing but torch.

`python -m tests.project.compile_matrix` prints a line for each configuration, and exits with 1 if
any fails; `python -m tests.project.compile_matrix NDCG queue` for those whose line has these words.
"""

from __future__ import annotations

import copy
import itertools
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from imbalanced_losses import NDCGLoss, PartialAUCLoss, RecallAtKLoss, SmoothAPLoss

LOSSES: dict[str, Callable[..., Any]] = {
    "AP": SmoothAPLoss,
    "recall at k": lambda *args, **options: RecallAtKLoss(*args, k=0.2, **options),
    "partial AUC": lambda *args, **options: PartialAUCLoss(*args, max_fpr=0.3, **options),
    "NDCG": lambda *args, **options: NDCGLoss(*args, k=8, **options),
}
LENGTHS = (40, 40, 32, 25)  # the rows of each step
MOST_GRAPHS = 2


class Configuration(NamedTuple):
    loss: str
    num_classes: int
    queue_size: int
    has_groups: bool
    training: bool
    backend: str = "aot_eager"

    def __str__(self) -> str:
        parts = (
            f"C={self.num_classes}",
            "queue" * (self.queue_size > 0),
            "groups" * self.has_groups,
            "train" if self.training else "eval",
            self.backend,
        )
        return f"{self.loss:11} {parts[0]:4} {parts[1]:5} {parts[2]:6} {parts[3]:5} {parts[4]:9}"

    def made(self) -> Any:
        multilabel = self.loss == "NDCG" and self.num_classes > 1
        options = {"queue_size": self.queue_size, "temperature": 0.2, "multilabel": multilabel}
        return LOSSES[self.loss](self.num_classes, **options)

    def steps(self) -> Iterator[tuple[tuple[Tensor, Tensor], dict[str, Tensor]]]:
        """Batches whose number of rows, and that of positives, changes."""
        generator = torch.Generator().manual_seed(0)
        of_each_class = self.loss == "NDCG" and self.num_classes > 1
        for step, rows in enumerate(LENGTHS):
            shape = (rows, self.num_classes) if of_each_class else (rows,)
            targets = torch.randint(0, max(2, self.num_classes), shape, generator=generator)
            targets = targets * (torch.rand(shape, generator=generator) < 0.2 * (2 + step % 3))
            targets[step] = -100
            group = torch.randint(0, 4, (rows,), generator=generator)
            logits = torch.randn(rows, self.num_classes, generator=generator)
            yield (logits, targets), {"group": group} if self.has_groups else {}


def all_configurations() -> list[Configuration]:
    found = [
        Configuration(*choices)
        for choices in itertools.product(LOSSES, (1, 10), (0, 64), (False, True), (True, False))
    ]
    return [*found, Configuration("AP", 1, 64, True, True, "inductor")]


def graphs_of(one: Configuration) -> int:
    """How many graphs the steps take; raises where they are more, or not what eager code gives."""
    torch._dynamo.reset()
    eager = one.made()
    (first, *steps) = one.steps()
    eager(*first[0], **first[1])  # eval has rows in the queue too
    eager.train(one.training)
    counter = CompileCounterWithBackend(one.backend)
    compiled = torch.compile(copy.deepcopy(eager), fullgraph=True, backend=counter)
    for (logits, targets), values in steps:
        results = []
        for loss_fn in (eager, compiled):
            leaf = logits.clone().requires_grad_()
            loss = loss_fn(leaf, targets, **values)
            loss.backward()
            results.append((loss.detach(), leaf.grad))
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)
        assert results[0][1].abs().max() > 0
    assert counter.frame_count <= MOST_GRAPHS, f"{counter.frame_count} graphs"
    return counter.frame_count


def main() -> int:
    warnings.simplefilter("ignore")  # of torch's compiler, about itself
    words = sys.argv[1:]
    configurations = [
        one for one in all_configurations() if all(word in str(one) for word in words)
    ]
    failed = 0
    for one in configurations:
        start = time.perf_counter()
        try:
            graphs = graphs_of(one)
            found = f"ok      {graphs} graph{'s' * (graphs > 1)}"
        except Exception as error:  # whatever it is, the others follow
            failed += 1
            lines = [line for line in str(error).splitlines() if line.strip()]
            found = f"FAILED  {type(error).__name__}: {' | '.join(lines[:3])}"
        print(f"{one}  {found}, {time.perf_counter() - start:.1f} s", flush=True)
    version = f"torch {torch.__version__}, Python {sys.version.split()[0]}"
    print(f"{version}: {len(configurations) - failed} of {len(configurations)} compiled")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
