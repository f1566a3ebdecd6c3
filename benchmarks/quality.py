"""Test AP of losses on real imbalanced tasks, with equal tuning by validation AP.

    python -m benchmarks.quality [--plan final] [--tasks protein chess] [--splits 10] [--report]

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
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table as Grid
from torch import Tensor, nn
from torch.optim import swa_utils

from benchmarks import _measure, _peers, tasks
from benchmarks._measure import Row
from benchmarks.recipes import (
    ALL,
    AVERAGED,
    BATCH_SIZE,
    BCE_FAMILY,
    CANDIDATES,
    LOSSES,
    OURS,
    REBALANCED,
    REBALANCED_TASKS,
    RECIPE,
    SCREENED,
    SECOND_MOMENT,
    STEPS,
    Make,
    Recipe,
)

LEARNING_RATES = (3e-3, 1e-2)
WEIGHT_DECAYS = (1e-4, 1e-1)
EVALUATE_EVERY = 50
ASSETS = _measure.RESULTS.parents[1] / "docs" / "assets"
DEVELOPMENT_SEED = 100  # splits from here on are for choosing the recipe, never reported
SAMPLED_POSITIVE = 0.25  # of a batch, where LibAUC asks for a sampler
KEY = ("task", "split", "loss", "learning_rate", "weight_decay")

Metric = Callable[[Tensor, Tensor], float]  # of scores [n] or [n, C] and labels [n]


class Job(NamedTuple):
    """One training run."""

    task: str
    split: int
    loss: str
    learning_rate: float
    weight_decay: float


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
    model = train.make_model(task.train.features.shape[1], job.split)
    return trained(job, ALL[job.loss], model, task, train.average_precision)


def trained(job: Job, make: Make, model: nn.Module, task: Any, metric: Metric) -> Row:
    """Train, and score the test rows once; a loss may have batches of its own."""
    started = time.perf_counter()
    best_step, validation_ap = _fit(job, make, model, task, metric)
    test_ap = metric(_scores(model, task.test.features), task.test.labels)
    return {
        **job._asdict(),
        "best_step": best_step,
        "validation_ap": f"{validation_ap:.6f}",
        "test_ap": f"{test_ap:.6f}",
        "seconds": f"{time.perf_counter() - started:.2f}",
    }


def _fit(job: Job, make: Make, model: nn.Module, task: Any, metric: Metric) -> tuple[int, float]:
    """Train in place; step and AP of the best validation, whose weights the model has then."""
    features, labels = task.train
    loss_fn = make(labels)
    rates = {"lr": job.learning_rate, "weight_decay": job.weight_decay}
    is_libauc = job.loss == "LibAUC APLoss"
    if is_libauc:
        from libauc.optimizers import SOAP

        optimizer: Any = SOAP(model.parameters(), mode="adam", verbose=False, **rates)
    else:
        betas = (0.9, getattr(make, "second_moment", SECOND_MOMENT))
        optimizer = torch.optim.AdamW(model.parameters(), betas=betas, fused=True, **rates)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=job.learning_rate, total_steps=STEPS, cycle_momentum=not is_libauc
    )
    sampled = SAMPLED_POSITIVE if is_libauc else getattr(make, "sampled_positive", None)
    batch_size = getattr(make, "batch_size", BATCH_SIZE)
    batches = (
        _batches(len(labels), batch_size, job.split)
        if sampled is None
        else _quota_batches(labels, sampled, batch_size, job.split)
    )
    best_step, best_ap, best_weights = 0, -1.0, model.state_dict()
    decay = getattr(make, "averaging", None)
    mean = (
        None
        if decay is None
        else swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(decay))
    )
    for step, rows in zip(range(1, STEPS + 1), batches, strict=False):
        optimizer.zero_grad()
        loss_fn(model(features[rows]), labels[rows], rows).backward()
        optimizer.step()
        schedule.step()
        if mean is not None:
            mean.update_parameters(model)
        if step % EVALUATE_EVERY == 0:
            evaluated = model if mean is None else mean.module
            scores = _scores(evaluated, task.validation.features)
            if not bool(scores.isfinite().all()):
                break
            ap = metric(scores, task.validation.labels)
            if ap > best_ap:
                best_step, best_ap = step, ap
                best_weights = {name: w.clone() for name, w in evaluated.state_dict().items()}
    model.load_state_dict(best_weights)
    return best_step, best_ap


def _batches(num_rows: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Whole epochs, shuffled anew, full batches only."""
    generator = torch.Generator().manual_seed(seed)
    size = min(batch_size, num_rows)
    while True:
        order = torch.randperm(num_rows, generator=generator)
        yield from (rows for rows in order.split(size) if len(rows) == size)


