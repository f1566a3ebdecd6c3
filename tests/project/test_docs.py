"""The documentation: its code runs, its links resolve, it leaves no parameter out."""

from __future__ import annotations

import csv
import importlib.util
import inspect
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from imbalanced_losses import SmoothAPLoss

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
NAMES = [path.relative_to(ROOT).with_suffix("").as_posix() for path in PAGES]
EACH_PAGE = pytest.mark.parametrize("page", PAGES, ids=NAMES)
MADE_AT_BUILD_TIME = {"contributing.md", "changelog.md"}  # by docs/hooks.py

# Blocks marked `python` are run; `py` marks code of other libraries, which is only shown.
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^()\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
DOCUMENTED = re.compile(r"^::: (\S+)$", re.MULTILINE)


def blocks(page: Path) -> Iterator[tuple[int, str]]:
    """(lines before it, code) of each fenced Python block."""
    text = page.read_text(encoding="utf-8")
    for match in FENCE.finditer(text):
        if match[1] == "python":
            yield text.count("\n", 0, match.start(2)), match[2]


def run(page: Path) -> dict[str, Any]:
    """The blocks of a page follow each other in one namespace, which is returned."""
    namespace: dict[str, Any] = {"__name__": "__page__"}
    for line, code in blocks(page):
        # Empty lines first, so that an error names the line of the page.
        exec(compile("\n" * line + code, str(page), "exec"), namespace)
    return namespace


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """What can follow # in a link to a page."""
    headings = HEADING.findall(prose(page))
    of_headings = {
        re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings
    }
    return of_headings | set(DOCUMENTED.findall(prose(page)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [
        page
        for page in (*PAGES, ROOT / "CONTRIBUTING.md")
        if page.stem not in ("README", "tutorial") and list(blocks(page))
    ],
    ids=str,
)
def test_code_runs(page: Path) -> None:
    run(page)


def test_the_readme_trains_on_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file that a reader has: a header, columns on different scales, the label at the end."""
    labels = torch.arange(4000) % 50 == 0
    columns = (torch.randn(4000, 6) + labels[:, None]) * 10.0 ** torch.arange(-2, 4)
    lines = [
        ",".join(f"{cell:.6g}" for cell in (*row, label))
        for row, label in zip(columns.tolist(), labels.tolist(), strict=True)
    ]
    (tmp_path / "table.csv").write_text("\n".join(["a,b,c,d,e,f,label", *lines]), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    run(ROOT / "README.md")
    ap = re.fullmatch(r"test AP (0\.\d{3})\n", capsys.readouterr().out)
    assert ap is not None
    assert float(ap[1]) > 0.3  # chance is 0.02


@pytest.mark.slow
def test_the_tutorial_prints_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trained anew; chance, such as other rounding, moves AP by some hundredths."""
    page = DOCS / "tutorial.md"
    monkeypatch.chdir(tmp_path)  # where the checkpoint is written
    namespace = run(page)
    _, _, table = page.read_text(encoding="utf-8").partition("<!-- tutorial -->")
    rows = re.findall(r"^\| (.+?) \| (\.\d+) \| (\.\d+) \|$", table, re.MULTILINE)
    said = {name: (float(validation), float(test)) for name, validation, test in rows}
    assert said.keys() == namespace["table"].keys()
    for name, values in namespace["table"].items():
        assert values == pytest.approx(said[name], abs=0.05), name
    found = namespace["table"]
    assert min(found["SmoothAP"][1], found["sqrt-weighted BCE"][1]) > found["BCE"][1] + 0.05
    assert "carry gradient" in capsys.readouterr().out


@EACH_PAGE
def test_links_resolve(page: Path) -> None:
    for link in LINK.findall(prose(page)):
        if link.startswith("https://") or link in MADE_AT_BUILD_TIME:
            continue
        file, _, heading = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        if heading:
            assert heading in anchors(target), link


def test_the_guide_mentions_every_parameter() -> None:
    pages = [DOCS / "guide.md", *(DOCS / "guide").glob("*.md")]
    guide = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    parameters = {
        *inspect.signature(SmoothAPLoss.__init__).parameters,
        *inspect.signature(SmoothAPLoss.forward).parameters,
    } - {"self"}
    missing = {name for name in parameters if not re.search(rf"\b{name}\b", guide)}
    assert not missing


def test_the_guide_has_every_default() -> None:
    guide = (DOCS / "guide.md").read_text(encoding="utf-8").replace("−", "-")
    table = guide.partition("## Every parameter")[2]
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", table, re.MULTILINE))
    parameters = inspect.signature(SmoothAPLoss.__init__).parameters
    defaults = {
        name: "required" if p.default is p.empty else repr(p.default).replace("'", '"')
        for name, p in parameters.items()
        if name != "self"
    }
    assert {name: cell.strip("` ") for name, cell in rows.items()} == defaults


# --- Numbers that were measured ------------------------------------------------------------------

RESULTS = ROOT / "benchmarks" / "results"
TABLE_ROW = re.compile(r"^\|(?!-)(.+)\|$", re.MULTILINE)
MEASURED = re.compile(r"([\d,.]+)( ms| s| MiB| times as long)?")
UNITS = {" s": 1e3, " MiB": 2**20}  # of what a result file has in ms and bytes


def results(name: str) -> list[dict[str, str]]:
    """The rows of the one file of results that ends so."""
    (path,) = RESULTS.glob(f"*{name}.csv")
    lines = path.read_text(encoding="utf-8").splitlines()
    return list(csv.DictReader(line for line in lines if not line.startswith("#")))


def cells_of(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in row.split("|")] for row in TABLE_ROW.findall(text)]


