"""What mkdocs does beyond its plugins: formulas, and pages made from files of the repository.

Formulas become MathML while the site is built, so that pages need no script and no font for them.
"""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES_OF_FILES = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}

# What arithmatex makes of $…$ and $$…$$.
FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<latex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that live at the root of the repository, their links as seen from here."""
    for page, source in PAGES_OF_FILES.items():
        text = (ROOT / source).read_text(encoding="utf-8").replace("](docs/", "](")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_content(page_html: str, **_: Any) -> str:
    """Formulas as MathML."""
    return FORMULA.sub(_mathml, page_html)


def _mathml(formula: re.Match[str]) -> str:
    latex = html.unescape(formula["latex"]).strip()
    if formula["tag"] == "span":
        return convert(latex)
    return f'<div class="formula">{convert(latex, display="block")}</div>'
