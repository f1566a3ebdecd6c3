"""Test AP of losses on real imbalanced tasks, with equal tuning by validation AP.

    python -m benchmarks.quality [--tasks protein chess] [--splits 10] [--workers 2] [--into NAME]

Eight binary tasks (`benchmarks.tasks`), fixed splits, one network (an MLP F-64-32-1), one budget
(500 steps of 1,024 rows, AdamW with one cycle) for every loss. For each task, split and loss the
learning rate and the weight decay are those of the best validation AP, and so is the checkpoint;
test rows are scored once a run. The library's loss has one recipe for all tasks, `OURS`.

Every finished run is a line of the CSV at once; started again, the rest is done. `--report` prints
what there is. Then: differences of test AP, paired by split, to the member of the BCE family that
has the best mean validation AP on that task, with Wilcoxon's signed-rank test.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table as Grid
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce

from benchmarks import _measure, _peers, tasks
from benchmarks._measure import Row

LEARNING_RATES = (3e-3, 1e-2)
WEIGHT_DECAYS = (1e-4, 1e-1)
BATCH_SIZE, STEPS, EVALUATE_EVERY = 1024, 500, 50
SPLITS = 10
DEVELOPMENT_SEED = 100  # splits from here on are for choosing the recipe, never reported
SAMPLED_POSITIVE = 0.25  # of a batch, where LibAUC asks for a sampler
KEY = ("task", "split", "loss", "learning_rate", "weight_decay")

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # logits [n], labels [n], rows [n] -> []


class Job(NamedTuple):
    """One training run."""

    task: str
    split: int
    loss: str
    learning_rate: float
    weight_decay: float


# --- Losses: from the training labels [N] to a function -------------------------------------------


def _weighted(power: float) -> Callable[[Tensor], Loss]:
    def make(labels: Tensor) -> Loss:
        weight = ((labels == 0).sum() / (labels == 1).sum()) ** power
        return lambda logits, y, _: bce(logits, y.float(), pos_weight=weight)

    return make


def _focal(labels: Tensor) -> Loss:
    """Lin et al. 2017, γ = 2, without α."""

    def loss(logits: Tensor, y: Tensor, _: Tensor) -> Tensor:
        each = bce(logits, y.float(), reduction="none")
        return ((1 - torch.exp(-each)).square() * each).mean()

    return loss


def _hard_negatives(labels: Tensor) -> Loss:
    """BCE on all positives and the tenth of the negatives that has the highest scores."""

    def loss(logits: Tensor, y: Tensor, _: Tensor) -> Tensor:
        negatives = logits[y == 0]
        hardest = negatives.topk(max(1, len(negatives) // 10)).values
        kept = torch.cat((logits[y == 1], hardest))
        is_positive = torch.arange(len(kept)) < len(kept) - len(hardest)
        return bce(kept, is_positive.float())

    return loss


def _ours(**settings: Any) -> Callable[[Tensor], Loss]:
    """Smooth-AP of the batch beside cross-entropy."""

    def make(labels: Tensor) -> Loss:
        from imbalanced_losses import CrossEntropy, MixedLoss, SmoothAPLoss

        weight = ((labels == 0).sum() / (labels == 1).sum()) ** settings.get("power", 0.0)
        ranking = SmoothAPLoss(
            1, queue_size=0, temperature=settings["temperature"], temperature_unit="spread"
        )
        if settings["main_weight"] == 1:
            return lambda logits, y, _: ranking(logits[:, None], y)
        entropy = CrossEntropy(1, class_weight=weight[None])
        mixed = MixedLoss(entropy, ranking, main_weight=settings["main_weight"])
        return lambda logits, y, _: mixed(logits[:, None], y)

    return make


def _predecessor(labels: Tensor) -> Loss:
    """With its own defaults: raw logits, τ = 0.01, a queue of 1,024."""
    loss_fn = _peers.load("predecessor").SmoothAPLoss(1)
    return lambda logits, y, _: loss_fn(logits[:, None], y)


def _libauc(labels: Tensor) -> Loss:
    loss_fn = _peers.load("libauc").APLoss(data_len=len(labels))
    return lambda logits, y, rows: loss_fn(torch.sigmoid(logits)[:, None], y[:, None], rows)


OURS = "SmoothAP + BCE"
BCE_FAMILY = {
    "BCE": _weighted(0.0),
    "sqrt-weighted BCE": _weighted(0.5),
    "weighted BCE": _weighted(1.0),
    "focal": _focal,
    "hard-negative BCE": _hard_negatives,
}
LOSSES: dict[str, Callable[[Tensor], Loss]] = {
    **BCE_FAMILY,
    "LibAUC APLoss": _libauc,
    OURS: _ours(temperature=0.1, main_weight=0.5, power=0.5),
    "SmoothAP": _ours(temperature=0.1, main_weight=1),
    "predecessor": _predecessor,
}
# For the choice of the recipe, on development splits.
CANDIDATES = {
    f"τ {tau} w {w} power {power}": _ours(temperature=tau, main_weight=w, power=power)
    for tau, w, power in (
        (0.1, 0.5, 0.0),
        (0.1, 0.5, 0.5),
        (0.3, 0.5, 0.0),
        (0.3, 0.5, 0.5),
        (0.3, 0.8, 0.5),
        (0.1, 0.8, 0.5),
        (0.1, 0.2, 0.5),
    )
}


# --- One run --------------------------------------------------------------------------------------

_cached: dict[tuple[str, int], Any] = {}


def run(job: Job) -> Row:
    """Train, keep the checkpoint of the best validation AP, score the test rows once."""
    from demo import train

    torch.set_num_threads(1)
    if (job.task, job.split) not in _cached:
        _cached.clear()
        table = tasks.load(job.task)
        _cached[job.task, job.split] = train.make_task(table, table.split(job.split))
    task = _cached[job.task, job.split]
    started = time.perf_counter()
    model = train.make_model(task.train.features.shape[1], job.split)
    best_step, validation_ap = _fit(model, task, job)
    test_ap = train.average_precision(_scores(model, task.test.features), task.test.labels)
    return {
        **job._asdict(),
        "best_step": best_step,
        "validation_ap": f"{validation_ap:.6f}",
        "test_ap": f"{test_ap:.6f}",
        "seconds": f"{time.perf_counter() - started:.2f}",
    }


def _fit(model: nn.Module, task: Any, job: Job) -> tuple[int, float]:
    """Train in place; step and AP of the best validation, whose weights the model has then."""
    from demo import train

    features, labels = task.train
    loss_fn = {**LOSSES, **CANDIDATES}[job.loss](labels)
    rates = {"lr": job.learning_rate, "weight_decay": job.weight_decay}
    is_libauc = job.loss == "LibAUC APLoss"
    if is_libauc:
        from libauc.optimizers import SOAP

        optimizer: Any = SOAP(model.parameters(), mode="adam", verbose=False, **rates)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), fused=True, **rates)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=job.learning_rate, total_steps=STEPS, cycle_momentum=not is_libauc
    )
    batches = _quota_batches(labels, job.split) if is_libauc else _batches(len(labels), job.split)
    best_step, best_ap, best_weights = 0, -1.0, model.state_dict()
    for step, rows in zip(range(1, STEPS + 1), batches, strict=False):
        optimizer.zero_grad()
        loss_fn(model(features[rows]), labels[rows], rows).backward()
        optimizer.step()
        schedule.step()
        if step % EVALUATE_EVERY == 0:
            scores = _scores(model, task.validation.features)
            if not bool(scores.isfinite().all()):
                break
            ap = train.average_precision(scores, task.validation.labels)
            if ap > best_ap:
                best_step, best_ap = step, ap
                best_weights = {name: w.clone() for name, w in model.state_dict().items()}
    model.load_state_dict(best_weights)
    return best_step, best_ap


def _batches(num_rows: int, seed: int) -> Iterator[Tensor]:
    """Whole epochs, shuffled anew, full batches only."""
    generator = torch.Generator().manual_seed(seed)
    size = min(BATCH_SIZE, num_rows)
    while True:
        order = torch.randperm(num_rows, generator=generator)
        yield from (rows for rows in order.split(size) if len(rows) == size)


def _quota_batches(labels: Tensor, seed: int) -> Iterator[Tensor]:
    """A fixed share of positives in every batch, as LibAUC's samplers make them."""
    generator = torch.Generator().manual_seed(seed)
    rare, common = (labels == 1).nonzero().squeeze(1), (labels == 0).nonzero().squeeze(1)
    num_rare = round(SAMPLED_POSITIVE * BATCH_SIZE)
    while True:
        picks = [
            part[torch.randint(len(part), (number,), generator=generator)]
            for part, number in ((rare, num_rare), (common, BATCH_SIZE - num_rare))
        ]
        yield torch.cat(picks)


