"""Batches for passes of our own over a pool: columns, order by length, device, losses."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from tqdm.auto import tqdm

from tsqlora.data import require_map_style
from tsqlora.errors import DataError, ModelError
from tsqlora.losses import SEQ2SEQ, sample_losses

Collator = Callable[[list[dict[str, Any]]], Mapping[str, Tensor]]
Batch = dict[str, Tensor]

_REFUSALS = (
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    NotImplementedError,
    AssertionError,
)


def model_columns(model: nn.Module, dataset: Dataset) -> Dataset:
    """`dataset` without the columns the model's forward does not take, as the Trainer does it.

    All columns stay where none is one of the forward's (raw text for a collator of one's own).
    """
    inner = getattr(model, "get_base_model", lambda: model)()
    accepted = {*inspect.signature(inner.forward).parameters, "label", "label_ids", "labels"}
    kept = [name for name in dataset.column_names if name in accepted]
    return dataset.select_columns(kept) if kept else dataset


def require_samples(model: nn.Module, dataset: Any, collator: Collator) -> None:
    """Check, before anything long, that `dataset` holds rows which `collator` gives labels.

    Raises:
        DataError: it is no `datasets.Dataset`, is empty, or its batches have no `labels`.
    """
    require_map_style(dataset, "the data set")
    if len(dataset) == 0:
        raise DataError("There is no sample to measure: the data set is empty.")
    _require_labels(collator([model_columns(model, dataset)[0]]), dataset)


def batches(
    model: nn.Module,
    dataset: Dataset,
    collator: Collator,
    batch_size: int,
    what: str,
) -> Iterator[tuple[np.ndarray, Batch]]:
    """(positions, batch) over the whole data set, longest first, on the model's device.

    Longest first: little padding, and a batch too large for memory fails at once. Shows a progress
    bar `what` counted in samples.

    Raises:
        DataError: the collator gives no `labels`.
    """
    rows = model_columns(model, dataset)
    device = next(model.parameters()).device
    order = np.argsort(-_lengths(rows), kind="stable")
    with tqdm(total=len(rows), desc=what, unit=" samples", leave=False) as progress:
        for start in range(0, len(order), batch_size):
            positions = order[start : start + batch_size]
            batch = collator([rows[int(i)] for i in positions])
            _require_labels(batch, dataset)
            yield positions, {k: v.to(device) for k, v in batch.items() if isinstance(v, Tensor)}
            progress.update(len(positions))


def _require_labels(batch: Mapping[str, Tensor], dataset: Dataset) -> None:
    if "labels" not in batch:
        raise DataError(
            "The collator's batches have no `labels`, so no loss can be taken: name the target "
            f"column `labels` (columns here: {', '.join(dataset.column_names)})."
        )


def _lengths(dataset: Dataset) -> np.ndarray:
    if "input_ids" not in dataset.column_names:
        return np.zeros(len(dataset))
    return np.array([len(row) for row in dataset["input_ids"]])


def forward_logits(model: nn.Module, kind: str, batch: Batch) -> Tensor:
    """The logits of a batch; labels go in only where the decoder's input is made from them."""
    inputs = {k: v for k, v in batch.items() if k != "labels" or kind == SEQ2SEQ}
    if kind != SEQ2SEQ and "use_cache" in _forward_parameters(model):
        inputs["use_cache"] = False  # type: ignore[assignment]
    logits = model(**inputs).logits
    assert isinstance(logits, Tensor)
    return logits


def forward_losses(model: nn.Module, kind: str, batch: Batch) -> Tensor:
    """ℓ_i (N) of a batch."""
    return sample_losses(kind, forward_logits(model, kind, batch), batch["labels"])


def try_out(model: nn.Module, kind: str, dataset: Dataset, collator: Collator) -> None:
    """Take the two longest samples forward and back, so that what cannot work shows at once.

    Raises:
        ModelError: with the model's own words.
    """
    longest = np.argsort(-_lengths(dataset), kind="stable")[:2]
    _, batch = next(batches(model, dataset.select(longest), collator, 2, "trial"))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    training = model.training
    try:
        with torch.enable_grad():
            model.eval()  # as samples are measured
            losses = forward_losses(model, kind, batch)
            torch.autograd.grad(losses.sum(), trained, allow_unused=True)
            model.train()  # as the Trainer takes them
            torch.autograd.grad(model(**batch).loss, trained, allow_unused=True)
    except torch.OutOfMemoryError:
        raise
    except _REFUSALS as error:
        name = type(getattr(model, "get_base_model", lambda: model)()).__name__
        words = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ModelError(
            f"{name} cannot take these samples forward and back ({words.rstrip('. ')}). Mend its "
            "config.json or the tokenizer, lower data.max_length, or use another model."
        ) from error
    finally:
        model.train(training)


def _forward_parameters(model: nn.Module) -> Sequence[str]:
    inner = getattr(model, "get_base_model", lambda: model)()
    return list(inspect.signature(inner.forward).parameters)


def singly(batch: Batch) -> Iterator[Batch]:
    """The same samples in batches of one, for models whose layers mix samples."""
    for i in range(len(batch["labels"])):
        yield {k: v[i : i + 1] for k, v in batch.items()}


def subset(dataset: Dataset, most: int, seed: int) -> Dataset:
    """At most `most` rows, drawn with `seed`, in their own order."""
    if len(dataset) <= most:
        return dataset
    chosen = np.random.default_rng(seed).choice(len(dataset), most, replace=False)
    return dataset.select(np.sort(chosen))


def no_grad_unless(wanted: bool) -> Any:
    """A context in which gradients are recorded only when `wanted`."""
    return torch.enable_grad() if wanted else torch.no_grad()
