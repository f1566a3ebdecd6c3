"""Whether what is built can be published, as `make dist` asks: `python -m … dist`.

The contents, file by file; that the sdist builds the same wheel as the repository; and that the
wheel works in an environment with nothing but torch and what torch requires.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
import time
import venv
from email.parser import HeaderParser
from importlib.metadata import distribution
from pathlib import Path
from zipfile import ZipFile

from packaging.requirements import Requirement

import imbalanced_losses

ROOT = Path(__file__).resolve().parents[2]
# What stays in the repository.
NOT_IN_SDIST = (".ci/", ".github/", ".pre-commit-config.yaml")

TRIAL = """
import importlib.metadata, importlib.util, sys, warnings
import torch  # which warns that there is no numpy
warnings.simplefilter("error")
import imbalanced_losses
from imbalanced_losses import CrossEntropy, MixedLoss, SmoothAPLoss
assert sys.prefix in imbalanced_losses.__file__
assert imbalanced_losses.__version__ == importlib.metadata.version("imbalanced-losses")
assert importlib.util.find_spec("sklearn") is None and importlib.util.find_spec("pytest") is None
loss_fn = MixedLoss(CrossEntropy(1), SmoothAPLoss(1), main_weight=0.9)
logits = torch.linspace(-1, 1, 12).unsqueeze(1).requires_grad_()
loss = loss_fn(logits, torch.arange(12) % 3 == 0)
loss.backward()
assert loss.isfinite() and logits.grad.abs().sum() > 0
print("imbalanced_losses", imbalanced_losses.__version__, "on torch", torch.__version__)
"""


def main(folder: Path) -> None:
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    check_sdist(sdist)
    check_wheel(wheel)
    check_metadata(wheel)
    with tempfile.TemporaryDirectory() as scratch:
        check_same_wheel(wheel, Path(scratch) / "again")
        check_alone(wheel, Path(scratch) / "empty")


def check_sdist(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tracked = output("git", "ls-files").splitlines()
    expected = {name for name in tracked if not name.startswith(NOT_IN_SDIST)} | {"PKG-INFO"}
    compare(sdist.name, names, expected)


def check_wheel(wheel: Path) -> None:
    tracked = output("git", "ls-files", "src").splitlines()
    of_package = {name.removeprefix("src/") for name in tracked}
    info = f"imbalanced_losses-{imbalanced_losses.__version__}.dist-info"
    of_metadata = {f"{info}/{name}" for name in ("METADATA", "RECORD", "WHEEL")}
    with ZipFile(wheel) as archive:
        compare(
            wheel.name,
            set(archive.namelist()),
            of_package | of_metadata | {f"{info}/licenses/LICENSE"},
        )
    assert "imbalanced_losses/py.typed" in of_package


def check_metadata(wheel: Path) -> None:
    with ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        metadata = HeaderParser().parsestr(archive.read(name).decode())
    assert metadata["Name"] == "imbalanced-losses"
    assert metadata["Version"] == imbalanced_losses.__version__
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Description-Content-Type"] == "text/markdown"
    required = [text for text in metadata.get_all("Requires-Dist", []) if "extra ==" not in text]
    assert [Requirement(text).name for text in required] == ["torch"], required


def check_same_wheel(wheel: Path, folder: Path) -> None:
    """The one in dist was built from the sdist; this one is built from the repository."""
    output(sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), ".")
    (again,) = folder.glob("*.whl")
    assert again.name == wheel.name
    assert again.read_bytes() == wheel.read_bytes(), "the sdist builds another wheel"


def check_alone(wheel: Path, folder: Path) -> None:
    """Install into an empty environment and train for a step.

    torch and what it requires are links to those of this environment: gigabytes, and not in doubt.
    """
    start = time.perf_counter()
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    (packages,) = folder.glob("lib/python*/site-packages")
    for name in required_by("torch"):
        link(name, packages)
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check"]
    output(*pip, "install", "-q", "--no-index", str(wheel))  # fails where torch does not suffice
    output(*pip, "check")
    print(output(str(python), "-I", "-W", "ignore", "-c", TRIAL).strip(), end=", ")
    print(f"installed and run in {time.perf_counter() - start:.0f} s")


def required_by(name: str) -> set[str]:
    """A distribution and all that it requires, at any depth, as installed here."""
    found, waiting = set(), [name]
    while waiting:
        one = waiting.pop()
        if one in found:
            continue
        found.add(one)
        for text in distribution(one).requires or []:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name.lower())
    return found


def link(name: str, packages: Path) -> None:
    """The files of an installed distribution, by links to its folders."""
    installed = distribution(name)
    tops = {path.parts[0] for path in installed.files or [] if path.parts[0] != ".."}
    for top in tops - {"__pycache__"}:
        link_to = packages / top
        if not link_to.exists():
            link_to.symlink_to(Path(str(installed.locate_file(top))))


def compare(what: str, found: set[str], expected: set[str]) -> None:
    assert found == expected, (
        f"{what} lacks {sorted(expected - found)}, holds {sorted(found - expected)} besides"
    )
    print(f"{what}: {len(found)} files, as they should be")


def output(*command: str) -> str:
    return subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    main(Path(sys.argv[1]))
