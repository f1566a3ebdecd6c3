"""The libraries compared with, each loaded from its own folder in a process of its own.

`make peers` puts them there, without their dependencies: their own lists ask for far more than
their losses need. The predecessor has the import name of this library, so the two must never share
a process.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / ".cache" / "peers"


class Peer(NamedTuple):
    """Where a library lives and which of its modules holds the losses."""

    folder: Path
    distribution: str
    module: str


PEERS = {
    "ours": Peer(ROOT / "src", "imbalanced-losses", "imbalanced_losses"),
    "predecessor": Peer(FOLDER / "predecessor", "imbalanced-losses", "imbalanced_losses"),
    "pml": Peer(
        FOLDER / "pytorch-metric-learning",
        "pytorch-metric-learning",
        "pytorch_metric_learning.losses",
    ),
    "libauc": Peer(FOLDER / "libauc", "libauc", "libauc.losses"),
    "allrank": Peer(FOLDER / "allrank", "allRank", "allrank.models.losses"),
}

# What peers import for their data sets and trainers; their losses use none of it.
_PROGRESS: dict[str, dict[str, object]] = {"tqdm": {"tqdm": None, "trange": None}}
STAND_INS: dict[str, dict[str, dict[str, object]]] = {
    "pml": _PROGRESS,
    "libauc": _PROGRESS,
    "allrank": {
        "allrank.data.dataset_loading": {"PADDED_Y_VALUE": -1},
        "allrank.utils.file_utils": {"is_gs_path": None, "copy_file_to_local": None},
    },
}


def is_there(name: str) -> bool:
    """Whether a peer has been fetched."""
    return (PEERS[name].folder / PEERS[name].module.split(".")[0]).is_dir()


def describe(name: str) -> str:
    """Name and version of a peer, for the header of a result."""
    peer = PEERS[name]
    if name == "ours":
        try:
            version = importlib.metadata.version(peer.distribution)
        except importlib.metadata.PackageNotFoundError:
            version = "(not installed)"
        return f"imbalanced_losses {version} (ours)"
    found = importlib.metadata.distributions(path=[str(peer.folder)])
    versions = [item.version for item in found if item.metadata["Name"] == peer.distribution]
    return f"{peer.distribution} {versions[0] if versions else '(absent)'} ({name})"


def load(name: str) -> ModuleType:
    """The module of a peer with its losses.

    Raises:
        RuntimeError: the peer is absent, or another library was imported under its name.
    """
    peer = PEERS[name]
    if not is_there(name):
        raise RuntimeError(f"{name} is not there: fetch it with `make peers`")
    sys.path.insert(0, str(peer.folder))
    for needed, names in STAND_INS.get(name, {}).items():
        _stand_in(needed, names)
    module = importlib.import_module(peer.module)
    if not Path(str(module.__file__)).resolve().is_relative_to(peer.folder.resolve()):
        raise RuntimeError(f"{peer.module} was not imported from the folder of {name}")
    return module


def _stand_in(name: str, names: dict[str, object]) -> None:
    """A module with these names, for one of the peer's own or one that is not there."""
    if name not in sys.modules and ("." in name or importlib.util.find_spec(name) is None):
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name]).update(names)
