from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from datasets import Dataset
from scipy import stats
from sklearn import metrics as sk
from torch import nn

import tiny_text as tiny
from runs import classification_run
from tsqlora import finished
from tsqlora.artefacts import read_lines
from tsqlora.base_task import Task
from tsqlora.config import RunConfig
from tsqlora.errors import ConfigError, DataError
from tsqlora.generation import predict, references
from tsqlora.losses import CAUSAL_LM, IGNORED
from tsqlora.metrics import evaluate
from tsqlora.pipeline import train
from tsqlora.tasks import make_task

TEXTS = [
    "a good film",
    "bad",
    "the film was not very good",
    "dull dull dull one two",
    "red blue",
    "not bad not good",
    "one",
    "the very fine film is the very fine film",
]
TARGETS: dict[str, list[Any]] = {
    "classification": ["x", "y", "z", "y", "x", "x", "z", "y"],
    "binary": [0, 1, 1, 0, 1, 0, 1, 1],
    "regression": [0.5, -1.0, 2.0, 3.5, 0.0, 1.0, -2.0, 0.25],
    "seq2seq": ["yes", "no no", "red", "good one", "a", "two two two", "not", "is it"],
    "causal-lm": [" yes", " no", " a b c d", "x", " good", " one two", "q", " it is"],
}

Made = tuple[Task, Any, Dataset]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    """(task, model, encoded) of each kind."""
    folder = tmp_path_factory.mktemp("models")
    bert = tiny.save_bert(folder / "bert")
    models = {"seq2seq": tiny.save_bart(folder / "bart"), CAUSAL_LM: tiny.save_llama(folder / "l")}
    result: dict[str, Made] = {}
    for name, targets in TARGETS.items():
        train = tiny.rows(text=TEXTS, target=targets)
        kind = "classification" if name == "binary" else name
        data = {"text": "text", "target": "target"}
        task = tiny.task_of(models.get(name, bert), kind, data, train)
        torch.manual_seed(1)
        result[name] = task, task.load_model(), task.encode(train, "data.train")
    return result


def logits_one_by_one(made: Made) -> np.ndarray:
    task, model, encoded = made
    model.eval()
    with torch.no_grad():
        rows = [model(**task.collate([row])).logits[0].numpy() for row in encoded]
    return np.array(rows)


# Classification and regression


@pytest.mark.parametrize("name", ["classification", "binary"])
def test_classification_metrics_are_scikit_learns_on_rows_taken_one_by_one(
    made: dict[str, Made], name: str
) -> None:
    task, model, encoded = made[name]
    logits, true = logits_one_by_one(made[name]), np.array(encoded["labels"])
    predicted = logits.argmax(-1)
    result = evaluate(task, model, encoded, task.default_metrics, batch_size=3)
    log_odds = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    average = "macro" if name == "classification" else "binary"
    assert result == pytest.approx(
        {
            "loss": -log_odds[np.arange(len(true)), true].mean(),
            "accuracy": (predicted == true).mean(),
            "f1": sk.f1_score(true, predicted, average=average, zero_division=0.0),
            "matthews_correlation": sk.matthews_corrcoef(true, predicted),
        },
        abs=1e-5,
    )


def test_regression_metrics_are_scipys_on_rows_taken_one_by_one(made: dict[str, Made]) -> None:
    task, model, encoded = made["regression"]
    predicted, true = logits_one_by_one(made["regression"])[:, 0], np.array(encoded["labels"])
    assert evaluate(task, model, encoded, task.default_metrics, batch_size=3) == pytest.approx(
        {
            "loss": ((predicted - true) ** 2).mean(),
            "pearson": stats.pearsonr(predicted, true)[0],
            "spearman": stats.spearmanr(predicted, true)[0],
        },
        abs=1e-5,
    )


def test_predictions_all_the_same_have_no_correlation(made: dict[str, Made]) -> None:
    task, _, encoded = made["regression"]
    model = task.load_model()
    nn.init.zeros_(model.classifier.weight)
    result = evaluate(task, model, encoded, ("pearson", "spearman"))
    assert (result["pearson"], result["spearman"]) == (0.0, 0.0)


# Every kind


