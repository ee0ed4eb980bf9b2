"""Batches for passes of our own over a pool: order and size by length, memory, device, losses."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from tsqlora.columns import blocks_of, column
from tsqlora.errors import DataError
from tsqlora.losses import SEQ2SEQ, sample_losses
from tsqlora.progress import progress
from tsqlora.quantized import keep_exact

Collator = Callable[[list[dict[str, Any]]], Mapping[str, Tensor]]
Batch = dict[str, Tensor]

REFUSALS = (
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    NotImplementedError,
    AssertionError,
)
"""What collators and models raise of samples that they cannot take."""
OWN = 16
"""Tokens that a sample counts beside its own, for what it takes in memory at any length."""
ROWS_AT_ONCE = 10_000


def model_columns(model: nn.Module, dataset: Dataset, collator: Collator) -> Dataset:
    """`dataset` without the columns the model's forward does not take, as the Trainer does it.

    All columns stay where `collator` can take rows only with them: raw text, or weights, for one
    of the user's own. So they do where a transform makes others of them.
    """
    inner = getattr(model, "get_base_model", lambda: model)()
    accepted = {*inspect.signature(inner.forward).parameters, "label", "label_ids", "labels"}
    kept = [name for name in dataset.column_names if name in accepted]
    if not kept or len(kept) == len(dataset.column_names) or dataset.format["type"] == "custom":
        return dataset
    cut = dataset.select_columns(kept)
    if refusal(cut, collator) is not None and refusal(dataset, collator) is None:
        return dataset
    return cut


def refusal(dataset: Dataset, collator: Collator) -> Exception | None:
    """Why `collator` cannot take the first two rows, if it cannot."""
    try:
        collator([dataset[i] for i in range(min(2, len(dataset)))])
    except REFUSALS as error:
        return error
    return None


class Pool:
    """A data set as batches of one size in tokens, collated and put on the model's device.

    No batch holds more tokens than `batch_size` of the longest samples, which is what batches in
    the data set's order come to now and then: so short samples come many at a time and long ones
    few, in the same memory and with little padding.

    Attributes:
        plan: the positions of each batch. Longest first: a batch too large for memory fails at
            once. It depends on the lengths and `batch_size` only.
        tokens: the tokens of each sample (N), 0 where the collator makes them.
    """

    def __init__(
        self, model: nn.Module, dataset: Dataset, collator: Collator, batch_size: int
    ) -> None:
        self.rows, self.collator = model_columns(model, dataset, collator), collator
        self.device = _device(model)
        self._columns = _token_columns(self.rows)
        self.tokens = _lengths(self.rows, self._columns)
        self.most = batch_size * (int(self.tokens.max(initial=0)) + OWN)
        self.plan = _plan(self.tokens, self.most)

    def planned(self, positions: np.ndarray) -> list[np.ndarray]:
        """`plan` for some positions alone."""
        return [positions[each] for each in _plan(self.tokens[positions], self.most)]

    def take(self, positions: np.ndarray) -> Iterator[tuple[np.ndarray, Batch]]:
        """(positions, batch), once, or in pieces where the collator pads further than was planned.

        Raises:
            DataError: the collator gives no `labels`, or other samples than it was given.
        """
        batch = self.collator(self.rows.__getitems__(positions.tolist()))
        require_labels(batch, self.rows)
        require_apart(batch, len(positions))
        found = {k: v.to(self.device) for k, v in batch.items() if isinstance(v, Tensor)}
        padded = sum(found[name].numel() for name in self._columns if name in found)
        pieces = min(len(positions), max(1, round(padded / self.most)))
        yield from zip(np.array_split(positions, pieces), split(found, pieces), strict=True)


def batches(
    model: nn.Module, dataset: Dataset, collator: Collator, batch_size: int, what: str
) -> Iterator[tuple[np.ndarray, Batch]]:
    """(positions, batch) over the whole data set as `Pool` plans it, with a `Progress` of `what`.

    Raises:
        DataError: the collator gives no `labels`.
    """
    pool = Pool(model, dataset, collator, batch_size)
    with passing(pool.tokens, pool.plan, what) as passed:
        for positions in pool.plan:
            yield from pool.take(positions)
            passed(positions)


@contextmanager
def passing(
    tokens: np.ndarray, ahead: Sequence[np.ndarray], what: str, hidden: bool = False
) -> Iterator[Callable[[np.ndarray], None]]:
    """The progress of a pass over a pool; it is told the positions that have passed.

    Work is counted in tokens (N), as long samples take longer, or in samples where those are all 0;
    `ahead` are the positions still to pass, batch by batch.
    """
    work = tokens if tokens.any() else np.ones_like(tokens)
    total, samples = sum(int(work[each].sum()) for each in ahead), sum(map(len, ahead))
    with progress(what, samples, "samples", total, hidden) as passed:
        yield lambda positions: passed(len(positions), int(work[positions].sum()))


def split(batch: Batch, pieces: int) -> list[Batch]:
    """The samples of a batch in so many batches, sizes as `np.array_split` has them."""
    samples = len(batch["labels"])
    if min(pieces, samples) <= 1:
        return [batch]
    pieces = min(pieces, samples)
    parts = {
        name: torch.tensor_split(tensor, pieces)
        if _by_sample(tensor, samples)
        else [tensor] * pieces
        for name, tensor in batch.items()
    }
    return [{name: tensors[i] for name, tensors in parts.items()} for i in range(pieces)]


def first(batch: Batch, samples: int) -> Batch:
    """The first so many samples of a batch."""
    here = len(batch["labels"])
    return {k: v[:samples] if _by_sample(v, here) else v for k, v in batch.items()}


def _by_sample(tensor: Tensor, samples: int) -> bool:
    """Whether a tensor has a row a sample; else it is the whole batch's, as positions may be."""
    return tensor.dim() > 0 and len(tensor) == samples


