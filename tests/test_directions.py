"""Fresh components along the mean gradient: what they are, what they leave alone, how they grow."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from reference import gram_schmidt, mean_gradients
from runs import causal_run, classification_run
from test_adapter import logits
from test_dynamic_rank import OFTEN, loop
from tiny import KINDS, collate, rows_of, tiny_batch, tiny_model, with_lora
from tsqlora import RankPlan, allocate_ranks, layer_sensitivity, lora_config, start_from_gradient
from tsqlora.adapter import active, add_headroom, warm_start
from tsqlora.cli import main
from tsqlora.config import RunConfig
from tsqlora.directions import FreshRows, new_directions
from tsqlora.dynamic_rank import DynamicRank
from tsqlora.errors import ConfigError, ModelError, TrainingError
from tsqlora.inputs import Inputs
from tsqlora.lora_layers import lora_modules, lora_parameters, trainable_state, wrap
from tsqlora.losses import sample_losses
from tsqlora.pipeline import Run
from tsqlora.sensitivity import LayerSensitivity


def measured(name: str, spectrum: int = 6, samples: int = 5) -> LayerSensitivity:
    rows = Dataset.from_list(rows_of(tiny_batch(KINDS[name], samples=samples)))
    return layer_sensitivity(tiny_model(name), rows, collate, spectrum=spectrum)


@pytest.mark.parametrize("name", ["bert", "gpt2", "bart"])
def test_the_first_gradients_of_b_are_the_singular_values_of_the_mean_gradient(name: str) -> None:
    kind, samples = KINDS[name], 5
    sensitivity = measured(name, samples=samples)
    model = with_lora(tiny_model(name), kind, rank=3, random=False).eval()
    before = logits(model, kind)
    start_from_gradient(model, sensitivity)
    assert torch.equal(logits(model, kind), before)
    batch = tiny_batch(kind, samples=samples)
    inputs = {k: v for k, v in batch.items() if k != "labels" or kind == "seq2seq"}
    sample_losses(kind, model(**inputs).logits, batch["labels"]).mean().backward()
    means = mean_gradients(with_lora(tiny_model(name), kind, random=False), kind, batch)
    for module in lora_modules(model):
        directions = torch.as_tensor(sensitivity.directions[module.name])
        assert len(directions) >= 1
        rows = module.a.weight.detach()[: len(directions)]
        assert torch.allclose(rows, directions[: len(rows)], atol=1e-6)
        assert not module.b.weight.any()
        true = torch.linalg.svdvals(means[module.name])[: len(rows)] * module.scale
        assert torch.allclose(module.b.weight.grad.norm(dim=0)[: len(rows)], true, rtol=1e-3)


def test_what_has_no_direction_keeps_the_row_that_peft_drew() -> None:
    sensitivity = measured("bert", spectrum=2)
    names = list(sensitivity.directions)
    none = np.zeros((0, sensitivity.shapes[names[0]][1]), np.float32)
    sensitivity = replace(sensitivity, directions={**sensitivity.directions, names[0]: none})
    del sensitivity.directions[names[1]]
    model = with_lora(tiny_model("bert"), "classification", rank=4, random=False)
    drawn = {m.name: m.a.weight.detach().clone() for m in lora_modules(model)}
    start_from_gradient(model, sensitivity)
    for module in lora_modules(model):
        turned = len(sensitivity.directions.get(module.name, none))
        assert torch.equal(module.a.weight[turned:], drawn[module.name][turned:])
        assert turned == 0 or not torch.equal(module.a.weight[0], drawn[module.name][0])
    assert {len(directions) for directions in sensitivity.directions.values()} >= {0, 2}


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 6), st.integers(0, 6), st.integers(6, 9), st.sets(st.integers(0, 5)),
    st.integers(0, 999),
)  # fmt: skip
def test_new_directions_are_those_of_gram_schmidt_at_right_angles_to_all_before(
    there: int, known: int, width: int, taken: set[int], seed: int
) -> None:
    torch.manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(width, known).double())[0].T.float()
    rows = torch.randn(there, width)
    if there and known:  # one that they hold but for little
        rows[0] = directions[0] + 0.1 * torch.randn(width)
    found = list(new_directions(rows, directions, taken))
    expected = gram_schmidt(rows.double(), directions.double(), sorted(taken))
    assert [number for number, _ in found] == expected
    for i, (number, row) in enumerate(found):
        assert float(row.norm()) == pytest.approx(1, abs=1e-5)
        assert float(row @ directions[number]) >= 0.5**0.5 - 1e-5
        for other in [*rows, *(r for _, r in found[:i])]:
            assert float(row @ other) == pytest.approx(0, abs=1e-4)


def test_after_an_adaptation_only_components_beyond_it_are_turned() -> None:
    kind, sensitivity = "classification", measured("bert")
    state = trainable_state(with_lora(tiny_model("bert"), kind, rank=2))
    plain = with_lora(tiny_model("bert"), kind, rank=4, random=False)
    warm_start(plain, state)
    model = with_lora(tiny_model("bert"), kind, rank=4, random=False)
    warm_start(model, state)
    start_from_gradient(model, sensitivity)
    assert torch.equal(logits(model, kind), logits(plain, kind))
    turned = 0
    for module, other in zip(lora_modules(model), lora_modules(plain), strict=True):
        assert torch.equal(module.a.weight[:2], other.a.weight[:2])
        assert torch.equal(module.b.weight, other.b.weight)
        there, beyond = module.a.weight.detach().split(2)
        for row, drawn in zip(beyond, other.a.weight[2:], strict=True):
            if not torch.equal(row, drawn):
                turned += 1
                assert float(row.norm()) == pytest.approx(1, abs=1e-5)
                assert (there @ row).abs().max() < 1e-5
    assert turned


def test_a_fresh_first_adapter_leaves_all_components_to_peft_or_the_gradient() -> None:
    fresh = with_lora(tiny_model("bert"), "classification", rank=3, random=False)
    torch.manual_seed(5)
    model = with_lora(tiny_model("bert"), "classification", rank=3, random=False)
    drawn = [m.a.weight.detach().clone() for m in lora_modules(model)]
    warm_start(model, trainable_state(fresh))
    assert all(
        torch.equal(m.a.weight, row) for m, row in zip(lora_modules(model), drawn, strict=True)
    )


def test_what_cannot_be_started_is_said() -> None:
    sensitivity = measured("bert")
    model = with_lora(tiny_model("bert"), "classification")
    with pytest.raises(ConfigError, match=r"spectrum=max_rank"):
        start_from_gradient(model, replace(sensitivity, directions={}))
    other = replace(sensitivity, shapes=dict.fromkeys(sensitivity.shapes, (1, 2)))
    with pytest.raises(ModelError, match=r"measure it on this model"):
        start_from_gradient(model, other)
    with pytest.raises(ModelError, match=r"no active LoRA adapter"):
        start_from_gradient(tiny_model("bert"), sensitivity)
    wrapped = torch.nn.parallel.DistributedDataParallel.__new__(
        torch.nn.parallel.DistributedDataParallel
    )
    torch.nn.Module.__init__(wrapped)
    wrapped.add_module("module", model)
    with pytest.raises(TrainingError, match=r"before accelerator.prepare"):
        start_from_gradient(wrapped, sensitivity)


def growing(sensitivity: LayerSensitivity) -> tuple[Any, DynamicRank, Any]:
    ranks = {n: (1, 3)[i % 2] for i, n in enumerate(sorted(sensitivity.shapes))}
    plan = RankPlan(ranks, sensitivity.shapes, 2.0, 10**9)
    torch.manual_seed(0)
    model = wrap(tiny_model("llama"), lora_config(plan, "CAUSAL_LM")).train()
    start_from_gradient(model, sensitivity)
    add_headroom(model, 3)
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=1e-2)
    ranks_of = DynamicRank(model, optimizer, 30, plan, OFTEN, sensitivity=sensitivity)
    return model, ranks_of, optimizer


def test_grown_components_take_the_next_direction_and_resume_to_the_same_bytes() -> None:
    sensitivity = measured("llama", spectrum=5)
    model, ranks, optimizer = growing(sensitivity)
    first = {name: list(numbers) for name, numbers in ranks.rows.given.items()}
    planned = {m.name: int(active(m).sum()) for m in lora_modules(model)}
    assert first == {name: list(range(rank)) for name, rank in planned.items()}
    loop(model, ranks, optimizer, range(30))
    grown = dict.fromkeys(first, 0)
    for move in ranks.history:
        for name, count in move.grown.items():
            grown[name] += count
    assert any(grown.values())
    for name, numbers in ranks.rows.given.items():
        assert len(set(numbers)) == len(numbers) <= len(sensitivity.directions[name])
        assert len(numbers) - len(first[name]) <= grown[name]
    assert any(len(numbers) > len(first[name]) for name, numbers in ranks.rows.given.items())

    half, half_ranks, half_optimizer = growing(sensitivity)
    loop(half, half_ranks, half_optimizer, range(13))
    again, again_ranks, again_optimizer = growing(sensitivity)
    again.load_state_dict(half.state_dict())
    again_optimizer.load_state_dict(half_optimizer.state_dict())
    again_ranks.load_state_dict(json.loads(json.dumps(half_ranks.state_dict())))
    loop(again, again_ranks, again_optimizer, range(13, 30))
    assert again_ranks.rows.given == ranks.rows.given
    for a, b in zip(lora_parameters(model), lora_parameters(again), strict=True):
        assert torch.equal(a, b)


def test_a_row_taken_is_the_next_direction_and_then_random() -> None:
    sensitivity = measured("llama", spectrum=3)
    model = with_lora(tiny_model("llama"), "causal-lm", rank=1, random=False)
    start_from_gradient(model, sensitivity)
    modules = lora_modules(model)
    rows, drawn = (FreshRows(modules, s, 0) for s in (sensitivity, None))
    for module in modules:
        directions = torch.as_tensor(sensitivity.directions[module.name])
        for number in range(1, len(directions)):
            row = rows.take(module, 1, 7)
            assert torch.allclose(row, directions[number], atol=1e-5)
        last = rows.take(module, 1, 7)
        assert torch.equal(last, drawn.take(module, 1, 7))
        assert last.abs().max() <= module.shape[1] ** -0.5
        assert rows.given[module.name] == list(range(len(directions)))


UNADAPTED = {"quality.mode": "none", "quality.adapt_steps": 0, "quality.fraction": None}


def test_a_run_starts_along_the_directions_it_measured(tmp_path: Path) -> None:
    config = classification_run(tmp_path, **UNADAPTED)
    run = Run.start(config)
    plan = run.plan()
    sensitivity = LayerSensitivity.load(run.folder.sensitivity)
    assert {len(values) for values in sensitivity.spectrum.values()} == {8}  # ranks.max_rank
    assert max(map(len, sensitivity.directions.values())) <= 8
    started = lora_modules(run._planned_model(plan))
    for module in started:
        directions = torch.as_tensor(sensitivity.directions[module.name])[: module.rank]
        assert len(directions)
        assert torch.allclose(module.a.weight[: len(directions)], directions, atol=1e-6)
    beside = run.folder.directions.read_bytes()
    run.folder.directions.unlink()
    again = Run.start(config)
    again.plan()
    assert again.folder.directions.read_bytes() == beside
    folder = tmp_path / "random"
    folder.mkdir()
    drawn = Run.start(classification_run(folder, **UNADAPTED, **{"adapter.start": "random"}))
    others = lora_modules(drawn._planned_model(drawn.plan()))
    assert not drawn.folder.directions.exists()
    assert {m.name: m.rank for m in others} == {m.name: m.rank for m in started}
    for module, turned in zip(others, started, strict=True):
        assert not torch.equal(module.a.weight, turned.a.weight)


def test_the_adapter_for_other_trainers_starts_there_too(tmp_path: Path) -> None:
    config = causal_run(tmp_path, **UNADAPTED)
    assert main(["plan", str(config), "--format", "axolotl"]) == 0
    tensors = load_file(tmp_path / "run/untrained/adapter_model.safetensors")
    directions = LayerSensitivity.load(tmp_path / "run/sensitivity.json").directions
    ranks = RankPlan.load(tmp_path / "run/plan.json").adapted
    for name, rank in ranks.items():
        a = tensors[f"base_model.model.{name}.lora_A.weight"]
        known = torch.as_tensor(directions[name])[:rank]
        assert len(known)
        assert torch.allclose(a[: len(known)], known, atol=1e-6)
        assert not tensors[f"base_model.model.{name}.lora_B.weight"].any()


def test_the_largest_rank_and_the_start_decide_what_is_measured(tmp_path: Path) -> None:
    def digests(**changes: Any) -> dict[str, str]:
        inputs = Inputs(RunConfig.from_yaml(classification_run(tmp_path, **changes)))
        return {stage: inputs.digest(stage) for stage in ("scores", "sensitivity")}

    gain = {"ranks.rule": "marginal_gain", "adapter.start": "random"}
    first, larger = digests(**gain), digests(**gain, **{"ranks.max_rank": 9})
    turned = digests(**{**gain, "adapter.start": "gradient"})
    assert first["scores"] == larger["scores"] == turned["scores"]
    assert len({each["sensitivity"] for each in (first, larger, turned)}) == 3


def test_three_lines_start_a_wrapped_model() -> None:
    rows = Dataset.from_list(rows_of(tiny_batch("classification", samples=5)))
    sensitivity = layer_sensitivity(tiny_model("bert"), rows, collate, spectrum=32)
    plan = allocate_ranks(sensitivity, mean_rank=2, max_rank=32)
    assert 0 in plan.ranks.values()  # modules that are not adapted are passed over
    model = wrap(tiny_model("bert"), lora_config(plan, "SEQ_CLS"))
    start_from_gradient(model, sensitivity)
    for module in lora_modules(model):
        direction = torch.as_tensor(sensitivity.directions[module.name])[0]
        assert torch.allclose(module.a.weight[0], direction, atol=1e-6)
