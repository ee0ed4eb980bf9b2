"""Pieces of tensors as DeepSpeed's ZeRO keeps them, and what of its configuration goes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from runs import classification_run
from tsqlora import zero_settings
from tsqlora.cli import main
from tsqlora.errors import ConfigError
from tsqlora.optimizer_state import zero_state
from tsqlora.sharded import set_parameter
from tsqlora.zero_settings import deepspeed_settings


def flat_optimizer(flat: Tensor) -> torch.optim.Optimizer:
    """AdamW after a step on what one process keeps."""
    flat.grad = torch.ones_like(flat)
    optimizer = torch.optim.AdamW([flat], lr=0.1)
    optimizer.step()
    return optimizer


def mapped(value: Tensor, flat: Tensor, offset: int, first: int, last: int) -> nn.Parameter:
    """A parameter that lies at `offset` in all that is flat, of which `flat` is first to last."""
    parameter = nn.Parameter(value.clone())
    start, stop = max(offset, first), min(offset + value.numel(), last)
    own: Any = None
    if start < stop:
        own = SimpleNamespace(
            hp_fragment=flat.detach().narrow(0, start - first, stop - start),
            lp_fragment_address=SimpleNamespace(start=start - offset, numel=stop - start),
            hp_fragment_address=SimpleNamespace(start=start - first, numel=stop - start),
            param_group_index=0,
        )
    parameter._hp_mapping = own  # type: ignore[attr-defined]
    return parameter


@given(st.data())
def test_pieces_together_are_set_as_the_whole_is(data: st.DataObject) -> None:
    rows, columns = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    offset, after = data.draw(st.integers(0, 5)), data.draw(st.integers(0, 5))
    dimension = data.draw(st.integers(0, 1))
    index = torch.tensor(
        sorted(data.draw(st.sets(st.integers(0, (rows, columns)[dimension] - 1), min_size=1)))
    )
    total = offset + rows * columns + after
    cut = data.draw(st.integers(1, total - 1)) if total > 1 else total
    everything = torch.arange(1.0, total + 1)
    value = everything[offset : offset + rows * columns].reshape(rows, columns)
    flats = [nn.Parameter(part.clone()) for part in (everything[:cut], everything[cut:])]
    before, after_state = [], []
    for flat, first in zip(flats, (0, cut), strict=True):
        if not len(flat):
            continue
        optimizer = flat_optimizer(flat)
        wrapper = SimpleNamespace(optimizer=SimpleNamespace(optimizer=optimizer))
        before.append(optimizer.state[flat]["exp_avg"].clone())
        with torch.no_grad():
            copied = mapped(value, flat, offset, first, first + len(flat))
            set_parameter(copied, dimension, index, 7.0)
        zero_state(wrapper, copied, dimension, index)  # type: ignore[arg-type]
        assert torch.equal(copied.data, value.index_fill(dimension, index, 7.0))
        after_state.append(optimizer.state[flat]["exp_avg"])
    own = slice(offset, offset + rows * columns)
    whole = torch.cat([flat.detach() for flat in flats])
    chosen = torch.zeros(rows, columns).index_fill(dimension, index, 1.0).flatten().bool()
    assert (whole[own][chosen] == 7.0).all()
    expected = torch.cat(before)
    expected[own] = expected[own].masked_fill(chosen, 0.0)
    assert torch.equal(torch.cat(after_state), expected)
    untouched = torch.cat([whole[:offset], whole[own][~chosen], whole[own.stop :]])
    assert not (untouched == 7.0).any()


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"deepspeed": {"zero_optimization": {"stage": 3}}}, "ZeRO-3"),
    ({"deepspeed": {"zero_optimization": {"stage": "two"}}}, "0, 1 or 2"),
    ({"deepspeed": {"zero_optimization": 2}}, "0, 1 or 2"),
    ({"deepspeed": {"train_batch_size": 8}, "bf16": True}, "stage 1 or 2"),
    ({"deepspeed": {"optimizer": {"type": "AdamW"}}}, "training.optim"),
    (
        {"deepspeed": {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}},
        "offload_optimizer",
    ),
    ({"deepspeed": "nowhere.json"}, "nowhere.json"),
    ({"deepspeed": 2}, "mapping"),
]


@pytest.mark.parametrize(("training", "named"), REFUSED, ids=[named for _, named in REFUSED])
def test_what_does_not_go_is_refused_by_name(training: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        deepspeed_settings(training)


def test_a_mapping_and_a_file_of_it_are_the_same_filled_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zero_settings, "find_spec", lambda name: name)
    given = {"zero_optimization": {"stage": 2}, "gradient_clipping": 0.5}
    file = tmp_path / "zero.json"
    file.write_text(json.dumps(given))
    found = deepspeed_settings({"deepspeed": given})
    assert found == deepspeed_settings({"deepspeed": str(file)})
    assert found is not None
    assert found["gradient_clipping"] == 0.5
    assert found["train_micro_batch_size_per_gpu"] == "auto"
    assert deepspeed_settings({}) is None


def test_one_process_is_told_to_start_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(zero_settings, "find_spec", lambda name: name)
    config = classification_run(tmp_path, **{"training.deepspeed": {"zero_optimization": {}}})
    assert main(["train", str(config)]) == 2
    assert "torchrun --nproc_per_node 2" in capsys.readouterr().err


def test_without_deepspeed_the_way_to_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zero_settings, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"tsqlora\[deepspeed\]"):
        deepspeed_settings({"deepspeed": {"zero_optimization": {"stage": 2}}})


def test_a_launcher_that_configures_deepspeed_by_itself_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert main(["train", str(classification_run(tmp_path))]) == 2
    assert "without --use_deepspeed" in capsys.readouterr().err
