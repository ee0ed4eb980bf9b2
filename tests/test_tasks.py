from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from datasets import Dataset
from torch.utils.data import DataLoader

import tiny_text as tiny
from tiny import KINDS, tiny_model
from tsqlora.base_task import Task
from tsqlora.config import DataConfig
from tsqlora.errors import DataError
from tsqlora.losses import IGNORED, infer_kind, sample_losses
from tsqlora.model_card import prompt_line
from tsqlora.tasks import make_task

TEXTS = ["a good film", "bad", "the film was not very good", "dull dull dull one two"]
CHAT = [
    {"role": "user", "content": "is the film good"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "why"},
    {"role": "assistant", "content": "it is not dull"},
]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.save_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def bart(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.save_bart(tmp_path_factory.mktemp("bart"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.save_llama(tmp_path_factory.mktemp("llama"), tiny.CHAT_TEMPLATE)


@pytest.fixture(
    params=["classification", "regression", "seq2seq", "plain", "completion", "chat", "asked"]
)
def example(
    request: pytest.FixtureRequest, bert: str, bart: str, llama: str
) -> tuple[Task, Dataset]:
    """A task of each kind with its data."""
    text = {"text": "text", "target": "target"}
    cases: dict[str, tuple[str, str, dict[str, Any], list[Any]]] = {
        "classification": (bert, "classification", text, ["x", "y", "z", "y"]),
        "regression": (bert, "regression", text, [0.5, -1.0, 2.0, 3.5]),
        "seq2seq": (bart, "seq2seq", text, ["yes", "no no", "red one", "a very good one"]),
        "plain": (llama, "causal-lm", {"text": "text"}, [None] * 4),
        "completion": (llama, "causal-lm", text, [" yes", " no", " a b c d", "x"]),
        "chat": (llama, "causal-lm", {"messages": "target"}, [CHAT, CHAT[:2], CHAT, CHAT[2:]]),
        "asked": (llama, "causal-lm", {**text, "chat": True}, [" yes", " no", " a b c d", "x"]),
    }
    model, kind, data, targets = cases[request.param]
    train = tiny.rows(text=TEXTS, target=targets)
    return tiny.task_of(model, kind, data, train), train


# Laws of every kind


def test_padding_changes_no_sample_loss(example: tuple[Task, Dataset]) -> None:
    task, train = example
    torch.manual_seed(0)
    model = task.load_model().eval()
    encoded = task.encode(train, "data.train").to_list()

    def losses(features: list[dict[str, Any]]) -> torch.Tensor:
        batch = task.collate(features)
        with torch.no_grad():
            return sample_losses(task.kind, model(**batch).logits, batch["labels"])

    alone = torch.cat([losses([row]) for row in encoded])
    torch.testing.assert_close(losses(encoded), alone, rtol=1e-4, atol=1e-5)
    assert alone.min() > 0


def test_the_mean_sample_loss_of_one_sample_is_the_models_own_loss(
    example: tuple[Task, Dataset],
) -> None:
    task, train = example
    model = task.load_model().eval()
    batch = task.collate(task.encode(train, "data.train").to_list()[2:3])
    with torch.no_grad():
        output = model(**batch)
    own = sample_losses(task.kind, output.logits, batch["labels"])[0]
    torch.testing.assert_close(output.loss, own)


def test_a_row_is_encoded_alike_alone_and_among_others(example: tuple[Task, Dataset]) -> None:
    task, train = example
    together = task.encode(train, "data.train").to_list()
    alone = [task.encode(train.select([i]), "data.train").to_list()[0] for i in range(len(train))]
    assert together == alone
    assert [row["id"] for row in together] == train["id"]


def test_the_collator_survives_pickling_and_works_in_a_data_loader(
    example: tuple[Task, Dataset],
) -> None:
    task, train = example
    encoded = task.encode(train, "data.train")
    collate = pickle.loads(pickle.dumps(task.collate))
    (batch,) = DataLoader(encoded, batch_size=4, collate_fn=collate)
    expected = task.collate(encoded.to_list())
    assert batch.keys() == expected.keys()
    assert "id" not in batch
    assert all(torch.equal(batch[key], expected[key]) for key in batch)


def test_padding_is_on_the_right_and_its_labels_are_ignored(
    example: tuple[Task, Dataset],
) -> None:
    task, train = example
    encoded = task.encode(train, "data.train").to_list()
    batch = task.collate(encoded)
    for row, ids, mask, labels in zip(
        encoded, batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True
    ):
        length = len(row["input_ids"])
        assert ids[:length].tolist() == row["input_ids"]
        assert mask.tolist() == [1] * length + [0] * (len(mask) - length)
        if labels.dim():
            own = row["labels"]
            assert labels.tolist() == own + [IGNORED] * (len(labels) - len(own))


def test_a_task_rebuilt_from_its_description_encodes_the_same(
    example: tuple[Task, Dataset],
) -> None:
    task, train = example
    known = json.loads(json.dumps(task.describe()))
    data = {name: getattr(task.data, name) for name in ("text", "target", "messages", "chat")}
    again = make_task(tiny.config(task.model, known["kind"], data), None, labels=known["labels"])
    assert again.encode(train, "x").to_list() == task.encode(train, "x").to_list()


def test_the_model_is_of_the_tasks_kind_and_knows_pad_token_and_labels(
    example: tuple[Task, Dataset],
) -> None:
    task, _ = example
    model = task.load_model()
    assert infer_kind(model) == task.kind
    assert model.config.pad_token_id == task.tokenizer.pad_token_id
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    if task.labels:
        assert tuple(model.config.id2label[i] for i in range(3)) == task.labels


@pytest.mark.parametrize("name", KINDS)
def test_the_kind_of_every_architecture_is_known(name: str) -> None:
    assert infer_kind(tiny_model(name)) == KINDS[name]


def test_saved_tokenizers_encode_the_same(example: tuple[Task, Dataset], tmp_path: Path) -> None:
    task, train = example
    task.save_tokenizers(tmp_path)
    data = {name: getattr(task.data, name) for name in ("text", "target", "messages", "chat")}
    config = tiny.config(task.model, task.kind, data, tokenizer=str(tmp_path))
    again = make_task(config, None, labels=list(task.labels))
    assert again.encode(train, "x").to_list() == task.encode(train, "x").to_list()


# Faults of rows


@pytest.mark.parametrize(
    ("kind", "column", "bad", "message"),
    [
        ("classification", "target", "maybe", r"'maybe' is not one of .*\(no, yes\)"),
        ("classification", "target", None, "'target' is missing"),
        ("classification", "text", None, "'text' is missing"),
        ("classification", "text", "  ", "the text encodes to nothing"),
        ("seq2seq", "text", "", "the text encodes to nothing"),
        ("seq2seq", "target", " ", "the target encodes to nothing"),
        ("causal-lm", "target", "", "the target encodes to nothing"),
        ("causal-lm", "text", None, "'text' is missing"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(
    request: pytest.FixtureRequest, kind: str, column: str, bad: Any, message: str
) -> None:
    model = request.getfixturevalue(
        {"classification": "bert", "seq2seq": "bart", "causal-lm": "llama"}[kind]
    )
    good = {"text": TEXTS, "target": ["yes", "no", "yes", "no"]}
    task = tiny.task_of(model, kind, {"text": "text", "target": "target"}, tiny.rows(**good))
    rows = tiny.rows(**{**good, column: [*good[column][:3], bad]})
    with pytest.raises(DataError, match=f"^data.validation: row 3: .*{message}"):
        task.encode(rows, "data.validation")


@pytest.mark.parametrize("bad", ["abc", float("nan"), float("inf"), None])
def test_a_target_that_is_no_finite_number_is_refused(bert: str, bad: Any) -> None:
    data = {"text": "text", "target": "score"}
    task = tiny.task_of(bert, "regression", data, tiny.rows(text=TEXTS, score=[1.0, 2, 3, 4]))
    scores = [1.0, 2.0, bad, 3.0] if not isinstance(bad, str) else ["1.0", "2", bad, "3"]
    with pytest.raises(DataError, match=r"^data.test: row 2: 'score'"):
        task.encode(tiny.rows(text=TEXTS, score=scores), "data.test")


def test_several_faults_are_reported_together(bert: str) -> None:
    data = {"text": "text", "target": "label"}
    task = tiny.task_of(bert, "classification", data, tiny.rows(text=TEXTS, label=[0, 1, 0, 1]))
    with pytest.raises(DataError) as caught:
        task.encode(tiny.rows(text=["a", "", "a", None], label=[0, 1, 7, 0]), "data.test")
    for row in (1, 2, 3):
        assert f"data.test: row {row}: " in str(caught.value)


def test_a_column_that_is_not_there_is_named_before_anything_is_read(bert: str) -> None:
    with pytest.raises(DataError, match=r"data.train: .*'sentence'"):
        tiny.task_of(
            bert, "classification", {"text": "sentence", "target": "label"}, tiny.rows(label=[0, 1])
        )


# Texts


def test_a_pair_is_two_segments_and_a_template_one_text(bert: str) -> None:
    train = tiny.rows(first=["a good"], second=["bad film"], label=[1.0])
    pair = tiny.task_of(
        bert, "regression", {"text": ["first", "second"], "target": "label"}, train
    ).encode(train, "x")[0]
    one = tiny.task_of(
        bert, "regression", {"text": "{first} {second}", "target": "label"}, train
    ).encode(train, "x")[0]
    assert pair["token_type_ids"] == [0, 0, 0, 0, 1, 1, 1]
    assert one["token_type_ids"] == [0] * 6
    assert [i for i in pair["input_ids"] if i > 2] == [i for i in one["input_ids"] if i > 2]


def test_inputs_and_targets_fit_the_shortest_of_all_limits(bart: str) -> None:
    train = tiny.rows(text=["good " * 100], target=["bad " * 100])
    task = make_task(
        tiny.config(bart, "seq2seq", {"text": "text", "target": "target", "max_length": 1000}),
        train,
    )
    row = task.encode(train, "data.train")[0]
    assert len(row["input_ids"]) == len(row["labels"]) == task.limit == 24
    assert row["input_ids"][-1] == row["labels"][-1] == task.tokenizer.eos_token_id
    model = task.load_model()
    assert torch.isfinite(model(**task.collate([row])).logits).all()


def test_seq2seq_targets_are_those_of_the_target_tokenizer(bart: str, tmp_path: Path) -> None:
    tiny.byte_tokenizer().save_pretrained(tmp_path)
    train = tiny.rows(text=["good"], target=["good"])
    shutil.copytree(bart, tmp_path / "bart")
    model = tf.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "bart")
    model.resize_token_embeddings(400)
    model.save_pretrained(tmp_path / "bart")
    config = tiny.config(
        str(tmp_path / "bart"),
        "seq2seq",
        {"text": "text", "target": "target"},
        target_tokenizer=str(tmp_path),
    )
    task = make_task(config, train)
    row = task.encode(train, "data.train")[0]
    assert row["labels"] == tiny.byte_tokenizer()("good")["input_ids"]
    assert row["input_ids"] == tiny.word_tokenizer()("good")["input_ids"]
    task.save_tokenizers(tmp_path / "saved")
    again = tf.AutoTokenizer.from_pretrained(tmp_path / "saved" / "target_tokenizer")
    assert again("good")["input_ids"] == row["labels"]


# Real models


@pytest.mark.shared
def test_g2p_targets_are_what_the_real_model_was_trained_on(shared: Path) -> None:
    folder = shared / "models" / "misaki_bart_us"
    config = tiny.config(
        str(folder),
        "seq2seq",
        {"text": "word", "target": "phonemes", "max_length": 128},
        tokenizer=str(folder / "grapheme_tokenizer"),
        target_tokenizer=str(folder / "phoneme_tokenizer"),
    )
    task = make_task(config)
    encoded = task.encode(tiny.rows(word=["running", "tea"], phonemes=["ɹˈʌnɪŋ", "tˈi"]), "x")
    batch = task.collate(encoded.to_list())
    model = task.load_model().eval()
    with torch.no_grad():
        predicted = model(**batch).logits.argmax(-1)
    wanted = batch["labels"]
    assert torch.equal(predicted[wanted != IGNORED], wanted[wanted != IGNORED])
    assert task.limit == 64


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"text": "review"}, 'Input: `"review"`.'),
        ({"text": ("a", "b")}, 'Input: `"a"` and `"b"`, as a pair.'),
        ({"text": "{q}\n", "target": "t"}, r'Input: `"{q}\n"`.'),
        (
            {"text": "{q}", "target": "t", "chat": True},
            "Input: `\"{q}\"` as the user's turn, by the tokenizer's chat template.",
        ),
        ({"messages": "m"}, "Input: the turns of a chat, by the tokenizer's chat template."),
    ],
)
def test_the_card_of_an_adapter_says_what_it_was_given(data: dict[str, Any], said: str) -> None:
    assert prompt_line(DataConfig("train.jsonl", **data)) == said
