"""One `Task` a kind: rows ─► encoded samples ─► batches, and the model that takes them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import ClassLabel, Dataset, concatenate_datasets
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.data.data_collator import pad_without_fast_tokenizer_warning
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from tsqlora.config import DataConfig, RunConfig
from tsqlora.data import render, require_columns, spec_columns
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
from tsqlora.loading import load_config, load_model, load_tokenizer, require_embeddings
from tsqlora.losses import CAUSAL_LM, CLASSIFICATION, IGNORED, REGRESSION, SEQ2SEQ

Row = Mapping[str, Any]

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
_ROWS_AT_ONCE, _FAULTS_SHOWN = 1000, 5


@dataclass(frozen=True, eq=False)
class Task(ABC):
    """What rows of data are to one kind of model.

    `tokenizer` reads the inputs; `target_tokenizer` writes and reads generated text, and is the same
    one unless seq2seq has its own. `limit` is the longest input or target in tokens: `max_length`,
    or less where the tokenizer or the model takes less. `labels` are the classes' names, in the
    order of their numbers.
    """

    model: str
    data: DataConfig
    tokenizer: PreTrainedTokenizerBase
    target_tokenizer: PreTrainedTokenizerBase
    limit: int
    labels: tuple[str, ...] = ()

    kind: ClassVar[str]
    peft_task_type: ClassVar[str]
    default_metrics: ClassVar[tuple[str, ...]]
    auto_model: ClassVar[Any]

    def encode(self, dataset: Dataset, where: str) -> Dataset:
        """The rows of `dataset` as `id`, the model's inputs and `labels`, unpadded, in memory.

        Raises:
            DataError: a column is missing, or rows cannot be used; with `where`, row and remedy.
        """
        require_columns(dataset, self.columns(), where)
        faults: list[str] = []
        parts = []
        for rows in _chunks(dataset.select_columns(["id", *self.columns()]), where):
            parts.append(Dataset.from_list(self._encode_rows(rows, faults)))
            if len(faults) >= _FAULTS_SHOWN:
                faults[_FAULTS_SHOWN - 1] += " There may be more such rows."
                break
        if faults:
            raise DataError.of([f"{where}: {fault}" for fault in faults[:_FAULTS_SHOWN]])
        if not parts:
            raise DataError(f"{where}: there are no rows.")
        return concatenate_datasets(parts)

    def collate(self, features: list[dict[str, Any]]) -> dict[str, Tensor]:
        """A batch, padded on the right to its longest sample; padded labels are -100."""
        names = [name for name in INPUTS if name in features[0]]
        batch = pad_without_fast_tokenizer_warning(
            self.tokenizer,
            [{name: feature[name] for name in names} for feature in features],
            padding_side="right",
            return_tensors="pt",
        )
        return {**batch, "labels": self._collate_labels([f["labels"] for f in features])}

    def load_model(self) -> PreTrainedModel:
        """The pretrained model in float32; a new head is drawn from torch's global generator.

        Raises:
            ModelError: it cannot be loaded or does not fit the task or the tokenizer.
        """
        config = load_config(self.model)
        self._configure(config)
        model = load_model(self.model, self.auto_model, config)
        require_embeddings(model, self.tokenizer, self.model)
        require_embeddings(model, self.target_tokenizer, self.model)
        for settings in (model.config, getattr(model, "generation_config", None)):
            if settings is not None:
                settings.pad_token_id = self.tokenizer.pad_token_id
        return model

    def save_tokenizers(self, folder: Path | str) -> None:
        """Write the tokenizer to `folder`, a target's own one to `folder`/target_tokenizer."""
        self.tokenizer.save_pretrained(folder)
        if self.target_tokenizer is not self.tokenizer:
            self.target_tokenizer.save_pretrained(Path(folder) / "target_tokenizer")

    def describe(self) -> dict[str, Any]:
        """The kind and the labels, for JSON; `make_task(config, labels=...)` takes them back."""
        return {"kind": self.kind, "labels": list(self.labels)}

    def columns(self) -> tuple[str, ...]:
        """The columns of the data that the task reads."""
        text = self.data.text or ()
        specs = [text] if isinstance(text, str) else [*text]
        if self.data.target is not None:
            specs.append(self.data.target)
        return tuple(dict.fromkeys(column for spec in specs for column in spec_columns(spec)))

    @abstractmethod
    def _read(self, row: Row) -> Any:
        """What `_tokenize` needs of a row; DataError with the row's id where it cannot be had."""

    @abstractmethod
    def _tokenize(self, samples: list[Any]) -> list[Encoded]:
        """Each sample's columns, or its fault."""

    def _collate_labels(self, labels: list[Any]) -> Tensor:
        padded = [torch.tensor(each, dtype=torch.long) for each in labels]
        return pad_sequence(padded, batch_first=True, padding_value=IGNORED)

    def _configure(self, config: PreTrainedConfig) -> None:
        """Set the model's configuration for the task; ModelError where it cannot do it."""

    def _encode_rows(self, rows: list[Row], faults: list[str]) -> list[dict[str, Any]]:
        """The samples of those rows that can be used; the others' faults go into `faults`."""
        usable, samples, encoded = [], [], []
        for row in rows:
            try:
                samples.append(self._read(row))
                usable.append(row["id"])
            except DataError as error:
                faults.append(str(error))
        for number, columns in zip(usable, self._tokenize(samples) if samples else [], strict=True):
            if isinstance(columns, str):
                faults.append(f"row {number}: {columns}")
            else:
                encoded.append({"id": number, **columns})
        return encoded

    def _value(self, row: Row) -> Any:
        """The label or number of a row."""
        value = row[str(self.data.target)]
        if value is None or (isinstance(value, float) and math.isnan(value)):
            raise DataError(
                f"row {row['id']}: {self.data.target!r} is missing. Fill it in or drop the row."
            )
        return value


