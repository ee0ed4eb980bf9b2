"""Runs that are killed at random moments and resumed, against one that never was (`make chaos`).

    python tests/chaos.py --kills 25 --seed 0

Killed by the clock, just before what changes the run folder (a file opened for writing, a rename,
a removal, what Rust and C++ write), or halfway through a file's bytes: the kernel ends the process
at the first byte past a limit (RLIMIT_FSIZE), whoever writes it. One in three is killed once more
while it is resumed. All processes are forks of this one, which has imported everything.
"""

from __future__ import annotations

import os

os.environ.update(
    dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
)

import argparse
import importlib
import json
import random
import resource
import select
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import safetensors.numpy
import safetensors.torch
import torch
from tqdm import tqdm

from runs import causal_run, classification_run
from tsqlora import pipeline, scoring
from tsqlora.artefacts import is_temporary
from tsqlora.cli import main

BY_STEPS = {"training.save_strategy": "steps", "training.save_steps": 3}
CONFIGURATIONS: dict[str, tuple[Callable[..., Path], dict[str, Any]]] = {
    "best": (
        classification_run,
        {
            **BY_STEPS,
            "training.eval_strategy": "steps",
            "training.eval_steps": 3,
            "training.load_best_model_at_end": True,
            "training.greater_is_better": True,  # so that it is not the last
            "quality.reference": "validation",
        },
    ),
    "generation": (
        causal_run,
        {
            **BY_STEPS,
            "training.save_total_limit": 1,
            "training.max_steps": 7,  # in the middle of the third epoch
            "training.gradient_accumulation_steps": 2,
            "training.train_sampling_strategy": "group_by_length",
            "adapter.dropout": 0.1,
            "adapter.modules_to_save": ["lm_head"],
        },
    ),
    "compact": (
        classification_run,
        {
            "training.save_strategy": "epoch",
            "training.num_train_epochs": 4,
            "ranks.compact": True,
            "quality.weights.loss_reduction": 0.0,
            "quality.adapt_steps": 7,
        },
    ),
    "online": (
        classification_run,
        {
            **BY_STEPS,
            "quality.mode": "online",
            "quality.weights.loss_reduction": None,
            "training.num_train_epochs": 3,
        },
    ),
    "unsaved": (classification_run, {"training.save_strategy": "no", "ranks.dynamic": False}),
}
SAMPLES = 96
COMPARED = (
    "scores.parquet",
    "sensitivity.json",
    "sensitivity.safetensors",
    "plan.json",
    "ranks.jsonl",
    "task.json",
)
PATIENCE = 300
"""Seconds after which a process hangs."""


@dataclass
class Trap:
    """Watches what changes the folder `root`; ends the process at event `at`, if there is one.

    With a `limit` it is not that event that ends it but the first byte at that offset of any file
    written from then on.
    """

    root: str
    at: int = -1
    limit: int | None = None
    seen: list[str] = field(default_factory=list)

    def set(self) -> None:
        """Begin to watch."""
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it
        sys.addaudithook(self._audit)
        for place, name in (
            (torch, "save"),
            (safetensors.torch, "serialize_file"),
            (safetensors.numpy, "serialize_file"),
            (pq, "write_table"),
            (pq.ParquetWriter, "write_table"),
        ):
            setattr(place, name, self._watched(getattr(place, name), name))

    def _watched(self, write: Callable[..., Any], name: str) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            named = [*args, *(getattr(each, "where", None) for each in args)]
            where = next((str(a) for a in named if isinstance(a, (str, Path))), "")
            self._event(f"before {name}", where)
            result = write(*args, **kwargs)
            self._event(f"after {name}", where)
            return result

        return watched

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = args
            if isinstance(path, (str, bytes, os.PathLike)) and flags & (os.O_WRONLY | os.O_RDWR):
                self._event("open", os.fsdecode(path))
        elif event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"):
            inside = args[-1] not in (-1, None) and event != "os.rename"  # in a removed folder
            self._event(event, self.root if inside else os.fsdecode(args[0]))

    def _event(self, event: str, path: str) -> None:
        if not path.startswith(self.root):
            return
        if len(self.seen) == self.at:
            if self.limit is None:
                os.kill(os.getpid(), signal.SIGKILL)
            _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, most))
        self.seen.append(f"{event} {path.removeprefix(self.root)}")


