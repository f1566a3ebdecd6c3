"""The documentation: its code runs, its links resolve, it leaves no parameter out."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from imbalanced_losses import SmoothAPLoss

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EACH_PAGE = pytest.mark.parametrize("page", PAGES, ids=[path.stem for path in PAGES])

FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^()\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


def blocks(page: Path) -> Iterator[tuple[int, str]]:
    """(lines before it, code) of each fenced Python block."""
    text = page.read_text(encoding="utf-8")
    for match in FENCE.finditer(text):
        if match[1] == "python":
            yield text.count("\n", 0, match.start(2)), match[2]


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def anchor(heading: str) -> str:
    """What a heading is called in a link."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


@EACH_PAGE
def test_code_runs(page: Path) -> None:
    """The blocks of a page follow each other in one namespace."""
    namespace: dict[str, Any] = {"__name__": "__page__"}
    for line, code in blocks(page):
        # Empty lines first, so that an error names the line of the page.
        exec(compile("\n" * line + code, str(page), "exec"), namespace)


@pytest.mark.parametrize("name", ["README", "index", "guide"])
def test_there_is_code(name: str) -> None:
    page = next(path for path in PAGES if path.stem == name)
    assert list(blocks(page))


@EACH_PAGE
def test_links_resolve(page: Path) -> None:
    for link in LINK.findall(prose(page)):
        if link.startswith("https://"):
            continue
        file, _, heading = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        if heading:
            assert heading in {anchor(found) for found in HEADING.findall(prose(target))}, link


@EACH_PAGE
def test_every_fence_is_closed(page: Path) -> None:
    assert "```" not in prose(page)


def test_the_guide_mentions_every_parameter() -> None:
    guide = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
    parameters = {
        *inspect.signature(SmoothAPLoss.__init__).parameters,
        *inspect.signature(SmoothAPLoss.forward).parameters,
    } - {"self"}
    missing = {name for name in parameters if not re.search(rf"\b{name}\b", guide)}
    assert not missing


def test_the_guide_has_every_default() -> None:
    guide = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8").replace("−", "-")
    table = guide.partition("## Every parameter")[2]
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", table, re.MULTILINE))
    parameters = inspect.signature(SmoothAPLoss.__init__).parameters
    defaults = {
        name: "required" if p.default is p.empty else repr(p.default).replace("'", '"')
        for name, p in parameters.items()
        if name != "self"
    }
    assert {name: cell.strip("` ") for name, cell in rows.items()} == defaults


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 150


def test_the_navigation_lists_every_page() -> None:
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = set(re.findall(r"^ +- .+: (\w+\.md)$", settings, re.MULTILINE))
    assert listed == {path.name for path in PAGES[1:]}
