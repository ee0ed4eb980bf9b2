"""Seals, checkpoints that are told from broken ones, and signals that ask for one."""

from __future__ import annotations

import json
import logging
import os
import signal
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TrainerControl, TrainerState, TrainingArguments

from tiny import collate, rows_of, tiny_batch, tiny_model, with_lora
from tsqlora import checkpoints
from tsqlora.adaptation import Adaptation, adapt_briefly
from tsqlora.artefacts import prepare_folder, remove_temporaries, temporary_name
from tsqlora.checkpoints import InterruptCallback, last_checkpoint, whole_checkpoints
from tsqlora.interruption import Terminated, handling, stop
from tsqlora.lora_layers import trainable_state
from tsqlora.seals import SEAL, seal, why_broken

FILES = st.dictionaries(
    st.sampled_from(["a.safetensors", "b.json", "deep/c.bin", "deep/er/d"]),
    st.binary(max_size=50),
    min_size=1,
)


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


@settings(max_examples=25)  # each waits for the disk
@given(files=FILES, data=st.data())
def test_whatever_changes_after_the_seal_is_told(
    files: dict[str, bytes], data: st.DataObject
) -> None:
    with TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, files)
        assert why_broken(folder) is not None
        seal(folder)
        assert why_broken(folder) is None
        (folder / "notes.txt").touch()
        assert why_broken(folder) is None
        victim = folder / data.draw(st.sampled_from(sorted(files)))
        content = victim.read_bytes()
        kinds = ["missing", "longer", *(["shorter", "flipped"] if content else [])]
        kind = data.draw(st.sampled_from(kinds))
        if kind == "missing":
            victim.unlink()
        elif kind == "longer":
            victim.write_bytes(content + b"\0")
        elif kind == "shorter":
            victim.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
        else:
            place, bit = data.draw(st.integers(0, len(content) - 1)), data.draw(st.integers(0, 7))
            flipped = bytearray(content)
            flipped[place] ^= 1 << bit
            victim.write_bytes(flipped)
        assert victim.name in (why_broken(folder) or "")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"files": {"a": 3}}', "\udcff"])
def test_a_broken_seal_seals_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "a").touch()
    (tmp_path / SEAL).write_bytes(text.encode(errors="surrogateescape"))
    assert why_broken(tmp_path) is not None


def checkpoint(folder: Path, step: int, best: int | None = None, whole: bool = True) -> Path:
    made = folder / f"checkpoint-{step}"
    path = None if best is None else f"elsewhere/checkpoint-{best}"
    state = {"global_step": step, "best_global_step": best, "best_model_checkpoint": path}
    write(made, {"trainer_state.json": json.dumps(state).encode(), "weights": bytes(step)})
    if whole:
        seal(made)
    return made


def test_the_last_whole_checkpoint_is_taken_and_broken_ones_go_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert last_checkpoint(tmp_path / "none") is None
    kept = [checkpoint(tmp_path, step) for step in (5, 90)]
    cut_off, rotten = checkpoint(tmp_path, 1000, whole=False), checkpoint(tmp_path, 100)
    (rotten / "weights").write_bytes(bytes(50))
    (tmp_path / "checkpoint-7.zip").mkdir()
    with caplog.at_level(logging.WARNING):
        assert last_checkpoint(tmp_path) == kept[1]
    assert f"{cut_off} is skipped and removed: it was cut off" in caplog.text
    assert f"{rotten} is skipped and removed: weights has 50 bytes instead of 100" in caplog.text
    assert not cut_off.exists()
    assert not rotten.exists()
    assert whole_checkpoints(tmp_path) == (kept, {})


def test_a_checkpoint_without_its_best_is_not_gone_on_from(tmp_path: Path) -> None:
    first, best = checkpoint(tmp_path, 2, best=2), checkpoint(tmp_path, 4, best=4)
    last = checkpoint(tmp_path, 6, best=4)
    assert last_checkpoint(tmp_path) == last
    (best / "weights").unlink()
    assert last_checkpoint(tmp_path) == first


@pytest.mark.parametrize("there", [1, 3, 4])
def test_an_adaptation_goes_on_from_any_step_to_the_same_weights(
    tmp_path: Path, there: int
) -> None:
    def adapted(steps: int, folder: Path) -> dict[str, torch.Tensor]:
        model = with_lora(tiny_model("bert"), "classification", modules_to_save=["classifier"])
        rows = Dataset.from_list(rows_of(tiny_batch("classification", 11)))
        settings = {"save_strategy": "steps", "save_steps": 1, "disable_tqdm": True}
        adaptation = Adaptation(4, 1e-2, 2, 0, 0.5, settings)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(checkpoints, "InterruptCallback", lambda: StopAt(steps))
            adapt_briefly(model, rows, collate, adaptation, folder)
        return {name: tensor.clone() for name, tensor in trainable_state(model).items()}

    whole = adapted(9, tmp_path / "whole")
    adapted(there, tmp_path / "broken")
    assert [p.name for p in whole_checkpoints(tmp_path / "broken")[0]] == [f"checkpoint-{there}"]
    resumed = adapted(9, tmp_path / "broken")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())


class StopAt(InterruptCallback):
    """Stops after a step as if interrupted, but says nothing of it."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            control.should_training_stop = True


def test_what_was_made_of_other_inputs_is_cleared(tmp_path: Path) -> None:
    folder = tmp_path / "train"
    prepare_folder(folder, "a")
    made = checkpoint(folder, 3)
    prepare_folder(folder, "a")
    assert made.exists()
    (folder / "inputs.json").write_text("{")
    prepare_folder(folder, "a")
    assert not made.exists()
    made = checkpoint(folder, 3)
    prepare_folder(folder, "b")
    assert not made.exists()


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    kept = {".hidden", "deep/a.tmp", "deep/.b"}
    write(tmp_path, dict.fromkeys(kept, b""))
    temporary_name(tmp_path / "file").touch()
    write(temporary_name(tmp_path / "deep" / "folder"), {"x": b"", ".y.0.tmp": b""})
    remove_temporaries(tmp_path, of="folder")
    assert any(tmp_path.glob(".file.*"))
    remove_temporaries(tmp_path)
    left = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()}
    assert left == kept


@pytest.mark.usefixtures("listening")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_for_a_checkpoint_and_the_second_stops_at_once(
    tmp_path: Path, number: int
) -> None:
    callback, control = InterruptCallback(), TrainerControl()
    arguments, state = TrainingArguments(str(tmp_path), use_cpu=True), TrainerState()
    before = signal.getsignal(number)
    with handling(callback.interrupt):
        callback.on_step_end(arguments, state, control)
        assert not control.should_save
        os.kill(os.getpid(), number)
        callback.on_step_end(arguments, state, control)
        assert control.should_save
        assert control.should_training_stop
        with pytest.raises(Terminated if number == signal.SIGTERM else KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with handling(stop):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
