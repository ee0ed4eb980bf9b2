"""The scripts of examples/, run as they are; what SFTTrainer makes of chats; README's diffs."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
import torch
from datasets import Dataset
from nbclient import NotebookClient
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
)
from trl import SFTConfig, SFTTrainer

import tsqlora as tsq
from launched import TWO_PROCESSES
from tiny_text import CHAT_TEMPLATE, save_bert, save_llama
from tsqlora.config import QualityConfig
from tsqlora.demo_data import intents, make_demo_data
from tsqlora.dynamic_rank import RankSchedule
from tsqlora.errors import DataError
from tsqlora.selection import draw

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
AS_IT_IS = QualityConfig(adapt_steps=0)
MARKED = CHAT_TEMPLATE.replace(
    "{{ m.content }}</s>",
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>{% endgeneration %}"
    "{% else %}{{ m.content }}</s>{% endif %}",
)
LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


@pytest.fixture(scope="module")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A tiny encoder and a CSV of texts with labels, as arguments of a script."""
    folder = tmp_path_factory.mktemp("reviews")
    lines = [f"{word} film {i},{word}" for word in ("good", "bad", "dull") for i in range(16)]
    (folder / "data.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    return {"--model": save_bert(folder / "bert"), "--data": str(folder / "data.csv")}


@pytest.fixture(scope="module")
def chatter(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny chat model whose template marks what the assistant says."""
    return save_llama(tmp_path_factory.mktemp("chats") / "llama", MARKED)


def run(script: str, arguments: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tsqlora.samples.FEW", 5)
    given = [word for pair in arguments.items() for word in pair]
    monkeypatch.setattr(sys, "argv", [script, *given])
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")


def moved_adapter(base: Any, folder: Path) -> PeftModel:
    """What the script exported, loaded by PEFT; it has learnt something."""
    model = PeftModel.from_pretrained(base, str(folder / "adapter"))
    assert any(p.any() for name, p in model.named_parameters() if "lora_B" in name)
    return model


def test_the_trainer_script_trains_and_exports(
    reviews: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run("trainer.py", {**reviews, "--out": str(tmp_path)}, monkeypatch)
    assert "eval_accuracy" in capsys.readouterr().out
    base = AutoModelForSequenceClassification.from_pretrained(reviews["--model"], num_labels=3)
    moved_adapter(base, tmp_path)


def test_the_sft_script_trains_and_exports(
    chatter: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = tmp_path / "chats.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in chats()))
    arguments = {"--model": chatter, "--data": str(data), "--out": str(tmp_path)}
    run("sft.py", arguments, monkeypatch)
    assert capsys.readouterr().out.count("most doubtful: [{'") == 5
    moved_adapter(AutoModelForCausalLM.from_pretrained(chatter), tmp_path)


def test_the_accelerate_loop_trains_in_one_process(
    reviews: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run("accelerate_loop.py", {**reviews, "--out": str(tmp_path)}, monkeypatch)
    assert "epoch 4" in capsys.readouterr().out


TWO = """
import runpy, sys
import numpy as np
import tsqlora.samples
from accelerate import PartialState
from torch.utils.data import RandomSampler

home, script, *arguments = sys.argv[1:]
tsqlora.samples.FEW = 5
score = tsqlora.samples.score_samples

def noting(*given, **named):
    scores = score(*given, **named)
    np.save(f"{home}/scores-{PartialState().process_index}.npy", scores.probability)
    return scores

tsqlora.samples.score_samples = noting
sys.argv = [script, *arguments]
runpy.run_path(script, run_name="__main__")
"""


def test_the_accelerate_loop_trains_in_two_processes_by_one_set_of_scores(
    reviews: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "two.py").write_text(TWO)
    launch = [sys.executable, *TWO_PROCESSES]
    script = [str(tmp_path / "two.py"), str(tmp_path), str(EXAMPLES / "accelerate_loop.py")]
    given = [word for pair in reviews.items() for word in pair] + ["--out", str(tmp_path)]
    paths = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [*launch, *script, *given], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("epoch 4") == 1, "the main process alone prints"
    one, two = (np.load(tmp_path / f"scores-{i}.npy") for i in range(2))
    np.testing.assert_array_equal(one, two)
    base = AutoModelForSequenceClassification.from_pretrained(reviews["--model"], num_labels=3)
    moved_adapter(base, tmp_path)


def knowing_model(folder: Path) -> str:
    """A small encoder that has learnt the demo's task from clean labels."""
    clean, names = make_demo_data(train=800, wrong_share=0.0).train, sorted(intents())
    pieces = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Punctuation()])
    seen = {w for row in clean for w, _ in pieces.pre_tokenize_str(row["text"].lower())}
    words = {w: i for i, w in enumerate(["<pad>", "<unk>", "<s>", *sorted(seen)])}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pieces
    raw.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", words["<s>"])]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", unk_token="<unk>", model_max_length=64
    )
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=48,
        num_labels=len(names),
    )
    model = BertForSequenceClassification(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(100):
        rows = [clean[(64 * step + i) % len(clean)] for i in range(64)]
        batch = tokenizer([r["text"] for r in rows], padding=True, return_tensors="pt")
        labels = torch.tensor([names.index(r["intent"]) for r in rows])
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_the_notebook_lists_the_labels_that_were_planted(tmp_path: Path) -> None:
    notebook = nbformat.read(EXAMPLES / "clean_labels.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code), "strip the outputs"
    (parameters,) = (c for c in code if "parameters" in c.metadata.get("tags", []))
    parameters.source += f"\nMODEL = {knowing_model(tmp_path / 'model')!r}"
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()
    said = "".join(o.text for o in code[-1].outputs if o.output_type == "stream")
    share, first = re.fullmatch(r"(\d+)% of the first (\d+)\n", said).groups()  # type: ignore[union-attr]
    assert int(first) == 80
    assert int(share) >= 80
    assert (tmp_path / "ranked.csv").read_text().startswith("row,text,label,model_says,")


def chats(rows: int = 24) -> list[dict[str, Any]]:
    """Prompts of growing length with short answers."""
    answers = ("yes it is", "no not very", "a dull film")
    return [
        {
            "prompt": [{"role": "user", "content": "is the film " + "very " * (i // 3) + "good"}],
            "completion": [{"role": "assistant", "content": answers[i % 3]}],
        }
        for i in range(rows)
    ]


def as_messages(row: dict[str, Any]) -> dict[str, Any]:
    return {"messages": row["prompt"] + row["completion"]}


def sft(model: Any, rows: list[dict[str, Any]], folder: Path, **more: Any) -> SFTTrainer:
    callbacks, peft = more.pop("callbacks", None), more.pop("peft_config", None)
    arguments = SFTConfig(
        str(folder),
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        per_device_train_batch_size=4,
        **more,
    )
    return SFTTrainer(
        model,
        arguments,
        train_dataset=Dataset.from_list(rows),
        peft_config=peft,
        callbacks=callbacks,
    )


KINDS: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], dict[str, Any]]] = {
    "completions": (dict, {}),
    "prompts too": (dict, {"completion_only_loss": False}),
    "chats": (as_messages, {}),
    "what the assistant says": (as_messages, {"assistant_only_loss": True}),
    "cut": (as_messages, {"max_length": 14}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_that_is_scored_is_the_one_that_sfttrainer_minimises(
    kind: str, chatter: str, tmp_path: Path
) -> None:
    form, settings = KINDS[kind]
    trainer = sft(chatter, [form(row) for row in chats(6)], tmp_path, peft_config=LORA, **settings)
    rows, collator = trainer.train_dataset, trainer.data_collator
    scores = tsq.score_samples(trainer.model, rows, collator, AS_IT_IS, batch_size=4)
    trainer.model.eval()
    with torch.no_grad():
        true = [float(trainer.compute_loss(trainer.model, collator([row]))) for row in rows]
    np.testing.assert_allclose(scores.loss, true, rtol=1e-5)


def test_rows_that_sfttrainer_drops_are_not_scored_and_the_others_keep_their_ids(
    chatter: str, tmp_path: Path
) -> None:
    rows = [{**row, "id": 100 + i} for i, row in enumerate(chats())]
    trainer = sft(chatter, rows, tmp_path, peft_config=LORA, max_length=12, shuffle_dataset=True)
    scores = tsq.score_samples(
        trainer.model, trainer.train_dataset, trainer.data_collator, AS_IT_IS, batch_size=4
    )
    assert 0 < len(scores.ids) < len(rows), "prompts longer than max_length leave no target"
    asked = {row["id"]: row["prompt"] for row in rows}
    assert [asked[i] for i in scores.ids] == list(trainer.train_dataset["prompt"])
    with pytest.raises(DataError, match="24 rows but the scores are of"):
        tsq.select_samples(Dataset.from_list(rows), scores)


@pytest.mark.parametrize("wrapped", [False, True], ids=["peft_config", "PeftModel"])
def test_sfttrainer_trains_on_the_draws_and_ranks_move(
    wrapped: bool, chatter: str, tmp_path: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(chatter)
    moving = tsq.DynamicRankCallback(schedule=RankSchedule(window=2, move_share=0.3))
    given: dict[str, Any] = {"num_train_epochs": 4, "callbacks": [moving], "learning_rate": 1e-2}
    if wrapped:
        trainer = sft(get_peft_model(base, LORA), chats(), tmp_path, **given)
    else:
        trainer = sft(base, chats(), tmp_path, peft_config=LORA, **given)
    rows, collator = trainer.train_dataset, trainer.data_collator
    scores = tsq.score_samples(trainer.model, rows, collator, AS_IT_IS, batch_size=4)
    tsq.QualitySampler(scores, fraction=0.5, seed=3).attach(trainer)
    seen = []

    def noting(batch: list[dict[str, Any]]) -> Any:
        seen.extend(len(row["input_ids"]) for row in batch)
        return collator(batch)

    trainer.data_collator = noting
    trainer.train()
    expected = [draw(scores.probability, 0.5, 3, epoch) for epoch in range(4)]
    assert seen == [len(rows[int(i)]["input_ids"]) for each in expected for i in each]
    assert moving.ranks is not None
    assert moving.ranks.history
    tsq.export_adapter(trainer.model, tmp_path / "adapter")
    moved_adapter(AutoModelForCausalLM.from_pretrained(chatter), tmp_path)


def test_ranks_planned_on_the_rows_that_sfttrainer_prepared(chatter: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(chatter)
    prepared = sft(model, chats(), tmp_path, max_length=64)
    rows, collator = prepared.train_dataset, prepared.data_collator
    plan = tsq.allocate_ranks(tsq.layer_sensitivity(model, rows, collator), mean_rank=3)
    config = tsq.lora_config(plan, task_type="CAUSAL_LM")
    callbacks = [tsq.DynamicRankCallback(plan)]
    trainer = sft(model, list(rows), tmp_path, peft_config=config, callbacks=callbacks, max_steps=3)
    assert list(trainer.train_dataset["labels"]) == list(rows["labels"])
    trainer.train()
    assert {m.name for m in callbacks[0].ranks.modules} == set(plan.adapted)


@pytest.mark.parametrize("strategy", ["bfd", "wrapped"])
def test_packing_is_refused(strategy: str, chatter: str, tmp_path: Path) -> None:
    packing = {"packing": True, "packing_strategy": strategy, "max_length": 64}
    trainer = sft(chatter, chats(), tmp_path, peft_config=LORA, **packing)
    rows, collator = trainer.train_dataset, trainer.data_collator
    if strategy == "bfd":
        with pytest.raises(DataError, match=r"packed.*packing=False"):
            tsq.score_samples(trainer.model, rows, collator, AS_IT_IS)
    else:  # its rows look like any others
        scores = tsq.score_samples(trainer.model, rows, collator, AS_IT_IS, batch_size=4)
        with pytest.raises(DataError, match="set packing=False"):
            tsq.QualitySampler(scores).attach(trainer)


def lines_of(example: str) -> list[str]:
    text = (EXAMPLES / example).read_text(encoding="utf-8")
    if example.endswith(".ipynb"):
        text = "\n".join(cell["source"] for cell in nbformat.reads(text, as_version=4).cells)
    return [line.strip() for line in text.splitlines()]


def readme_diffs() -> dict[str, list[str]]:
    """The lines of each diff that README shows, by the example that stands above it."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.findall(r"\]\(examples/([\w.]+)\)[^\n]*\n\n```diff\n(.*?)```", readme, re.DOTALL)
    return {name: diff.splitlines() for name, diff in found}


@pytest.mark.parametrize("example", sorted(p.name for p in EXAMPLES.glob("*.[pi][yp]*")))
def test_the_diff_in_the_readme_is_true_to_the_example(example: str) -> None:
    diff, there = readme_diffs()[example], lines_of(example)
    for line in diff:
        if line.strip():
            assert (line[1:].strip() in there) == (line[0] != "-"), line
    added = [line for line in diff if line[0] == "+"]
    assert 1 <= len(added) <= 12