@pytest.mark.parametrize("name", TARGETS)
def test_neither_the_order_of_rows_nor_the_size_of_batches_changes_a_metric(
    made: dict[str, Made], name: str
) -> None:
    task, model, encoded = made[name]
    names = [*task.default_metrics, *(["exact_match", "rouge"] if name == CAUSAL_LM else [])]
    expected = evaluate(task, model, encoded, names, batch_size=64)
    turned = encoded.select(range(len(encoded) - 1, -1, -1))
    assert evaluate(task, model, turned, names, batch_size=3) == pytest.approx(expected, abs=1e-4)
    assert json.loads(json.dumps(expected)) == expected


@pytest.mark.parametrize("name", TARGETS)
def test_a_metric_is_the_same_when_memory_takes_few_rows_at_once(
    made: dict[str, Made], name: str
) -> None:
    task, model, encoded = made[name]
    names = [*task.default_metrics, *(["exact_match"] if name == CAUSAL_LM else [])]
    expected = evaluate(task, model, encoded, names)
    taken: list[int] = []

    def limited(_: Any, __: Any, inputs: dict[str, torch.Tensor]) -> None:
        rows = len(next(v for v in inputs.values() if isinstance(v, torch.Tensor)))
        if rows > 2:
            raise torch.OutOfMemoryError
        taken.append(rows)

    handle = model.register_forward_pre_hook(limited, with_kwargs=True)
    try:
        assert evaluate(task, model, encoded, names) == pytest.approx(expected, abs=1e-4)
    finally:
        handle.remove()
    assert taken


@pytest.mark.parametrize(
    ("given", "at_once"),
    [
        ({}, 32),
        ({"per_device_train_batch_size": 2}, 2),
        ({"per_device_train_batch_size": 2, "per_device_eval_batch_size": 7}, 7),
    ],
)
def test_as_many_rows_are_measured_at_once_as_a_training_takes(
    given: dict[str, int], at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finished, "evaluate", lambda *asked: {"batch": asked[-1]})
    data = {"train": "t.jsonl", "text": "text", "target": "label"}
    config = {"model": "m", "task": "classification", "data": data, "output": "o"}
    task: Any = SimpleNamespace(default_metrics=("accuracy",))
    run = RunConfig.from_dict({**config, "training": given})
    rows = Dataset.from_dict({})
    assert finished.measure(run, task, nn.Linear(1, 1), rows) == {"batch": at_once}


@pytest.mark.parametrize("name", TARGETS)
def test_evaluation_leaves_modes_and_gradients_as_they_were(
    made: dict[str, Made], name: str
) -> None:
    task, model, encoded = made[name]
    model.train()
    frozen = next(module for module in model.modules() if isinstance(module, nn.Linear))
    frozen.eval()
    before = [module.training for module in model.modules()]
    evaluate(task, model, encoded, task.default_metrics)
    assert [module.training for module in model.modules()] == before
    assert torch.is_grad_enabled()
    assert all(p.grad is None and not p.is_inference() for p in model.parameters())


@pytest.mark.parametrize("name", TARGETS)
def test_only_the_metrics_asked_for_are_given_and_always_the_loss(
    made: dict[str, Made], name: str
) -> None:
    task, model, encoded = made[name]
    assert evaluate(task, model, encoded, ()).keys() == {"loss"}
    first = next(m for m in task.default_metrics if m != "loss")
    assert evaluate(task, model, encoded, (first,)).keys() == {"loss", first}


def test_a_metric_of_another_kind_is_refused(made: dict[str, Made]) -> None:
    with pytest.raises(ConfigError, match=r"bleu is not a metric of regression.*pearson"):
        evaluate(*made["regression"], ("bleu",))


# Generation


