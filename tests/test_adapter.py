"""Components that come and go without the model noticing, and exports that load anywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification

from tiny import DECODERS, ENCODERS, KINDS, SEQ2SEQ, tiny_batch, tiny_model, with_lora
from tsqlora.adapter import (
    active_ranks,
    add_headroom,
    check_plan,
    grow,
    lora_config,
    prune,
    warm_start,
)
from tsqlora.allocation import RankPlan
from tsqlora.errors import ConfigError, ModelError
from tsqlora.export import export_adapter
from tsqlora.loading import load_config, load_model
from tsqlora.lora_layers import (
    PEFT_TASK_TYPES,
    lora_modules,
    temporary_adapter,
    trainable_state,
    wrap,
)


def logits(model: Any, kind: str) -> torch.Tensor:
    batch = tiny_batch(kind)
    if kind != "seq2seq":
        batch.pop("labels")
    with torch.no_grad():
        return model(**batch).logits


def uneven_plan(name: str, ranks: tuple[int, ...] = (0, 1, 2, 5)) -> RankPlan:
    model, kind = tiny_model(name), KINDS[name]
    with temporary_adapter(model, kind, 1) as adapted:
        shapes = {m.name: m.shape for m in lora_modules(adapted)}
    chosen = {n: min(ranks[i % len(ranks)], *shapes[n]) for i, n in enumerate(shapes)}
    return RankPlan(chosen, shapes, 2.0, 10**9)


def planned_model(name: str) -> tuple[Any, RankPlan]:
    plan = uneven_plan(name)
    config = lora_config(plan, PEFT_TASK_TYPES[KINDS[name]])
    config.init_lora_weights = False  # random B: a function that differs from the base's
    torch.manual_seed(1)
    return get_peft_model(tiny_model(name), config).eval(), plan


@pytest.mark.parametrize("name", [*ENCODERS, *SEQ2SEQ, *DECODERS])
@pytest.mark.parametrize("form", ["compact", "padded", "merged"])
def test_every_export_of_every_architecture_gives_equal_logits(
    name: str, form: str, tmp_path: Path
) -> None:
    kind = KINDS[name]
    model, plan = planned_model(name)
    check_plan(model, plan)
    adapted = lora_modules(model)[0]
    prune(adapted, [0], None)
    expected = logits(model, kind)
    assert not torch.allclose(expected, logits(tiny_model(name), kind), atol=1e-3)
    export_adapter(model, tmp_path / "out", form)
    if form == "merged":
        loaded = type(tiny_model(name)).from_pretrained(tmp_path / "out").eval()
    else:
        loaded = PeftModel.from_pretrained(tiny_model(name), str(tmp_path / "out")).eval()
        merged = PeftModel.from_pretrained(tiny_model(name), str(tmp_path / "out"))
        assert (logits(merged.merge_and_unload().eval(), kind) - expected).abs().max() < 1e-5
    assert (logits(loaded, kind) - expected).abs().max() < 1e-5
    assert torch.equal(logits(model, kind), expected)


@pytest.mark.parametrize("name", [*ENCODERS])
def test_a_head_that_was_drawn_at_random_goes_with_the_adapter(name: str, tmp_path: Path) -> None:
    whole = tiny_model(name)
    body = getattr(whole, whole.base_model_prefix)
    state = {k: v for k, v in body.state_dict().items() if not k.startswith("pooler.")}
    body.save_pretrained(tmp_path / "model", state_dict=state)

    def loaded(seed: int) -> Any:
        torch.manual_seed(seed)
        config = load_config(str(tmp_path / "model"))
        config.num_labels = 3
        return load_model(str(tmp_path / "model"), AutoModelForSequenceClassification, config)

    with temporary_adapter(loaded(0), "classification", 1) as adapted:
        shapes = {m.name: m.shape for m in lora_modules(adapted)}
    plan = RankPlan(dict.fromkeys(shapes, 1), shapes, 2.0, 10**9)
    model = wrap(loaded(0), lora_config(plan, "SEQ_CLS")).eval()
    check_plan(model, plan)
    expected = logits(model, "classification")
    export_adapter(model, tmp_path / "adapter")
    assert (logits(loaded(1).eval(), "classification") - expected).abs().max() > 1e-4
    again = PeftModel.from_pretrained(loaded(1), str(tmp_path / "adapter")).eval()
    assert (logits(again, "classification") - expected).abs().max() < 1e-5


def test_compact_holds_the_true_ranks_and_padded_one_rank(tmp_path: Path) -> None:
    model, plan = planned_model("llama")
    module = lora_modules(model)[0]
    prune(module, range(module.rank), None)
    export_adapter(model, tmp_path / "compact")
    compact = PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path / "compact"))
    wanted = {n: r for n, r in plan.adapted.items() if n != module.name}
    assert {m.name: m.rank for m in lora_modules(compact)} == wanted
    assert {m.scale for m in lora_modules(compact)} == {2.0}
    export_adapter(model, tmp_path / "padded", "padded")
    padded = PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path / "padded"))
    config = padded.peft_config["default"]
    assert {m.rank for m in lora_modules(padded)} == {max(plan.ranks.values())}
    assert not config.rank_pattern
    assert not config.alpha_pattern


@pytest.mark.parametrize("rslora", [False, True])
def test_exports_of_an_adapter_made_by_others_keep_its_scale(rslora: bool, tmp_path: Path) -> None:
    model = with_lora(
        tiny_model("llama"), "causal-lm", 4, use_rslora=rslora, rank_pattern={"q_proj": 2}
    )
    expected = logits(model, "causal-lm")
    for form in ("compact", "padded"):
        export_adapter(model, tmp_path / form, form)
        loaded = PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path / form)).eval()
        assert (logits(loaded, "causal-lm") - expected).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "bert", "bart", "gpt2", "albert"])
def test_headroom_keeps_the_function_and_growth_keeps_it_bit_for_bit(
    name: str, dtype: torch.dtype
) -> None:
    kind = KINDS[name]
    model = with_lora(tiny_model(name), kind).to(dtype)
    before, ranks = logits(model, kind), active_ranks(model)
    add_headroom(model, 2)
    with_room = logits(model, kind)  # other shapes may be added up in another order
    assert (with_room - before).abs().max() < (1e-6 if dtype == torch.float32 else 0.05)
    assert active_ranks(model) == ranks
    for module in lora_modules(model):
        grow(module, [module.rank - 1], None, torch.rand(1, module.shape[1]))
    assert torch.equal(logits(model, kind), with_room)
    assert active_ranks(model) == {name: rank + 1 for name, rank in ranks.items()}


def test_warm_start_keeps_the_function_where_ranks_suffice() -> None:
    warm = with_lora(tiny_model("bert"), "classification", rank=3)
    state = trainable_state(warm)
    wide = with_lora(tiny_model("bert"), "classification", rank=5, random=False)
    warm_start(wide, state)
    assert (logits(wide, "classification") - logits(warm, "classification")).abs().max() < 1e-5
    narrow = with_lora(tiny_model("bert"), "classification", rank=2, random=False)
    warm_start(narrow, state)
    for thin, thick in zip(lora_modules(narrow), lora_modules(warm), strict=True):
        u, s, vh = torch.linalg.svd(thick.b.weight @ thick.a.weight, full_matrices=False)
        best = u[:, :2] * s[:2] @ vh[:2]
        assert (thin.b.weight @ thin.a.weight - best).abs().max() < 1e-5
        assert torch.allclose(thin.a.weight.norm(dim=1), torch.tensor(3**-0.5))


def test_warm_start_keeps_the_function_where_a_module_is_narrower_than_the_rank() -> None:
    def model() -> torch.nn.Module:
        torch.manual_seed(0)
        body = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Linear(16, 3))
        return get_peft_model(body, LoraConfig(r=8, target_modules=["0", "1"]))

    warm, cold = model(), model()
    for module in lora_modules(warm):
        torch.nn.init.normal_(module.b.weight)
    warm_start(cold, trainable_state(warm))
    inputs = torch.randn(5, 4)
    assert (cold(inputs) - warm(inputs)).abs().max() < 1e-4


def test_a_plan_that_did_not_take_is_reported() -> None:
    model = with_lora(tiny_model("bert"), "classification", rank=3)
    with pytest.raises(ModelError, match="planned"):
        check_plan(model, uneven_plan("bert"))


def test_what_cannot_be_exported_is_said() -> None:
    with pytest.raises(ConfigError, match=r"'gguf'.*compact"):
        export_adapter(with_lora(tiny_model("bert"), "classification"), "x", "gguf")
    with pytest.raises(ModelError, match=r"no active LoRA adapter"):
        export_adapter(tiny_model("bert"), "x")
    with pytest.raises(ModelError, match=r"DoRA|Dora"):
        lora_modules(with_lora(tiny_model("bert"), "classification", use_dora=True))


def test_a_temporary_adapter_leaves_no_trace() -> None:
    model = tiny_model("roberta")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with temporary_adapter(model, "classification") as adapted:
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data.add_(1.0)
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(after[n], before[n]) and after[n].requires_grad for n in before)
