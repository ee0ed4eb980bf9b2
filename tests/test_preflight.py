"""What only the model or the Trainer can refuse is refused before the first optimizer step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from runs import class_rows, classification_run, write_rows
from tsqlora.cli import main
from tsqlora.config import RunConfig
from tsqlora.preflight import check_config

EARLY: list[tuple[dict[str, Any], list[str]]] = [
    ({"ranks.mean_rank": None, "ranks.parameters": 5}, ["budget of 5 parameters"]),
    (
        {"ranks.min_rank": 20, "ranks.mean_rank": 24, "ranks.max_rank": 40},
        ["min_rank = 20", "(16, 16)", "12 more modules"],
    ),
    ({"adapter.target_modules": ["query", "vlaue"]}, ["target_modules", "'vlaue'", "value"]),
    ({"adapter.target_modules": ".*(query"}, ["target_modules", ".*(query", "query"]),
    ({"adapter.modules_to_save": ["poler"]}, ["modules_to_save", "'poler'", "word_embeddings"]),
    ({"training.eval_strategy": "epoch", "data.validation": None}, ["training", "eval_dataset"]),
    ({"training.report_to": "nonsense"}, ["training", "nonsense"]),
    ({"training.train_sampling_strategy": "sequential"}, ["train_sampling_strategy", "draws"]),
    (
        {"training.dataloader_drop_last": True, "training.per_device_train_batch_size": 99},
        ["60 samples", "batch of 99"],
    ),
    ({"training.lr_scheduler_kwargs": {"speed": 1}}, ["training", "speed"]),
]


@pytest.mark.parametrize(("changes", "named"), EARLY, ids=[str(named[-1]) for _, named in EARLY])
def test_nothing_is_trained_or_kept_before_model_and_trainer_agree(
    changes: dict[str, Any], named: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(classification_run(tmp_path, **changes))]) == 2
    said = capsys.readouterr().err
    assert all(name in said for name in named)
    assert "adaptation" not in said
    kept = {str(p.relative_to(tmp_path / "run")) for p in (tmp_path / "run").glob("**/*")}
    pool = {
        "checkpoints/encoded",
        "checkpoints/encoded/train.arrow",
        "checkpoints/encoded/train.inputs",
    }
    assert kept == {"config.yaml", "checkpoints", *pool}  # the encoded pool is no artefact


@pytest.mark.parametrize(
    ("key", "value"), [("load_best_model_at_end", True), ("optim", "adamw_bnb_8bit")]
)
def test_what_cannot_be_compacted_is_refused_before_anything(
    key: str, value: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = classification_run(tmp_path, **{"ranks.compact": True, f"training.{key}": value})
    assert main(["train", str(config)]) == 2
    said = capsys.readouterr().err
    assert f"training.{key}" in said
    assert "ranks.compact" in said
    assert not list((tmp_path / "run").glob("*"))


def test_an_optimizer_with_a_second_copy_of_the_weights_is_refused_for_moving_ranks_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = {"training.optim": "schedule_free_adamw"}
    assert main(["train", str(classification_run(tmp_path, **asked))]) == 2
    assert "schedule_free_adamw keeps a second copy of the weights" in capsys.readouterr().err
    assert not list((tmp_path / "run").glob("*"))
    fixed = classification_run(tmp_path, **asked, **{"ranks.dynamic": False})
    check_config(RunConfig.from_yaml(fixed))


def test_the_best_checkpoint_is_told_by_what_is_measured_while_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = classification_run(tmp_path, **{"training.metric_for_best_model": "bleu"})
    assert main(["train", str(config)]) == 2
    assert "bleu is not measured while training; use one of loss, accuracy, f1" in (
        capsys.readouterr().err
    )
    assert not list((tmp_path / "run").glob("*"))


def test_no_is_a_strategy_although_yaml_reads_it_as_false(tmp_path: Path) -> None:
    config = classification_run(tmp_path, **{"training.save_strategy": False})
    assert main(["train", str(config), "--set", "training.max_steps=2"]) == 0
    assert not list((tmp_path / "run/checkpoints").glob("train/checkpoint-*"))


def test_a_rate_that_diverges_is_refused_and_may_be_mended_in_the_same_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wild = {"task": "regression", "training.learning_rate": 1e30}
    config = classification_run(tmp_path, samples=40, **wild)
    rows = [{**row, "label": float(i)} for i, row in enumerate(class_rows(40))]
    write_rows(tmp_path / "train.jsonl", rows)
    write_rows(tmp_path / "validation.jsonl", rows)
    assert main(["score", str(config)]) == 2
    assert "learning_rate" in capsys.readouterr().err
    assert main(["score", str(config), "--set", "training.learning_rate=1e-3"]) == 0