@torch.no_grad()
def _scores(model: nn.Module, features: Tensor) -> Tensor:
    scores: Tensor = model(features)
    return scores


# --- All runs -------------------------------------------------------------------------------------


def finished(path: Path) -> list[Row]:
    return list(_measure.read_csv(path)) if path.exists() else []


def key_of(row: Row) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in KEY)


def run_all(jobs: list[Job], path: Path, workers: int) -> None:
    """Run what is not in the file yet; the predecessor apart, for it has our import name."""
    done = {key_of(row) for row in finished(path)}
    left = [job for job in jobs if key_of(job._asdict()) not in done]
    is_new = not path.exists()
    context = multiprocessing.get_context("spawn")
    path.parent.mkdir(exist_ok=True)
    with path.open("a", newline="") as file:
        writer: Any = None
        groups = [[job for job in left if (job.loss == "predecessor") == apart] for apart in (0, 1)]
        for group in groups:
            # One split after the other for each worker, which keeps the data of one.
            chunks = [list(own) for _, own in itertools.groupby(group, key=lambda j: j[:2])]
            peer = "predecessor" if group and group[0].loss == "predecessor" else "ours"
            with ProcessPoolExecutor(workers, context, _peers.load, (peer,)) as pool:
                futures = [pool.submit(run_chunk, chunk) for chunk in chunks]
                for future in track(as_completed(futures), "training", total=len(futures)):
                    for row in future.result():
                        if writer is None:
                            writer = csv.DictWriter(file, list(row), lineterminator="\n")
                            if is_new:
                                file.writelines(f"{line}\n" for line in _measure.header(1, "cpu"))
                                writer.writeheader()
                        writer.writerow(row)
                    file.flush()


