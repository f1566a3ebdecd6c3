"""Settings of every test: the same random numbers in every run."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
from collections.abc import Generator, Iterator

import pytest
import torch
from hypothesis import settings

from imbalanced_losses._checks import tracing
from imbalanced_losses._ranking import PLANS
from imbalanced_losses._ranking.cuda import launches
from imbalanced_losses._ranking.cuda import ranks as kernel_ranks
from imbalanced_losses._ranking.panels.panels import PRECISIONS
from tests.helpers.ranks import Ranks

collect_ignore = [  # scripts
    "project/trainer_accumulation.py",
    "project/trainer_groups.py",
    "hardening/fuzz/__main__.py",
    "hardening/mutation.py",
    "hardening/mutation_plugin.py",
]
if (
    importlib.util.find_spec("pyarrow") is None
):  # the extras of the demo, of examples and benchmarks
    names = ("demo", "gpu_benchmark", "peers", "quality")
    collect_ignore += [f"project/test_{name}.py" for name in names]

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run on the CPU, slowly

settings.register_profile("fast", max_examples=30, derandomize=True, database=None, deadline=None)
settings.register_profile(
    "thorough", max_examples=200, derandomize=True, database=None, deadline=None
)
settings.load_profile("fast")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Let a test of random examples report how many there were, as its `cases`."""
    report = yield
    statistics = getattr(item, "hypothesis_statistics", None)
    if call.when == "call" and statistics is not None:
        examples = sum(map(int, re.findall(r"(\d+) passing", statistics)))
        report.user_properties.append(("cases", examples))
    return report


@pytest.fixture(autouse=True)
def _same_random_numbers() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Small operations gain nothing from more, and lose much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Two processes for the whole run."""
    pool = Ranks()
    yield pool
    pool.close()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--plan", help="dotted name of a plan that stands in for the dense backend's")


@pytest.fixture(autouse=True)
def _other_plan(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --plan: another backend in the place of the dense one, whose tests become its tests."""
    name = request.config.getoption("--plan")
    if name is None:
        return
    if request.node.get_closest_marker("of_dense") is not None:
        pytest.skip("about the means of the dense backend")
    module, _, attribute = name.rpartition(".")
    plan = getattr(importlib.import_module(module), attribute)
    monkeypatch.setitem(PLANS, "dense", plan)


@pytest.fixture
def _restored_matmul_precision() -> Iterator[None]:
    yield
    # In this order: the setters by backend (torch ≥ 2.9) leave the older one undefined.
    mkldnn = getattr(torch.backends.mkldnn, "matmul", None)
    for backend in (torch.backends, mkldnn, torch.backends.cuda.matmul):
        if hasattr(backend, "fp32_precision"):
            backend.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")


@pytest.fixture
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """The dtype of scores; panels of each degree for float32, without the rows they are for."""
    if request.param == "float64":
        return torch.float64
    finest, fine, coarse = PRECISIONS[torch.float32]
    only = {"float32": coarse, "float32, fine": fine, "float32, finest": finest}[request.param]
    monkeypatch.setitem(PRECISIONS, torch.float32, (only,))
    return torch.float32


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> str:
    """A device whose pools the kernels rank: the CPU in disguise where there is no other."""
    pytest.importorskip("triton", minversion="3.2")
    if torch.cuda.is_available():
        return "cuda"
    monkeypatch.setattr(launches, "DEVICES", ("cpu",))
    monkeypatch.setattr(kernel_ranks, "_PROGRAMS", 1)  # few and large: each is slow here
    monkeypatch.setitem(kernel_ranks._ROWS, torch.float32, 64)
    monkeypatch.setattr(tracing, "HOSTS", ())
    return "cpu"
