"""Samples that a collator or a model cannot take: found at once, before anything long."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from datasets import Dataset
from torch import nn

from tsqlora.batches import (
    REFUSALS,
    Collator,
    Pool,
    evaluating,
    forward_losses,
    model_columns,
    require_apart,
    require_labels,
)
from tsqlora.data import require_map_style
from tsqlora.errors import DataError, ModelError, TsqloraError


def require_samples(model: nn.Module, dataset: Any, collator: Collator) -> None:
    """Check, before anything long, that `dataset` holds rows which `collator` gives labels.

    Raises:
        DataError: it is no `datasets.Dataset`, is empty or packed, or `collator` cannot take it,
            gives no `labels` or mixes the samples.
    """
    require_map_style(dataset, "the data set")
    if len(dataset) == 0:
        raise DataError("There is no sample to measure: the data set is empty.")
    if "seq_lengths" in dataset.column_names:  # as TRL calls what it has put into a row
        raise DataError(
            "The data set is packed (it has a column seq_lengths): several samples share a row and "
            "cannot be told apart. Set packing=False."
        )
    rows = model_columns(model, dataset, collator)
    try:
        two = [rows[i] for i in range(min(2, len(rows)))]
        batch = collator(two)
    except TsqloraError:
        raise
    except REFUSALS as error:
        words = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise DataError(
            f"The collator cannot take the first rows ({words.rstrip('. ')}). It was given the "
            f"columns {', '.join(rows.column_names)}: tokenise the texts and name the target "
            "`labels`, or give the collator that makes these batches."
        ) from error
    require_labels(batch, dataset)
    require_apart(batch, len(two))


def try_out(model: nn.Module, kind: str, dataset: Dataset, collator: Collator) -> None:
    """Take the two longest samples forward and back, so that what cannot work shows at once.

    Raises:
        ModelError: with the model's own words.
    """
    longest = Pool(model, dataset, collator, 2)
    _, batch = next(longest.take(longest.plan[0]))
    held = {parameter: parameter.grad for parameter in model.parameters()}
    training = model.training
    try:
        with torch.enable_grad():
            with evaluating(model):  # as samples are measured
                forward_losses(model, kind, batch).sum().backward()
            model.train()  # as the Trainer takes them
            found = model(**batch)
            (found["loss"] if isinstance(found, Mapping) else found[0]).backward()
    except torch.OutOfMemoryError:
        raise
    except REFUSALS as error:
        name = type(getattr(model, "get_base_model", lambda: model)()).__name__
        words = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ModelError(
            f"{name} cannot take these samples forward and back ({words.rstrip('. ')}). Mend its "
            "config.json or the tokenizer, lower data.max_length, or use another model."
        ) from error
    finally:
        for parameter, gradient in held.items():
            parameter.grad = gradient
        model.train(training)
