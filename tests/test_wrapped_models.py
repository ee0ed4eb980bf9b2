"""However a model comes and whatever its collator adds, samples have the plain one's scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from accelerate import Accelerator, cpu_offload
from datasets import Dataset
from torch import Tensor, nn

import tsqlora as tsq
from reference import looped_gradients, looped_lookahead, loss_of
from test_layer_kinds import EXPERTS
from test_per_sample_grads import checkpointed
from tiny import KINDS, SMALL, all_terms, collate, rows_of, tiny_batch, tiny_model, with_lora
from tsqlora.batches import evaluating, first
from tsqlora.errors import DataError, ModelError
from tsqlora.losses import infer_kind, sample_losses
from tsqlora.scoring import Scorer
from tsqlora.trials import try_out

BRIEF = all_terms(adapt_steps=1)


def scored(model: nn.Module, batch: dict[str, Tensor], collator: Any = collate) -> Any:
    return tsq.score_samples(
        model, Dataset.from_list(rows_of(batch)), collator, BRIEF, batch_size=3
    )


def true_norms(model: nn.Module, kind: str, batch: dict[str, Tensor]) -> np.ndarray:
    loops = looped_gradients(model, kind, batch)
    return np.array([float(sum(g.square().sum() for g in loop.values()) ** 0.5) for loop in loops])


def adapted() -> Any:
    return with_lora(tiny_model("bert"), "classification")


def parts_compiled(model: Any) -> Any:
    for layer in model.base_model.model.bert.encoder.layer:
        layer.compile(backend="eager")
    return model


def offloaded(model: Any) -> Any:
    cpu_offload(model, execution_device=torch.device("cpu"))
    return model


def tuples(model: Any) -> Any:
    model.config.return_dict = False
    return model


WAYS: dict[str, Callable[[Any], Any]] = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "parts compiled": parts_compiled,
    "data parallel": nn.DataParallel,
    "prepared by accelerate": lambda model: Accelerator(cpu=True).prepare(model),
    "with weights held elsewhere": offloaded,
    "with dropout on": lambda model: model.train(),
    "that answers in tuples": tuples,
}


@pytest.mark.parametrize("way", WAYS)
def test_a_model_that_comes(way: str) -> None:
    batch = tiny_batch("classification", samples=5)
    true = true_norms(adapted(), "classification", batch)
    model = WAYS[way](adapted())
    training = model.training
    assert np.allclose(scored(model, batch).gradient_norm, true, rtol=1e-5)
    assert model.training == training


def test_a_compiled_model_without_adapters_is_scored_and_planned() -> None:
    model = torch.compile(tiny_model("bert"), backend="eager")
    batch = tiny_batch("classification", samples=5)
    assert np.isfinite(scored(model, batch).gradient_norm).all()
    sensitivity = tsq.layer_sensitivity(model, Dataset.from_list(rows_of(batch)), collate)
    assert "bert.encoder.layer.0.attention.self.query" in sensitivity.modules


MORE: dict[str, Callable[[Tensor], Tensor]] = {
    "position_ids": lambda ids: torch.arange(ids.shape[1])[None],  # one row for the whole batch
    "num_items_in_batch": lambda ids: torch.tensor(3),
}


@pytest.mark.parametrize(
    ("name", "more"),
    [("llama", "position_ids"), ("llama", "num_items_in_batch"), ("deberta", "position_ids")],
)
def test_tensors_that_have_no_row_a_sample(name: str, more: str) -> None:
    kind = KINDS[name]
    model, batch = with_lora(tiny_model(name), kind), tiny_batch(kind, samples=5)

    def collator(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        found = collate(rows)
        return {more: MORE[more](found["input_ids"]), **found}

    true = true_norms(model, kind, batch)
    assert np.allclose(scored(model, batch, collator).gradient_norm, true, rtol=1e-5)


def test_one_row_of_positions_before_the_samples_and_experts() -> None:
    model = with_lora(
        tiny_model("mixtral"), "causal-lm", target_modules=["q_proj"], target_parameters=EXPERTS
    )
    batch = tiny_batch("causal-lm", samples=4)

    def collator(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        found = collate(rows)
        return {"position_ids": torch.arange(found["input_ids"].shape[1])[None], **found}

    true = true_norms(model, "causal-lm", batch)
    assert np.allclose(scored(model, batch, collator).gradient_norm, true, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "bart"])
def test_a_sample_whose_targets_are_all_masked_has_no_loss_and_no_gradient(name: str) -> None:
    kind = KINDS[name]
    model, batch = with_lora(tiny_model(name), kind), tiny_batch(kind, samples=6)
    batch["labels"][[1, 4]] = -100
    scores = scored(model, batch)
    assert np.allclose(scores.gradient_norm, true_norms(model, kind, batch), rtol=1e-5)
    for column in ("loss", "gradient_norm", "loss_reduction"):
        assert (getattr(scores, column)[[1, 4]] == 0).all()
    assert np.isfinite(scores.quality).all()
    assert np.isclose(scores.probability.sum(), 1)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_labels": 3, "problem_type": "multi_label_classification"},
        {"num_labels": 2, "problem_type": "regression"},
    ],
)
def test_several_targets_a_sample_are_refused(settings: dict[str, Any]) -> None:
    model = tf.BertForSequenceClassification(tf.BertConfig(**SMALL, **settings))
    with pytest.raises(ModelError, match="only one is supported"):
        infer_kind(model)


@pytest.mark.parametrize(
    ("labels", "message"),
    [([0.0, 1.0], "fractions"), ([0, 3], "from 0 to 3"), ([-1, 2], "from -1 to 2")],
)
def test_labels_that_are_no_class_are_refused(labels: list[float], message: str) -> None:
    with pytest.raises(DataError, match=message):
        sample_losses("classification", torch.zeros(2, 3), torch.tensor(labels))


def test_trying_out_works_under_reentrant_checkpointing_and_leaves_gradients() -> None:
    model = adapted()
    checkpointed(model, reentrant=True)
    before = {n: torch.ones_like(p) for n, p in model.named_parameters() if "lora_A" in n}
    for name, gradient in before.items():
        model.get_parameter(name).grad = gradient
    rows = Dataset.from_list(rows_of(tiny_batch("classification")))
    try_out(model, "classification", rows, collate)
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == before.keys()
    assert all(torch.equal(found[name], before[name]) for name in found)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_bases(bits: int, tmp_path: Any) -> None:
    pytest.importorskip("bitsandbytes")
    small = {**SMALL, "hidden_size": 64, "intermediate_size": 64}
    tf.LlamaForCausalLM(tf.LlamaConfig(**small)).save_pretrained(tmp_path)
    quantised = tf.BitsAndBytesConfig(
        load_in_8bit=bits == 8, load_in_4bit=bits == 4, bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    base = tf.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=quantised, device_map="cpu", dtype=torch.float32
    )
    model = with_lora(base, "causal-lm", target_modules=["q_proj", "v_proj", "down_proj"])
    batch = tiny_batch("causal-lm", samples=6)
    rows = Dataset.from_list(rows_of(batch))
    found = Scorer(collate, BRIEF, batch_size=2).score(model, rows)  # batches after a lookahead
    with evaluating(model):
        true = true_norms(model, "causal-lm", batch)
        assert (true > 0.1).all()
        assert np.allclose(found.gradient_norm, true, rtol=1e-4)
        assert np.allclose(found.loss_reduction[:2], alone(model, first(batch, 2)), rtol=1e-2)


def alone(model: Any, batch: dict[str, Tensor]) -> np.ndarray:
    """Loss less the loss after a real step of half a unit on each sample."""
    steps = torch.from_numpy(0.5 / true_norms(model, "causal-lm", batch)).float()
    with torch.no_grad():
        before = loss_of(model, "causal-lm", batch)
    return (before - looped_lookahead(model, "causal-lm", batch, steps)).numpy()