def is_rounded(quoted: str, value: float) -> bool:
    """Whether `quoted` is the value in as many digits."""
    decimals = len(quoted.partition(".")[2])
    step = 10.0**-decimals if decimals or not quoted.endswith("0") else 10.0
    return abs(value - float(quoted)) <= 0.51 * step


@pytest.mark.parametrize(
    ("heading", "file", "columns"),
    [
        ("Time", "cpu-speed", ("ours_ms", "other_ms", "ratio")),
        ("Memory", "cpu-memory", ("peak_bytes",)),
        ("The family, and groups", "cpu-family", ("cpu_ms", "ratio")),
    ],
)
def test_what_is_quoted_was_measured(heading: str, file: str, columns: tuple[str, ...]) -> None:
    """With as many rows or embeddings, where the line says how many."""
    page = prose(DOCS / "benchmarks.md")
    section = page.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    rows, num_quoted = results(file), 0
    for label, *cells in cells_of(section):
        size = re.match(r"(?:.*, )?([\d,]{2,})(?: rows| embeddings|$)", label)
        own = [r for r in rows if size is None or r["num_rows"] == size[1].replace(",", "")]
        for quoted in filter(None, map(MEASURED.fullmatch, cells)):
            unit = UNITS.get(quoted[2], 1)
            values = [float(row[name]) / unit for row in own for name in columns if row[name]]
            number = quoted[1].replace(",", "")
            assert any(is_rounded(number, value) for value in values), (label, quoted[0])
            num_quoted += 1
    assert num_quoted > 20


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 100


def test_the_navigation_lists_every_page() -> None:
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    _, _, nav = settings.partition("\nnav:\n")
    listed = re.findall(r"^ +- .+: (\S+\.md)$", nav, re.MULTILINE)
    pages = {page.relative_to(DOCS).as_posix() for page in PAGES[1:]}
    assert sorted(listed) == sorted(pages | MADE_AT_BUILD_TIME)


@pytest.mark.slow
def test_figures_are_those_of_the_script(tmp_path: Path) -> None:
    """Drawn anew: the committed files, no more and no fewer, each shown on a page."""
    pytest.importorskip("matplotlib")
    command = [sys.executable, "-m", "benchmarks.figures", "--into", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {path.name for path in (DOCS / "assets").glob("*.svg")}
    shown = "\n".join(prose(page) for page in PAGES)
    assert all(f"assets/{name})" in shown for name in drawn)


@pytest.fixture
def hooks() -> ModuleType:
    """docs/hooks.py, which `mkdocs` loads while it builds the site."""
    for needed in ("latex2mathml", "mkdocs"):
        pytest.importorskip(needed)
    spec = importlib.util.spec_from_file_location("hooks", DOCS / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "tag",
    [
        '<script src="https://cdn.example/a.js">',
        '<img alt="plot" src="//cdn.example/a.png">',
        '<link rel="stylesheet" href="https://cdn.example/a.css">',
    ],
)
def test_the_build_refuses_other_hosts(
    hooks: ModuleType, tag: str, caplog: pytest.LogCaptureFixture
) -> None:
    page = SimpleNamespace(file=SimpleNamespace(src_uri="page.md"))
    with caplog.at_level(logging.WARNING):
        hooks.on_post_page('<a href="https://arxiv.org/"><img src="assets/a.png">', page=page)
        assert not caplog.records
        hooks.on_post_page(tag, page=page)
    assert "cdn.example" in caplog.text
