"""One `Task` a kind: classification, regression, seq2seq and causal language modelling."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from tsqlora.base_task import Row, Task
from tsqlora.chats import chat_columns, question_and_answer, turns_of
from tsqlora.config import RunConfig
from tsqlora.data import render, require_columns
from tsqlora.encoding import (
    Encoded,
    encode_chats,
    encode_completions,
    encode_plain,
    encode_targets,
    encode_texts,
    render_chat,
)
from tsqlora.errors import ConfigError, DataError, ModelError
from tsqlora.labels import class_names, label_name
from tsqlora.loading import load_config, load_tokenizer, most_tokens
from tsqlora.losses import CAUSAL_LM, CLASSIFICATION, REGRESSION, SEQ2SEQ
from tsqlora.quantized import Quantization


def make_task(
    config: RunConfig, train: Dataset | None = None, labels: Sequence[str] | None = None
) -> Task:
    """The task that `config` describes; classes are those of `train`, or `labels` where given.

    Loads the configuration of the model and the tokenizers, not the weights.

    Raises:
        ConfigError: the configuration asks for what the kind of task cannot do.
        DataError: `train` lacks a column, or its labels make no classes.
        ModelError: model or tokenizer cannot be found or are of the wrong kind.
    """
    _refuse_metrics(config)
    model_config = load_config(config.model)
    tokenizer = load_tokenizer(config.tokenizer or config.model, _field(config))
    target_tokenizer = tokenizer
    if config.target_tokenizer is not None:
        target_tokenizer = load_tokenizer(config.target_tokenizer, "target_tokenizer")
    limits = [
        config.data.max_length,
        tokenizer.model_max_length,
        target_tokenizer.model_max_length,
    ]
    limit = most_tokens(model_config, min(limits))
    task = _TASKS[config.task](
        config.model,
        config.data,
        tokenizer,
        target_tokenizer,
        limit,
        tuple(labels or ()),
        Quantization.of(config),
    )
    if train is not None:
        require_columns(train, task.columns(), "data.train")
    if task.kind == CLASSIFICATION and labels is None:
        if train is None:
            raise ConfigError("The classes are not known: give the training data or the labels.")
        task = replace(task, labels=class_names(train, str(config.data.target), "data.train"))
    task.configure(model_config)
    return task


def auto_model(kind: str) -> Any:
    """The auto class of transformers that loads models for that kind of task."""
    return _TASKS[kind].auto_model


def _refuse_metrics(config: RunConfig) -> None:
    """Before anything is trained: plain text leaves nothing to write and compare."""
    plain = config.task == CAUSAL_LM and config.data.target is None and config.data.messages is None
    for name in config.metrics or ():
        if plain and name not in CausalLMTask.default_metrics:
            raise ConfigError(
                f"metrics: {name} needs a prompt and a reference; give data.target (or "
                "data.messages), or leave it out."
            )


def _field(config: RunConfig) -> str:
    return "model" if config.tokenizer is None else "tokenizer"


_LARGEST = torch.finfo(torch.float32).max


class _SequenceTask(Task):
    """One label or number for one text or pair of texts."""

    peft_task_type = "SEQ_CLS"
    auto_model = AutoModelForSequenceClassification

    def __post_init__(self) -> None:
        super().__post_init__()
        if "{" in str(self.data.target):
            raise ConfigError(f"data.target: {self.kind} needs a column, not a template.")

    def _read(self, row: Row) -> tuple[str, str, Any]:
        text = self.data.text
        first, second = (text, None) if isinstance(text, str) else text or ("", None)
        return render(row, first), render(row, second) if second else "", self._label(row)

    def _tokenize(self, samples: list[tuple[str, str, Any]]) -> list[Encoded]:
        texts, pairs, labels = zip(*samples, strict=True)
        second = None if isinstance(self.data.text, str) else pairs
        rows = encode_texts(self.tokenizer, texts, second, self.limit)
        return [
            row if isinstance(row, str) else {**row, "labels": label}
            for row, label in zip(rows, labels, strict=True)
        ]

    @abstractmethod
    def _label(self, row: Row) -> int | float: ...


class ClassificationTask(_SequenceTask):
    """One of several classes."""

    kind = CLASSIFICATION
    default_metrics = ("accuracy", "f1", "matthews_correlation")

    def _label(self, row: Row) -> int:
        name = label_name(self._value(row))
        if name not in self.labels:
            known = ", ".join(self.labels[:20]) + (", ..." if len(self.labels) > 20 else "")
            raise DataError(
                f"row {row['id']}: the label {name!r} is not one of the training data ({known}). "
                "Mend the label or drop the row."
            )
        return self.labels.index(name)

    def _collate_labels(self, labels: list[Any]) -> Tensor:
        return torch.tensor(labels, dtype=torch.long)

    def configure(self, config: PreTrainedConfig) -> None:
        """Set the model's configuration for the task; ModelError if its kind is the wrong one."""
        config.num_labels = len(self.labels)
        config.id2label = dict(enumerate(self.labels))
        config.label2id = {name: i for i, name in enumerate(self.labels)}
        config.problem_type = "single_label_classification"


