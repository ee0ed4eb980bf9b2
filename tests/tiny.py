"""Tiny random models of every architecture that is supported, and batches for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from tsqlora.config import QualityConfig, QualityWeights
from tsqlora.lora_layers import PEFT_TASK_TYPES
from tsqlora.targets import resolve_targets

VOCABULARY, END = 40, 2
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
DECODER = {**SMALL, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
BART: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}


def _encoder(config: type, model: type, **more: Any) -> Callable[[], Any]:
    return lambda: model(config(**SMALL, num_labels=3, **more))


def _decoder(config: type, model: type, **more: Any) -> Callable[[], Any]:
    return lambda: model(config(**{**DECODER, **more}))


ENCODERS: dict[str, Callable[[], Any]] = {
    "bert": _encoder(tf.BertConfig, tf.BertForSequenceClassification),
    "roberta": _encoder(tf.RobertaConfig, tf.RobertaForSequenceClassification),
    "albert": _encoder(tf.AlbertConfig, tf.AlbertForSequenceClassification, embedding_size=8),
    "distilbert": lambda: tf.DistilBertForSequenceClassification(
        tf.DistilBertConfig(
            vocab_size=VOCABULARY,
            dim=16,
            n_layers=2,
            n_heads=2,
            hidden_dim=24,
            max_position_embeddings=64,
            num_labels=3,
        )
    ),
    "deberta": _encoder(
        tf.DebertaConfig,
        tf.DebertaForSequenceClassification,
        relative_attention=True,
        max_relative_positions=16,
        pos_att_type=["p2c", "c2p"],
    ),
    "deberta-v2": _encoder(
        tf.DebertaV2Config,
        tf.DebertaV2ForSequenceClassification,
        relative_attention=True,
        position_buckets=8,
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        norm_rel_ebd="layer_norm",
    ),
    "modernbert": _encoder(
        tf.ModernBertConfig,
        tf.ModernBertForSequenceClassification,
        local_attention=8,
        global_attn_every_n_layers=2,
        bos_token_id=1,
        eos_token_id=2,
        cls_token_id=1,
        sep_token_id=2,
    ),
    "xlnet": lambda: tf.XLNetForSequenceClassification(
        tf.XLNetConfig(
            vocab_size=VOCABULARY, d_model=16, n_layer=2, n_head=2, d_inner=24, num_labels=3
        )
    ),
    "bart-classifier": lambda: tf.BartForSequenceClassification(
        tf.BartConfig(**BART, num_labels=3)
    ),
    "llama-classifier": _decoder(tf.LlamaConfig, tf.LlamaForSequenceClassification, num_labels=3),
}
SEQ2SEQ: dict[str, Callable[[], Any]] = {
    "bart": lambda: tf.BartForConditionalGeneration(tf.BartConfig(**BART)),
    "marian": lambda: tf.MarianMTModel(tf.MarianConfig(**BART)),
    "t5": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(
            vocab_size=VOCABULARY,
            d_model=16,
            d_kv=8,
            d_ff=24,
            num_layers=2,
            num_heads=2,
            decoder_start_token_id=0,
            pad_token_id=0,
            eos_token_id=2,
        )
    ),
}
DECODERS: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: tf.GPT2LMHeadModel(
        tf.GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=16,
            n_layer=2,
            n_head=2,
            n_positions=64,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    ),
    "openai-gpt": lambda: tf.OpenAIGPTLMHeadModel(
        tf.OpenAIGPTConfig(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=64)
    ),
    "xlm": lambda: tf.XLMWithLMHeadModel(
        tf.XLMConfig(vocab_size=VOCABULARY, emb_dim=16, n_layers=2, n_heads=2, pad_index=0)
    ),
    "mamba": lambda: tf.MambaForCausalLM(
        tf.MambaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            num_hidden_layers=2,
            state_size=4,
            time_step_rank=2,
            pad_token_id=0,
        )
    ),
    "llama": _decoder(tf.LlamaConfig, tf.LlamaForCausalLM),
    "qwen2": _decoder(tf.Qwen2Config, tf.Qwen2ForCausalLM),
    "qwen3": _decoder(tf.Qwen3Config, tf.Qwen3ForCausalLM, head_dim=8),
    "gemma": _decoder(tf.GemmaConfig, tf.GemmaForCausalLM, head_dim=8),
    "gemma2": _decoder(tf.Gemma2Config, tf.Gemma2ForCausalLM, head_dim=8),
    "phi": _decoder(tf.PhiConfig, tf.PhiForCausalLM),
    "phi3": _decoder(tf.Phi3Config, tf.Phi3ForCausalLM),
    "mistral": _decoder(tf.MistralConfig, tf.MistralForCausalLM),
    "mixtral": _decoder(tf.MixtralConfig, tf.MixtralForCausalLM, num_local_experts=4),
    "phimoe": _decoder(tf.PhimoeConfig, tf.PhimoeForCausalLM, num_local_experts=4),
    "falcon": _decoder(tf.FalconConfig, tf.FalconForCausalLM, new_decoder_architecture=True),
    "qwen2-moe": _decoder(
        tf.Qwen2MoeConfig,
        tf.Qwen2MoeForCausalLM,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=8,
    ),
}
KINDS = {
    **dict.fromkeys(ENCODERS, "classification"),
    **dict.fromkeys(SEQ2SEQ, "seq2seq"),
    **dict.fromkeys(DECODERS, "causal-lm"),
}


def tiny_model(name: str, seed: int = 0, double: bool = False) -> Any:
    """A model of that architecture with seeded random weights, in eval mode."""
    torch.manual_seed(seed)
    model = {**ENCODERS, **SEQ2SEQ, **DECODERS}[name]()
    if double and hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the grouped one knows no float64
    return (model.double() if double else model).eval()


def with_lora(
    model: Any, kind: str, rank: int = 3, random: bool = True, **settings: Any
) -> PeftModel:
    """The model under LoRA; with random A and B where asked, so that both have gradients."""
    targets = resolve_targets(model, kind, settings.pop("target_modules", "all-linear"))
    mixed = settings.pop("mixed", False)
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        task_type=PEFT_TASK_TYPES[kind],
        init_lora_weights=not random,
        target_modules=targets,
        **settings,
    )
    dtype = next(model.parameters()).dtype
    return get_peft_model(model, config, mixed=mixed).to(dtype).eval()


def tiny_batch(
    kind: str, samples: int = 4, seed: int = 0, longest: int = 9, left: bool = False
) -> dict[str, Tensor]:
    """Random samples of random lengths, padded with 0, with targets of that kind.

    What is to be classified ends with END, by which encoder-decoders find its end.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (samples, longest), generator=generator)
    lengths = torch.randint(4, longest + 1, (samples,), generator=generator)
    if samples:
        lengths[0] = longest
    steps = torch.arange(longest)
    mask = (steps >= (longest - lengths)[:, None]) if left else (steps < lengths[:, None])
    ids = ids * mask
    if kind == "classification":
        ids[range(samples), steps.expand(samples, -1).mul(mask).argmax(1)] = END
        labels = torch.randint(0, 3, (samples,), generator=generator)
    elif kind == "regression":
        labels = torch.randn(samples, generator=generator)
    else:
        labels = torch.where(mask, ids, -100)
        if kind == "causal-lm":
            first = mask.int().argmax(1, keepdim=True)
            labels = torch.where(steps <= first + 1, -100, labels)
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}


