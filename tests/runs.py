"""A tiny model with its tokenizer, data files and configurations for whole runs."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import yaml
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tiny import VOCABULARY, tiny_model

SPECIAL = ["[PAD]", "[BOS]", "[EOS]", "[UNK]"]
WORDS = [f"w{i}" for i in range(VOCABULARY - len(SPECIAL))]


def save_model(folder: Path, name: str) -> Path:
    """A tiny model of that architecture and a word tokenizer, as `save_pretrained` leaves them."""
    tiny_model(name).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, w0 to w35."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(
        single="[BOS] $A [EOS]",
        pair="[BOS] $A [EOS] $B [EOS]",
        special_tokens=[("[BOS]", 1), ("[EOS]", 2)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="[PAD]",
        bos_token="[BOS]",
        eos_token="[EOS]",
        unk_token="[UNK]",
    )


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """JSON Lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def class_rows(samples: int, seed: int = 0, classes: int = 3) -> list[dict[str, Any]]:
    """Texts whose class is a word of theirs."""
    chance = random.Random(seed)
    rows = []
    for _ in range(samples):
        label = chance.randrange(classes)
        words = [*chance.choices(WORDS[5:], k=chance.randint(2, 6)), WORDS[label]]
        chance.shuffle(words)
        rows.append({"text": " ".join(words), "label": f"class {label}"})
    return rows


def classification_run(folder: Path, samples: int = 120, **changes: Any) -> Path:
    """A configuration file for a tiny classification; keys with dots are nested."""
    model = folder / "model"
    if not model.exists():
        save_model(model, "bert")
    write_rows(folder / "train.jsonl", class_rows(samples))
    write_rows(folder / "validation.jsonl", class_rows(30, seed=1))
    return _write_run(folder, changes)


def _write_run(folder: Path, changes: dict[str, Any]) -> Path:
    config: dict[str, Any] = {
        "model": str(folder / "model"),
        "task": "classification",
        "data": {
            "train": str(folder / "train.jsonl"),
            "validation": str(folder / "validation.jsonl"),
            "text": "text",
            "target": "label",
        },
        "quality": {"adapt_steps": 4, **_all_terms(changes)},
        "ranks": {"mean_rank": 3, "max_rank": 8},
        "adapter": {"start": "gradient"},
        "training": {
            "learning_rate": 1.0e-2,
            "num_train_epochs": 2,
            "per_device_train_batch_size": 8,
            "disable_tqdm": True,
        },
        "output": str(folder / "run"),
    }
    return write_config(folder / "config.yaml", config, changes)


def _all_terms(changes: dict[str, Any]) -> dict[str, Any]:
    """Scored upfront by all three terms, or by those that the mode asked for can measure."""
    mode = changes.get("quality.mode", "upfront")
    if changes.get("quality.preset") == "paper" or mode == "none":
        return {"mode": mode}
    terms = {"gradient_norm": 1.0, "loss_reduction": float(mode == "upfront"), "convergence": 1.0}
    return {"mode": mode, "weights": terms}


def causal_run(folder: Path, samples: int = 120, **changes: Any) -> Path:
    """A configuration file for a tiny causal language model that names a word of the text."""
    settings = {"task": "causal-lm", "data.text": "{text} ", "metrics": ["loss"], **changes}
    return _naming_run(folder, "llama", samples, settings)


def seq2seq_run(folder: Path, samples: int = 120, **changes: Any) -> Path:
    """The same for a tiny encoder-decoder."""
    settings = {"task": "seq2seq", "metrics": ["exact_match"], **changes}
    return _naming_run(folder, "bart", samples, settings)


def _naming_run(folder: Path, name: str, samples: int, changes: dict[str, Any]) -> Path:
    model = folder / "model"
    if not model.exists():
        save_model(model, name)
    for split, count, seed in (("train", samples, 0), ("validation", 30, 1)):
        rows = [{**row, "label": WORDS[int(row["label"][-1])]} for row in class_rows(count, seed)]
        write_rows(folder / f"{split}.jsonl", rows)
    return _write_run(folder, changes)


def write_config(path: Path, config: dict[str, Any], changes: dict[str, Any]) -> Path:
    """`config` with `changes`, whose dotted keys are nested and whose None removes a key."""
    for key, value in changes.items():
        place = config
        *parents, last = key.split(".")
        for parent in parents:
            place = place.setdefault(parent, {})
        if value is None:
            place.pop(last, None)
        else:
            place[last] = value
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path
