from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from datasets import Dataset

import tiny_text as tiny
from tiny import collate, rows_of, tiny_batch, tiny_model, with_lora
from tsqlora.adaptation import Adaptation, adapt_briefly
from tsqlora.errors import ConfigError, ModelError
from tsqlora.loading import load_tokenizer, most_tokens
from tsqlora.lora_layers import temporary_adapter
from tsqlora.tasks import make_task

DATA = {"text": "text", "target": "target"}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.save_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def bart(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.save_bart(tmp_path_factory.mktemp("bart"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.save_llama(tmp_path_factory.mktemp("llama"), tiny.CHAT_TEMPLATE)


def test_a_folder_without_tokenizer_names_the_remedy_and_those_nearby(
    bert: str, tmp_path: Path
) -> None:
    shutil.copy(Path(bert) / "config.json", tmp_path)
    tiny.word_tokenizer().save_pretrained(tmp_path / "words")
    with pytest.raises(ModelError, match=r"no tokenizer; set `tokenizer:`.*words"):
        make_task(tiny.config(str(tmp_path), "regression", DATA))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./no-such-folder", "there is no folder"),
        ("no-such-owner/no-such-model", "cannot be loaded"),
        (__file__, "is a file"),
        (str(Path(__file__).parent), "no config.json"),
    ],
)
def test_a_model_that_is_not_there_is_named(name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        make_task(tiny.config(name, "regression", DATA))
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_pickled_weights_are_refused(bert: str, tmp_path: Path) -> None:
    folder = shutil.copytree(bert, tmp_path / "bert")
    weights = tf.AutoModel.from_pretrained(folder).state_dict()
    (folder / "model.safetensors").unlink()
    task = make_task(tiny.config(str(folder), "regression", DATA))
    with pytest.raises(ModelError, match="no weights in safetensors"):
        task.load_model()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pickled weights are not read.*save_pretrained"):
        task.load_model()


def test_a_damaged_weights_file_is_named(bert: str, tmp_path: Path) -> None:
    folder = shutil.copytree(bert, tmp_path / "bert")
    (folder / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ModelError, match=r"bert cannot be loaded"):
        make_task(tiny.config(str(folder), "regression", DATA)).load_model()


def test_weights_of_another_shape_than_the_config_says_are_refused(
    bert: str, tmp_path: Path
) -> None:
    folder = shutil.copytree(bert, tmp_path / "bert")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "intermediate_size": 40}))
    with pytest.raises(ModelError, match="does not fit the weights"):
        make_task(tiny.config(str(folder), "regression", DATA)).load_model()


@pytest.mark.parametrize(
    ("model", "kind", "remedy"),
    [
        ("bert", "seq2seq", "no encoder and decoder"),
        ("llama", "seq2seq", "task: causal-lm"),
        ("bert", "causal-lm", "task: classification"),
        ("bart", "causal-lm", "task: seq2seq"),
    ],
)
def test_a_model_of_the_wrong_kind_is_refused_before_training(
    request: pytest.FixtureRequest, model: str, kind: str, remedy: str
) -> None:
    with pytest.raises(ModelError, match=remedy):
        make_task(tiny.config(request.getfixturevalue(model), kind, DATA))


def test_a_head_of_another_number_of_classes_is_drawn_afresh(bert: str, tmp_path: Path) -> None:
    five = tf.AutoModelForSequenceClassification.from_pretrained(bert, num_labels=5)
    five.save_pretrained(tmp_path)
    tiny.word_tokenizer().save_pretrained(tmp_path)
    task = make_task(tiny.config(str(tmp_path), "classification", DATA), labels=["a", "b"])
    model = task.load_model()
    assert model.classifier.weight.shape == (2, 16)
    torch.testing.assert_close(
        model.bert.embeddings.word_embeddings.weight, five.bert.embeddings.word_embeddings.weight
    )


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused(tmp_path: Path) -> None:
    model = tiny.save_bert(tmp_path, vocabulary=10)
    with pytest.raises(ModelError, match=r"22 tokens but .* 10 embeddings"):
        make_task(tiny.config(model, "regression", DATA)).load_model()


