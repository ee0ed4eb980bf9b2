"""The batch size that is found by trial, and forwards in lower precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from runs import classification_run
from tiny import all_terms, collate, rows_of, tiny_batch, tiny_model, with_lora
from tsqlora import fitting, score_samples, scoring
from tsqlora.measuring import Wanted
from tsqlora.pipeline import Run
from tsqlora.scoring import Scorer

ALL = Wanted(("gradient_norm", "loss_reduction", "convergence"))


def pool(samples: int = 1100) -> Dataset:
    return Dataset.from_list(rows_of(tiny_batch("classification", samples)))


def adapted() -> Any:
    return with_lora(tiny_model("bert"), "classification")


@pytest.mark.parametrize(
    ("fits", "pays_up_to", "free", "found"),
    [
        (40, 1000, 1e12, 32),
        (1000, 16, 1e12, 16),
        (1000, 1000, 1e12, 64),
        (1000, 1000, 10.0, 8),
        (3, 1000, 1e12, 8),
    ],
    ids=["memory runs out", "more pay no more", "a 16th of the pool", "no room", "halved later"],
)
def test_the_batch_is_as_large_as_fits_and_pays(
    fits: int, pays_up_to: int, free: float, found: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, timed = adapted(), fitting._timed

    def limited(_: Any, __: Any, inputs: dict[str, torch.Tensor]) -> None:
        if len(inputs["input_ids"]) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def seconds(meter: Any, batch: dict[str, torch.Tensor]) -> float:
        timed(meter, batch)
        samples = len(batch["labels"])
        return 1.0 if samples <= pays_up_to else samples / pays_up_to

    held = iter(range(0, 10**6, 1000))
    monkeypatch.setattr(fitting, "_timed", seconds)
    monkeypatch.setattr(fitting, "_free", lambda: free)
    monkeypatch.setattr(fitting, "_resident", lambda: next(held))
    model.register_forward_pre_hook(limited, with_kwargs=True)
    assert fitting.fitting_batch_size(model, pool(), collate, ALL) == found


def test_the_system_tells_what_memory_there_is() -> None:
    if Path("/proc/self/status").exists():
        assert 2**24 < fitting._resident() < fitting._free() + fitting._resident() < 2**50


def test_the_size_found_is_kept_and_gives_the_same_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rows, scorer = adapted(), pool(150), Scorer(collate, all_terms())
    scorer.measure(model, rows, None, tmp_path)
    monkeypatch.delattr(scoring, "fitting_batch_size")  # not tried again
    scorer.measure(model, rows, None, tmp_path, share=(1, 2))
    found = scorer.scores(model, rows, None, tmp_path)
    given = score_samples(model, rows, collate, all_terms(), batch_size=32)
    np.testing.assert_allclose(found.loss, given.loss, rtol=1e-5)
    np.testing.assert_allclose(found.gradient_norm, given.gradient_norm, rtol=1e-4)


@pytest.mark.parametrize("value", ["auto", 5, None])
def test_the_configuration_names_the_size_or_has_it_found(value: Any, tmp_path: Path) -> None:
    config = classification_run(tmp_path, 140, **{"quality.batch_size": value})
    run = Run.start(config)
    assert run.scorer.batch_size == {"auto": None, 5: 5, None: 8}[value]
    assert np.isfinite(run.score().quality).all()


def test_scores_are_taken_in_the_precision_of_the_training(tmp_path: Path) -> None:
    seen: set[tuple[bool, torch.dtype]] = set()

    def scored(bf16: bool) -> Any:
        folder = tmp_path / str(bf16)
        folder.mkdir()
        run = Run.start(classification_run(folder, 60, **{"quality.adapt_steps": 0}))
        scorer = Scorer(run.inputs.task.collate, all_terms(), batch_size=8, bf16=bf16)
        model = run.warm_model
        layer = next(m for m in model.modules() if isinstance(m, torch.nn.Linear))
        layer.register_forward_hook(lambda _, __, out: seen.add((bf16, out.dtype)))
        return scorer.score(model, run.inputs.splits.train, run.inputs.splits.validation)

    full, half = scored(False), scored(True)
    assert seen == {(False, torch.float32), (True, torch.bfloat16)}
    np.testing.assert_allclose(half.loss, full.loss, rtol=0.05)
    assert np.corrcoef(half.gradient_norm, full.gradient_norm)[0, 1] > 0.95
    assert not np.array_equal(half.loss, full.loss)


def test_a_run_in_bf16_scores_in_bf16(tmp_path: Path) -> None:
    for bf16 in (True, False):
        config = classification_run(
            tmp_path, 40, **{"training.bf16": bf16, "training.use_cpu": True}
        )
        assert Run.start(config).scorer.bf16 is bf16