@pytest.mark.parametrize("name", ["seq2seq", CAUSAL_LM])
def test_the_loss_weighs_every_target_token_alike(made: dict[str, Made], name: str) -> None:
    task, model, encoded = made[name]
    model.eval()
    total, count = 0.0, 0
    for row in encoded:
        batch = task.collate([row])
        counted = batch["labels"][:, 1:] if name == CAUSAL_LM else batch["labels"]
        tokens = int((counted != IGNORED).sum())
        with torch.no_grad():
            total += tokens * model(**batch).loss.item()
        count += tokens
    result = evaluate(task, model, encoded, ("perplexity",) if name == CAUSAL_LM else (), 3)
    assert result["loss"] == pytest.approx(total / count, rel=1e-5)
    if name == CAUSAL_LM:
        assert result["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)


@pytest.mark.parametrize("name", ["seq2seq", CAUSAL_LM])
def test_predictions_are_the_likeliest_tokens_one_after_another(
    made: dict[str, Made], name: str
) -> None:
    task, model, encoded = made[name]
    model.eval()
    expected = []
    for row in encoded:
        prompt = row["input_ids"]
        if name == CAUSAL_LM:
            prompt = prompt[: next(i for i, x in enumerate(row["labels"]) if x != IGNORED)]
        source, written = torch.tensor([prompt]), []
        while len(written) < task.limit - (len(prompt) if name == CAUSAL_LM else 0):
            with torch.no_grad():
                if name == CAUSAL_LM:
                    logits = model(torch.tensor([prompt + written])).logits
                else:
                    start = model.config.decoder_start_token_id
                    decoded = torch.tensor([[start, *written]])
                    logits = model(input_ids=source, decoder_input_ids=decoded).logits
            written.append(int(logits[0, -1].argmax()))
            if written[-1] == task.tokenizer.eos_token_id:
                break
        expected.append(task.tokenizer.decode(written, skip_special_tokens=True).strip())
    assert predict(task, model, encoded, batch_size=3) == expected
    assert len(set(expected)) > 1


@pytest.mark.parametrize("name", ["seq2seq", CAUSAL_LM])
def test_references_are_the_targets(made: dict[str, Made], name: str) -> None:
    task, _, encoded = made[name]
    special = {"it": ""}  # not in the vocabulary of the word tokenizer
    wanted = [t.strip() for t in TARGETS[name]]
    if name == "seq2seq":
        wanted = [" ".join(special.get(w, w) for w in t.split()).strip() for t in wanted]
    assert references(task, encoded) == wanted


def test_a_chat_is_written_from_before_its_last_assistant_turn(tmp_path: Path) -> None:
    turns = [("user", "a"), ("assistant", "red"), ("user", "b"), ("assistant", "blue")]
    rows = tiny.rows(messages=[[{"role": role, "content": text} for role, text in turns]])
    model = tiny.save_llama(tmp_path, tiny.CHAT_TEMPLATE)
    task = tiny.task_of(model, CAUSAL_LM, {"messages": "messages", "max_length": 64}, rows)
    encoded = task.encode(rows, "data.train")
    assert references(task, encoded) == ["blue"]

    class Recorder(nn.Module):
        """Takes the prompt that it is given and writes nothing."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))
            self.config, self.prompts = task.load_model().config, []

        def generate(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
            self.prompts += input_ids.tolist()
            return input_ids

    recorder = Recorder()
    assert predict(task, recorder, encoded) == [""]
    (prompt,) = recorder.prompts
    assert task.tokenizer.decode(prompt).endswith("red</s>\n<|user|>b</s>\n<|assistant|>")


@pytest.mark.parametrize(
    "model",
    [
        lambda: tf.MptForCausalLM(
            tf.MptConfig(vocab_size=330, d_model=16, n_heads=2, n_layers=1, max_seq_len=32)
        ),
        lambda: tf.XLNetLMHeadModel(
            tf.XLNetConfig(vocab_size=330, d_model=16, n_layer=1, n_head=2, d_inner=24)
        ),
    ],
    ids=["mpt", "xlnet"],
)
def test_writing_ends_within_the_positions_that_the_model_has(
    model: Callable[[], Any], tmp_path: Path
) -> None:
    model().save_pretrained(tmp_path)
    tiny.byte_tokenizer().save_pretrained(tmp_path)
    data = {"text": "text", "target": "target", "max_length": 32}
    rows = tiny.rows(text=["a", "a good film is not a bad"], target=["b", "b"])
    task = make_task(tiny.config(str(tmp_path), CAUSAL_LM, data), rows)
    assert len(predict(task, task.load_model(), task.encode(rows, "x"))) == 2


def test_what_the_model_itself_writes_is_matched_by_all_metrics(made: dict[str, Made]) -> None:
    task, model, encoded = made["seq2seq"]
    written = predict(task, model, encoded)
    usable = [i for i, text in enumerate(written) if text]
    rows = tiny.rows(text=[TEXTS[i] for i in usable], target=[written[i] for i in usable])
    again = task.encode(rows, "x")
    same = [
        a == b for a, b in zip(references(task, again), predict(task, model, again), strict=True)
    ]
    result = evaluate(task, model, again, task.default_metrics)
    assert result["exact_match"] == np.mean(same) > 0
    if all(same):
        assert result["rougeL"] == result["rouge1"] == 1.0
        assert result["bleu"] == pytest.approx(100.0)


def test_plain_text_has_nothing_to_match(made: dict[str, Made]) -> None:
    task, model, _ = made[CAUSAL_LM]
    plain = tiny.task_of(task.model, CAUSAL_LM, {"text": "text"}, tiny.rows(text=TEXTS))
    encoded = plain.encode(tiny.rows(text=TEXTS), "data.test")
    with pytest.raises(DataError, match="row 0: there is no prompt"):
        evaluate(plain, model, encoded, ("exact_match",))


# Real models


def read(path: Path, most: int) -> Dataset:
    lines = path.read_text(encoding="utf-8").split("\n")[:most]
    records = [json.loads(line) for line in lines]
    return tiny.rows(**{key: [record[key] for record in records] for key in records[0]})


@pytest.mark.shared
def test_greedy_exact_match_of_g2p_is_that_of_teacher_forcing(shared: Path) -> None:
    folder = shared / "models" / "misaki_bart_us"
    config = tiny.config(
        str(folder),
        "seq2seq",
        {"text": "word", "target": "phonemes", "max_length": 64},
        tokenizer=str(folder / "grapheme_tokenizer"),
        target_tokenizer=str(folder / "phoneme_tokenizer"),
    )
    task, rows = make_task(config), read(shared / "data/g2p_en_gb/validation.jsonl", 300)
    model, encoded = task.load_model().eval(), task.encode(rows, "data.validation")
    assert references(task, encoded) == rows["phonemes"]
    batch = task.collate(encoded.to_list())
    with torch.no_grad():
        right = model(**batch).logits.argmax(-1) == batch["labels"]
    forced = (right | (batch["labels"] == IGNORED)).all(-1).double().mean().item()
    result = evaluate(task, model, encoded, ("exact_match",))
    assert result["exact_match"] == pytest.approx(forced)
    assert result["exact_match"] == pytest.approx(0.14, abs=0.03)


@pytest.mark.shared
def test_stories_are_likelier_than_chance_and_than_their_words_in_disorder(shared: Path) -> None:
    story = "Once upon a time, there was a little girl named Lily. She loved to play outside."
    mixed = " ".join(sorted(story.split()))
    name = str(shared / "models" / "stories260K")
    losses = []
    for text in (story, mixed):
        rows = tiny.rows(text=[text])
        task = tiny.task_of(name, CAUSAL_LM, {"text": "text"}, rows)
        losses.append(evaluate(task, task.load_model(), task.encode(rows, "x"), ())["loss"])
    assert losses[0] < losses[1]
    assert losses[0] < math.log(512) / 2


@pytest.mark.parametrize(("kind", "metric"), [("classification", "f1"), ("regression", "pearson")])
def test_a_training_logs_the_metrics_of_its_own_evaluations(
    tmp_path: Path, kind: str, metric: str
) -> None:
    """The last evaluation is of the trained model, as is the run's own."""
    changes: dict[str, Any] = {"training.eval_strategy": "epoch", "quality.mode": "none"}
    path = classification_run(tmp_path, 48, **changes, task=kind)
    if kind == "regression":
        for split in ("train", "validation"):
            file = tmp_path / f"{split}.jsonl"
            file.write_text(file.read_text().replace('"class ', "").replace('"}', "}"))
    folder = train(path)
    logged = [line for line in read_lines(folder / "train_log.jsonl") if f"eval_{metric}" in line]
    final = json.loads((folder / "metrics.json").read_text())["validation"]
    assert len(logged) == 2
    assert logged[-1][f"eval_{metric}"] == pytest.approx(final[metric], abs=1e-4)
    assert f"{metric}, validation" in (folder / "report.html").read_text().lower()


@pytest.mark.parametrize(("use_cpu", "device"), [(False, "meta"), (True, "cpu")])
def test_models_are_measured_on_the_accelerator_that_trains_them(
    use_cpu: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("meta"))
    monkeypatch.setattr(finished, "evaluate", lambda _, model, *__: {str(model.weight.device): 0.0})
    data = {"train": "t.jsonl", "text": "text", "target": "label"}
    config: dict[str, Any] = {
        "model": "m",
        "task": "classification",
        "data": data,
        "output": "runs/m",
    }
    config |= {"training": {"use_cpu": use_cpu}, "metrics": ["accuracy"]}
    task: Any = None
    rows = Dataset.from_dict({})
    measured = finished.measure(RunConfig.from_dict(config), task, nn.Linear(1, 1), rows)
    assert [*measured] == [device]
