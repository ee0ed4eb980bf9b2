"""Every architecture that transformers lists, tiny, against the loop: a table, run by hand.

    python tests/sweep_architectures.py [causal-lm|classification|seq2seq] [NAME ...]

Configurations are made from the defaults with every size cut down; what cannot be made that way is
said so and is no failure of ours. Each row: whether samples are told apart in one batch, the worst
relative error of gradients (also of the last layers alone), own steps and `score_samples` to the
loop, then score, plan, three steps with dynamic ranks, export, and what plain PEFT loads of it.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from datasets import Dataset, disable_progress_bars
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers.models.auto import modeling_auto

import tsqlora as tsq
from reference import looped_gradients, looped_lookahead, loss_of
from tiny import VOCABULARY, all_terms, collate, rows_of, tiny_batch, with_lora
from tsqlora.batches import forward_logits, singly
from tsqlora.errors import TsqloraError
from tsqlora.lookahead import one_step
from tsqlora.lora_layers import PEFT_TASK_TYPES
from tsqlora.per_sample_grads import Keep, PerSampleGradients, separable

AUTO = {
    "causal-lm": (tf.AutoModelForCausalLM, "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
    "classification": (
        tf.AutoModelForSequenceClassification,
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    ),
    "seq2seq": (tf.AutoModelForSeq2SeqLM, "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES"),
}
WIDTH, LONGEST = 32, 12
SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "emb_dim"), WIDTH),
    **dict.fromkeys(("embedding_size", "word_embed_proj_dim", "lru_width", "hidden_dim"), WIDTH),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "n_inner", "d_inner"), 48),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "ffn_hidden_size"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("shared_intermediate_size", "moe_ffn_hidden_size"), 16),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_encoder_layers",), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "num_ln_in_parallel_attn"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "v_head_dim", "qk_nope_head_dim", "kv_channels"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim", "global_head_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "hidden_size_per_layer_input"), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_num_experts", "num_local_expert"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "experts_per_token"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"), 64),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "state_size", "mamba_d_state"), 16),
    **dict.fromkeys(("ssm_state_size", "mamba_d_ssm"), 16),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    "mamba_n_groups": 1, "n_groups": 1, "sliding_window": 8, "attention_window": 4,
    "block_size": 4, "num_kv_shared_layers": 0, "laurel_rank": 4, "altup_num_inputs": 2,
    "attention_hidden_size": WIDTH, "conv_dim": WIDTH, "time_step_rank": 4, "mamba_dt_rank": 4,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
    "cls_token_id": 1, "sep_token_id": 2, "dropout": 0.0, "type_vocab_size": 2,
}  # fmt: skip
SPECIAL: dict[str, dict[str, Any]] = {
    "mamba2": {"num_heads": 4, "head_dim": 16, "expand": 2, "chunk_size": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "falcon_mamba": {"time_step_rank": 4},
    "mamba": {"time_step_rank": 4},
    "gptj": {"rotary_dim": 8},
    "codegen": {"rotary_dim": 8},
    "reformer": {
        "attn_layers": ["local", "local"], "axial_pos_embds": False, "is_decoder": True,
        "attention_head_size": 8, "feed_forward_size": 48, "local_attn_chunk_length": 4,
    },
    "funnel": {"block_sizes": [1, 1], "num_decoder_layers": 1},
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid"], "mamba_ngroups": 1, "attention_hidden_size": 64,
    },
    "falcon_h1": {"mamba_d_ssm": 64},
    "deberta": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
}  # fmt: skip


def cut(config: Any) -> dict[str, Any]:
    """The sizes that this configuration knows."""
    kind = type(config)
    fixed = {name for name in SIZES if isinstance(getattr(kind, name, None), property)}
    fixed |= set(getattr(kind, "attribute_map", {}))
    return {k: v for k, v in SIZES.items() if k not in fixed and k in vars(config)}


def made(kind: str, name: str) -> Any:
    """A tiny model of that architecture, whose forward works."""
    batch, problem = tiny_batch(kind, samples=2), Exception()
    for without in [(), ("head_dim",), ("layers",), ("head_dim", "layers")]:
        try:
            model = attempted(kind, name, without)
            with torch.no_grad():
                forward_logits(model, kind, batch)
        except Exception as error:  # noqa: PERF203
            problem = error if not problem.args else problem
        else:
            return model
    raise problem


def attempted(kind: str, name: str, without: tuple[str, ...]) -> Any:
    """One way to make it."""
    config_class = type(tf.AutoConfig.for_model(name))
    default = config_class()
    settings = {**cut(default), **SPECIAL.get(name, {})}
    for part in ("text_config", "encoder", "decoder", "encoder_config", "decoder_config"):
        inner = getattr(default, part, None)
        if hasattr(inner, "to_dict"):
            settings[part] = {**cut(inner), **SPECIAL.get(inner.model_type, {})}
            settings[part]["model_type"] = inner.model_type
    if "qk_rope_head_dim" in settings:  # all heads share one latent
        settings["num_key_value_heads"] = settings["num_attention_heads"]
    if "layers" not in without:
        settings = {**two_kinds_of_layer(default), **settings}
    if "head_dim" in without:
        settings.pop("head_dim", None)
    if kind == "classification":
        settings["num_labels"] = 3
    if kind == "seq2seq":
        settings["decoder_start_token_id"] = 1
    torch.manual_seed(0)
    model = AUTO[kind][0].from_config(config_class(**settings))
    if sum(p.numel() for p in model.parameters()) > 5_000_000:
        raise ValueError("not made tiny: its sizes have other names")
    for parameter in model.parameters():
        if parameter.dim() > 1 or not parameter.isfinite().all() or parameter.abs().max() > 1e3:
            torch.nn.init.normal_(parameter, std=0.2)
    model.config.use_cache = False
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return model.eval()


def two_kinds_of_layer(config: Any) -> dict[str, Any]:
    """The lists that say what each layer is, for two layers of two kinds where there are two."""
    found = {}
    for key in ("layer_types", "mlp_layer_types", "layers_block_type", "mlp_only_layers"):
        kinds = getattr(config, key, None)
        if kinds and not isinstance(getattr(type(config), key, None), property):
            distinct = list(dict.fromkeys(kinds))
            found[key] = distinct if len(distinct) == 2 else (distinct * 2)[:2]
    return found


def relative(got: Tensor, true: Tensor) -> float:
    """‖got − true‖ / ‖true‖."""
    error = (got - true).norm() / true.norm().clamp(min=1e-30)
    return float(error.nan_to_num(nan=torch.inf))


def flat(gradients: dict[str, Tensor]) -> Tensor:
    """One vector."""
    return torch.cat([gradient.flatten() for gradient in gradients.values()])


def gradient_errors(make: Callable[[], Any], kind: str, batch: dict[str, Tensor]) -> dict[str, Any]:
    """Of gradients, the last layers' too, and own steps to the loop, in float64 if it can be."""
    model = with_lora(make().double(), kind)
    try:
        sound = all(flat(g).isfinite().all() for g in looped_gradients(model, kind, batch))
    except RuntimeError:
        sound = False
    if not sound:
        model = with_lora(make(), kind)
    told = separable(model, kind, batch)
    rows = {"told apart": "yes" if told else "no"}
    worst = {"gradient": 0.0, "lookahead": 0.0, "depth": 0.0}
    for piece in [batch] if told else singly(batch):
        loops = looped_gradients(model, kind, piece)
        true = torch.stack([flat(loop) for loop in loops])
        steps = 0.5 / true.norm(dim=1)
        for column, depth in [("gradient", 1.0), ("depth", 0.3)]:
            keep = Keep()
            with PerSampleGradients(model, keep, depth=depth) as gradients:
                before = loss_of(model, kind, piece)
                gradients.backward(before)
            whole = {n: keep.whole(n, w) for n, w in gradients.weights.items()}
            for i, loop in enumerate(loops):
                expected = flat({n: loop[n] for n in whole})
                error = relative(flat({n: g[i] for n, g in whole.items()}), expected)
                worst[column] = max(worst[column], error)
            if depth == 1:
                with torch.no_grad(), one_step(gradients, keep, steps):
                    gained = before.detach() - loss_of(model, kind, piece)
                truly = before.detach() - looped_lookahead(model, kind, piece, steps)
                worst["lookahead"] = max(worst["lookahead"], relative(gained, truly))
    return {**rows, **{name: f"{error:.0e}" for name, error in worst.items()}}


