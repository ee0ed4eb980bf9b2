"""The run folder: what lies where, whose run it is, and which stages are done."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tsqlora.artefacts import (
    VERSION,
    atomic_write_json,
    atomic_write_text,
    free_bytes,
    is_temporary,
    os_errors,
    plain,
    read_json,
    remove_temporaries,
    temporary_name,
)
from tsqlora.config import RunConfig
from tsqlora.errors import ConfigError, RunError

logger = logging.getLogger("tsqlora")

LEAST_FREE = 50_000_000
"""Bytes that must be free before a run starts."""
NAMED = 5
"""At most so many differences are named."""


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
    def ranked(self) -> Path:
        """The scores for a spreadsheet, the likely wrong rows first."""
        return self.path / "ranked.csv"

    @property
    def sensitivity(self) -> Path:
        """`LayerSensitivity`."""
        return self.path / "sensitivity.json"

    @property
    def directions(self) -> Path:
        """The directions of `LayerSensitivity`."""
        return self.path / "sensitivity.safetensors"

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
    def adapting(self) -> Path:
        """The checkpoints of the brief adaptation while it goes on."""
        return self.checkpoints / "adaptation"

    @property
    def encoded(self) -> Path:
        """The pool as the model takes it; made again where it is gone."""
        return self.checkpoints / "encoded"

    @property
    def measured(self) -> Path:
        """What is measured of the samples while they are being scored."""
        return self.checkpoints / "scores"

    @property
    def training(self) -> Path:
        """The Trainer's checkpoints."""
        return self.checkpoints / "train"

    @property
    def untrained(self) -> Path:
        """The plan as an adapter that is not trained yet."""
        return self.path / "untrained"

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
    def tensorboard(self) -> Path:
        """The events of the training, with `training.report_to: tensorboard`."""
        return self.path / "tensorboard"

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

        An absent or empty folder becomes a new run, as does one that holds only the configuration
        (and the cost so far) of a run that ended before its first artefact. A run of the same
        configuration goes on; if its training has begun, only with `resume`.

        Raises:
            RunError: the folder holds another configuration's run, one whose training has begun
                (without `resume`), or something else; or nothing can be written there.
        """
        run = cls(Path(path).expanduser())
        with os_errors(run.path):
            if run.path.exists() and not run.path.is_dir():
                raise RunError(f"{run.path} is a file, not a folder: choose another `output`.")
            run.path.mkdir(parents=True, exist_ok=True)
            remove_temporaries(run.path)
            run._check_room()
            if run.config.exists() and not run._without_artefacts():
                run._check_same(config)
                run._check_begun(resume)
            elif run._entries() and not run._without_artefacts():
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
                f"{run.path} is no run ({what}): give the `output` of a `tsqlora train`."
            )
        return run

    def load_config(self) -> RunConfig:
        """The configuration of this run.

        Raises:
            ConfigError: `config.yaml` has been broken.
        """
        return RunConfig.from_yaml(self.config)

    def is_done(self, stage: str, inputs: str, outputs: Sequence[Path]) -> bool:
        """Whether `stage` was finished on these inputs (a digest), and its outputs are there."""
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
        merged: dict[str, Any] = {"version": VERSION}
        if self.metrics.exists():
            merged = read_json(self.metrics)
        for name, section in sections.items():
            merged[name] = {**merged.get(name, {}), **section}
        atomic_write_json(self.metrics, merged)

    def _done(self) -> dict[str, str]:
        if not self.stages.exists():
            return {}
        try:
            return dict(read_json(self.stages)["stages"])
        except (RunError, KeyError, TypeError, ValueError) as error:
            logger.warning("%s is broken (%s): every stage counts as not done.", self.stages, error)
            return {}

    def _entries(self) -> set[str]:
        names = {entry.name for entry in self.path.iterdir() if not is_temporary(entry)}
        if self.checkpoints.exists() and {*self.checkpoints.iterdir()} <= {self.encoded}:
            names.discard(self.checkpoints.name)  # no artefact of a stage
        return names

    def _without_artefacts(self) -> bool:
        """Whether there is only the resolved configuration and the cost; not one typed by hand."""
        if not self.config.exists() or self._entries() - {self.config.name, self.metrics.name}:
            return False
        with suppress(ConfigError):
            return self.config.read_bytes() == self.load_config().to_yaml().encode()
        return False

    def _check_room(self) -> None:
        free = free_bytes(self.path)
        if free < LEAST_FREE:
            raise RunError(
                f"Only {free / 1e6:.0f} MB are free for {self.path}, a run needs at least "
                f"{LEAST_FREE / 1e6:.0f} MB: make room, or choose another `output`."
            )
        probe = temporary_name(self.path / "probe")
        probe.touch()
        probe.unlink()

    def _check_same(self, config: RunConfig) -> None:
        there, wanted = _flat(self.load_config().to_dict()), _flat(config.to_dict())
        changes = [
            f"{key}: {there.get(key)} -> {wanted.get(key)}"
            for key in {**there, **wanted}
            if key != "output" and there.get(key) != wanted.get(key)
        ]
        if changes:
            more = f"; {len(changes) - NAMED} more" if len(changes) > NAMED else ""
            raise RunError(
                f"{self.path} holds a run of another configuration "
                f"({'; '.join(changes[:NAMED])}{more}): choose another `output`, or go back to "
                "that configuration."
            )

    def _check_begun(self, resume: bool) -> None:
        if not resume and (self.training.exists() or self.adapter.exists()):
            state = "is finished" if self.adapter.exists() else "has begun"
            raise RunError(
                f"Training in {self.path} {state}: --resume goes on with it, another `output` "
                "starts a new run."
            )


def _flat(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{name}."))
        else:
            flat[name] = plain(value)
    return flat
