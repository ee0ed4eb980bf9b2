"""What holds for every test: offline, one thread, deterministic, `../shared` optional."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

# Before torch and huggingface_hub are imported: both read these only once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # pytest-xdist already keeps each core busy

import pytest
from hypothesis import settings

from browser import no_browser
from tsqlora.interruption import SIGNALS

SHARED = Path(__file__).resolve().parents[2] / "shared"

settings.register_profile("deterministic", derandomize=True, deadline=None)
settings.load_profile("deterministic")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "shared: needs the data or models of ../shared")
    config.addinivalue_line("markers", "browser: needs Chromium and its driver")
    config.addinivalue_line("markers", "llama_cpp: needs llama-cpp-python and gguf")
    config.addinivalue_line("markers", "deepspeed: needs deepspeed and a C++ compiler")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = {
        "shared": "" if SHARED.is_dir() else f"{SHARED} is not there",
        "browser": no_browser(),
    }
    for item in items:
        for mark, reason in missing.items():
            if reason and mark in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder beside the clone that holds real data and models."""
    return SHARED


@pytest.fixture
def listening() -> Iterator[None]:
    """Signals are heard, as they are not in what a shell without job control put in background."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
