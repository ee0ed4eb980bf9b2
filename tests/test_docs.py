"""What README and docs show works: every block and command, on tiny data, in a page's order."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

import tsqlora as tsq
from doc_blocks import CHECKS, PAGES, ROOT, RUNS, Block, blocks, named_commands, parses, run_yaml
from runs import class_rows, save_model, tokenizer, write_rows
from test_examples import chats, readme_diffs
from tiny_text import CHAT_TEMPLATE, save_llama
from tsqlora.config import QualityConfig

ROWS = 64


@pytest.fixture(scope="module")
def things(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, and the data files that pages name."""
    folder = tmp_path_factory.mktemp("docs")
    save_model(folder / "model", "bert")
    rows = class_rows(ROWS)
    as_sentences = [{"sentence": row["text"], "label": row["label"]} for row in rows]
    write_rows(folder / "train.jsonl", as_sentences)
    for name in ("more", "trusted"):
        write_rows(folder / f"{name}.jsonl", as_sentences[:20])
    for name, column in (("data", "sentence"), ("reviews", "text"), ("more", "text")):
        lines = [f"{row['text']},{row['label']}" for row in rows]
        (folder / f"{name}.csv").write_text("\n".join([f"{column},label", *lines]) + "\n")
    return folder


@pytest.fixture
def scratch(things: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a page's commands run: the things, and README's configuration."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tsqlora.samples.FEW", 3)
    for thing in things.iterdir():
        os.symlink(thing, tmp_path / thing.name)
    for block in blocks("README.md"):
        if block.text.startswith("# mine.yaml"):
            run_yaml(block)
    return tmp_path


def classifier() -> dict[str, Any]:
    """A model, tokenised rows and their collator."""
    words = tokenizer()
    rows = Dataset.from_list(class_rows(ROWS)).class_encode_column("label")
    rows = rows.map(lambda row: dict(words(row["text"]))).remove_columns("text")
    model = AutoModelForSequenceClassification.from_pretrained("model", num_labels=3)
    return {"model": model, "rows": rows, "collator": DataCollatorWithPadding(words)}


def sampling() -> dict[str, Any]:
    """What the sampler is given to."""
    made = classifier()
    scores = tsq.score_samples(**_scored(made))
    arguments = TrainingArguments("trainer", report_to="none", use_cpu=True)
    names = {"tsq": tsq, "DataLoader": DataLoader, "Trainer": Trainer, "scores": scores}
    trainer = Trainer(made["model"], arguments, train_dataset=made["rows"])
    return {**made, **names, "trainer": trainer}


def _scored(made: dict[str, Any]) -> dict[str, Any]:
    quality = QualityConfig(adapt_steps=2)
    return {
        "model": made["model"],
        "dataset": made["rows"],
        "collator": made["collator"],
        "quality": quality,
    }


def supervised() -> dict[str, Any]:
    """A chat model, chats and SFTTrainer's arguments."""
    model = AutoModelForCausalLM.from_pretrained(save_llama(Path("llama"), CHAT_TEMPLATE))
    arguments = SFTConfig("sft", report_to="none", use_cpu=True, bf16=False, save_strategy="no")
    given = {"model": model, "args": arguments, "chats": Dataset.from_list(chats())}
    return {**given, "SFTTrainer": SFTTrainer}


def exported() -> dict[str, Any]:
    """An adapter of a chat model."""
    model = AutoModelForCausalLM.from_pretrained(save_llama(Path("llama")))
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    tsq.export_adapter(get_peft_model(model, lora), "DIR", "padded")
    return {}


def accumulating() -> dict[str, Any]:
    """A step of a loop of one's own."""
    accelerator, made = Accelerator(cpu=True), classifier()
    lora = LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS")
    model = get_peft_model(made["model"], lora)
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    ranks = tsq.DynamicRank(model, optimizer, total_steps=8, headroom=2)
    model, optimizer = accelerator.prepare(model, optimizer)
    loader = DataLoader(made["rows"], batch_size=4, collate_fn=made["collator"])
    names = {"accelerator": accelerator, "model": model, "optimizer": optimizer, "ranks": ranks}
    return {**names, "batch": next(iter(loader))}


GIVEN: dict[str, list[Callable[[], dict[str, Any]]]] = {
    "docs/adoption.md": [sampling, supervised, accumulating],
    "docs/cleaning.md": [classifier],
    "docs/serving.md": [exported],
}
"""What comes before each Python block of a page, where that is not on the page itself."""


@pytest.mark.parametrize("page", PAGES)
def test_every_block_of_the_page_works(page: str, scratch: Path) -> None:
    names: dict[str, Any] = {}
    given = iter(GIVEN.get(page, []))
    for block in blocks(page):
        where = f"{page}, the block at line {block.line}"
        try:
            if block.language == "python":
                names |= next(given, dict)()
                exec(compile(block.text, where, "exec"), names)
            elif block.language == "diff":
                assert block.text.splitlines() in readme_diffs().values(), "no example's"
            else:
                assert block.language in RUNS, f"nobody knows how to run {block.language!r}"
                RUNS[block.language](block)
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{where}: {error}") from error
    assert next(given, None) is None, "more set-ups than Python blocks"


@pytest.mark.parametrize("page", PAGES)
def test_every_command_that_a_sentence_names_is_understood(page: str) -> None:
    for words in named_commands(page):
        parses(words)


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("sh", "tsqlora trian mine.yaml"),
        ("sh", "tsqlora train mine.yaml --resmue"),
        ("sh", "tsqlora train nowhere.yaml"),
        ("sh", "make everything"),
        ("sh", "pip install '.[nothing]'"),
        ("sh", "pytest -m nothing"),
        ("sh", "pytest tests/test_nothing.py"),
        ("sh", "torchrun --nproc_per_node 2 -m tsqlora trian mine.yaml"),
        ("sh", "accelerate launch -m tsqlora score mine.yaml --resmue"),
        ("sh", "vllm serve BASE"),
        ("yaml", "quality: {fractoin: 0.5}"),
        ("csv", "a,b\n1,2\n"),
        ("text", "src/tsqlora/\n  nothing.py   not there\n"),
    ],
)
def test_a_block_that_is_not_true_is_found_out(language: str, text: str, scratch: Path) -> None:
    with pytest.raises((AssertionError, SystemExit, tsq.TsqloraError)):
        RUNS[language](Block("page", 1, language, text + "\n", None))


def test_only_known_programs_go_without_a_reason() -> None:
    assert "vllm" not in CHECKS
    assert all(b.reason is None or len(b.reason) > 10 for page in PAGES for b in blocks(page))
    assert (ROOT / "mkdocs.yml").exists()
