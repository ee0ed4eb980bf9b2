"""What a page carries, as little text as it can unpack: gzip in base64, numbers in two bytes.

Base64 holds nothing that HTML could take for markup, whatever was packed.
"""

from __future__ import annotations

import base64
import gzip
import json
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Packed:
    """A piece of a page: its name, how its bytes are to be read, and the base64 of their gzip.

    Attributes:
        kind: text, json, or numbers in planes of bytes, the highest first: u8, u16, u32, f16.
        scale: a number is what was read times 2 to this.
    """

    name: str
    kind: str
    text: str
    scale: int = 0


def packed_text(name: str, text: str) -> Packed:
    """UTF-8; what cannot be written in it (half a surrogate pair) is a question mark."""
    return Packed(name, "text", _packed(text.encode("utf-8", "replace")))


def packed_json(name: str, value: Any) -> Packed:
    """Plain types; numbers that are not finite are null."""
    text = json.dumps(_finite(value), ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return Packed(name, "json", _packed(text.encode("ascii")))


def packed_integers(name: str, values: np.ndarray) -> Packed:
    """Whole numbers from 0 up in as few bytes as the largest takes."""
    most = int(values.max(initial=0))
    size = 1 if most < 2**8 else 2 if most < 2**16 else 4
    return Packed(name, f"u{8 * size}", _packed(_planes(values.astype(f">u{size}"))))


def packed_floats(name: str, values: np.ndarray) -> Packed:
    """Three digits and more, as half precision times a power of two; NaN stays NaN."""
    finite = np.abs(values[np.isfinite(values)])
    most = float(finite.max(initial=0.0))
    scale = int(np.frexp(most)[1]) - 15 if most else 0
    halves = np.ldexp(values.astype(np.float64), -scale).astype(">f2")
    return Packed(name, "f16", _packed(_planes(halves)), scale)


def _planes(values: np.ndarray) -> bytes:
    """All first bytes, then all second ones, and so on: alike ones side by side."""
    return values.view(np.uint8).reshape(len(values), values.itemsize).T.tobytes()


def _packed(data: bytes) -> str:
    return base64.b64encode(gzip.compress(data, 9, mtime=0)).decode()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