@dataclass(frozen=True)
class Ended:
    """How a process ended: its status (negative: the signal), seconds, and what it said."""

    status: int
    seconds: float
    said: str


def attempt(commands: list[list[str]], trap: Trap, notes: Path, after: float | None) -> Ended:
    """Commands of `tsqlora` one after the other in a forked process, killed `after` seconds."""
    read, write = os.pipe()
    started = time.monotonic()
    process = os.fork()
    if process == 0:
        os.close(read)
        _child(commands, trap, notes, write)
    os.close(write)
    said, killed, deadline = bytearray(), False, started + (after or PATIENCE)
    while True:
        ready, _, _ = select.select([read], [], [], max(0.0, deadline - time.monotonic()))
        if ready:
            block = os.read(read, 1 << 16)
            if not block:
                break
            said += block
        elif not killed:
            killed = True
            os.kill(process, signal.SIGKILL)
            deadline = time.monotonic() + PATIENCE
    os.close(read)
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    return Ended(status, time.monotonic() - started, said.decode(errors="replace"))


def _child(commands: list[list[str]], trap: Trap, notes: Path, output: int) -> None:
    status = 1
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        torch.set_num_threads(1)
        scoring.PART = 2
        trap.set()
        for command in commands:
            status = main(command)
            if status:
                break
        found = {"events": trap.seen, "modules": list(sys.modules)}
        notes.write_text(json.dumps(found), encoding="utf-8")
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def differences(whole: Path, resumed: Path) -> list[str]:
    """What is not the same in two run folders that should be, and what should not be there."""
    found = [
        str(name)
        for name in sorted(_names(whole) | _names(resumed))
        if _bytes(whole / name) != _bytes(resumed / name)
    ]
    if _figures(whole) != _figures(resumed):
        found.append(f"metrics.json: {_figures(whole)} and {_figures(resumed)}")
    left = [p for p in resumed.rglob("*") if is_temporary(p)]
    left += [resumed / "checkpoints" / name for name in ("scores", "adaptation")]
    return found + [f"{path} is left" for path in left if path.exists()]


def _names(run: Path) -> set[Path]:
    adapter = {p.relative_to(run) for p in (run / "adapter").rglob("*") if p.is_file()}
    return adapter | {Path(name) for name in COMPARED}


