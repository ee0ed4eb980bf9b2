"""The loss of every sample on its own, for each kind of task.

Shapes: N samples, T target positions, V vocabulary, C classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from tsqlora.errors import DataError, ModelError

CLASSIFICATION, REGRESSION, SEQ2SEQ, CAUSAL_LM = (
    "classification",
    "regression",
    "seq2seq",
    "causal-lm",
)
IGNORED = -100
"""The label of a position that carries no loss, as everywhere in transformers."""


def sample_losses(kind: str, logits: Tensor, labels: Tensor) -> Tensor:
    """The loss ℓ_i of each sample (N): the mean over its own target tokens.

    Classification: cross-entropy of `logits` (N, C) at `labels` (N).
    Regression: squared error of `logits` (N, 1) or (N) against `labels` (N).
    seq2seq: cross-entropy of `logits` (N, T, V) at `labels` (N, T), mean over labels that are
    not -100. causal-lm: the same with position t predicting label t + 1.

    The mean is per sample, never over the batch, so ℓ_i does not depend on its neighbours. A
    sample without any target token has loss 0.

    Raises:
        DataError: labels that are no class or token of the model's.
    """
    if kind == REGRESSION:
        return F.mse_loss(logits.float().reshape(len(labels)), labels.float(), reduction="none")
    _require_classes(logits, labels)
    if kind == CLASSIFICATION:
        return F.cross_entropy(_at_least_float32(logits), labels, reduction="none")
    token_losses, counted = token_cross_entropy(kind, logits, labels)
    return token_losses.sum(-1) / counted.sum(-1).clamp(min=1)


def token_cross_entropy(kind: str, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each target token (N, T), 0 where not counted, and the mask of counted."""
    if kind == CAUSAL_LM:
        logits, labels = logits[:, :-1], labels[:, 1:]
    flat = F.cross_entropy(
        _at_least_float32(logits).reshape(-1, logits.shape[-1]),
        labels.reshape(-1),
        reduction="none",
        ignore_index=IGNORED,
    )
    return flat.view(labels.shape), labels != IGNORED


def last_turn_losses(logits: Tensor, labels: Tensor, losses: Tensor) -> Tensor:
    """The mean loss of each causal sample (N) over its last run of counted labels alone.

    `losses` are those over all of them, which they are where no sample of the batch has two runs.
    """
    counted = labels != IGNORED
    begins = counted & ~F.pad(counted, (1, -1))
    if int(begins.sum(-1).max()) < 2:
        return losses
    earlier = begins.flip(-1).cumsum(-1).flip(-1) - begins.int() > 0
    return sample_losses(CAUSAL_LM, logits, labels.masked_fill(earlier, IGNORED))


def target_lengths(kind: str, labels: Tensor) -> Tensor:
    """Target tokens of each sample (N); 1 where the target is one label or number."""
    if kind in (CLASSIFICATION, REGRESSION):
        return torch.ones(len(labels), dtype=torch.long, device=labels.device)
    return ((labels[:, 1:] if kind == CAUSAL_LM else labels) != IGNORED).sum(-1)


def infer_kind(model: nn.Module) -> str:
    """The kind of task a transformers model is built for, read from its class and config.

    A class counts as what transformers' auto classes list it for, or else as its name says.

    Raises:
        ModelError: the model is none of the four kinds.
    """
    inner = getattr(model, "get_base_model", lambda: model)()
    name = type(inner).__name__
    config = getattr(inner, "config", None)
    classes = {each.__name__ for each in type(inner).__mro__}
    if "SequenceClassification" in name:
        return _classifier_kind(name, getattr(config, "problem_type", None), config)
    encoder_decoder = getattr(config, "is_encoder_decoder", False)
    seq2seq = classes & set(MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values())
    if encoder_decoder and (seq2seq or "ConditionalGeneration" in name):
        return SEQ2SEQ
    causal = classes & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    if causal or "CausalLM" in name or "LMHeadModel" in name:
        return CAUSAL_LM
    raise ModelError(
        f"{name} is not a model for sequence classification, regression, seq2seq or causal "
        "language modelling: load it with the matching AutoModelFor... class."
    )


def _classifier_kind(name: str, problem: str | None, config: object) -> str:
    outputs = getattr(config, "num_labels", 2)
    if problem == "multi_label_classification" or (problem == "regression" and outputs > 1):
        raise ModelError(
            f"{name} has {outputs} targets a sample (problem_type: {problem}), and only one is "
            "supported: set problem_type to single_label_classification, or to regression with "
            "num_labels=1, and give each row one label."
        )
    return REGRESSION if problem == "regression" or outputs == 1 else CLASSIFICATION


def _require_classes(logits: Tensor, labels: Tensor) -> None:
    """Labels name one of the last dimension's entries, or are -100."""
    if labels.is_floating_point():
        raise DataError(
            "The labels are fractions where whole numbers are wanted, each the number of a class "
            "or token: cast the column to integers, or load the model with num_labels=1."
        )
    named = labels[labels != IGNORED]
    if len(named) and not 0 <= int(named.min()) <= int(named.max()) < logits.shape[-1]:
        raise DataError(
            f"Labels run from {int(named.min())} to {int(named.max())}, but the model knows 0 to "
            f"{logits.shape[-1] - 1}: load it with the right num_labels, or mend the labels."
        )


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
