"""Every mistake ends with status 2 and one message that names the place and the remedy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from runs import causal_run, class_rows, classification_run, save_model, write_rows
from tsqlora.cli import main


def failing(capsys: pytest.CaptureFixture[str], config: Path, *arguments: str) -> str:
    """The message of a `tsqlora train` that must fail as the user's mistake."""
    assert main(["train", str(config), *arguments]) == 2
    captured = capsys.readouterr()
    message = captured.err[captured.err.rindex("tsqlora: ") :]
    assert "Traceback" not in captured.err
    return message


def test_missing_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = classification_run(tmp_path, **{"data.train": str(tmp_path / "none.jsonl")})
    message = failing(capsys, config)
    assert "data.train" in message
    assert "none.jsonl" in message


def test_malformed_json_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = classification_run(tmp_path)
    lines = (tmp_path / "train.jsonl").read_text().splitlines()
    lines[6] = lines[6][:-4]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    message = failing(capsys, config)
    assert "train.jsonl" in message
    assert "line 7" in message or ":7" in message


def test_a_prompt_that_is_empty_for_a_model_without_a_first_token(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = causal_run(tmp_path, 60, **{"data.text": "{text}", "metrics": ["exact_match"]})
    tokenizer = tmp_path / "model/tokenizer.json"
    tokenizer.write_text(json.dumps({**json.loads(tokenizer.read_text()), "post_processor": None}))
    rows = [json.loads(line) for line in (tmp_path / "validation.jsonl").read_text().splitlines()]
    rows[3]["text"] = ""
    write_rows(tmp_path / "validation.jsonl", rows)
    message = failing(capsys, config)
    assert "data.validation: row 3: no token comes before the target" in message


def test_missing_column(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = failing(capsys, classification_run(tmp_path, **{"data.text": "txt"}))
    assert "'txt'" in message
    assert "text" in message
    assert "label" in message


def test_empty_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = classification_run(tmp_path)
    (tmp_path / "train.jsonl").write_text("")
    assert "train.jsonl" in failing(capsys, config)


def test_label_unseen_in_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = classification_run(tmp_path)
    rows = class_rows(20, seed=1)
    rows[13]["label"] = "novel"
    write_rows(tmp_path / "validation.jsonl", rows)
    message = failing(capsys, config)
    assert "data.validation" in message
    assert "13" in message
    assert "novel" in message
    assert "class 0" in message


def test_single_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = classification_run(tmp_path)
    write_rows(tmp_path / "train.jsonl", [{**r, "label": "one"} for r in class_rows(20)])
    message = failing(capsys, config)
    assert "one" in message
    assert "label" in message


@pytest.mark.parametrize("value", ["many", float("nan"), None, 1e300])
def test_regression_target_that_is_no_number(
    value: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = classification_run(tmp_path, task="regression")
    rows = [{**row, "label": float(i)} for i, row in enumerate(class_rows(20))]
    write_rows(tmp_path / "validation.jsonl", rows)
    rows[4]["label"] = value
    write_rows(tmp_path / "train.jsonl", rows)
    message = failing(capsys, config)
    assert "data.train" in message
    assert "label" in message
    assert "4" in message or "line 5" in message


def test_text_that_encodes_to_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = classification_run(tmp_path)
    rows = class_rows(20)
    rows[9]["text"] = "   "
    write_rows(tmp_path / "train.jsonl", rows)
    message = failing(capsys, config)
    assert "data.train" in message
    assert "9" in message


def test_unknown_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = failing(capsys, classification_run(tmp_path, **{"quality.fractoin": 0.5}))
    assert "fractoin" in message
    assert "fraction" in message.replace("fractoin", "")


def test_impossible_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    below = classification_run(tmp_path, **{"ranks.mean_rank": None, "ranks.parameters": 5})
    assert "budget of 5 parameters" in failing(capsys, below)
    shutil.rmtree(tmp_path / "run")
    over = classification_run(
        tmp_path, **{"ranks.min_rank": 20, "ranks.mean_rank": 24, "ranks.max_rank": 40}
    )
    message = failing(capsys, over)
    assert "min_rank = 20" in message
    assert "(16, 16)" in message


def test_no_module_matches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = classification_run(tmp_path, **{"adapter.target_modules": ["q_proj"]})
    message = failing(capsys, config)
    assert "q_proj" in message
    assert "query" in message


def test_fraction_outside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for fraction in ("0", "1.5"):
        message = failing(
            capsys, classification_run(tmp_path), "--set", f"quality.fraction={fraction}"
        )
        assert "quality.fraction" in message


def test_output_that_holds_another_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(classification_run(tmp_path))]) == 0
    adapter = (tmp_path / "run/adapter/adapter_model.safetensors").read_bytes()
    message = failing(capsys, classification_run(tmp_path, seed=3))
    assert "seed: 0 -> 3" in message
    assert "--resume" in failing(capsys, classification_run(tmp_path))
    assert (tmp_path / "run/adapter/adapter_model.safetensors").read_bytes() == adapter
    assert main(["train", str(classification_run(tmp_path)), "--resume"]) == 0
    assert (tmp_path / "run/adapter/adapter_model.safetensors").read_bytes() == adapter


def test_output_that_is_not_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/thesis.txt").write_text("precious")
    assert "run" in failing(capsys, classification_run(tmp_path))
    assert (tmp_path / "run/thesis.txt").read_text() == "precious"


def test_model_folder_without_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(tmp_path / "model", "bert")
    (tmp_path / "model/model.safetensors").unlink()
    message = failing(capsys, classification_run(tmp_path))
    assert str(tmp_path / "model") in message
    assert "weights" in message or "safetensors" in message


def test_model_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = failing(capsys, classification_run(tmp_path, model=str(tmp_path / "absent")))
    assert "absent" in message


def test_a_loss_that_is_not_finite_stops_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = classification_run(
        tmp_path, task="regression", **{"quality.adapt_steps": 0, "training.learning_rate": 1e30}
    )
    rows = [{**row, "label": float(i)} for i, row in enumerate(class_rows(40))]
    write_rows(tmp_path / "train.jsonl", rows)
    write_rows(tmp_path / "validation.jsonl", rows)
    message = failing(capsys, config)
    assert "loss became" in message
    assert "learning_rate" in message
    assert "checkpoint" in message
    assert not (tmp_path / "run/adapter").exists()


def test_a_folder_where_nothing_may_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    message = failing(capsys, classification_run(tmp_path, output=str(tmp_path / "file/run")))
    assert str(tmp_path / "file") in message
    monkeypatch.setattr(
        "shutil.disk_usage", lambda _: SimpleNamespace(total=10**9, used=10**9, free=0)
    )
    assert "free" in failing(capsys, classification_run(tmp_path))


def test_a_configuration_that_is_not_there_or_not_yaml(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "none.yaml" in failing(capsys, tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("model: [unclosed")
    assert "bad.yaml" in failing(capsys, tmp_path / "bad.yaml")


def test_a_mistake_mended_goes_on_in_the_same_folder(tmp_path: Path) -> None:
    assert main(["train", str(classification_run(tmp_path, **{"data.text": "txt"}))]) == 2
    assert main(["score", str(classification_run(tmp_path)), "--json"]) == 0


def test_evaluating_or_exporting_what_is_not_finished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err
    main(["score", str(classification_run(tmp_path))])
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 2
    assert "--resume" in capsys.readouterr().err
    assert json.loads((tmp_path / "run/stages.json").read_text())


def test_an_adapter_that_was_broken_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(classification_run(tmp_path))]) == 0
    weights = tmp_path / "run/adapter/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:50])
    again = ["evaluate", str(tmp_path / "run"), "--data", str(tmp_path / "validation.jsonl")]
    assert main(again) == 2
    weights.unlink()
    assert main(again) == 2
    assert capsys.readouterr().err.count(f"tsqlora: {weights.parent}") == 2


def test_weights_that_are_not_finite_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = classification_run(tmp_path)
    file = tmp_path / "model/model.safetensors"
    weights = load_file(file)
    weights["bert.embeddings.word_embeddings.weight"][3, 3] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})
    message = failing(capsys, config)
    assert "word_embeddings" in message
    assert str(tmp_path / "model") in message
