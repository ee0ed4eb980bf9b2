"""What a run cost, stage by stage, in seconds and in sample passes, kept in `metrics.json`.

Of several processes the passes are those of all together, the peak memory that of the largest.
A pass is one sample through forward and backward; a forward alone counts ½, since the base is
frozen and so backward costs about one forward.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tsqlora import processes
from tsqlora.artefacts import read_json
from tsqlora.run_folder import RunFolder


@contextmanager
def counted(
    folder: RunFolder, stage: str, passes: float | Callable[[], float], before: float = 0.0
) -> Iterator[None]:
    """Note the seconds spent inside for `stage`, and its passes once it is through.

    `before`: the seconds that an interrupted run took for what this one goes on from. Work that was
    lost with it and is done again counts once, in seconds as in passes.
    """
    stages = _stages(folder)
    started = time.perf_counter()
    done, peak = 0.0, 0
    try:
        yield
        done = passes() if callable(passes) else passes
        peak = processes.largest(peak_memory())
    finally:
        if processes.is_main():
            seconds = before + time.perf_counter() - started
            stages[stage] = {"seconds": round(seconds, 3), "passes": done}
            folder.update_metrics({"cost": _cost(folder, stages, peak or peak_memory())})


def scored_inside(folder: RunFolder, inside: float, seconds: float, passes: float) -> None:
    """Note what scoring took, of which the seconds `inside` were counted as training until now."""
    stages = _stages(folder)
    stages["scores"] = {"seconds": round(seconds, 3), "passes": passes}
    training = stages["training"]
    training["seconds"] = round(max(0.0, training["seconds"] - inside), 3)
    folder.update_metrics({"cost": _cost(folder, stages, peak_memory())})


def record_parameters(folder: RunFolder, parameters: int) -> None:
    """Note how many parameters were trained: the plan's and modules_to_save."""
    cost = _read(folder)
    folder.update_metrics({"cost": {**cost, "trainable_parameters": parameters}})


def _cost(folder: RunFolder, stages: dict[str, dict[str, float]], peak: int) -> dict[str, Any]:
    def total(key: str, of: bool) -> float:
        return round(sum(v[key] for stage, v in stages.items() if (stage == "training") == of), 3)

    old = _read(folder)
    return {
        "scoring_seconds": total("seconds", False),
        "training_seconds": total("seconds", True),
        "scoring_passes": total("passes", False),
        "training_passes": total("passes", True),
        "peak_memory_bytes": max(peak, old.get("peak_memory_bytes") or 0),
        "trainable_parameters": old.get("trainable_parameters"),
        "stages": stages,
    }


def _read(folder: RunFolder) -> dict[str, Any]:
    return dict(read_json(folder.metrics).get("cost", {})) if folder.metrics.exists() else {}


def _stages(folder: RunFolder) -> dict[str, dict[str, float]]:
    return dict(_read(folder).get("stages", {}))


def peak_memory() -> int:
    """Bytes: the GPU's peak where there is one, else the process's resident peak."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
