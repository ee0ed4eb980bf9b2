"""Layer sensitivity against frozen weights that are really made trainable."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import default_data_collator

from reference import exact_hessian_trace, looped_sensitivity
from tiny import KINDS, collate, rows_of, tiny_batch, tiny_model, with_lora
from tsqlora.errors import ConfigError, DataError, RunError
from tsqlora.lora_layers import lora_modules
from tsqlora.samples import score_samples
from tsqlora.sensitivity import LayerSensitivity, layer_sensitivity


@pytest.mark.parametrize("estimator", ["weight_gradient", "fisher"])
@pytest.mark.parametrize("name", ["bert", "albert", "deberta-v2", "gpt2", "mixtral", "t5", "bart"])
def test_every_module_agrees_with_a_loop_over_samples(name: str, estimator: str) -> None:
    kind = KINDS[name]
    model = with_lora(tiny_model(name, double=True), kind)
    rows = rows_of(tiny_batch(kind, samples=5))
    got = layer_sensitivity(model, Dataset.from_list(rows), collate, estimator, batch_size=3)
    expected = looped_sensitivity(model, kind, collate(rows), estimator)
    assert got.modules == pytest.approx(expected, rel=1e-8)
    assert got.shapes == {m.name: m.shape for m in lora_modules(model)}


def test_hutchinson_tends_to_the_exact_hessian_trace() -> None:
    # One module and one sample: others only add noise of mean 0.
    model = tiny_model("bert", double=True)
    model = with_lora(model, "classification", target_modules=["pooler.dense"])
    rows = rows_of(tiny_batch("classification", samples=1))
    (module,) = lora_modules(model)
    true = abs(exact_hessian_trace(model, "classification", collate(rows), module))
    again = Dataset.from_list(rows * 400)  # one direction a batch, so 400 directions
    found = layer_sensitivity(
        model, again, collate, "hessian", batch_size=1, max_samples=len(again)
    ).modules[module.name]
    assert found == pytest.approx(true, rel=0.1)


def test_the_hessian_of_a_model_that_mixes_samples_is_taken_one_by_one() -> None:
    model = with_lora(tiny_model("deberta-v2", double=True), "classification")
    dataset = Dataset.from_list(rows_of(tiny_batch("classification", samples=3)))
    together = layer_sensitivity(model, dataset, collate, "hessian", batch_size=3)
    assert all(math.isfinite(value) for value in together.modules.values())
    assert any(together.modules.values())


def test_a_plain_model_is_measured_and_left_bit_equal() -> None:
    model = tiny_model("bert")
    model.train()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    required = {n: p.requires_grad for n, p in model.named_parameters()}
    dataset = Dataset.from_list(rows_of(tiny_batch("classification")))
    found = layer_sensitivity(model, dataset, collate)
    assert all(value > 0 for value in found.modules.values())
    assert "classifier" not in found.modules
    assert {n: p.requires_grad for n, p in model.named_parameters()} == required
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert model.training
    assert not hasattr(model, "peft_config")


def test_the_same_whatever_the_batch_size() -> None:
    model = with_lora(tiny_model("llama", double=True), "causal-lm")
    dataset = Dataset.from_list(rows_of(tiny_batch("causal-lm", samples=7)))
    one = layer_sensitivity(model, dataset, collate, batch_size=1)
    seven = layer_sensitivity(model, dataset, collate, batch_size=7)
    assert one.modules == pytest.approx(seven.modules, rel=1e-9)


def test_saves_and_loads(tmp_path) -> None:  # type: ignore[no-untyped-def]
    made = LayerSensitivity("fisher", {"a.b": 0.25, "c": 0.0}, {"a.b": (3, 4), "c": (5, 6)})
    made.save(tmp_path / "sensitivity.json")
    assert LayerSensitivity.load(tmp_path / "sensitivity.json") == made
    with pytest.raises(RunError, match=r"nothing.json"):
        LayerSensitivity.load(tmp_path / "nothing.json")


def test_directions_lie_beside_it_and_go_when_they_are_not_asked_for(tmp_path) -> None:  # type: ignore[no-untyped-def]
    directions = {"a": np.eye(2, 4, dtype=np.float32), "b": np.zeros((0, 3), np.float32)}
    shapes = {"a": (5, 4), "b": (2, 3)}
    made = LayerSensitivity("fisher", {"a": 1.0, "b": 0.0}, shapes, {}, directions)
    bare = replace(made, directions={})
    assert made == bare
    assert repr(made) == repr(bare)
    file = tmp_path / "sensitivity.json"
    made.save(file)
    text = file.read_text()
    loaded = LayerSensitivity.load(file).directions
    assert loaded.keys() == directions.keys()
    assert all(np.array_equal(loaded[name], directions[name]) for name in loaded)
    (tmp_path / "sensitivity.safetensors").write_bytes(b"cut off")
    with pytest.raises(RunError, match=r"sensitivity.safetensors.*measure it again"):
        LayerSensitivity.load(file)
    bare.save(file)
    assert file.read_text() == text
    assert LayerSensitivity.load(file).directions == {}


def test_an_unknown_estimator_is_named() -> None:
    with pytest.raises(ConfigError, match=r"'newton'.*fisher"):
        layer_sensitivity(tiny_model("bert"), Dataset.from_list([]), collate, "newton")


def test_what_holds_no_labelled_rows_is_refused_before_it_is_measured() -> None:
    rows = Dataset.from_list(rows_of(tiny_batch("classification", samples=4)))
    bare = rows.remove_columns("labels")
    wrong = [
        (list(rows), "Dataset.from_list"),
        (DatasetDict(train=rows), "not DatasetDict"),
        (rows.to_iterable_dataset(), "without streaming"),
        (rows.select([]), "empty"),
        (bare, "no `labels`"),
    ]
    model = tiny_model("bert")
    for measure in (layer_sensitivity, score_samples):
        for dataset, message in wrong:
            collator = default_data_collator if dataset is bare else collate
            with pytest.raises(DataError, match=message):
                measure(model, dataset, collator)  # type: ignore[operator]
