"""The documentation as a site: no warning, no network, nothing left out."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import tsqlora

ROOT = Path(__file__).resolve().parents[1]
BUILT_BY = ("mkdocs", "material", "mkdocstrings_handlers", "latex2mathml")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as `make docs` builds it."""
    if missing := [name for name in BUILT_BY if find_spec(name) is None]:
        pytest.skip(f"{missing} not installed: pip install '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    yield folder
    shutil.rmtree(folder)


def pages(site: Path) -> dict[str, str]:
    return {str(path.relative_to(site)): path.read_text("utf-8") for path in site.rglob("*.html")}


def test_every_page_of_docs_is_in_the_site(site: Path) -> None:
    written = {path.stem for path in (ROOT / "docs").glob("*.md")}
    assert written <= {Path(name).stem for name in pages(site)}


def test_no_page_loads_anything_from_elsewhere(site: Path) -> None:
    loads = re.compile(r'<(?:script|img|iframe)[^>]*\ssrc="(?:https?:)?//|<link[^>]*'
                       r'rel="(?:stylesheet|preconnect)"[^>]*href="(?:https?:)?//')  # fmt: skip
    assert not [name for name, page in pages(site).items() if loads.search(page)]


def test_every_formula_is_drawn_by_the_browser_itself(site: Path) -> None:
    found = pages(site)
    assert not [name for name, page in found.items() if 'class="arithmatex"' in page]
    assert "<math" in found["method.html"]


@pytest.mark.parametrize("name", sorted(tsqlora.__all__))
def test_every_public_name_is_on_the_page_of_the_api(name: str, site: Path) -> None:
    api = (site / "api.html").read_text("utf-8")
    assert f'id="tsqlora.{tsqlora._HOME[name]}.{name}"' in api
