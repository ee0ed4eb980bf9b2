"""llama.cpp itself on what is exported: `pytest -m llama_cpp tests/test_llama_cpp.py`.

Needs `pip install gguf llama-cpp-python`; with LLAMA_CPP, the folder of llama.cpp's sources (the
sdist of llama-cpp-python has them in vendor/llama.cpp), its own converters make the files too.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from runs import save_model
from tiny import tiny_model, with_lora
from tsqlora.adapter import prune
from tsqlora.export import export_adapter
from tsqlora.lora_layers import lora_modules

pytestmark = pytest.mark.llama_cpp
pytest.importorskip("gguf", reason="pip install gguf llama-cpp-python")
llama_cpp = pytest.importorskip("llama_cpp", reason="pip install gguf llama-cpp-python")

CLOSE = 1e-5
"""float32 in another order of addition; logits are of order 0.1 to 1."""
TOKENS = [1, 5, 9, 17, 30, 4, 22]
SOURCES = os.environ.get("LLAMA_CPP")


def by_torch(model: Any) -> NDArray[Any]:
    with torch.no_grad():
        return model.eval()(torch.tensor([TOKENS])).logits[0].numpy()


def by_llama_cpp(model: Path, adapter: Path | None = None) -> NDArray[Any]:
    cache = llama_cpp.GGML_TYPE_F32  # float16 by default, which alone costs 1e-5 to 1e-4
    loaded = llama_cpp.Llama(
        str(model),
        lora_path=adapter and str(adapter),
        logits_all=True,
        n_ctx=32,
        type_k=cache,
        type_v=cache,
        verbose=False,
    )
    loaded.eval(TOKENS)
    return np.array(loaded.scores[: len(TOKENS)])


def uneven() -> Any:
    """As after training with moving ranks: 0 to 4, different in the two layers."""
    model = with_lora(tiny_model("llama"), "causal-lm", 4)
    for i, module in enumerate(lora_modules(model)):
        prune(module, range(i % (module.rank + 1)), None)
    return model


def brought_in() -> Any:
    return with_lora(
        tiny_model("llama"), "causal-lm", 4, use_rslora=True, rank_pattern={"q_proj": 2},
        alpha_pattern={"v_proj": 5}, target_modules=["q_proj", "v_proj", "embed_tokens"],
    )  # fmt: skip


@pytest.mark.parametrize("make", [uneven, brought_in])
def test_padded_is_right_compact_is_wrong_and_merged_is_right(
    make: Callable[[], Any], tmp_path: Path
) -> None:
    from gguf_files import write_adapter, write_model

    model, plain = make(), tiny_model("llama")
    base = write_model(plain, tmp_path / "base.gguf")
    untouched, expected = by_torch(plain), by_torch(model)
    assert np.abs(by_llama_cpp(base) - untouched).max() < CLOSE
    assert np.abs(untouched - expected).max() > 100 * CLOSE
    errors = {}
    for form in ("padded", "compact"):
        folder = export_adapter(model, tmp_path / form, form)
        adapter = write_adapter(folder, plain.config, tmp_path / f"{form}.gguf")
        errors[form] = np.abs(by_llama_cpp(base, adapter) - expected).max()
    print(f"largest error in the logits: {errors}")
    assert errors["padded"] < CLOSE
    assert errors["compact"] > 1000 * errors["padded"]
    merged = type(plain).from_pretrained(export_adapter(model, tmp_path / "merged", "merged"))
    whole = write_model(merged, tmp_path / "merged.gguf")
    assert np.abs(by_llama_cpp(whole) - expected).max() < CLOSE


@pytest.mark.skipif(SOURCES is None, reason="LLAMA_CPP names no sources of llama.cpp")
@pytest.mark.parametrize("make", [uneven, brought_in])
def test_llama_cpps_own_converter_takes_padded(make: Callable[[], Any], tmp_path: Path) -> None:
    from gguf_files import write_model

    model = make()
    folder = save_model(tmp_path / "llama", "llama")
    padded = export_adapter(model, tmp_path / "padded", "padded")
    script = Path(str(SOURCES)) / "convert_lora_to_gguf.py"
    out = tmp_path / "padded.gguf"
    given = [padded, "--base", folder, "--outfile", out]
    subprocess.run([sys.executable, script, *given], check=True, capture_output=True)
    base = write_model(tiny_model("llama"), tmp_path / "base.gguf")
    error = np.abs(by_llama_cpp(base, out) - by_torch(model)).max()
    print(f"largest error in the logits: {error}")
    assert error < CLOSE
