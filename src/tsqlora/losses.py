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

from tsqlora.errors import ModelError

CLASSIFICATION, REGRESSION, SEQ2SEQ, CAUSAL_LM = (
    "classification",
    "regression",
    "seq2seq",
    "causal-lm",
)
KINDS = (CLASSIFICATION, REGRESSION, SEQ2SEQ, CAUSAL_LM)
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
    """
    if kind == REGRESSION:
        return F.mse_loss(logits.float().reshape(len(labels)), labels.float(), reduction="none")
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
        regression = getattr(config, "problem_type", None) == "regression"
        return REGRESSION if regression or getattr(config, "num_labels", 2) == 1 else CLASSIFICATION
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


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
