"""A tiny Llama and a LoRA adapter as GGUF files, by the `gguf` package alone.

What `convert_hf_to_gguf.py` and `convert_lora_to_gguf.py` of llama.cpp write, for this one model:
the rows of q_proj and k_proj reordered from halves to pairs, every other tensor as it is.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray
from safetensors.torch import load_file

LAYERS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write_model(model: Any, path: Path) -> Path:
    """A LlamaForCausalLM, in float32 and without a tokenizer."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    for name, tensor in model.state_dict().items():
        module = name.removesuffix(".weight")
        array = tensor.float().numpy()
        writer.add_tensor(f"{_named(module)}.weight", _paired(module, array, config))
    return _written(writer, path)


def write_adapter(folder: Path, config: Any, path: Path) -> Path:
    """A PEFT adapter folder: one alpha, that of adapter_config.json, for all tensors."""
    said = json.loads((folder / "adapter_config.json").read_text())
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(said["lora_alpha"]))
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        if ".base_layer." in name:
            continue
        module, factor = name.removeprefix("base_model.model.").split(".lora_", 1)
        letter = "a" if "A" in factor else "b"
        array = tensor.float().numpy()
        if letter == "b":
            array = _paired(module, array, config)
        elif "embedding" in factor:
            array = np.ascontiguousarray(array.T)
        writer.add_tensor(f"{_named(module)}.weight.lora_{letter}", array)
    return _written(writer, path)


def _named(module: str) -> str:
    if module in WHOLE:
        return WHOLE[module]
    _, _, layer, inner = module.split(".", 3)
    return f"blk.{layer}.{LAYERS[inner]}"


def _paired(module: str, array: NDArray[Any], config: Any) -> NDArray[Any]:
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    count = heads.get(module.rsplit(".", 1)[-1])
    if count is None:
        return array
    halves = array.reshape(count, 2, len(array) // count // 2, *array.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(array.shape))


def _written(writer: gguf.GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
