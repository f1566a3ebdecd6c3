"""The examples, run as their docstrings say, on two processes over gloo."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from demo.data import CACHE

ROOT = Path(__file__).resolve().parents[1]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
EXAMPLES = {
    "ddp": (TORCHRUN, None),
    "fsdp": (TORCHRUN, None),
    "lightning_ddp": ((), "lightning"),
    "accelerate_ddp": (TORCHRUN, "accelerate"),
}
DONE = re.compile(
    r"^(\w+): 5 steps on 2 ranks, loss 0\.\d+ -> 0\.\d+; the gradient is that of one process, "
    r"largest relative difference (\S+)$",
    re.MULTILINE,
)


def run(script: Path, launcher: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.run(
        [sys.executable, *launcher, str(script)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=environment,
        timeout=120,
    )


@pytest.mark.skipif(not any(CACHE.glob("*")), reason="the demo's data are not there: make demo")
@pytest.mark.parametrize("name", EXAMPLES)
def test_the_gradient_is_that_of_one_process(name: str) -> None:
    launcher, needed = EXAMPLES[name]
    if needed is not None and importlib.util.find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed: pip install -e '.[examples]'")
    done = run(ROOT / "examples" / f"{name}.py", launcher)
    assert done.returncode == 0, done.stderr[-4000:]
    (found,) = DONE.findall(done.stdout)
    assert float(found[1]) <= 1e-12


def test_every_example_is_run() -> None:
    scripts = {path.stem for path in (ROOT / "examples").glob("*.py")}
    assert scripts == {"_shared", *EXAMPLES}
