"""A model on an encoded data set ─► `{metric: value}`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import sacrebleu
from datasets import Dataset
from rouge_score.rouge_scorer import RougeScorer
from scipy import stats
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch import Tensor, nn
from transformers import EvalPrediction

from tsqlora.base_task import Task
from tsqlora.batches import Batch, batches, forward_logits
from tsqlora.config import METRICS
from tsqlora.errors import ConfigError
from tsqlora.generation import inference, predict, references
from tsqlora.losses import CLASSIFICATION, REGRESSION, sample_losses, target_lengths
from tsqlora.memory import Halving
from tsqlora.progress import progress

_ROUGE = ("rouge1", "rouge2", "rougeL")
_GENERATED = ("exact_match", "rouge", "bleu")


def evaluate(
    task: Task, model: nn.Module, encoded: Dataset, metrics: Sequence[str], batch_size: int = 64
) -> dict[str, float]:
    """The metrics of `model` on samples encoded by `task`; always with `loss` among them.

    | metric | what it is |
    | --- | --- |
    | loss | mean of ℓ_i; for seq2seq and causal-lm the mean over all target tokens |
    | accuracy, matthews_correlation | as in scikit-learn |
    | f1 | of class 1 where there are two classes, else the mean of all classes' (macro) |
    | pearson, spearman | 0 where predictions or targets are all the same |
    | perplexity | exp(loss) |
    | exact_match | share of greedy predictions equal to their reference, both stripped |
    | rouge | as rouge1, rouge2, rougeL: mean F-measures from 0 to 1, not stemmed |
    | bleu | sacrebleu's corpus BLEU, from 0 to 100 |

    Batches are halved when memory runs out.

    Raises:
        ConfigError: a metric that the kind of task does not have.
    """
    _require_known(task.kind, metrics)
    loss, predictions, targets = _forward(task, model, encoded, batch_size)
    result = {"loss": loss}
    if "perplexity" in metrics:
        result["perplexity"] = math.exp(min(loss, 700.0))  # JSON has no infinity
    if task.kind in (CLASSIFICATION, REGRESSION):
        result |= _of_predictions(task, predictions, targets)
    elif any(name in _GENERATED for name in metrics):
        texts = predict(task, model, encoded, batch_size)
        result |= _generation(texts, references(task, encoded), metrics)
    wanted = {"loss", *metrics, *(_ROUGE if "rouge" in metrics else ())}
    return {name: float(value) for name, value in result.items() if name in wanted}


def in_training(task: Task, metrics: Sequence[str]) -> dict[str, Any]:
    """Settings with which a Trainer logs them beside each `eval_loss`, from the same pass.

    For classes and numbers; none for texts, which would have to be generated.
    """
    if task.kind not in (CLASSIFICATION, REGRESSION):
        return {}

    def computed(found: EvalPrediction) -> dict[str, float]:
        outputs = np.asarray(found.predictions)
        classes = task.kind == CLASSIFICATION
        predicted = outputs.argmax(-1) if classes else outputs.reshape(-1)
        result = _of_predictions(task, predicted, np.asarray(found.label_ids))
        return {name: float(value) for name, value in result.items() if name in metrics}

    def alone(outputs: Any, labels: Tensor) -> Tensor:
        return outputs[0] if isinstance(outputs, tuple) else outputs  # BART gives states as well

    return {"compute_metrics": computed, "preprocess_logits_for_metrics": alone}


def _of_predictions(task: Task, predicted: np.ndarray, true: np.ndarray) -> dict[str, Any]:
    if task.kind == CLASSIFICATION:
        return _classification(predicted, true, len(task.labels))
    return _regression(predicted, true)


def _forward(
    task: Task, model: nn.Module, encoded: Dataset, batch_size: int
) -> tuple[float, np.ndarray, np.ndarray]:
    """The loss, and for one label or number a sample (predictions, targets) in any order."""
    halving, found = Halving(), list[tuple[np.ndarray, ...]]()
    with inference(model):
        for _, batch in batches(model, encoded, task.collate, batch_size, "evaluating"):
            found += halving(partial(_measured, task, model), batch)
    losses, weights, predictions, targets = map(np.concatenate, zip(*found, strict=True))
    return float(np.average(losses, weights=weights)), predictions, targets


def _measured(task: Task, model: nn.Module, batch: Batch) -> tuple[np.ndarray, ...]:
    """Of a batch: losses, their weights, and for one label or number predictions and targets."""
    logits, labels = forward_logits(model, task.kind, batch), batch["labels"]
    losses = sample_losses(task.kind, logits, labels).double().cpu().numpy()
    weights = target_lengths(task.kind, labels).cpu().numpy()
    if task.kind not in (CLASSIFICATION, REGRESSION):
        return losses, weights, np.zeros(0), np.zeros(0)
    predicted = logits.argmax(-1) if task.kind == CLASSIFICATION else logits.float().reshape(-1)
    return losses, weights, predicted.cpu().numpy(), labels.cpu().numpy()


def _classification(predicted: np.ndarray, true: np.ndarray, classes: int) -> dict[str, Any]:
    average = "binary" if classes == 2 else "macro"
    return {
        "accuracy": accuracy_score(true, predicted),
        "f1": f1_score(true, predicted, average=average, zero_division=0.0),
        "matthews_correlation": matthews_corrcoef(true, predicted),
    }


def _regression(predicted: np.ndarray, true: np.ndarray) -> dict[str, Any]:
    if np.ptp(predicted) == 0 or np.ptp(true) == 0:
        return {"pearson": 0.0, "spearman": 0.0}
    return {
        "pearson": stats.pearsonr(predicted, true).statistic,
        "spearman": stats.spearmanr(predicted, true).statistic,
    }


def _generation(texts: list[str], wanted: list[str], metrics: Sequence[str]) -> dict[str, float]:
    result: dict[str, float] = {}
    if "exact_match" in metrics:
        result["exact_match"] = float(np.mean([a == b for a, b in zip(texts, wanted, strict=True)]))
    if "rouge" in metrics:
        scorer = RougeScorer(_ROUGE)
        scores = []
        with progress("rouge", len(texts), "texts", delay=3) as scored:
            for text, reference in zip(texts, wanted, strict=True):
                scores.append(scorer.score(reference, text))
                scored()
        result |= {name: float(np.mean([s[name].fmeasure for s in scores])) for name in _ROUGE}
    if "bleu" in metrics:
        result["bleu"] = sacrebleu.corpus_bleu(texts, [wanted], force=True).score
    return result


def _require_known(kind: str, metrics: Sequence[str]) -> None:
    known = ("loss", *(name for name in METRICS[kind] if name != "loss"))
    problems = [
        f"metrics: {name} is not a metric of {kind}; choose from {', '.join(known)}."
        for name in metrics
        if name not in known
    ]
    if problems:
        raise ConfigError.of(problems)