def _plan(tokens: np.ndarray, most: int) -> list[np.ndarray]:
    order = _longest_first(tokens)
    plan, start = [], 0
    while start < len(order):
        stop = start + max(1, most // (int(tokens[order[start]]) + OWN))
        plan.append(order[start:stop])
        start = stop
    return plan


def _longest_first(tokens: np.ndarray) -> np.ndarray:
    """Positions, the longest samples' first, those alike in their own order: a counting sort."""
    order, longest = column(len(tokens), np.int64), int(tokens.max(initial=0))
    counts = np.zeros(longest + 1, dtype=np.int64)
    for rows in blocks_of(len(tokens)):
        counts += np.bincount(tokens[rows], minlength=longest + 1)
    places = len(tokens) - counts.cumsum()  # after those that are longer
    for rows in blocks_of(len(tokens)):
        own = np.argsort(-tokens[rows], kind="stable")
        ordered = tokens[rows][own]
        rank = np.arange(len(own)) - np.searchsorted(-ordered, -ordered, "left")
        order[places[ordered] + rank] = rows.start + own
        places += np.bincount(ordered, minlength=longest + 1)
    return order


def _token_columns(dataset: Dataset) -> list[str]:
    """The columns whose lengths make a batch long: the inputs, and the targets of generation."""
    types = {field.name: field.type for field in dataset.data.schema}
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return [
        name
        for name in ("input_ids", "labels")
        if name in types and any(i(types[name]) for i in lists)
    ]


def _lengths(dataset: Dataset, columns: Sequence[str]) -> np.ndarray:
    """Tokens of each row (N), read from Arrow, as Python's integers would fill the memory."""
    found = column(len(dataset), np.int32)
    arrow = dataset.with_format("arrow")
    for start in range(0, len(dataset) if columns else 0, ROWS_AT_ONCE):
        rows = arrow[start : start + ROWS_AT_ONCE]
        lengths = [pc.fill_null(pc.list_value_length(rows[name]), 0) for name in columns]
        found[start : start + len(rows)] = np.sum([each.to_numpy() for each in lengths], axis=0)
    return found


def require_labels(batch: Mapping[str, Tensor], dataset: Dataset) -> None:
    """DataError where a batch of `dataset` has no `labels`."""
    if "labels" not in batch:
        raise DataError(
            "The collator's batches have no `labels`, so no loss can be taken: name the target "
            f"column `labels` (columns here: {', '.join(dataset.column_names)}). Preference data, "
            "as of DPO, have no target of which samples could be scored."
        )


def require_apart(batch: Mapping[str, Tensor], rows: int) -> None:
    """DataError where a batch made of so many rows holds another number of samples."""
    if len(batch["labels"]) != rows:
        raise DataError(
            f"The collator made {len(batch['labels'])} samples of {rows} rows, so they cannot be "
            "told apart: use one that neither packs nor splits rows (TRL: packing=False, "
            "padding_free=False)."
        )


def forward_logits(model: nn.Module, kind: str, batch: Batch) -> Tensor:
    """The logits of a batch; labels go in only where the decoder's input is made from them."""
    inputs = {k: v for k, v in batch.items() if k != "labels" or kind == SEQ2SEQ}
    if kind != SEQ2SEQ and "use_cache" in _forward_parameters(model):
        inputs["use_cache"] = False  # type: ignore[assignment]
    if getattr(getattr(model, "config", None), "return_dict", True) is False:
        inputs["return_dict"] = True  # type: ignore[assignment]
    logits = model(**inputs).logits
    assert isinstance(logits, Tensor)
    return logits


def forward_losses(model: nn.Module, kind: str, batch: Batch) -> Tensor:
    """ℓ_i (N) of a batch."""
    return sample_losses(kind, forward_logits(model, kind, batch), batch["labels"])


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in eval mode, and what was compiled of it runs as it is written.

    A compiled part would be compiled again for every hook that watches it.
    """
    training = model.training
    keep_exact(model)
    model.eval()
    try:
        with torch.compiler.set_stance("force_eager") if _compiled(model) else nullcontext():
            yield
    finally:
        model.train(training)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile`, DataParallel or DistributedDataParallel."""
    while True:
        if isinstance(model, DataParallel | DistributedDataParallel):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = model.get_submodule("_orig_mod")
        else:
            return model


def _compiled(model: nn.Module) -> bool:
    return any(
        "_orig_mod" in module._modules or module._compiled_call_impl is not None
        for module in model.modules()
    )


def _device(model: nn.Module) -> torch.device:
    """Where the model's weights are, or go where they are held elsewhere until they are needed."""
    devices = (parameter.device for parameter in model.parameters())
    return next((d for d in devices if d.type != "meta"), torch.device("cpu"))


def _forward_parameters(model: nn.Module) -> Sequence[str]:
    inner = getattr(model, "get_base_model", lambda: model)()
    return list(inspect.signature(inner.forward).parameters)


def singly(batch: Batch) -> Iterator[Batch]:
    """The same samples in batches of one, for models whose layers mix samples."""
    return iter(split(batch, len(batch["labels"])))


def subset(dataset: Dataset, most: int, seed: int) -> Dataset:
    """At most `most` rows, drawn with `seed`, in their own order."""
    return dataset if len(dataset) <= most else dataset.select(places(len(dataset), most, seed))


def places(rows: int, most: int, seed: int) -> np.ndarray:
    """The numbers of the rows that `subset` has."""
    if rows <= most:
        return np.arange(rows)
    return np.sort(np.random.default_rng(seed).choice(rows, most, replace=False))
