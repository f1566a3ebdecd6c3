"""What mkdocs does beyond its plugins: formulas, and pages made from files of the repository.

Formulas become MathML while the site is built, so that pages need no script and no font for them.
"""

from __future__ import annotations

import html
import logging
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PAGES_OF_FILES = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}

log = logging.getLogger("mkdocs.plugins.site")  # a warning fails `mkdocs build --strict`

# What arithmatex makes of $…$ and $$…$$.
FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<latex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL
)

# What a browser fetches by itself, where that is at another host; `<a>` it does not.
FETCHED = re.compile(
    r'<(?:script|img|source|iframe|video|audio|link(?! rel="canonical"))\b'
    r'[^>]*?\b(?:src|srcset|href)="((?:https?:)?//[^"]*)'
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


def on_post_page(output: str, page: Page, **_: Any) -> str:
    """Refuse pages that need another host."""
    for address in FETCHED.findall(output):
        log.warning("%s would fetch %s", page.file.src_uri, address)
    return output


def _mathml(formula: re.Match[str]) -> str:
    latex = html.unescape(formula["latex"]).strip()
    is_block = formula["tag"] == "div"
    mathml = convert(latex, display="block" if is_block else "inline")
    if "\\" in mathml:
        log.warning("a command is not known in the formula %s", latex)
    return f'<div class="formula">{mathml}</div>' if is_block else mathml