class _SequenceTask(Task):
    """One label or number for one text or pair of texts."""

    peft_task_type = "SEQ_CLS"
    auto_model = AutoModelForSequenceClassification

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

    def _configure(self, config: PreTrainedConfig) -> None:
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
        if not math.isfinite(number):
            raise DataError(
                f"row {row['id']}: {self.data.target!r} is {value!r}, not a finite number. Mend it, "
                "drop the row, or use `task: classification` for names."
            )
        return number

    def _collate_labels(self, labels: list[Any]) -> Tensor:
        return torch.tensor(labels, dtype=torch.float32)

    def _configure(self, config: PreTrainedConfig) -> None:
        config.num_labels = 1
        config.problem_type = "regression"


class Seq2SeqTask(Task):
    """A text from a text, by an encoder and a decoder."""

    kind = SEQ2SEQ
    peft_task_type = "SEQ_2_SEQ_LM"
    default_metrics = ("exact_match", "rouge", "bleu")
    auto_model = AutoModelForSeq2SeqLM

    def _read(self, row: Row) -> tuple[str, str]:
        return render(row, str(self.data.text)), render(row, str(self.data.target))

    def _tokenize(self, samples: list[tuple[str, str]]) -> list[Encoded]:
        sources = encode_texts(self.tokenizer, [s for s, _ in samples], None, self.limit)
        targets = encode_targets(self.target_tokenizer, [t for _, t in samples], self.limit)
        encoded: list[Encoded] = []
        for source, target in zip(sources, targets, strict=True):
            faults = [each for each in (source, target) if isinstance(each, str)]
            encoded.append(faults[0] if faults else {**source, **target})  # type: ignore[dict-item]
        return encoded

    def _configure(self, config: PreTrainedConfig) -> None:
        if not config.is_encoder_decoder:
            raise ModelError(
                f"model: {self.model} ({config.model_type}) has no encoder and decoder, which "
                "seq2seq needs; use `task: causal-lm`, or a model such as BART or T5."
            )


class CausalLMTask(Task):
    """The next token of plain text, of completions (`target`) or of assistant turns (`messages`)."""

    kind = CAUSAL_LM
    peft_task_type = "CAUSAL_LM"
    default_metrics = ("loss", "perplexity")
    auto_model = AutoModelForCausalLM

    def columns(self) -> tuple[str, ...]:
        """The columns of the data that the task reads."""
        return (self.data.messages,) if self.data.messages is not None else super().columns()

    def _read(self, row: Row) -> Any:
        if self.data.messages is None:
            target = self.data.target
            return render(row, str(self.data.text)), render(row, target) if target else ""
        try:
            return render_chat(self.tokenizer, row[self.data.messages] or ())
        except DataError as error:
            raise DataError(f"row {row['id']}: {error}") from None

    def _tokenize(self, samples: list[Any]) -> list[Encoded]:
        if self.data.messages is not None:
            return encode_chats(self.tokenizer, samples, self.limit)
        texts, targets = zip(*samples, strict=True)
        if self.data.target is not None:
            return encode_completions(self.tokenizer, texts, targets, self.limit)
        return encode_plain(self.tokenizer, texts, self.limit)

    def _configure(self, config: PreTrainedConfig) -> None:
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
