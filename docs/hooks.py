"""What mkdocs does besides: files outside docs/ that pages link to, and formulas as MathML."""

from __future__ import annotations

import html
import posixpath
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = ("benchmarks/*.md", "benchmarks/results/*.[!m]*", "CHANGELOG.md", "CONTRIBUTING.md")
"""Put into the site under the names that they have in the repository, with `EXAMPLES`."""
EXAMPLES = "examples/*.*"
FOLDERS = {"benchmarks": "benchmarks/README.md", "examples": "docs/adoption.md"}
"""The page on a folder."""

_LINK = re.compile(r"(\]\()([^)\s:#]+)((?:#[^)\s]*)?\))")
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Add what lies outside docs/."""
    for pattern in (*OUTSIDE, EXAMPLES):
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links as the repository has them become links within the site."""
    source = page.file.src_uri
    inside = (ROOT / "docs" / source).exists()
    here = posixpath.dirname(f"docs/{source}" if inside else source)

    def moved(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(here, link[2]))
        target = FOLDERS.get(target, target).removeprefix("docs/")
        return link[1] + posixpath.relpath(target, posixpath.dirname(source) or ".") + link[3]

    return _LINK.sub(moved, markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Formulas need neither JavaScript nor a network: browsers draw MathML themselves."""

    def drawn(found: re.Match[str]) -> str:
        display = "block" if found[1] == "div" else "inline"
        return convert(html.unescape(found[2]).strip(), display=display)

    return _FORMULA.sub(drawn, content)