def _quota_batches(labels: Tensor, share: float, batch_size: int, seed: int) -> Iterator[Tensor]:
    """A fixed share of positives in every batch, as LibAUC's samplers make them."""
    generator = torch.Generator().manual_seed(seed)
    rare, common = (labels == 1).nonzero().squeeze(1), (labels == 0).nonzero().squeeze(1)
    num_rare = round(share * batch_size)
    while True:
        picks = [
            part[torch.randint(len(part), (number,), generator=generator)]
            for part, number in ((rare, num_rare), (common, batch_size - num_rare))
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


def run_all(jobs: list[Job], path: Path, workers: int, run: Callable[[Job], Row] = run) -> None:
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
                futures = [pool.submit(run_chunk, chunk, run) for chunk in chunks]
                for future in track(as_completed(futures), "training", total=len(futures)):
                    for row in future.result():
                        if writer is None:
                            writer = csv.DictWriter(file, list(row), lineterminator="\n")
                            if is_new:
                                file.writelines(f"{line}\n" for line in _measure.header(1, "cpu"))
                                writer.writeheader()
                        writer.writerow(row)
                    file.flush()


def run_chunk(jobs: list[Job], run: Callable[[Job], Row]) -> list[Row]:
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


def report(
    rows: list[Row],
    rival: str | None = None,
    value: str = "test_ap",
    family: Iterable[str] = BCE_FAMILY,
) -> None:
    """Mean AP of every loss, and its paired difference to `rival`, or the best of the family.

    `value` is "validation_ap" where a recipe is to be chosen.
    """
    from scipy.stats import wilcoxon

    chosen = tuned(rows)

    def ap(run: Tuned) -> float:
        return float(getattr(run, value))

    names = list(dict.fromkeys(row["task"] for row in rows))
    losses = list(dict.fromkeys(row["loss"] for row in rows))
    grid = Grid("loss", *names, "s")
    rivals = {task: rival or rival_of(chosen, task, family) for task in names}
    for loss in losses:
        cells, seconds = [], []
        for task in names:
            own, other = chosen.get((task, loss), {}), chosen.get((task, rivals[task]), {})
            both = sorted(own.keys() & other.keys())
            if not both:
                cells.append("–")
                continue
            mean = statistics.mean(ap(own[k]) for k in both)
            seconds += [own[k].seconds for k in both]
            differences = [ap(own[k]) - ap(other[k]) for k in both]
            if loss == rivals[task]:
                cells.append(f"{mean:.4f}\n{'rival' if rival else 'best of family'}")
                continue
            wins = sum(d > 0 for d in differences)
            p = wilcoxon(differences).pvalue if any(differences) and len(both) > 1 else 1.0
            cells.append(
                f"{mean:.4f}\n{statistics.mean(differences):+.4f} {wins}/{len(both)}\np {p:.3f}"
            )
        grid.add_row(loss, *cells, f"{statistics.mean(seconds):.1f}" if seconds else "–")
    if value == "validation_ap":
        recipes = [loss for loss in losses if isinstance(ALL[loss], Recipe)]
        found = [gains(chosen, task, recipes, rivals[task]) for task in names]
        cells = [
            f"{max(g):+.4f}\n{sum(x > 0 for x in g)}/{len(g)} ahead" if g else "–" for g in found
        ]
        grid.add_row("best recipe, by hindsight", *cells, "–")
    Console(width=140).print(grid)


def gains(
    chosen: dict[tuple[str, str], dict[int, Tuned]], task: str, losses: list[str], rival: str
) -> list[float]:
    """Mean difference in validation AP to the rival, of each loss that has the rival's splits."""
    base = chosen.get((task, rival), {})
    return [
        statistics.mean(own[k].validation_ap - base[k].validation_ap for k in base)
        for own in (chosen.get((task, loss), {}) for loss in losses)
        if own and own.keys() == base.keys()
    ]


def rival_of(
    chosen: dict[tuple[str, str], dict[int, Tuned]], task: str, family: Iterable[str] = BCE_FAMILY
) -> str:
    """The member of the family with the best mean validation AP; test AP plays no part."""

    def mean_validation(loss: str) -> float:
        runs = chosen.get((task, loss), {})
        return statistics.mean(r.validation_ap for r in runs.values()) if runs else -1.0

    return max(family, key=mean_validation)


def plot(rows: list[Row], path: Path) -> None:
    """Forest plot: mean difference to the best of the BCE family and its 95 % t interval."""
    from matplotlib import pyplot as plt
    from scipy.stats import t

    chosen = tuned(rows)
    names = list(dict.fromkeys(row["task"] for row in rows))
    figure, axes = plt.subplots(figsize=(7, 0.75 * len(names) + 1.2), layout="constrained")
    for k, (loss, style) in enumerate(STYLES.items()):
        means, errors, heights = [], [], []
        for height, task in enumerate(reversed(names)):
            own, rival = chosen.get((task, loss), {}), chosen[task, rival_of(chosen, task)]
            gains = [own[s].test_ap - rival[s].test_ap for s in sorted(own.keys() & rival.keys())]
            if len(gains) < 2:
                continue
            half = statistics.stdev(gains) / len(gains) ** 0.5 * t.ppf(0.975, len(gains) - 1)
            means.append(statistics.mean(gains))
            errors.append(half)
            heights.append(height + 0.27 - 0.18 * k)
        axes.errorbar(means, heights, xerr=errors, linestyle="", capsize=2, label=loss, **style)
    axes.axvline(0, color="#666666", linewidth=1)
    axes.set_yticks(
        range(len(names)), [f"{n}\n(best: {rival_of(chosen, n)})" for n in reversed(names)]
    )
    axes.set_xlabel("difference in test AP to the best of the BCE family, paired by split")
    axes.set_xlim(left=-0.16)
    axes.legend(loc="lower left", fontsize="small")
    figure.savefig(path, dpi=150)


STYLES: dict[str, dict[str, Any]] = {
    OURS: {"color": "#0072B2", "marker": "o"},
    "SmoothAP": {"color": "#56B4E9", "marker": "D"},
    "predecessor": {"color": "#D55E00", "marker": "s"},
    "LibAUC APLoss": {"color": "#009E73", "marker": "^"},
}


class Plan(NamedTuple):
    """One set of runs."""

    losses: list[str]
    tasks: tuple[str, ...]
    first_split: int
    splits: int
    into: str
    rival: str | None = None
    value: str = "test_ap"
    family: tuple[str, ...] = tuple(BCE_FAMILY)
    learning_rates: tuple[float, ...] = LEARNING_RATES
    weight_decays: tuple[float, ...] = WEIGHT_DECAYS


PLANS = {
    "final": Plan(list(LOSSES), tuple(tasks.TASKS), 0, 10, "quality"),
    "development": Plan(
        [*BCE_FAMILY, "SmoothAP", *CANDIDATES],
        tuple(tasks.TASKS),
        DEVELOPMENT_SEED,
        2,
        "quality-development",
        value="validation_ap",
    ),
    "screening": Plan(
        [*BCE_FAMILY, RECIPE.name(), *SCREENED],
        tuple(tasks.TASKS),
        DEVELOPMENT_SEED,
        1,
        "quality-screening",
        value="validation_ap",
        weight_decays=WEIGHT_DECAYS[:1],
    ),
    "averaged": Plan(
        [*BCE_FAMILY, "SmoothAP", RECIPE.name(), *AVERAGED],
        tuple(tasks.TASKS),
        DEVELOPMENT_SEED,
        2,
        "quality-averaged",
        value="validation_ap",
        family=tuple(name for name in AVERAGED if not name.startswith("SmoothAP")),
        weight_decays=WEIGHT_DECAYS[:1],
    ),
    "rates": Plan(
        [*BCE_FAMILY, "SmoothAP", RECIPE.name()],
        tuple(tasks.TASKS),
        DEVELOPMENT_SEED,
        2,
        "quality-rates",
        value="validation_ap",
        learning_rates=(1e-3, *LEARNING_RATES, 3e-2),
        weight_decays=WEIGHT_DECAYS[:1],
    ),
    "prevalence": Plan(
        list(REBALANCED), REBALANCED_TASKS, 0, 5, "prevalence", "SmoothAP, 50 % positives"
    ),
}


def main() -> None:
    """Train what is left, then report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--plan",
        choices=PLANS,
        default="final",
        help="by validation AP on other splits: candidates for the recipe (development), those "
        "given up early (screening), means of weights (averaged), more learning rates (rates); "
        "prevalence: batches with 50 %% positives",
    )
    parser.add_argument("--tasks", nargs="+", choices=tasks.TASKS, help="instead of the plan's")
    parser.add_argument("--losses", nargs="+", help="instead of the plan's")
    parser.add_argument("--splits", type=int, help="instead of the plan's")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--into", help="name of the CSV in benchmarks/results")
    parser.add_argument("--report", action="store_true", help="print what there is, and plot it")
    options = parser.parse_args()
    plan = PLANS[options.plan]
    path = _measure.RESULTS / f"{options.into or plan.into}.csv"
    splits = range(plan.first_split, plan.first_split + (options.splits or plan.splits))
    names = options.tasks or plan.tasks
    jobs = [
        Job(*cell)
        for cell in itertools.product(
            names, splits, options.losses or plan.losses, plan.learning_rates, plan.weight_decays
        )
    ]
    if not options.report:
        for name in names:
            tasks.load(name)  # once, before the workers ask for it
        run_all(jobs, path, options.workers)
    rows = finished(path)
    report(rows, plan.rival, plan.value, plan.family)
    if options.plan == "final":
        plot(rows, ASSETS / "quality.png")


if __name__ == "__main__":
    main()
