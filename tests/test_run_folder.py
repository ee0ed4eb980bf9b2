"""Laws of the run folder: nothing half-written, nobody else's run touched, stages go on."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors import SafetensorError

from tsqlora import claims
from tsqlora.artefacts import (
    atomic_file,
    atomic_folder,
    atomic_write_json,
    atomic_write_text,
    digest,
    os_errors,
    read_json,
    read_lines,
)
from tsqlora.claims import claimed
from tsqlora.config import RunConfig
from tsqlora.errors import DataError, RunError
from tsqlora.run_folder import RunFolder


def configuration(output: Path | str, **changes: Any) -> RunConfig:
    data = {"train": "train.jsonl", "text": "text", "target": "label"}
    return RunConfig.from_dict(
        {"model": "m", "task": "classification", "data": data, "output": str(output), **changes}
    )


def interrupted(writer: AbstractContextManager[Path], name: str, error: BaseException) -> None:
    """Write half of something, then raise."""
    with writer as temporary:
        (temporary / name).write_text("half")
        raise error


def names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


# writing


def test_a_writer_that_raises_midway_leaves_the_old_content_and_nothing_else(
    tmp_path: Path,
) -> None:
    atomic_write_text(tmp_path / "a", "old")
    with pytest.raises(ValueError, match="midway"):
        interrupted(atomic_file(tmp_path / "a"), "", ValueError("midway"))
    assert (tmp_path / "a").read_text() == "old"
    assert names(tmp_path) == {"a"}


def test_a_writer_killed_midway_leaves_the_old_content(tmp_path: Path) -> None:
    atomic_write_text(tmp_path / "a", "old")
    script = (
        "import os, sys\nfrom tsqlora.artefacts import atomic_file\n"
        "with atomic_file(sys.argv[1]) as temporary:\n"
        "    temporary.write_text('half'); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "a")], timeout=60)
    assert done.returncode == -9
    assert (tmp_path / "a").read_text() == "old"


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    with pytest.raises(KeyboardInterrupt):
        interrupted(atomic_folder(target), "half", KeyboardInterrupt())
    assert names(tmp_path) == set()
    with atomic_folder(target) as folder:
        (folder / "first").write_text("1")
        assert not target.exists()
    with atomic_folder(target) as folder:
        (folder / "second").write_text("2")
    assert names(target) == {"second"}
    assert names(tmp_path) == {"adapter"}


def test_the_older_folder_survives_a_writer_that_raises(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "adapter") as folder:
        (folder / "old").touch()
    with pytest.raises(ValueError, match="midway"):
        interrupted(atomic_folder(tmp_path / "adapter"), "half", ValueError("midway"))
    assert names(tmp_path / "adapter") == {"old"}


def test_the_older_folder_comes_back_if_the_new_one_cannot_be_moved_into_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "adapter"
    with atomic_folder(target) as folder:
        (folder / "old").touch()
    replace, calls = os.replace, []

    def second_fails(source: Path, to: Path) -> None:
        calls.append(to)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "full")
        replace(source, to)

    monkeypatch.setattr(os, "replace", second_fails)
    with pytest.raises(RunError, match="no space left"), atomic_folder(target) as folder:
        (folder / "new").touch()
    assert names(target) == {"old"}
    assert names(tmp_path) == {"adapter"}


def test_json_keeps_order_and_unicode_and_has_null_for_what_is_not_finite(tmp_path: Path) -> None:
    values = {"z": float("nan"), "a": np.float32("inf"), "é": (np.int64(3), [np.ones(2)]), "n": 0.1}
    atomic_write_json(tmp_path / "a.json", values)
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert list(json.loads(text)) == ["z", "a", "é", "n"]
    assert json.loads(text) == {"z": None, "a": None, "é": [3, [[1.0, 1.0]]], "n": 0.1}
    assert '"é"' in text
    assert text.endswith("}\n")


@pytest.mark.parametrize("text", ["{", "[1]", "\xff", '{"version": 2}'])
def test_a_json_artefact_that_cannot_be_used_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "plan.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(RunError, match=r"plan\.json"):
        read_json(tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOSPC, "no space left"),
        (errno.EDQUOT, "quota"),
        (errno.EACCES, "no permission"),
        (errno.EPERM, "not permitted"),
        (errno.EROFS, "read-only"),
    ],
)
def test_what_the_disk_refuses_becomes_a_message_with_path_and_remedy(
    code: int, words: str
) -> None:
    with pytest.raises(RunError) as caught, os_errors("runs/x/plan.json"):
        raise OSError(code, os.strerror(code))
    assert "runs/x/plan.json" in str(caught.value)
    assert words in str(caught.value)
    assert "output" in str(caught.value)


def test_a_full_disk_is_recognised_behind_any_library_s_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    with pytest.raises(RunError, match="no space left"), os_errors("adapter"):
        raise RuntimeError("PytorchStreamWriter failed writing file")


def test_safetensors_words_for_a_refusal_are_understood() -> None:
    hidden = SafetensorError("Error while serializing: No space left on device (os error 28)")
    with pytest.raises(RunError, match="no space left"), os_errors("adapter"):
        raise hidden


@pytest.mark.parametrize("error", [ValueError("x"), OSError("no errno"), DataError("row 3")])
def test_other_errors_pass_unchanged(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, os_errors("adapter"):
        raise error
    assert caught.value is error


# lines


def test_a_half_written_last_line_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "ranks.jsonl"
    assert read_lines(path) == []
    path.write_text('{"step": 1}\n{"step": "à"}\n{"step": 3, "ra', encoding="utf-8")
    assert read_lines(path) == [{"step": 1}, {"step": "à"}]
    assert "cut off" in caplog.text


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    (tmp_path / "ranks.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(RunError, match=r"ranks\.jsonl, line 2"):
        read_lines(tmp_path / "ranks.jsonl")


# whose run


def test_a_new_run_holds_a_configuration_that_replays_it(tmp_path: Path) -> None:
    config = configuration(tmp_path / "runs" / "a", seed=7)
    run = RunFolder.create(config.output, config, resume=False)
    assert names(run.path) == {"config.yaml"}
    assert RunFolder.open(run.path).load_config() == config


def test_the_same_configuration_goes_on_without_resume_until_training_begins(
    tmp_path: Path,
) -> None:
    config = configuration(tmp_path)
    run = RunFolder.create(tmp_path, config)
    run.scores.touch()
    run.warmup.mkdir(parents=True)
    assert RunFolder.create(tmp_path, config) == run
    run.training.mkdir()
    with pytest.raises(RunError, match="has begun: --resume"):
        RunFolder.create(tmp_path, config)
    run.adapter.mkdir()
    with pytest.raises(RunError, match="is finished: --resume"):
        RunFolder.create(tmp_path, config)
    assert RunFolder.create(tmp_path, config, resume=True) == run
    assert run.scores.exists()


@pytest.mark.parametrize("resume", [False, True])
def test_another_configuration_is_refused_and_the_keys_that_differ_are_named(
    tmp_path: Path, resume: bool
) -> None:
    before = configuration(tmp_path, training={"learning_rate": 0.001})
    run = RunFolder.create(tmp_path, before)
    run.scores.touch()
    written = run.config.read_text()
    other = configuration(
        tmp_path, seed=3, quality={"fraction": 0.25}, training={"num_train_epochs": 2}
    )
    with pytest.raises(RunError) as caught:
        RunFolder.create(tmp_path, other, resume)
    message = str(caught.value)
    assert "seed: 0 -> 3" in message
    assert "quality.fraction: 1.0 -> 0.25" in message
    assert "training.learning_rate: 0.001 -> None" in message
    assert "choose another `output`" in message
    assert run.config.read_text() == written


def test_many_differences_are_counted_not_listed(tmp_path: Path) -> None:
    RunFolder.create(tmp_path, configuration(tmp_path)).scores.touch()
    ranks = {"mean_rank": 4, "min_rank": 1, "max_rank": 16, "dynamic": False}
    other = configuration(tmp_path, seed=1, ranks=ranks, model="n", quality={"temperature": 2})
    with pytest.raises(RunError, match=r"; 2 more\)"):
        RunFolder.create(tmp_path, other)


def test_a_moved_run_is_still_the_same_run(tmp_path: Path) -> None:
    RunFolder.create(tmp_path / "a", configuration(tmp_path / "a")).scores.touch()
    (tmp_path / "a").rename(tmp_path / "b")
    RunFolder.create(tmp_path / "b", configuration(tmp_path / "b"))


def test_a_folder_of_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(RunError, match=r"not empty.*another `output`"):
        RunFolder.create(tmp_path, configuration(tmp_path))
    assert names(tmp_path) == {"thesis.tex"}


def test_what_a_killed_first_start_leaves_does_not_block_the_next(tmp_path: Path) -> None:
    (tmp_path / ".config.yaml.0123abcd.tmp").write_text("half")
    RunFolder.create(tmp_path, configuration(tmp_path))


def test_a_run_that_ended_before_its_first_artefact_may_change_its_configuration(
    tmp_path: Path,
) -> None:
    RunFolder.create(tmp_path, configuration(tmp_path))
    mended = configuration(tmp_path, seed=1)
    assert RunFolder.create(tmp_path, mended).load_config() == mended


def test_a_configuration_typed_by_hand_is_never_overwritten(tmp_path: Path) -> None:
    typed = "# my notes\n" + configuration(tmp_path).to_yaml()
    (tmp_path / "config.yaml").write_text(typed)
    RunFolder.create(tmp_path, configuration(tmp_path))
    with pytest.raises(RunError, match="another configuration"):
        RunFolder.create(tmp_path, configuration(tmp_path, seed=3))
    assert (tmp_path / "config.yaml").read_text() == typed


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    with pytest.raises(RunError, match="is a file"):
        RunFolder.create(tmp_path / "a", configuration(tmp_path))
    with pytest.raises(RunError, match="part of the path is a file"):
        RunFolder.create(tmp_path / "a" / "b", configuration(tmp_path))


def test_too_little_space_is_found_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=9e6))
    with pytest.raises(RunError, match=r"Only 9 MB.*needs at least 50 MB"):
        RunFolder.create(tmp_path, configuration(tmp_path))
    assert names(tmp_path) == set()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
@pytest.mark.parametrize("there", [False, True])
def test_a_folder_without_write_permission_is_found_before_long_work(
    tmp_path: Path, there: bool
) -> None:
    config = configuration(tmp_path / "a")
    RunFolder.create(tmp_path / "a", config)
    closed = tmp_path / "a" if there else tmp_path
    closed.chmod(0o555)
    try:
        with pytest.raises(RunError, match="no permission"):
            RunFolder.create(tmp_path / ("a" if there else "b"), config)
    finally:
        closed.chmod(0o755)


def test_a_refused_folder_is_a_clear_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, *_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(RunError, match=r"runs/x: there is no permission.*another `output`"):
        RunFolder.create("runs/x", configuration("runs/x"))


def test_opening_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"holds no config\.yaml"):
        RunFolder.open(tmp_path)
    with pytest.raises(RunError, match="is not a folder"):
        RunFolder.open(tmp_path / "none")


def test_a_folder_is_claimed_by_one_process_until_that_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "PATIENCE", 0.3)
    script = (
        "import sys, time\nfrom tsqlora.claims import claimed\n"
        "with claimed(sys.argv[1]):\n    print('claimed', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(RunError, match="Another process works in"), claimed(tmp_path):
            pass
        other.kill()
        other.wait()
    for _ in range(2):
        with claimed(tmp_path):
            pass


# stages and metrics


def test_a_stage_is_done_only_on_the_same_inputs_and_with_all_its_outputs(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, configuration(tmp_path))
    inputs = digest("scores", {"fraction": 0.5})
    run.mark_done("scores", inputs)
    assert not run.is_done("scores", inputs, [run.scores])
    run.scores.touch()
    assert run.is_done("scores", inputs, [run.scores])
    assert not run.is_done("scores", digest("scores", {"fraction": 0.6}), [run.scores])
    assert not run.is_done("plan", inputs, [])
    run.mark_done("plan", "x")
    assert run.is_done("scores", inputs, [run.scores])


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 1}', '{"stages": 3}'])
def test_a_corrupt_record_of_stages_counts_as_nothing_done(
    tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    run = RunFolder.create(tmp_path, configuration(tmp_path))
    run.stages.write_text(text)
    with caplog.at_level(logging.WARNING):
        assert not run.is_done("scores", "x", [])
    assert "not done" in caplog.text
    run.mark_done("scores", "x")
    assert run.is_done("scores", "x", [])


def test_a_digest_depends_on_the_parts_and_not_on_the_order_of_keys() -> None:
    assert digest("a", {"x": 1, "y": (1, 2)}) == digest("a", {"y": [1, 2], "x": 1})
    assert len({digest("a", "b"), digest("ab"), digest(["a", "b"]), digest("b", "a")}) == 4
    assert digest("scores", {"é": None}) == (
        "ed0d4318d59664041a478dc8a0c2a0ed3f352b45d6eb1ec8c914c7d782714904"
    )


def test_metrics_of_different_stages_come_together(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, configuration(tmp_path))
    run.update_metrics({"cost": {"scoring_seconds": 2.0, "scoring_passes": 10}})
    run.update_metrics({"cost": {"training_seconds": 3.0}, "validation": {"f1": float("nan")}})
    run.update_metrics({"cost": {"scoring_seconds": 4.0}})
    assert read_json(run.metrics) == {
        "version": 1,
        "cost": {"scoring_seconds": 4.0, "scoring_passes": 10, "training_seconds": 3.0},
        "validation": {"f1": None},
    }
