"""Greedy generation: encoded samples ─► texts, and the references they are measured by."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers.data.data_collator import pad_without_fast_tokenizer_warning

from tsqlora.base_task import Task
from tsqlora.batches import Batch
from tsqlora.errors import DataError
from tsqlora.loading import most_tokens, quiet
from tsqlora.losses import CAUSAL_LM, IGNORED
from tsqlora.memory import Halving
from tsqlora.progress import progress


def predict(task: Task, model: Any, encoded: Dataset, batch_size: int = 64) -> list[str]:
    """What the model writes for each sample, greedily, without special tokens.

    seq2seq: from the source, at most `task.limit` tokens. causal-lm: from all that stands before
    the last target (the completion, the last assistant turn), until `task.limit` is filled up.
    Neither their order nor the size of the batches changes the texts.

    Raises:
        DataError: causal-lm samples without a prompt.
    """
    prompts = [_prompt(task, row) for row in encoded]
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    texts, halving = [""] * len(prompts), Halving()

    def written_after(some: Batch) -> list[str]:
        return _generate(task, model, [prompts[i] for i in some["labels"].tolist()])

    with inference(model), progress("generating", len(order), "samples") as written:
        for start in range(0, len(order), batch_size):
            positions = order[start : start + batch_size]
            found = halving(written_after, {"labels": torch.tensor(positions)})
            for i, text in zip(positions, chain.from_iterable(found), strict=True):
                texts[i] = text
            written(len(positions))
    return texts


def references(task: Task, encoded: Dataset) -> list[str]:
    """The last target of each sample, decoded from its tokens just as predictions are."""
    return _decode(task, [labels[_last_target(labels)] for labels in encoded["labels"]])


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; afterwards each module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, training in modes:
            module.training = training


def _generate(task: Task, model: Any, prompts: list[list[int]]) -> list[str]:
    causal = task.kind == CAUSAL_LM
    inputs = pad_without_fast_tokenizer_warning(
        task.tokenizer,
        [{"input_ids": prompt, "attention_mask": [1] * len(prompt)} for prompt in prompts],
        padding_side="left" if causal else "right",
        return_tensors="pt",
    ).to(next(model.parameters()).device)
    longest = inputs["input_ids"].shape[1]
    room = [task.limit - len(prompt) if causal else task.limit for prompt in prompts]
    most = max(room)
    if causal:  # the shortest prompt may have room beyond the model's positions, being padded
        most = most_tokens(model.config, longest + most) - longest
    with quiet():  # generation settings of the model that greedy search does not use
        written = model.generate(**inputs, max_new_tokens=most, num_beams=1, do_sample=False)
    new = written[:, longest:] if causal else written[:, 1:]  # the decoder's start token
    return _decode(task, [row[:n] for row, n in zip(new.tolist(), room, strict=True)])


def _prompt(task: Task, row: dict[str, Any]) -> list[int]:
    ids: list[int] = row["input_ids"]
    if task.kind != CAUSAL_LM:
        return ids
    start = _last_target(row["labels"]).start
    if start == 0:
        raise DataError(f"row {row['id']}: there is no prompt before the target to write from.")
    return ids[:start]


def _last_target(labels: Sequence[int]) -> slice:
    """Where the last unbroken run of targets stands."""
    end = len(labels)
    while end and labels[end - 1] == IGNORED:
        end -= 1
    start = end
    while start and labels[start - 1] != IGNORED:
        start -= 1
    return slice(start, end)


def _decode(task: Task, tokens: list[list[int]]) -> list[str]:
    texts: list[str] = task.target_tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return [text.strip() for text in texts]
