"""The run folder: its artefacts, written so that a crash leaves the old ones or the new ones."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tsqlora.config import RunConfig
from tsqlora.errors import RunError, TsqloraError

logger = logging.getLogger("tsqlora")

VERSION = 1
"""Of every JSON artefact; a reader refuses a newer one."""
LEAST_FREE = 50_000_000
"""Bytes that must be free before a run starts."""
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
        RunError: disk full, quota, permission, read-only file system, impossible path. Libraries
            that hide the errno (safetensors, torch) are believed to mean a full disk if it is full.
    """
    try:
        yield
    except TsqloraError:
        raise
    except Exception as error:
        reason = _REASONS.get(getattr(error, "errno", None) or 0)
        if reason is None and _free(Path(path)) < FULL:
            reason = _REASONS[errno.ENOSPC]
        if reason is None:
            raise
        raise RunError(f"Cannot write {path}: {reason}, or choose another `output`.") from error


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """A temporary name beside `path`, moved into place if the block ends well, else removed.

    Raises:
        RunError: as `os_errors`.
    """
    path = Path(path)
    temporary = _temporary(path)
    try:
        with os_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            _sync(temporary)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder beside `path`, moved into place (replacing an older one) if all goes well.

    Raises:
        RunError: as `os_errors`.
    """
    path = Path(path)
    temporary, old = _temporary(path), _temporary(path)
    try:
        with os_errors(path):
            temporary.mkdir(parents=True)
            yield temporary
            for file in filter(Path.is_file, temporary.rglob("*")):
                _sync(file)
            with suppress(FileNotFoundError):
                os.replace(path, old)
            os.replace(temporary, path)
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
        temporary.write_text(text, encoding="utf-8", newline="\n")


def atomic_write_json(path: str | Path, mapping: Mapping[str, Any]) -> None:
    """Write JSON, keys in the order given; numbers that are not finite become null.

    Raises:
        RunError: as `os_errors`.
    """
    text = json.dumps(_plain(mapping), indent=2, ensure_ascii=False, allow_nan=False)
    atomic_write_text(path, text + "\n")


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON artefact.

    Raises:
        RunError: it is missing, is not a JSON object, or was written by a newer tsqlora.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(
            f"{path} cannot be read ({error}): remove it and run its stage again."
        ) from error
    if not isinstance(found, dict):
        raise RunError(f"{path} holds no JSON object: remove it and run its stage again.")
    version = found.get("version", VERSION)
    if version != VERSION:
        raise RunError(
            f"{path} has version {version}, this tsqlora reads {VERSION}: upgrade tsqlora."
        )
    return found


def append_line(path: str | Path, mapping: Mapping[str, Any]) -> None:
    """Append a line of JSON and see it on the disk; a half-written last line is cut off first.

    Raises:
        RunError: as `os_errors`.
    """
    line = json.dumps(_plain(mapping), ensure_ascii=False, allow_nan=False) + "\n"
    with os_errors(path), open(path, "a+b") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


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


def truncate_lines(path: str | Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Keep only the lines for which `keep` is true, such as those up to a resumed step.

    Raises:
        RunError: as `read_lines` and `os_errors`.
    """
    if Path(path).exists():
        kept = [
            json.dumps(line, ensure_ascii=False) + "\n" for line in read_lines(path) if keep(line)
        ]
        atomic_write_text(path, "".join(kept))


