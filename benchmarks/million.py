"""Resident memory and time of scoring pools from ten thousand to a million samples, tiny model.

    python benchmarks/million.py [--sizes 10000 100000 1000000]

Each size is a whole `tsqlora score` in a process of its own, with all three terms. Per phase, the
largest resident set seen, sampled ten times a second: anonymous memory, and with it the pages of
mapped files, which the system takes back when it wants them. To benchmarks/results/million.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "million.json"
SETTINGS = {"data.validation": None, "training.per_device_train_batch_size": 256}
PHASES = ("start", "read", "encode", "adapt", "measure", "score")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--once", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.write:
        sys.path.insert(0, str(HERE.parent / "tests"))
        from runs import classification_run

        classification_run(arguments.write, arguments.sizes[0], **SETTINGS)
        return
    if arguments.once:
        print(json.dumps(measure(arguments.once)))
        return
    results = {}
    for size in arguments.sizes:
        command = [sys.executable, __file__, "--once", str(size)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
        results[size] = json.loads(done.stdout.splitlines()[-1])
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    table(results)


class Watch:
    """The largest resident set of each phase, in bytes."""

    def __init__(self) -> None:
        self.phase, self.seen = PHASES[0], {phase: [0, 0] for phase in PHASES}
        self.seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            found = resident()
            before = self.seen[self.phase]
            self.seen[self.phase] = [max(pair) for pair in zip(before, found, strict=True)]
            time.sleep(0.1)
            self.seconds[self.phase] += 0.1


def measure(size: int) -> dict[str, Any]:
    """One scoring of so many samples."""
    from tsqlora import pipeline, scoring, tasks

    with tempfile.TemporaryDirectory(prefix="tsqlora-") as folder:
        config = Path(folder) / "config.yaml"
        writing = [sys.executable, __file__, "--write", folder, "--sizes", str(size)]
        subprocess.run(writing, check=True)  # whose memory is not ours
        watch = Watch()
        time.sleep(0.2)

        def during(phase: str, owner: Any, name: str) -> None:
            whole = getattr(owner, name)

            def noted(*given: Any, **named: Any) -> Any:
                watch.phase = phase
                return whole(*given, **named)

            setattr(owner, name, noted)

        during("encode", tasks.Task, "encoded")
        during("adapt", pipeline, "adapt_briefly")
        during("measure", scoring.Scorer, "measure")
        during("score", scoring.Scorer, "scores")
        watch.phase, started = "read", time.perf_counter()
        pipeline.Run.start(config).score()
        seconds = time.perf_counter() - started
        bytes_left = sum(f.stat().st_size for f in Path(folder, "run").rglob("*") if f.is_file())
    return {
        "seconds": round(seconds, 1),
        "run_folder_bytes": bytes_left,
        "phase_seconds": {phase: round(spent, 1) for phase, spent in watch.seconds.items()},
        "peak_anonymous_bytes": {phase: pair[0] for phase, pair in watch.seen.items()},
        "peak_resident_bytes": {phase: pair[1] for phase, pair in watch.seen.items()},
    }


def resident() -> tuple[int, int]:
    """(anonymous, all) resident bytes now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = dict(line.split(":", 1) for line in lines if line.startswith(("RssAnon", "VmRSS")))
    return tuple(1024 * int(found[name].split()[0]) for name in ("RssAnon", "VmRSS"))


def table(results: dict[int, dict[str, Any]]) -> None:
    print("| samples | " + " | ".join(PHASES[1:]) + " | seconds | samples/s measured |")
    print("| --- |" + " --- |" * (len(PHASES) + 1))
    for size, found in results.items():
        anonymous, whole = found["peak_anonymous_bytes"], found["peak_resident_bytes"]
        cells = [f"{anonymous[p] / 1e6:.0f} / {whole[p] / 1e6:.0f}" for p in PHASES[1:]]
        rate = size / max(found["phase_seconds"]["measure"], 0.1)
        print(f"| {size} | {' | '.join(cells)} | {found['seconds']:.0f} | {rate:.0f} |")


if __name__ == "__main__":
    main()
