"""Names and folders ─► tokenizers and models; what fails is one `ModelError` with its remedy."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from tsqlora.errors import ModelError
from tsqlora.heads import head_modules, may_be_new, note_drawn
from tsqlora.quantized import Quantization, keep_exact, note_stacked

T = TypeVar("T")

_POSITIONS = ("max_position_embeddings", "max_encoder_position_embeddings", "max_seq_len")
_FAILURES = (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError, SafetensorError)


def load_config(name: str) -> PreTrainedConfig:
    """The configuration of the model `name`, a folder or a hub name.

    Raises:
        ModelError: no such folder, no config.json in it, or a hub name that cannot be found.
    """
    path = _folder(name, "model")
    if path and not (path / "config.json").is_file():
        raise ModelError(
            f"model: the folder {name} has no config.json; give one written by save_pretrained."
        )
    return _tried(lambda: AutoConfig.from_pretrained(name, trust_remote_code=False), "model", name)


def most_tokens(config: PreTrainedConfig, wanted: int) -> int:
    """`wanted`, or less where the model has fewer positions.

    RoBERTa and its kin count positions from the padding token's number on, so that the first ones
    take no token. Only the built model tells, so it is built (without weights) where it matters.
    """
    sizes = [getattr(config, name, None) or 0 for name in _POSITIONS]
    most = next((size for size in sizes if size > 0), wanted)
    reserved = (getattr(config, "pad_token_id", None) or 0) + 1
    if wanted <= most - reserved:
        return wanted
    with quiet(), torch.device("meta"):
        body = AutoModel.from_config(copy.deepcopy(config))
    padded = any(
        isinstance(module, nn.Embedding) and module.padding_idx is not None
        for name, module in body.named_modules()
        if "position" in name.rpartition(".")[2]
    )
    return min(wanted, most - reserved if padded else most)


def load_tokenizer(name: str, field: str) -> PreTrainedTokenizerBase:
    """The tokenizer `name`, a folder or a hub name, with a pad token (eos where it has none).

    `field` is the configuration's field that `name` comes from.

    Raises:
        ModelError: nothing there, no vocabulary in it, or neither a pad nor an eos token.
    """
    path = _folder(name, field)
    if path and not any(_is_tokenizer_file(file.name) for file in path.iterdir()):
        raise ModelError(_no_tokenizer(path, field))
    read: Any = PreTrainedTokenizerFast if path and _is_generic(path) else AutoTokenizer
    tokenizer: PreTrainedTokenizerBase = _tried(
        lambda: read.from_pretrained(name, trust_remote_code=False), field, name
    )
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # what transformers makes out of nothing
        raise ModelError(f"{field}: the tokenizer of {name} has no vocabulary; set `tokenizer:`.")
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ModelError(
                f"{field}: the tokenizer of {name} has neither a pad nor an eos token; "
                "add a pad_token to its tokenizer_config.json."
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    name: str,
    auto_class: Any,
    config: PreTrainedConfig,
    quantization: Quantization | None = None,
) -> PreTrainedModel:
    """The model `name` in float32 on the CPU, or quantised, read from safetensors alone.

    The head of a sequence classifier may be new, or of another shape in the checkpoint; it is then
    drawn afresh. All other weights must be there.

    Raises:
        ModelError: no safetensors, the wrong architecture, or weights that are missing or misfit.
    """
    path = _folder(name, "model")
    if path and not any(path.glob("*.safetensors")):
        pickled = any(path.glob("*.bin")) or any(path.glob("*.pt"))
        raise ModelError(
            f"model: the folder {name} has no weights in safetensors"
            + ("; pickled weights are not read: load them" if pickled else ": load the model")
            + " where you trust them and write the folder again by model.save_pretrained."
        )
    with quiet():
        model, found = _tried(
            lambda: auto_class.from_pretrained(
                name,
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **_packed(quantization, auto_class, config),
            ),
            "model",
            name,
        )
    absent = [key for key in found["missing_keys"] if not may_be_new(key, model)]
    misfit = [str(key[0]) for key in found["mismatched_keys"] if not may_be_new(key[0], model)]
    if absent or misfit:
        raise ModelError(
            f"model: {name} lacks weights of {type(model).__name__} ({_few(absent + misfit)}); its "
            "architecture does not fit the task, or its config.json does not fit the weights."
        )
    assert isinstance(model, PreTrainedModel)
    keep_exact(model)
    note_drawn(model, [*found["missing_keys"], *(str(key[0]) for key in found["mismatched_keys"])])
    return model


def _packed(
    quantization: Quantization | None, auto_class: Any, config: PreTrainedConfig
) -> dict[str, Any]:
    """Keywords that quantise all but what is trained whole, and the output embedding."""
    if quantization is None:
        return {}
    quantization.check()
    with torch.device("meta"):
        model = auto_class.from_config(copy.deepcopy(config))
    note_stacked(model)
    output = model.get_output_embeddings()
    skip = [n for n, m in model.named_modules() if output is not None and m is output]
    if type(model).__name__.endswith("ForSequenceClassification"):
        skip += ["pooler", *head_modules(model)]
    return quantization.settings(skip)


def require_embeddings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str
) -> None:
    """Refuse a tokenizer with more tokens than the model has embeddings.

    Raises:
        ModelError: so it is.
    """
    try:
        rows = model.get_input_embeddings().weight.shape[0]
    except NotImplementedError:  # no table of tokens: CANINE hashes characters
        return
    if len(tokenizer) > rows:
        raise ModelError(
            f"The tokenizer {tokenizer.name_or_path} has {len(tokenizer)} tokens but {name} only "
            f"{rows} embeddings: set `tokenizer:` to the model's own, or call "
            "model.resize_token_embeddings and save the model again."
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Transformers without its progress bars and warnings, restored afterwards."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _folder(name: str, field: str) -> Path | None:
    """`name` as a folder, or None where it is a hub name."""
    path = Path(name)
    if path.is_dir():
        return path
    if path.exists():
        raise ModelError(f"{field}: {name} is a file; give the folder that holds it.")
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):
        raise ModelError(f"{field}: there is no folder {name}, and it is not a hub name either.")
    return None


def _tried(load: Callable[[], T], field: str, name: str) -> T:
    try:
        with quiet():
            return load()
    except _FAILURES as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ModelError(
            f"{field}: {name} cannot be loaded ({reason.rstrip('. ')}). Give an existing folder "
            "or a hub name that is downloaded or can be; code that comes with a model is not run."
        ) from error


def _is_generic(path: Path) -> bool:
    """Whether tokenizer.json says it all; AutoTokenizer would read it as the model type's own."""
    try:
        said = json.loads((path / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    generic = ("PreTrainedTokenizerFast", "TokenizersBackend")
    return (path / "tokenizer.json").is_file() and said.get("tokenizer_class") in generic


def _no_tokenizer(path: Path, field: str) -> str:
    inner = sorted(str(f.parent) for f in path.glob("*/*") if f.name == "tokenizer.json")
    there = f" (there is one in {_few(inner)})" if inner else ""
    key = "tokenizer" if field == "model" else field
    return f"{field}: the folder {path} holds no tokenizer; set `{key}:` to one{there}."


def _is_tokenizer_file(name: str) -> bool:
    return bool(re.match(r"(tokenizer|vocab|tekken)", name) or re.search(r"\.(model|spm)$", name))


def _few(names: Iterable[str], most: int = 3) -> str:
    names = sorted(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