def _bytes(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _figures(run: Path) -> Any:
    """`metrics.json` but for seconds and memory."""

    def without(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        kept = (k for k in value if "seconds" not in k and k != "peak_memory_bytes")
        return {k: without(value[k]) for k in kept}

    return without(json.loads((run / "metrics.json").read_text(encoding="utf-8")))


class Chaos:
    """One configuration: the run that is left alone, then those that are not."""

    def __init__(self, name: str, folder: Path, random: random.Random) -> None:
        self.folder, self.random = folder, random
        self.make, self.changes = CONFIGURATIONS[name]
        folder.mkdir()
        self.whole = folder / "whole"
        self.notes = folder / "notes.json"
        ended = self._attempt(self.whole, ["train"])
        if ended.status:
            raise SystemExit(f"{name}: the run that was left alone failed:\n{ended.said}")
        self.seconds = ended.seconds
        found = json.loads(self.notes.read_text(encoding="utf-8"))
        self.events: list[str] = found["events"]
        for module in found["modules"]:
            with suppress(ImportError):
                importlib.import_module(module)

    def kill(self, number: int) -> tuple[str, list[str]]:
        """Kill a run, now and then twice, and resume it: (where it was killed, what is wrong)."""
        run = self.folder / str(number)
        first = [] if self.changes.get("quality.mode") == "online" else ["score"]
        verbs = self.random.choice([["train"], ["train"], [*first, "plan", "train"]])
        where, spent = [], 0.0
        for _ in range(1 + (self.random.random() < 1 / 3)):
            trap, after, words = self._moment(run)
            ended = self._attempt(run, verbs, trap, after)
            spent += ended.seconds
            where.append(words if ended.status else "not reached")
            if ended.status not in (0, -signal.SIGKILL, -signal.SIGXFSZ):
                return " then ".join(where), [f"status {ended.status}:\n{ended.said}"]
        ended = self._attempt(run, ["train"])
        if ended.status:
            return " then ".join(where), [f"resumed, status {ended.status}:\n{ended.said}"]
        wrong = differences(self.whole, run)
        cost = json.loads((run / "metrics.json").read_text(encoding="utf-8"))["cost"]
        if cost["scoring_seconds"] + cost["training_seconds"] > spent + ended.seconds:
            wrong.append(f"it costs more seconds than {spent + ended.seconds:.1f}: {cost}")
        return " then ".join(where), wrong and [ended.said, *wrong]

    def _moment(self, run: Path) -> tuple[Trap, float | None, str]:
        """When to kill: by the clock, at an event, or in the middle of the bytes after one."""
        kind = self.random.randrange(4)
        trap = Trap(str(run))
        if kind == 0:
            after = self.random.uniform(0.05, 1.0) * self.seconds
            return trap, after, f"after {after:.2f} s"
        stages: dict[str, list[int]] = {}
        for at, event in enumerate(self.events):  # every stage alike, however much it writes
            stages.setdefault(_stage(event), []).append(at)
        at = self.random.choice(stages[self.random.choice(sorted(stages))])
        if kind == 1:
            limit = self.random.choice([0, int(10 ** self.random.uniform(0, 4))])
            words = f"at byte {limit} after {self.events[at]}"
            return replace(trap, at=at, limit=limit), None, words
        return replace(trap, at=at), None, f"before {self.events[at]}"

    def _attempt(
        self, run: Path, verbs: list[str], trap: Trap | None = None, after: float | None = None
    ) -> Ended:
        config = self.make(self.folder, SAMPLES, **self.changes, output=str(run))
        commands = [[verb, str(config), "--resume"] for verb in verbs]
        return attempt(commands, trap or Trap(str(run)), self.notes, after)


def _stage(event: str) -> str:
    """What the event writes: the first names of its path that have no number."""
    names = [name for name in event.split(" ")[-1].split("/") if name]
    named = [name.strip(".").split(".")[0].rstrip("-0123456789") for name in names]
    return "/".join(named[:3])


def chaos(names: list[str], kills: int, seed: int) -> int:
    """Kill so many runs, the configurations in turn; the number of those that ended otherwise."""
    failed, stages = 0, Counter[str]()
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        chance = random.Random(seed)
        made = [Chaos(name, Path(folder) / name, chance) for name in names]
        for name, each in zip(names, made, strict=True):
            print(f"{name}: {each.seconds:.1f} s, {len(each.events)} events", flush=True)
        for number in tqdm(range(kills), desc="kills", mininterval=1):
            which = number % len(made)
            where, wrong = made[which].kill(number)
            told = f"WRONG: {names[which]}" if wrong else names[which]
            tqdm.write("\n".join([f"{told}: {where}", *wrong]), file=sys.stdout)
            failed += bool(wrong)
            stages["not reached" if where.startswith("not") else "killed"] += 1
    summary = ", ".join(f"{number} {what}" for what, number in stages.items())
    print(f"{kills} runs (seed {seed}): {summary}; {failed} ended otherwise than one left alone")
    return failed


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--kills", type=int, default=25)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--configuration", choices=CONFIGURATIONS, action="append")
    given = arguments.parse_args()
    tqdm.monitor_interval = 0  # a thread would not survive a fork
    assert pipeline is not None
    sys.exit(bool(chaos(given.configuration or list(CONFIGURATIONS), given.kills, given.seed)))