def collated(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """`collate`, without a mask where the model takes none."""
    found = collate([{"attention_mask": [1] * len(row["input_ids"]), **row} for row in rows])
    return {name: found[name] for name in found if name in rows[0]}


def the_whole_way(make: Callable[[], Any], kind: str, batch: dict[str, Tensor]) -> float:
    """The largest difference of logits between what was trained and what plain PEFT loads."""
    model = make()
    pool = Dataset.from_list(rows_of(batch))
    scores = tsq.score_samples(model, pool, collated, all_terms(adapt_steps=2), batch_size=4)
    subset = tsq.select_samples(pool, scores, fraction=0.5)
    plan = tsq.allocate_ranks(tsq.layer_sensitivity(model, subset, collated), mean_rank=2)
    adapted = get_peft_model(model, tsq.lora_config(plan, task_type=PEFT_TASK_TYPES[kind]))
    with tempfile.TemporaryDirectory() as folder:
        arguments = tf.TrainingArguments(
            folder, max_steps=3, per_device_train_batch_size=4, learning_rate=0.05,
            save_strategy="no", report_to="none", disable_tqdm=True, logging_strategy="no",
        )  # fmt: skip
        moving = tsq.DynamicRankCallback(plan)
        tf.Trainer(
            adapted, arguments, train_dataset=pool, data_collator=collated, callbacks=[moving]
        ).train()
        tsq.export_adapter(adapted, Path(folder) / "adapter")
        loaded = PeftModel.from_pretrained(make(), f"{folder}/adapter").eval()
    with torch.no_grad():
        trained = forward_logits(adapted.eval(), kind, batch)
        return float((forward_logits(loaded, kind, batch) - trained).abs().max())


def row(kind: str, name: str) -> dict[str, Any]:
    """What was found of one architecture."""
    batch = tiny_batch(kind, samples=4, longest=LONGEST)
    try:
        make = lambda: made(kind, name)  # noqa: E731
        make()
    except Exception as error:
        return {"not made": f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}"[:110]}
    return {
        **tried("gradients", lambda: gradient_errors(make, kind, batch)),
        **tried("whole way", lambda: {"whole way": f"{the_whole_way(make, kind, batch):.0e}"}),
    }


def tried(what: str, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `run` found, or what it said instead."""
    try:
        return run()
    except TsqloraError as error:
        return {what: f"refused: {str(error)[:160]}"}
    except Exception as error:
        return {what: f"FAILED {type(error).__name__}: {str(error)[:160]}"}


def names(kind: str) -> Iterator[str]:
    """All model types that the auto class lists."""
    yield from getattr(modeling_auto, AUTO[kind][1])


def main() -> None:
    """The table, a line as soon as it is known."""
    warnings.filterwarnings("ignore")
    disable_progress_bars()
    tf.logging.set_verbosity_error()
    kinds = [sys.argv[1]] if len(sys.argv) > 1 else list(AUTO)
    for kind in kinds:
        for name in sys.argv[2:] or names(kind):
            shown = "  ".join(f"{k}={v}" for k, v in row(kind, name).items())
            print(f"{kind:15}{name:28}{shown}", flush=True)


if __name__ == "__main__":
    main()
