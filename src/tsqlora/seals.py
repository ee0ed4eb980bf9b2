"""A folder's seal, written last: tells what is whole from what was cut off or has changed since."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

from tsqlora.artefacts import atomic_write_json, is_temporary, sync

SEAL = "sealed.json"
BLOCK = 1 << 20


def seal(folder: str | Path) -> None:
    """See every file of the folder, of whatever kind, on the disk and note its size and CRC-32.

    Raises:
        RunError: nothing can be written.
    """
    folder = Path(folder)
    notes = {}
    for file in _files(folder):
        sync(file)
        notes[file.relative_to(folder).as_posix()] = [file.stat().st_size, checksum(file)]
    atomic_write_json(folder / SEAL, {"files": notes})


def why_broken(folder: str | Path) -> str | None:
    """What differs from the folder's seal, or None where all is as it was sealed."""
    folder = Path(folder)
    if not (folder / SEAL).is_file():
        return "it was cut off while being written"
    try:
        notes = json.loads((folder / SEAL).read_text(encoding="utf-8"))["files"]
        for name, (size, expected) in notes.items():
            file = folder / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != size:
                return f"{name} has {file.stat().st_size} bytes instead of {size}"
            if checksum(file) != expected:
                return f"{name} is not what was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"it cannot be read ({error})"
    return None


def checksum(file: Path) -> int:
    """The CRC-32 of a file's bytes."""
    value = 0
    with file.open("rb") as opened:
        while block := opened.read(BLOCK):
            value = zlib.crc32(block, value)
    return value


def _files(folder: Path) -> list[Path]:
    files = (file for file in folder.rglob("*") if file.is_file() and file != folder / SEAL)
    return sorted(file for file in files if not is_temporary(file))
