"""The embedded default: plain LoRA against TsqLoRA at equal cost, on messages with wrong labels."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import numpy as np

from tsqlora.adapter import active_ranks
from tsqlora.artefacts import read_json
from tsqlora.baseline import train_plain_lora
from tsqlora.config import (
    AdapterConfig,
    DataConfig,
    RanksConfig,
    RunConfig,
)
from tsqlora.demo_data import make_demo_data, write_demo_data
from tsqlora.errors import RunError
from tsqlora.packaged import encoder_folder
from tsqlora.pipeline import Run
from tsqlora.quality import QualityScores

logger = logging.getLogger("tsqlora")

TRAIN, VALIDATION, TEST = 800, 200, 600
WRONG, DUPLICATES = 0.3, 0.1
EPOCHS, BATCH, RATE = 7, 32, 3e-3
LOW = 0.5
"""A probability below this part of the uniform 1/N counts as low."""


def run_demo(out: Path, seed: int = 0) -> dict[str, Any]:
    """Generate the data, run both arms, say what came of it. Everything lies under `out`.

    Raises:
        ModelError: the encoder's package is missing or its weights are not the known ones.
        RunError: `out` is there already.
    """
    model = encoder_folder()
    if out.exists() and any(out.iterdir()):
        raise RunError(f"{out} is there already: name another folder by --out, or remove it.")
    data = make_demo_data(seed, TRAIN, VALIDATION, TEST, WRONG, DUPLICATES)
    write_demo_data(out / "data", data)
    logger.info(
        "%d support messages, %d with a wrong intent and %d near-duplicates, in %s",
        *(len(data.train), len(data.wrong), len(data.duplicates), out / "data"),
    )
    run = Run.start(demo_config(out, model, seed))
    run.train()
    metrics = run.evaluate()
    report = run.report()
    passes = metrics["cost"]["scoring_passes"] + metrics["cost"]["training_passes"]
    steps = math.ceil(passes / BATCH)
    logger.info("Plain LoRA on all data for the same cost: %d steps of %d", steps, BATCH)
    plain = train_plain_lora(run.inputs, steps)
    scores = QualityScores.from_parquet(run.folder.scores)
    low = scores.probability < LOW / len(scores.ids)
    wrong = np.isin(scores.ids, list(data.wrong))
    return {
        "sample passes of each": int(passes),
        "test accuracy": {"plain LoRA": plain["accuracy"], "TsqLoRA": metrics["test"]["accuracy"]},
        "planted wrong labels given low probability": f"{(low & wrong).sum()} of {wrong.sum()}",
        "sound labels given low probability": f"{(low & ~wrong).sum()} of {(~wrong).sum()}",
        "estimated share of wrong labels": scores.wrong_share,
        "ranks": _final_ranks(run),
        "adapter": str(run.folder.adapter),
        "report": str(report),
    }


def demo_config(out: Path, model: Path, seed: int) -> RunConfig:
    """The configuration of the TsqLoRA arm: the default, for as many epochs as pay here."""
    return RunConfig(
        model=str(model),
        task="classification",
        data=DataConfig(
            train=str(out / "data/train.jsonl"),
            validation=str(out / "data/validation.jsonl"),
            test=str(out / "data/test.jsonl"),
            text="text",
            target="intent",
            max_length=64,
        ),
        ranks=RanksConfig(mean_rank=8),
        adapter=AdapterConfig(),
        training={
            "learning_rate": RATE,
            "num_train_epochs": EPOCHS,
            "per_device_train_batch_size": BATCH,
            "train_sampling_strategy": "group_by_length",
        },
        output=str(out / "tsqlora"),
        seed=seed,
    )


def _final_ranks(run: Run) -> dict[str, int]:
    """The rank of every planned module at the end, 0 where it is not adapted any more."""
    ended = active_ranks(run.finished.model())
    return {name: ended.get(name, 0) for name in read_json(run.folder.plan)["ranks"]}
