"""A pruned component stays exactly zero until it is grown, whatever trains the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from accelerate import Accelerator
from torch import nn

from tiny import tiny_batch, tiny_model, with_lora
from tsqlora.adapter import active, add_headroom, compact, grow, prune
from tsqlora.errors import TrainingError
from tsqlora.lora_layers import lora_modules, lora_parameters
from tsqlora.optimizer_state import check_understood, state_of

DECAY: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.1}


def eight_bit(parameters: Any) -> Any:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    return bitsandbytes.optim.AdamW8bit(parameters, **DECAY, min_8bit_size=16)


OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "adamw": lambda p: torch.optim.AdamW(p, **DECAY),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, **DECAY, foreach=True, amsgrad=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, **DECAY, fused=True),
    "sgd-momentum": lambda p: torch.optim.SGD(p, **DECAY, momentum=0.9, nesterov=True),
    "sgd": lambda p: torch.optim.SGD(p, **DECAY),
    "rmsprop": lambda p: torch.optim.RMSprop(p, **DECAY, momentum=0.5, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, **DECAY, initial_accumulator_value=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, **DECAY),
    "adafactor-of-transformers": lambda p: transformers.optimization.Adafactor(
        p, **DECAY, beta1=0.9, relative_step=False, scale_parameter=False
    ),
    "adamw-8bit": eight_bit,
}


def train(model: Any, optimizer: Any, steps: int, how: str = "plain") -> None:
    """Steps of two accumulated batches, clipped."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=how == "scaled")
    for seed in range(steps):
        for part in range(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=how == "bf16"):
                loss = model(**tiny_batch("classification", seed=2 * seed + part)).loss / 2
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(lora_parameters(model), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()


@pytest.mark.parametrize("how", ["plain", "bf16", "scaled"])
@pytest.mark.parametrize("name", [n for n in OPTIMIZERS if n != "adamw-8bit"])
def test_a_pruned_component_stays_exactly_zero_until_grown(name: str, how: str) -> None:
    model = with_lora(tiny_model("bert"), "classification").train()
    optimizer = OPTIMIZERS[name](lora_parameters(model))
    module = lora_modules(model)[1]
    train(model, optimizer, 3, how)
    prune(module, [1], optimizer)
    train(model, optimizer, 4, how)
    assert not module.a.weight[1].any()
    assert not module.b.weight[:, 1].any()
    assert active(module).tolist() == [True, False, True]
    grow(module, [1], optimizer, torch.rand(1, module.shape[1]))
    train(model, optimizer, 2, how)
    assert module.a.weight[1].any()
    assert module.b.weight[:, 1].any()
    assert all(bool(p.isfinite().all()) for p in lora_parameters(model))


@pytest.mark.parametrize("name", ["adamw", "adafactor", "adafactor-of-transformers", "adamw-8bit"])
def test_only_the_pruned_slices_of_the_state_change(name: str) -> None:
    model = with_lora(tiny_model("bert"), "classification").train()
    optimizer = OPTIMIZERS[name](lora_parameters(model))
    module = lora_modules(model)[1]
    parameters = {0: module.a.get_parameter("weight"), 1: module.b.get_parameter("weight")}
    train(model, optimizer, 2)

    def copies() -> list[dict[str, Any]]:
        return [
            {k: v.clone() for k, v in state_of(optimizer, p).items() if isinstance(v, torch.Tensor)}
            for p in parameters.values()
        ]

    before = copies()
    prune(module, [1], optimizer)
    changed = 0
    for dimension, (old, new) in enumerate(zip(before, copies(), strict=True)):
        for key in old:
            if old[key].dim() == 2 and old[key].shape[dimension] == 3:
                keep = torch.tensor([0, 2])
                assert torch.equal(
                    new[key].index_select(dimension, keep), old[key].index_select(dimension, keep)
                )
            changed += not torch.equal(new[key], old[key])
    assert changed >= 2


def estimate(state: dict[str, Any]) -> torch.Tensor:
    """Adafactor's E g² (rows, columns)."""
    rows, columns = (
        state.get(f"{name}_var", state.get(f"exp_avg_sq_{name}")) for name in ("row", "col")
    )
    assert rows is not None
    assert columns is not None
    return rows.flatten()[:, None] * columns.flatten()[None] / rows.mean()


@pytest.mark.parametrize("name", ["adafactor", "adafactor-of-transformers"])
def test_adafactors_estimates_of_the_others_stay(name: str) -> None:
    model = with_lora(tiny_model("bert"), "classification").train()
    optimizer = OPTIMIZERS[name](lora_parameters(model))
    train(model, optimizer, 2)
    module = lora_modules(model)[1]
    parameter = module.a.get_parameter("weight")
    before = estimate(state_of(optimizer, parameter))
    prune(module, [1], optimizer)
    after = estimate(state_of(optimizer, parameter))
    assert not after[1].any()
    assert torch.allclose(after[[0, 2]], before[[0, 2]], rtol=1e-5)
    compact(model, optimizer)
    short = estimate(state_of(optimizer, parameter))
    assert torch.allclose(short, before[[0, 2]], rtol=1e-5)
    train(model, optimizer, 1)


def test_accelerates_wrapper_is_looked_through() -> None:
    model = with_lora(tiny_model("bert"), "classification").train()
    inner = torch.optim.AdamW(lora_parameters(model))
    wrapped = Accelerator(cpu=True).prepare(inner)
    train(model, inner, 1)
    parameter = lora_parameters(model)[0]
    assert state_of(wrapped, parameter) is inner.state[parameter]
    assert check_understood(wrapped, lora_parameters(model))


def test_state_that_is_not_understood_is_refused_by_name() -> None:
    class Shampoo(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for group in self.param_groups:
                for p in group["params"]:
                    self.state[p]["left"] = torch.eye(p.shape[0] + 1)

    model = with_lora(tiny_model("bert"), "classification").train()
    optimizer = Shampoo(lora_parameters(model), lr=0.1)
    assert not check_understood(optimizer, lora_parameters(model))
    optimizer.step()
    with pytest.raises(TrainingError, match=r"Shampoo keeps 'left' \(of shape \(4, 4\)\)"):
        check_understood(optimizer, lora_parameters(model))
    with pytest.raises(TrainingError, match=r"Shampoo"):
        prune(lora_modules(model)[0], [0], optimizer)


@pytest.mark.parametrize(
    "name", ["adamw", "adamw-foreach", "adamw-fused", "sgd-momentum", "rmsprop", "adagrad"]
)
def test_training_goes_on_after_compaction_as_it_would_have(name: str) -> None:
    def run(compacted: bool) -> tuple[Any, Any]:
        model = with_lora(tiny_model("bert"), "classification").train()
        add_headroom(model, 3)
        optimizer = OPTIMIZERS[name](lora_parameters(model))
        for each in lora_modules(model)[::2]:
            prune(each, [1], optimizer)
        emptied = lora_modules(model)[1]
        prune(emptied, range(emptied.rank), optimizer)
        train(model, optimizer, 2)
        loss = model(**tiny_batch("classification")).loss  # its graph lives on
        loss.backward()
        same = [id(p) for p in lora_parameters(model)]
        if compacted:
            compact(model, optimizer)
            assert [id(p) for p in lora_parameters(model)] == same
            assert {m.rank for m in lora_modules(model)} == {1, 2, 3}
            assert model.peft_config["default"].r == 3
        optimizer.step()
        optimizer.zero_grad()
        train(model, optimizer, 2)
        assert loss.isfinite()
        return model.eval(), optimizer

    (short, optimizer), (long, _) = run(True), run(False)
    batch = tiny_batch("classification")
    assert (short(**batch).logits - long(**batch).logits).abs().max() < 2e-3
    for parameter in lora_parameters(short):
        for key, value in state_of(optimizer, parameter).items():
            if isinstance(value, torch.Tensor) and value.dim() == 2 and "_" in key:
                assert all(a in (1, b) for a, b in zip(value.shape, parameter.shape, strict=True))


def test_8_bit_state_is_not_cut() -> None:
    model = with_lora(tiny_model("bert"), "classification").train()
    optimizer = eight_bit(lora_parameters(model))
    train(model, optimizer, 1)
    before = [p.shape for p in lora_parameters(model)]
    with pytest.raises(TrainingError, match=r"8-bit state cannot be cut"):
        compact(model, optimizer)
    assert [p.shape for p in lora_parameters(model)] == before


def test_a_second_copy_of_the_weights_is_not_taken_for_a_moment() -> None:
    model = with_lora(tiny_model("bert"), "classification")
    optimizer = torch.optim.AdamW(lora_parameters(model))
    train(model, optimizer, 1)
    assert check_understood(optimizer, lora_parameters(model))
    for parameter in lora_parameters(model):  # as schedulefree does it
        optimizer.state[parameter]["z"] = parameter.detach().clone()
    with pytest.raises(TrainingError, match="keeps 'z'"):
        check_understood(optimizer, lora_parameters(model))