class RegressionTask(_SequenceTask):
    """One number."""

    kind = REGRESSION
    default_metrics = ("pearson", "spearman")

    def _label(self, row: Row) -> float:
        value = self._value(row)
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not abs(number) <= _LARGEST:  # NaN included
            raise DataError(
                f"row {row['id']}: {self.data.target!r} is {value!r}, not a finite number in "
                "float32. Mend it, drop the row, or use `task: classification` for names."
            )
        return number

    def _collate_labels(self, labels: list[Any]) -> Tensor:
        return torch.tensor(labels, dtype=torch.float32)

    def configure(self, config: PreTrainedConfig) -> None:
        """Set the model's configuration for the task; ModelError if its kind is the wrong one."""
        config.num_labels = 1
        config.problem_type = "regression"


class Seq2SeqTask(Task):
    """A text from a text, by an encoder and a decoder."""

    kind = SEQ2SEQ
    peft_task_type = "SEQ_2_SEQ_LM"
    default_metrics = ("exact_match", "rouge", "bleu")
    auto_model = AutoModelForSeq2SeqLM

    def __post_init__(self) -> None:
        super().__post_init__()
        _refuse_pairs(self)

    def _read(self, row: Row) -> tuple[str, str]:
        return render(row, str(self.data.text)), render(row, str(self.data.target))

    def _tokenize(self, samples: list[tuple[str, str]]) -> list[Encoded]:
        sources = encode_texts(self.tokenizer, [s for s, _ in samples], None, self.limit)
        targets = encode_targets(self.target_tokenizer, [t for _, t in samples], self.limit)
        encoded: list[Encoded] = []
        for source, target in zip(sources, targets, strict=True):
            if isinstance(source, str) or isinstance(target, str):
                encoded.append(source if isinstance(source, str) else target)
            else:
                source.pop("token_type_ids", None)
                encoded.append({**source, **target})
        return encoded

    def configure(self, config: PreTrainedConfig) -> None:
        """Set the model's configuration for the task; ModelError if its kind is the wrong one."""
        if not config.is_encoder_decoder:
            raise ModelError(
                f"model: {self.model} ({config.model_type}) has no encoder and decoder, which "
                "seq2seq needs; use `task: causal-lm`, or a model such as BART or T5."
            )


class CausalLMTask(Task):
    """The next token of plain text, of completions (`target`) or of assistant turns (`messages`, or
    `text` and `target` as a `chat`)."""

    kind = CAUSAL_LM
    peft_task_type = "CAUSAL_LM"
    default_metrics = ("loss", "perplexity")
    auto_model = AutoModelForCausalLM

    def __post_init__(self) -> None:
        super().__post_init__()
        _refuse_pairs(self)
        name, data = self.tokenizer.name_or_path, self.data
        if self._chats and self.tokenizer.chat_template is None:
            given = "data.chat" if data.messages is None else "data.messages"
            raise ModelError(
                f"The tokenizer {name} has no chat template, which {given} needs: set `tokenizer:` "
                "to one that has, or give data.text and data.target alone, as templates."
            )
        if (data.messages or data.target) is not None and not self.tokenizer.is_fast:
            raise ModelError(
                f"The tokenizer {name} does not tell which token stands for which characters, so "
                "prompt and target cannot be told apart: set `tokenizer:` to a fast one."
            )

    def columns(self) -> tuple[str, ...]:
        """The columns of the data that the task reads."""
        chat = self.data.messages
        return super().columns() if chat is None else chat_columns(chat)

    @property
    def _chats(self) -> bool:
        return self.data.messages is not None or self.data.chat

    def _read(self, row: Row) -> Any:
        messages, target, said = self.data.messages, self.data.target, ("", "")
        if messages is None:
            said = render(row, str(self.data.text)), render(row, target) if target else ""
            if not self.data.chat:
                return said
        try:
            turns = (question_and_answer(*said), 0) if messages is None else turns_of(row, messages)
            return render_chat(self.tokenizer, *turns)
        except DataError as error:
            raise DataError(f"row {row['id']}: {error}") from None

    def _tokenize(self, samples: list[Any]) -> list[Encoded]:
        if self._chats:
            return encode_chats(self.tokenizer, samples, self.limit)
        texts, targets = zip(*samples, strict=True)
        if self.data.target is not None:
            return encode_completions(self.tokenizer, texts, targets, self.limit)
        return encode_plain(self.tokenizer, texts, self.limit)

    def configure(self, config: PreTrainedConfig) -> None:
        """Set the model's configuration for the task; ModelError if its kind is the wrong one."""
        masked = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
        if config.is_encoder_decoder or (masked and not getattr(config, "is_decoder", False)):
            remedy = "seq2seq" if config.is_encoder_decoder else "classification"
            raise ModelError(
                f"model: {self.model} ({config.model_type}) is not a causal language model; use "
                f"`task: {remedy}`, or a decoder such as Llama, Qwen or GPT-2."
            )


_TASKS: dict[str, type[Task]] = {
    task.kind: task for task in (ClassificationTask, RegressionTask, Seq2SeqTask, CausalLMTask)
}


def _refuse_pairs(task: Task) -> None:
    if isinstance(task.data.text, tuple):
        raise ConfigError(
            f"data.text: {task.kind} takes no pair of columns; write a template, such as "
            f'"{{{task.data.text[0]}}}\\n{{{task.data.text[1]}}}".'
        )