def rows_of(batch: dict[str, Tensor]) -> list[dict[str, Any]]:
    """The samples without their padding, as a data set's rows."""
    rows = []
    for i in range(len(batch["labels"])):
        mask = batch["attention_mask"][i].bool()
        labels = batch["labels"][i]
        rows.append(
            {
                "id": i,
                "input_ids": batch["input_ids"][i][mask].tolist(),
                "attention_mask": [1] * int(mask.sum()),
                "labels": labels[mask].tolist() if labels.dim() else labels.item(),
            }
        )
    return rows


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Right-padded batches of `rows_of`."""

    def padded(key: str, fill: int) -> Tensor:
        longest = max(len(row[key]) for row in rows)
        return torch.tensor([row[key] + [fill] * (longest - len(row[key])) for row in rows])

    first = rows[0]["labels"]
    labels = (
        padded("labels", -100)
        if isinstance(first, list)
        else torch.tensor([row["labels"] for row in rows])
    )
    return {
        "input_ids": padded("input_ids", 0),
        "attention_mask": padded("attention_mask", 0),
        "labels": labels,
    }


def all_terms(**keys: Any) -> QualityConfig:
    """Scored upfront by all three terms, unless `keys` say otherwise."""
    return QualityConfig(**{"weights": QualityWeights(1.0, 1.0, 1.0), **keys})