def test_a_tokenizer_without_pad_token_pads_with_its_end_token(bert: str, tmp_path: Path) -> None:
    tokenizer = tiny.word_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    task = make_task(tiny.config(bert, "regression", DATA, tokenizer=str(tmp_path)))
    assert task.tokenizer.pad_token == tokenizer.eos_token
    assert task.load_model().config.pad_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("kind", "data", "message"),
    [
        ("seq2seq", {"text": ["a", "b"], "target": "c"}, "no pair.*template"),
        ("causal-lm", {"text": ["a", "b"]}, "no pair.*template"),
        ("classification", {"text": "a", "target": "{b}{c}"}, "needs a column"),
        ("regression", {"text": "a", "target": "b", "max_length": 2}, "no room for text"),
    ],
)
def test_a_configuration_the_kind_cannot_do_is_refused(
    request: pytest.FixtureRequest, kind: str, data: dict[str, Any], message: str
) -> None:
    model = {"seq2seq": "bart", "causal-lm": "llama"}.get(kind, "bert")
    with pytest.raises(ConfigError, match=message):
        make_task(tiny.config(request.getfixturevalue(model), kind, data), labels=["x", "y"])


def test_metrics_of_written_text_are_refused_for_plain_text_before_training(llama: str) -> None:
    with pytest.raises(ConfigError, match="exact_match needs a prompt"):
        make_task(tiny.config(llama, "causal-lm", {"text": "text"}, metrics=["exact_match"]))


@pytest.mark.parametrize(
    ("config", "most"),
    [
        (tf.BertConfig(max_position_embeddings=64, pad_token_id=1), 64),
        (tf.RobertaConfig(max_position_embeddings=66, pad_token_id=1), 64),
        (tf.GPT2Config(n_positions=64), 64),
        (tf.MptConfig(max_seq_len=64, n_layers=1), 64),
        (tf.LEDConfig(max_encoder_position_embeddings=64, max_decoder_position_embeddings=32), 64),
        (tf.XLNetConfig(), 100),
        (tf.T5Config(), 100),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_inputs_are_no_longer_than_the_positions_that_tokens_can_take(
    config: tf.PreTrainedConfig, most: int
) -> None:
    assert most_tokens(config, 100) == most
    assert most_tokens(config, 10) == 10


def test_a_tokenizer_file_that_says_it_all_is_read_as_it_is(tmp_path: Path) -> None:
    made = tiny.word_tokenizer()
    made.save_pretrained(tmp_path)
    tf.Qwen2Config(vocab_size=64).save_pretrained(tmp_path)  # transformers would take Qwen's own
    text = "a good film"
    assert load_tokenizer(str(tmp_path), "model")(text).input_ids == made(text).input_ids


def test_a_model_that_cannot_take_the_samples_is_refused_in_its_own_words() -> None:
    model = with_lora(tiny_model("t5"), "seq2seq")
    model.config.decoder_start_token_id = None
    rows = Dataset.from_list(rows_of(tiny_batch("seq2seq")))
    with pytest.raises(ModelError, match=r"T5For.*decoder_start_token_id.*config\.json"):
        adapt_briefly(model, rows, collate, Adaptation(2, 1e-3, 2, 0))


def test_what_peft_cannot_adapt_is_refused_with_the_names_that_can_be() -> None:
    model = tf.MambaForCausalLM(
        tf.MambaConfig(vocab_size=8, hidden_size=8, state_size=2, num_hidden_layers=1)
    )
    with (
        pytest.raises(ModelError, match=r"= out_proj .*'out_proj' is incompatible"),
        temporary_adapter(model, "causal-lm", target_modules=["out_proj"]),
    ):
        pass