def digest(*parts: object) -> str:
    """SHA-256 of JSON-able parts, the same on every machine; the order of keys does not count."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class RunFolder:
    """Where a run keeps its artefacts, and which of its stages are done."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved configuration, which replays the run."""
        return self.path / "config.yaml"

    @property
    def scores(self) -> Path:
        """`QualityScores`, a row a sample."""
        return self.path / "scores.parquet"

    @property
    def sensitivity(self) -> Path:
        """`LayerSensitivity`."""
        return self.path / "sensitivity.json"

    @property
    def plan(self) -> Path:
        """`RankPlan`."""
        return self.path / "plan.json"

    @property
    def ranks(self) -> Path:
        """A line a reallocation."""
        return self.path / "ranks.jsonl"

    @property
    def metrics(self) -> Path:
        """Metrics by split, and the cost."""
        return self.path / "metrics.json"

    @property
    def checkpoints(self) -> Path:
        """What is needed to resume."""
        return self.path / "checkpoints"

    @property
    def warmup(self) -> Path:
        """The briefly adapted model's factors."""
        return self.checkpoints / "warmup"

    @property
    def training(self) -> Path:
        """The Trainer's checkpoints."""
        return self.checkpoints / "train"

    @property
    def adapter(self) -> Path:
        """The finished adapter."""
        return self.path / "adapter"

    @property
    def task(self) -> Path:
        """What the task learnt from the training data, such as its labels."""
        return self.path / "task.json"

    @property
    def train_log(self) -> Path:
        """A line a logged training step."""
        return self.path / "train_log.jsonl"

    @property
    def report(self) -> Path:
        """The report."""
        return self.path / "report.html"

    @property
    def stages(self) -> Path:
        """Which stages are done, and on which inputs."""
        return self.path / "stages.json"

    @classmethod
    def create(cls, path: str | Path, config: RunConfig, resume: bool = False) -> RunFolder:
        """Start a run, or go on with the one of the same configuration.

        An absent or empty folder becomes a new run. A run of the same configuration goes on; if its
        training has begun, only with `resume`.

        Raises:
            RunError: the folder holds a run of another configuration, a run whose training has begun
                (without `resume`), or something else; or nothing can be written there.
        """
        run = cls(Path(path).expanduser())
        with os_errors(run.path):
            if run.path.exists() and not run.path.is_dir():
                raise RunError(f"{run.path} is a file, not a folder: choose another `output`.")
            run.path.mkdir(parents=True, exist_ok=True)
            run._check_room()
            if run.config.exists():
                run._check_same(config)
                run._check_begun(resume)
            elif any(not _is_temporary(entry) for entry in run.path.iterdir()):
                raise RunError(
                    f"{run.path} is not empty and holds no run (no config.yaml): choose another "
                    "`output`, or empty the folder."
                )
            else:
                atomic_write_text(run.config, config.to_yaml())
        return run

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """A run that is there already.

        Raises:
            RunError: there is none.
        """
        run = cls(Path(path).expanduser())
        if not run.config.is_file():
            what = "holds no config.yaml" if run.path.is_dir() else "is not a folder"
            raise RunError(
                f"{run.path} is not a run ({what}): give the `output` of a `tsqlora train`."
            )
        return run

    def load_config(self) -> RunConfig:
        """The configuration of this run.

        Raises:
            ConfigError: `config.yaml` has been broken.
        """
        return RunConfig.from_yaml(self.config)

    def is_done(self, stage: str, inputs: str, outputs: Sequence[Path]) -> bool:
        """Whether `stage` was finished on these inputs (a digest) and all it wrote is still there."""
        return self._done().get(stage) == inputs and all(output.exists() for output in outputs)

    def mark_done(self, stage: str, inputs: str) -> None:
        """Note that `stage` is finished on these inputs."""
        stages = {**self._done(), stage: inputs}
        atomic_write_json(self.stages, {"version": VERSION, "stages": stages})

    def update_metrics(self, sections: Mapping[str, Mapping[str, Any]]) -> None:
        """Merge sections (`base`, `validation`, `test`, `cost`) into `metrics.json`, key by key.

        Raises:
            RunError: what is there cannot be read, or nothing can be written.
        """
        merged = read_json(self.metrics) if self.metrics.exists() else {}
        for name, section in sections.items():
            merged[name] = {**merged.get(name, {}), **section}
        atomic_write_json(self.metrics, {"version": VERSION, **merged})

    def _done(self) -> dict[str, str]:
        if not self.stages.exists():
            return {}
        try:
            return dict(read_json(self.stages)["stages"])
        except (RunError, KeyError, TypeError, ValueError) as error:
            logger.warning(
                "%s cannot be used (%s): every stage counts as not done.", self.stages, error
            )
            return {}

    def _check_room(self) -> None:
        free = _free(self.path)
        if free < LEAST_FREE:
            raise RunError(
                f"Only {free / 1e6:.0f} MB are free for {self.path}, a run needs at least "
                f"{LEAST_FREE / 1e6:.0f} MB: make room, or choose another `output`."
            )
        probe = _temporary(self.path / "probe")
        probe.touch()
        probe.unlink()

    def _check_same(self, config: RunConfig) -> None:
        there, wanted = _flat(self.load_config().to_dict()), _flat(config.to_dict())
        keys = [key for key in {**there, **wanted} if key != "output"]
        changes = [
            f"{key}: {there.get(key)} -> {wanted.get(key)}"
            for key in keys
            if there.get(key) != wanted.get(key)
        ]
        if changes:
            more = f" and {len(changes) - 5} more" if len(changes) > 5 else ""
            raise RunError(
                f"{self.path} holds a run of another configuration ({'; '.join(changes[:5])}{more}): "
                "choose another `output`, or go back to that configuration."
            )

    def _check_begun(self, resume: bool) -> None:
        if not resume and (self.training.exists() or self.adapter.exists()):
            state = "is finished" if self.adapter.exists() else "has begun"
            raise RunError(
                f"Training in {self.path} {state}: --resume goes on with it, another `output` starts "
                "a new run."
            )


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def _is_temporary(path: Path) -> bool:
    return path.name.startswith(".") and path.name.endswith(".tmp")


def _sync(file: Path) -> None:
    with file.open("rb+") as opened:
        os.fsync(opened.fileno())


def _free(path: Path) -> float:
    """Bytes free where `path` is or would be; infinity if nobody can tell."""
    for place in (path, *path.absolute().parents):
        with suppress(OSError):
            return shutil.disk_usage(place).free
    return math.inf


def _line(path: str | Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        return dict(json.loads(line))
    except (ValueError, TypeError) as error:
        raise RunError(f"{path}, line {number} is not a JSON object: remove the line.") from error


def _flat(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{name}."))
        else:
            flat[name] = _plain(value)
    return flat


def _plain(value: Any) -> Any:
    """What JSON can hold: NumPy values as Python's, tuples as lists, not-finite numbers as None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return _plain(value.tolist()) if hasattr(value, "tolist") else value