def run_chunk(jobs: list[Job]) -> list[Row]:
    return [run(job) for job in jobs]


class Tuned(NamedTuple):
    """A loss on one split, with the settings of its best validation AP."""

    validation_ap: float
    test_ap: float
    seconds: float  # of one run


def tuned(rows: list[Row]) -> dict[tuple[str, str], dict[int, Tuned]]:
    """(task, loss) -> split -> the run chosen."""
    found: dict[tuple[str, str], dict[int, Tuned]] = {}
    for row in rows:
        one = Tuned(*(float(row[name]) for name in Tuned._fields))
        splits = found.setdefault((row["task"], row["loss"]), {})
        split = int(row["split"])
        splits[split] = max(splits.get(split, one), one, key=lambda run: run.validation_ap)
    return found


def report(rows: list[Row]) -> None:
    """Mean test AP of every loss, and its paired difference to the best of the BCE family."""
    from scipy.stats import wilcoxon

    chosen = tuned(rows)
    names = list(dict.fromkeys(row["task"] for row in rows))
    losses = list(dict.fromkeys(row["loss"] for row in rows))
    grid = Grid("loss", *names, "s")
    rivals = {task: rival_of(chosen, task) for task in names}
    for loss in losses:
        cells, seconds = [], []
        for task in names:
            own, rival = chosen.get((task, loss), {}), chosen.get((task, rivals[task]), {})
            both = sorted(own.keys() & rival.keys())
            if not both:
                cells.append("–")
                continue
            mean = statistics.mean(own[k].test_ap for k in both)
            seconds += [own[k].seconds for k in both]
            differences = [own[k].test_ap - rival[k].test_ap for k in both]
            if loss == rivals[task]:
                cells.append(f"{mean:.4f}\nbest BCE")
                continue
            wins = sum(d > 0 for d in differences)
            p = wilcoxon(differences).pvalue if any(differences) and len(both) > 1 else 1.0
            cells.append(
                f"{mean:.4f}\n{statistics.mean(differences):+.4f} {wins}/{len(both)}\np {p:.3f}"
            )
        grid.add_row(loss, *cells, f"{statistics.mean(seconds):.1f}" if seconds else "–")
    Console(width=140).print(grid)


def rival_of(chosen: dict[tuple[str, str], dict[int, Tuned]], task: str) -> str:
    """The member of the BCE family with the best mean validation AP; test AP plays no part."""

    def mean_validation(loss: str) -> float:
        runs = chosen.get((task, loss), {})
        return statistics.mean(r.validation_ap for r in runs.values()) if runs else -1.0

    return max(BCE_FAMILY, key=mean_validation)


def main() -> None:
    """Train what is left, then report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=tasks.TASKS, default=list(tasks.TASKS))
    parser.add_argument("--losses", nargs="+", default=list(LOSSES))
    parser.add_argument("--splits", type=int, default=SPLITS)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--into", default="quality", help="name of the CSV in benchmarks/results")
    parser.add_argument("--development", action="store_true", help="candidates, on other splits")
    parser.add_argument("--report", action="store_true", help="print what there is")
    options = parser.parse_args()
    path = _measure.RESULTS / f"{options.into}.csv"
    losses, first = options.losses, 0
    if options.development:
        losses, first = [*BCE_FAMILY, "SmoothAP", *CANDIDATES], DEVELOPMENT_SEED
    jobs = [
        Job(*cell)
        for cell in itertools.product(
            options.tasks,
            range(first, first + options.splits),
            losses,
            LEARNING_RATES,
            WEIGHT_DECAYS,
        )
    ]
    if not options.report:
        for name in options.tasks:
            tasks.load(name)  # once, before the workers ask for it
        run_all(jobs, path, options.workers)
    report(finished(path))


if __name__ == "__main__":
    main()
