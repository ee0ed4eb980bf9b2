"""Tiny tokenizers and models saved as folders, and the configurations that name them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from tsqlora.base_task import Task
from tsqlora.config import RunConfig
from tsqlora.tasks import make_task

_TEXT = "a good bad film is was the not very dull fine one two three red blue yes no"
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
FORGETFUL_TEMPLATE = CHAT_TEMPLATE.replace(
    "{{ m.content }}", "{{ m.content if loop.last or m.role != 'assistant' else '...' }}"
)
_SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def word_tokenizer() -> tf.PreTrainedTokenizerFast:
    """Words, as BERT frames them: <s> a </s> b </s>, with segments."""
    vocabulary = {word: i for i, word in enumerate([*_SPECIAL.values(), *_TEXT.split()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> $B:1 </s>:1",
        special_tokens=[("<s>", vocabulary["<s>"]), ("</s>", vocabulary["</s>"])],
    )
    names = ["input_ids", "token_type_ids", "attention_mask"]
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_input_names=names, model_max_length=64, **_SPECIAL
    )


def byte_tokenizer(chat_template: str | None = None) -> tf.PreTrainedTokenizerFast:
    """Byte-level BPE with merges, <s> put before a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=[*_SPECIAL.values(), "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_TEXT, "Question: Answer: the good film"], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    fast = tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **_SPECIAL)
    fast.chat_template = chat_template
    return fast


def save_bert(folder: Path, vocabulary: int = 32) -> str:
    """A BERT encoder without a head, and the word tokenizer."""
    config = tf.BertConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=64,
    )
    return _save(tf.BertModel(config), word_tokenizer(), folder)


def save_bart(folder: Path) -> str:
    """A BART and the word tokenizer."""
    config = tf.BartConfig(
        vocab_size=32,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_position_embeddings=24,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
        init_std=0.5,
    )
    return _save(tf.BartForConditionalGeneration(config), word_tokenizer(), folder)


def save_llama(folder: Path, chat_template: str | None = None) -> str:
    """A Llama and the byte tokenizer."""
    config = tf.LlamaConfig(
        vocab_size=330,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=24,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.5,
    )
    return _save(tf.LlamaForCausalLM(config), byte_tokenizer(chat_template), folder)


def _save(model: Any, tokenizer: tf.PreTrainedTokenizerFast, folder: Path) -> str:
    torch.manual_seed(0)
    model.init_weights()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def config(model: str, task: str, data: Mapping[str, Any], **more: Any) -> RunConfig:
    """A run's configuration with what the task needs and nothing else."""
    data = {"train": "train.jsonl", "max_length": 32, **data}
    return RunConfig.from_dict({"model": model, "task": task, "data": data, "output": "o", **more})


def rows(**columns: list[Any]) -> Dataset:
    """A data set with ids, as `load_dataset` gives it."""
    return Dataset.from_dict({**columns, "id": list(range(len(next(iter(columns.values())))))})


def task_of(model: str, kind: str, data: Mapping[str, Any], train: Dataset) -> Task:
    """The task of that kind on that data."""
    return make_task(config(model, kind, data), train)
