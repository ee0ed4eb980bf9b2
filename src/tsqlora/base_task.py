"""What every kind of task shares: rows ─► encoded samples ─► batches, and the model for them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import torch
from datasets import ClassLabel, Dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.data.data_collator import pad_without_fast_tokenizer_warning

from tsqlora.config import DataConfig
from tsqlora.data import require_columns, spec_columns
from tsqlora.encoded import compact, in_memory
from tsqlora.encoding import Encoded
from tsqlora.errors import ConfigError, DataError
from tsqlora.labels import is_label
from tsqlora.loading import load_config, load_model, require_embeddings
from tsqlora.losses import IGNORED
from tsqlora.progress import progress
from tsqlora.quantized import Quantization

Row = dict[str, Any]

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
_ROWS_AT_ONCE, _FAULTS_SHOWN = 1000, 5


@dataclass(frozen=True, eq=False)
class Task(ABC):
    """What rows of data are to one kind of model.

    `tokenizer` reads the inputs; `target_tokenizer` writes and reads generated text, and is the
    same one unless seq2seq has its own. `limit` is the longest input or target in tokens:
    `max_length`, or less where the tokenizer or the model takes less. `labels` are the classes'
    names, in the order of their numbers.
    """

    model: str
    data: DataConfig
    tokenizer: PreTrainedTokenizerBase
    target_tokenizer: PreTrainedTokenizerBase
    limit: int
    labels: tuple[str, ...] = ()
    quantization: Quantization | None = None

    kind: ClassVar[str]
    peft_task_type: ClassVar[str]
    default_metrics: ClassVar[tuple[str, ...]]
    auto_model: ClassVar[Any]

    def __post_init__(self) -> None:
        added = self.tokenizer.num_special_tokens_to_add(pair=isinstance(self.data.text, tuple))
        if self.limit <= added:
            raise ConfigError(
                f"data.max_length: {self.limit} tokens leave no room for text beside the {added} "
                "special ones of the tokenizer; raise it."
            )

    def encode(self, dataset: Dataset, where: str) -> Dataset:
        """The rows of `dataset` as `id`, the model's inputs and `labels`, unpadded, in memory.

        Raises:
            DataError: a column is missing, or rows cannot be used; with `where`, row and remedy.
        """
        return in_memory(self.encoded(dataset, where))

    def encoded(self, dataset: Dataset, where: str) -> Iterator[pa.Table]:
        """What `encode` gives, some rows at a time; raises when all bad rows have been seen."""
        require_columns(dataset, self.columns(), where)
        faults: list[str] = []
        empty = True
        for rows in _chunks(dataset.select_columns(["id", *self.columns()]), where):
            samples = self._encode_rows(rows, faults)
            empty = False
            if len(faults) >= _FAULTS_SHOWN:
                faults[_FAULTS_SHOWN - 1] += " There may be more such rows."
                break
            if samples:
                yield compact(samples)
        if faults:
            raise DataError.of([f"{where}: {fault}" for fault in faults[:_FAULTS_SHOWN]])
        if empty:
            raise DataError(f"{where}: there are no rows.")

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
        """The pretrained model in float32, or quantised; a new head is drawn from torch's
        global generator.

        Raises:
            ModelError: it cannot be loaded or does not fit the task or the tokenizer.
        """
        config = load_config(self.model)
        self.configure(config)
        model = load_model(self.model, self.auto_model, config, self.quantization)
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

    @abstractmethod
    def configure(self, config: PreTrainedConfig) -> None:
        """Set the model's configuration for the task; ModelError if its kind is the wrong one."""

    def _encode_rows(self, rows: list[Row], faults: list[str]) -> list[dict[str, Any]]:
        """The samples of those rows that can be used; the others' faults go into `faults`."""
        samples = [sample for row in rows for sample in self._read_or_fault(row, faults)]
        columns = self._tokenize([sample for _, sample in samples]) if samples else []
        encoded = []
        for (number, _), row in zip(samples, columns, strict=True):
            if isinstance(row, str):
                faults.append(f"row {number}: {row}")
            else:
                encoded.append({"id": number, **row})
        return encoded

    def _read_or_fault(self, row: Row, faults: list[str]) -> list[tuple[int, Any]]:
        """(id, sample) of a row, or nothing and a fault."""
        try:
            return [(row["id"], self._read(row))]
        except DataError as error:
            faults.append(str(error))
            return []

    def _value(self, row: Row) -> Any:
        """The label or number of a row."""
        value = row[str(self.data.target)]
        if not is_label(value):
            raise DataError(
                f"row {row['id']}: {self.data.target!r} is missing. Fill it in or drop the row."
            )
        return value


def _chunks(dataset: Dataset, where: str) -> Iterator[list[Row]]:
    """The rows, some at a time, class numbers as names; its progress where it takes long."""
    features = dataset.features.items()
    classes = {name: each.names for name, each in features if isinstance(each, ClassLabel)}
    with progress(f"encoding {where}", len(dataset), "rows", delay=3) as encoded:
        for columns in dataset.with_format(None).iter(_ROWS_AT_ONCE):
            for name, names in classes.items():
                columns[name] = [None if i is None or i < 0 else names[i] for i in columns[name]]
            rows = [
                dict(zip(columns, values, strict=True))
                for values in zip(*columns.values(), strict=True)
            ]
            yield rows
            encoded(len(rows))
