"""The wheel: all of the package is in it, and it runs from there alone."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from email.parser import Parser
from importlib.util import find_spec
from pathlib import Path

import pytest

import tsqlora
from test_cli import VERBS

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "tsqlora"
BUILT_FROM = ("pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, by the setuptools that is here, offline."""
    folder = tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "src", *BUILT_FROM],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    if listed.returncode or find_spec("setuptools") is None:
        pytest.skip("no git checkout, or no setuptools")
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).exists():
            copy = folder / "source" / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes((ROOT / name).read_bytes())
    build = [sys.executable, "-c", "from setuptools import build_meta as b; b.build_wheel('out')"]
    (folder / "source/out").mkdir()
    subprocess.run(build, cwd=folder / "source", check=True, capture_output=True)
    (made,) = (folder / "source/out").glob("*.whl")
    return made


@pytest.fixture(scope="module")
def unpacked(wheel: Path) -> Path:
    """What pip would put into site-packages."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(wheel.parent / "site")
    return wheel.parent / "site"


def test_every_file_of_the_package_is_in_the_wheel_and_nothing_else(unpacked: Path) -> None:
    def files(folder: Path) -> set[str]:
        found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
        return {str(path) for path in found if "__pycache__" not in path.parts}

    assert files(unpacked / "tsqlora") == files(PACKAGE)
    assert {path.name for path in unpacked.iterdir()} == {
        "tsqlora",
        f"tsqlora-{tsqlora.__version__}.dist-info",
    }


def test_what_is_no_python_is_in_the_wheel(unpacked: Path) -> None:
    assert (unpacked / "tsqlora/py.typed").is_file()
    assert list((unpacked / "tsqlora/templates").iterdir())


def test_the_wheel_says_what_it_is(unpacked: Path) -> None:
    (folder,) = unpacked.glob("*.dist-info")
    told = Parser().parsestr((folder / "METADATA").read_text(encoding="utf-8"))
    assert told["Version"] == tsqlora.__version__
    assert told["License-Expression"] == "Apache-2.0"
    assert (folder / "licenses/LICENSE").is_file()
    assert "tsqlora = tsqlora.cli:main" in (folder / "entry_points.txt").read_text()


def run(unpacked: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m tsqlora` from the wheel, where no source lies near."""
    return subprocess.run(
        [sys.executable, "-m", "tsqlora", *arguments],
        cwd=unpacked.parent,
        env={
            **os.environ,
            "PYTHONPATH": f"{unpacked}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        },
        capture_output=True,
        text=True,
    )


def test_the_wheel_runs_as_a_module(unpacked: Path) -> None:
    assert run(unpacked, "--version").stdout == f"tsqlora {tsqlora.__version__}\n"
    helped = run(unpacked, "demo", "--help")
    assert helped.returncode == 0
    assert "usage: tsqlora demo" in helped.stdout


def test_no_verb_shows_the_help_and_is_the_users_mistake(unpacked: Path) -> None:
    done = run(unpacked)
    assert (done.returncode, done.stdout) == (2, "")
    assert "usage: tsqlora" in done.stderr
    assert all(f"    {verb}" in done.stderr for verb in VERBS)
