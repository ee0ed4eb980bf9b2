"""Files written so that a crash leaves the old ones or the new ones, and read with clear errors."""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import logging
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from tsqlora.errors import RunError, TsqloraError

logger = logging.getLogger("tsqlora")

VERSION = 1
"""Of every JSON artefact; a reader refuses a newer one."""
FULL = 1_000_000
"""A disk with fewer bytes free is called full, whatever the library that failed says."""

_REASONS = {
    errno.ENOSPC: "there is no space left on the disk; make room",
    errno.EDQUOT: "the disk quota is used up; make room",
    errno.EACCES: "there is no permission to write there; change it",
    errno.EPERM: "writing there is not permitted; change that",
    errno.EROFS: "the file system is read-only; remount it",
    errno.ENOTDIR: "a part of the path is a file, not a folder; move that file",
    errno.ENAMETOOLONG: "the name is too long; shorten it",
}


@contextmanager
def os_errors(path: str | Path) -> Iterator[None]:
    """Turn what the disk refuses while writing to `path` into a message with its remedy.

    Raises:
        RunError: disk full, quota, permission, read-only file system, impossible path. Of libraries
            that hide the errno, safetensors has it in its words; torch is believed to mean a full
            disk if it is full.
    """
    try:
        yield
    except TsqloraError:
        raise
    except Exception as error:
        hidden = re.search(r"(?:os error|errno) (\d+)", str(error), re.IGNORECASE)
        code = getattr(error, "errno", None) or (int(hidden[1]) if hidden else 0)
        reason = _REASONS.get(code)
        if reason is None and free_bytes(path) < FULL:
            reason = _REASONS[errno.ENOSPC]
        if reason is None:
            raise
        where = getattr(error, "filename", None) or path
        raise RunError(f"Cannot write {where}: {reason}, or choose another `output`.") from error


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """A temporary name beside `path`, moved into place if the block ends well, else removed.

    Raises:
        RunError: as `os_errors`.
    """
    path = Path(path)
    temporary = temporary_name(path)
    try:
        with os_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder beside `path`, moved into place (replacing an older one) if all goes well.

    Raises:
        RunError: as `os_errors`.
    """
    path = Path(path)
    temporary, old = temporary_name(path), temporary_name(path)
    try:
        with os_errors(path):
            temporary.mkdir(parents=True)
            yield temporary
            for written in (*temporary.rglob("*"), temporary):
                sync(written)
            with suppress(FileNotFoundError):
                os.replace(path, old)
            os.replace(temporary, path)
            sync(path.parent)
    finally:
        if old.exists() and not path.exists():
            os.replace(old, path)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def atomic_write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text so that a reader sees all of it or what was there before.

    Raises:
        RunError: as `os_errors`.
    """
    with atomic_file(path) as temporary:
        temporary.write_bytes(text.encode())


def atomic_write_json(path: str | Path, mapping: Mapping[str, Any]) -> None:
    """Write JSON, keys in the order given; numbers that are not finite become null.

    Raises:
        RunError: as `os_errors`.
    """
    text = json.dumps(plain(mapping), indent=2, ensure_ascii=False, allow_nan=False)
    atomic_write_text(path, text + "\n")


def atomic_write_lines(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write JSON Lines.

    Raises:
        RunError: as `os_errors`.
    """
    atomic_write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON artefact.

    Raises:
        RunError: it is missing, is not a JSON object, or was written by a newer tsqlora.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read ({error}): run its stage again.") from error
    if not isinstance(found, dict):
        raise RunError(f"{path} holds no JSON object: run its stage again.")
    version = found.get("version", VERSION)
    if version != VERSION:
        raise RunError(
            f"{path} has version {version}, this tsqlora reads {VERSION}: upgrade tsqlora."
        )
    return found


def read_lines(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a JSONL artefact; none where there is no file, and no half-written last one.

    Raises:
        RunError: another line is not a JSON object.
    """
    if not Path(path).exists():
        return []
    *lines, rest = Path(path).read_bytes().split(b"\n")
    if rest:
        logger.warning("%s: the last line was cut off while being written and is left out.", path)
    return [_line(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]


def digest(*parts: object) -> str:
    """SHA-256 of JSON-able parts, the same on every machine; the order of keys does not count."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def plain(value: Any) -> Any:
    """What JSON can hold: NumPy values as Python's, tuples as lists, not-finite numbers as None."""
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return plain(value.tolist()) if hasattr(value, "tolist") else value


def free_bytes(path: str | Path) -> float:
    """Bytes free where `path` is or would be; infinity if nobody can tell."""
    for place in (Path(path), *Path(path).absolute().parents):
        with suppress(OSError):
            return shutil.disk_usage(place).free
    return math.inf


def temporary_name(path: Path) -> Path:
    """A hidden name beside `path` that nobody else uses."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def is_temporary(path: Path) -> bool:
    """Whether `temporary_name` gave the name: what a killed process may leave."""
    return path.name.startswith(".") and path.name.endswith(".tmp")


def prepare_folder(folder: Path, inputs: str) -> None:
    """Keep what is in `folder` if it was made of the same `inputs` (a digest), else clear it, which
    is told.

    Raises:
        RunError: as `os_errors`.
    """
    note = folder / "inputs.json"
    try:
        same = read_json(note).get("inputs") == inputs
    except RunError:
        same = False
    if not same:
        if note.exists():
            logger.warning("%s is of other data or settings, and is made again.", folder)
        remove(folder)
        atomic_write_json(note, {"inputs": inputs})


def remove_temporaries(folder: Path, of: str = "") -> None:
    """Remove what killed processes left in `folder` and below; `of` one name in it, if given."""
    named = folder.glob(f".{glob.escape(of)}.*.tmp") if of else folder.rglob(".*.tmp")
    for left in list(named):
        remove(left)


def remove(path: Path) -> None:
    """Remove a file or a folder, which goes under another name first: none is ever half there.

    Raises:
        RunError: as `os_errors`.
    """
    with os_errors(path), suppress(FileNotFoundError):
        if not path.is_dir() or path.is_symlink():
            path.unlink()
            return
        gone = path if is_temporary(path) else temporary_name(path)
        os.replace(path, gone)
        shutil.rmtree(gone, ignore_errors=True)


def sync(path: Path) -> None:
    """See a file, or the names in a folder, on the disk, where the file system can do that.

    After a power cut, what was renamed later is then never there without what was renamed before.
    """
    with suppress(OSError) if path.is_dir() else nullcontext():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _line(path: str | Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        return dict(json.loads(line))
    except (ValueError, TypeError) as error:
        raise RunError(f"{path}, line {number} is not a JSON object: remove the line.") from error
