"""The stages in order; each is skipped when its artefact is there and its inputs are unchanged."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, TrainerCallback, set_seed

from tsqlora.adaptation import adapt_briefly
from tsqlora.adapter import check_plan, export_adapter, lora_config, warm_start
from tsqlora.allocation import RankPlan, allocate_ranks
from tsqlora.callback import DynamicRankCallback
from tsqlora.config import RunConfig
from tsqlora.cost import counted, record_parameters
from tsqlora.data import dataset_fingerprint, load_dataset, split_validation
from tsqlora.dynamic_rank import Reallocation
from tsqlora.errors import RunError
from tsqlora.lora_layers import load_trainable_state, resolve_targets, trainable_state, wrap
from tsqlora.metrics import evaluate
from tsqlora.quality import QualityScores
from tsqlora.run_folder import RunFolder, atomic_folder, atomic_write_text, digest, os_errors
from tsqlora.scoring import Scorer
from tsqlora.selection import QualitySampler
from tsqlora.sensitivity import LayerSensitivity, layer_sensitivity
from tsqlora.tasks import Task, make_task
from tsqlora.training import DEFAULTS, make_trainer, run_training, training_arguments

logger = logging.getLogger("tsqlora")

SENSITIVITY_SAMPLES = 512


@dataclass(frozen=True)
class Splits:
    """Encoded data: the pool, and what there is of the others."""

    train: Dataset
    validation: Dataset | None
    test: Dataset | None
    reference: Dataset | None


def train(config: RunConfig | str | Path, resume: bool = False) -> Path:
    """The whole way for a configuration (or its YAML file); returns the run folder.

    Raises:
        TsqloraError: whatever is wrong with the configuration, data, model, folder or training.
    """
    run = Run.start(config, resume)
    run.train()
    run.evaluate()
    run.report()
    return run.folder.path


class Run:
    """One configuration, its run folder, and a method for each stage."""

    def __init__(self, config: RunConfig, folder: RunFolder) -> None:
        self.config, self.folder = config, folder

    @classmethod
    def start(cls, config: RunConfig | str | Path, resume: bool = False) -> Run:
        """Check the configuration and the folder before anything long starts."""
        if not isinstance(config, RunConfig):
            config = RunConfig.from_yaml(config)
        training_arguments(config.training, Path(config.output) / "checkpoints", config.seed)
        return cls(config, RunFolder.create(config.output, config, resume))

    @classmethod
    def open(cls, folder: str | Path) -> Run:
        """A run that is there already."""
        found = RunFolder.open(folder)
        return cls(found.load_config(), found)

    # data and models

    @cached_property
    def raw(self) -> dict[str, Dataset]:
        """The data sets as loaded, by split."""
        data, quality = self.config.data, self.config.quality
        splits = {"train": load_dataset(data.train, "data.train")}
        if isinstance(data.validation, str):
            splits["validation"] = load_dataset(data.validation, "data.validation")
        elif data.validation is not None:
            splits["train"], splits["validation"] = split_validation(
                splits["train"], data.validation, self.config.seed
            )
        if data.test is not None:
            splits["test"] = load_dataset(data.test, "data.test")
        if quality.reference == "validation":
            if "validation" not in splits:
                raise RunError("quality.reference = validation, but data.validation is not given.")
            splits["reference"] = splits["validation"]
        elif quality.reference is not None:
            splits["reference"] = load_dataset(quality.reference, "quality.reference")
        return splits

    @cached_property
    def task(self) -> Task:
        """The task, its labels taken from the training data."""
        return make_task(self.config, self.raw["train"])

    @cached_property
    def splits(self) -> Splits:
        """Everything encoded, so that every bad row is found before anything long starts."""
        encoded = {name: self.task.encode(rows, name) for name, rows in self.raw.items()}
        return Splits(
            encoded["train"], encoded.get("validation"), encoded.get("test"), encoded.get("reference")
        )

    def base_model(self) -> PreTrainedModel:
        """The untouched model; the same every time (a fresh head is seeded)."""
        set_seed(self.config.seed)
        return self.task.load_model()

    @cached_property
    def warm_model(self) -> PeftModel:
        """The model under a uniform adapter, briefly adapted; loaded where that was done before."""
        config, inputs = self.config, self._inputs("adaptation")
        set_seed(config.seed)
        base = self.base_model()
        model = wrap(base, self._uniform_config(base))
        saved = self.folder.warmup / "state.safetensors"
        if self.folder.is_done("adaptation", inputs, [saved]):
            load_trainable_state(model, load_file(saved))
            return model
        steps = config.quality.adapt_steps
        logger.info("Brief adaptation: %d steps of %d samples", steps, self._batch_size)
        with counted(self.folder, "adaptation", steps * self._batch_size):
            adapt_briefly(
                model,
                self.splits.train,
                self.task.collate,
                steps,
                self._learning_rate,
                self._batch_size,
                config.seed,
            )
        with atomic_folder(self.folder.warmup) as folder:
            save_file(trainable_state(model), folder / "state.safetensors")
        self.folder.mark_done("adaptation", inputs)
        return model

    # stages

    def score(self) -> QualityScores:
        """Stage 1: quality scores of every sample."""
        inputs = self._inputs("scores")
        if self.folder.is_done("scores", inputs, [self.folder.scores]):
            logger.info("1/4 Quality scores: done before")
            return QualityScores.from_parquet(self.folder.scores)
        pool, reference = self.splits.train, self.splits.reference
        model = self.warm_model
        logger.info("1/4 Quality scores of %d samples", len(pool))
        scorer = self._scorer
        passes = scorer.passes(len(pool)) + scorer.passes(len(reference) if reference else 0)
        with counted(self.folder, "scores", passes):
            scores = scorer.score(model, pool, reference)
        temporary = self.folder.scores.with_suffix(".tmp")
        scores.to_parquet(temporary)
        temporary.replace(self.folder.scores)
        self.folder.mark_done("scores", inputs)
        logger.info(
            "    %s; effective sample size of the draw %.0f of %d",
            scores.verdict,
            scores.effective_samples,
            len(scores.ids),
        )
        return scores

    def plan(self) -> RankPlan:
        """Stages 2 and 3: layer sensitivity on the selected samples, and the rank plan."""
        sensitivity = self._sensitivity()
        inputs = self._inputs("plan")
        if self.folder.is_done("plan", inputs, [self.folder.plan]):
            logger.info("3/4 Rank plan: done before")
            return RankPlan.load(self.folder.plan)
        ranks = self.config.ranks
        plan = allocate_ranks(
            sensitivity,
            mean_rank=ranks.mean_rank if ranks.parameters is None else None,
            parameters=ranks.parameters,
            min_rank=ranks.min_rank,
            max_rank=ranks.max_rank,
            scale=self.config.adapter.scale,
        )
        logger.info(
            "3/4 Rank plan: %d modules, ranks %d to %d, %d of %d parameters",
            len(plan.ranks),
            min(plan.ranks.values()),
            max(plan.ranks.values()),
            plan.parameters,
            plan.budget,
        )
        plan.save(self.folder.plan)
        self.folder.mark_done("plan", inputs)
        return plan

    def _sensitivity(self) -> LayerSensitivity:
        inputs = self._inputs("sensitivity")
        if self.folder.is_done("sensitivity", inputs, [self.folder.sensitivity]):
            logger.info("2/4 Layer sensitivity: done before")
            return LayerSensitivity.load(self.folder.sensitivity)
        scores = self.score()
        selected = self.splits.train.select(np.flatnonzero(scores.selected))
        logger.info("2/4 Layer sensitivity (%s)", self.config.ranks.sensitivity)
        samples = min(len(selected), SENSITIVITY_SAMPLES)
        with counted(self.folder, "sensitivity", 1.5 * samples):
            sensitivity = layer_sensitivity(
                self.warm_model,
                selected,
                self.task.collate,
                estimator=self.config.ranks.sensitivity,
                max_samples=SENSITIVITY_SAMPLES,
                batch_size=self._batch_size,
                seed=self.config.seed,
            )
        sensitivity.save(self.folder.sensitivity)
        self.folder.mark_done("sensitivity", inputs)
        return sensitivity

    def train(self) -> None:
        """Stage 4: training with moving ranks, then the compact adapter."""
        inputs = self._inputs("training")
        if self.folder.is_done("training", inputs, [self.folder.adapter]):
            logger.info("4/4 Training: done before")
            return
        scores, plan = self.score(), self.plan()
        model = self._planned_model(plan)
        checkpoints = self.folder.checkpoints / "train"
        dynamic = DynamicRankCallback(plan, seed=self.config.seed, on_moves=self._save_moves)
        trainer = make_trainer(
            model,
            training_arguments(self.config.training, checkpoints, self.config.seed),
            self.splits.train,
            self.splits.validation,
            self.task.collate,
            self._sampler(scores),
            [dynamic] if self.config.ranks.dynamic else [],
        )
        logger.info("4/4 Training: %d samples an epoch, ranks %s", len(trainer.sampler), _how(self.config))
        passes = len(trainer.sampler) * trainer.args.num_train_epochs
        if trainer.args.max_steps > 0:
            passes = trainer.args.max_steps * trainer.args.train_batch_size
        going_on = self._begun(inputs)
        with counted(self.folder, "training", passes, going_on):
            run_training(trainer, resume=going_on)
        self._save_log(trainer.state.log_history)
        self._export(model)
        record_parameters(self.folder, trained_parameters(model, plan))
        self.folder.mark_done("training", inputs)

    def evaluate(self) -> dict[str, Any]:
        """Metrics on what splits there are; the untouched model's beside them where it has any."""
        inputs = self._inputs("evaluation")
        if not self.folder.is_done("evaluation", inputs, [self.folder.metrics]):
            splits = self.splits
            measured = {"validation": splits.validation, "test": splits.test}
            measured = {name: rows for name, rows in measured.items() if rows is not None}
            sections: dict[str, Any] = {}
            base = self.base_model()
            if measured and self.config.task in ("seq2seq", "causal-lm"):
                sections["base"] = self._metrics(base, next(iter(measured.values())))
            model = PeftModel.from_pretrained(base, str(self.folder.adapter))
            for name, rows in measured.items():
                sections[name] = self._metrics(model, rows)
            self.folder.update_metrics(sections)
            self.folder.mark_done("evaluation", inputs)
        return json.loads(self.folder.metrics.read_text(encoding="utf-8"))  # type: ignore[no-any-return]

    def evaluate_on(self, source: str) -> dict[str, float]:
        """Metrics of the finished adapter on another file, nothing written."""
        rows = self.finished_task().encode(load_dataset(source, "--data"), "--data")
        return self._metrics(self.finished_model(), rows)

    def finished_task(self) -> Task:
        """The task of a finished run, without its training data."""
        if not self.folder.task.exists():
            raise RunError(f"{self.folder.path} holds no trained adapter yet: finish it by --resume.")
        known = json.loads(self.folder.task.read_text(encoding="utf-8"))
        return make_task(self.config, None, labels=known["labels"])

    def finished_model(self) -> PeftModel:
        """The base model with the finished run's adapter."""
        set_seed(self.config.seed)
        base = self.finished_task().load_model()
        return PeftModel.from_pretrained(base, str(self.folder.adapter))

    def export(self, format: str, out: Path) -> Path:
        """The finished adapter as `compact`, `padded` or `merged` in a new folder.

        Raises:
            RunError: the folder is there already and not empty.
        """
        if out.exists() and any(out.iterdir()):
            raise RunError(f"{out} is not empty: name a new folder by --out.")
        task = self.finished_task()
        with os_errors(out):
            export_adapter(self.finished_model(), out, format)
            task.save_tokenizers(out)
            if format != "merged":
                atomic_write_text(out / "README.md", model_card(self.config, task))
        return out

    def report(self) -> Path:
        """`report.html`, from the folder alone."""
        from tsqlora.report import write_report

        return write_report(self.folder.path)

    # parts of the stages

    def _planned_model(self, plan: RankPlan) -> PeftModel:
        adapter = self.config.adapter
        planned = lora_config(plan, self.task.peft_task_type, adapter.modules_to_save, adapter.dropout)
        warm = load_file(self.folder.warmup / "state.safetensors")
        self.__dict__.pop("warm_model", None)  # its memory is wanted
        set_seed(self.config.seed)
        model = wrap(self.base_model(), planned)
        check_plan(model, plan)
        warm_start(model, warm)
        return model

    def _uniform_config(self, base: PreTrainedModel) -> LoraConfig:
        adapter = self.config.adapter
        rank = max(1, round(self.config.ranks.mean_rank or 8))
        return LoraConfig(
            r=rank,
            lora_alpha=adapter.scale * rank,  # type: ignore[arg-type]
            target_modules=resolve_targets(base, self.task.kind, adapter.target_modules),
            modules_to_save=list(adapter.modules_to_save) or None,
            task_type=self.task.peft_task_type,
        )

    def _sampler(self, scores: QualityScores) -> QualitySampler:
        quality, seed = self.config.quality, self.config.seed
        if quality.preset == "paper":  # one draw, kept
            kept = replace(scores, probability=scores.selected / scores.selected.sum())
            return QualitySampler(kept, quality.fraction, seed)
        return QualitySampler(scores, quality.fraction, seed)

    def _export(self, model: PeftModel) -> None:
        with atomic_folder(self.folder.adapter) as folder:
            export_adapter(model, folder)
            self.task.save_tokenizers(folder)
            atomic_write_text(folder / "README.md", model_card(self.config, self.task))
        atomic_write_text(self.folder.task, json.dumps(self.task.describe(), indent=2) + "\n")

    def _save_moves(self, moves: Sequence[Reallocation]) -> None:
        lines = [json.dumps(move.to_dict()) + "\n" for move in moves]
        atomic_write_text(self.folder.ranks, "".join(lines))

    def _begun(self, inputs: str) -> bool:
        """Whether checkpoints of this very training are there; notes that they will be."""
        note = self.folder.checkpoints / "train.inputs"
        begun = note.exists() and note.read_text(encoding="utf-8") == inputs
        note.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(note, inputs)
        return begun

    def _save_log(self, history: list[dict[str, float]]) -> None:
        lines = [json.dumps(entry) for entry in history if "loss" in entry or "eval_loss" in entry]
        atomic_write_text(self.folder.path / "train_log.jsonl", "\n".join(lines) + "\n")

    def _metrics(self, model: torch.nn.Module, rows: Dataset) -> dict[str, float]:
        names = self.config.metrics or self.task.default_metrics
        return evaluate(self.task, model, rows, names)

    @property
    def _scorer(self) -> Scorer:
        return Scorer(
            self.task.collate,
            self.config.quality,
            self._learning_rate,
            self._batch_size,
            self.config.seed,
        )

    @property
    def _learning_rate(self) -> float:
        return float(self.config.training.get("learning_rate", DEFAULTS["learning_rate"]))

    @property
    def _batch_size(self) -> int:
        key = "per_device_train_batch_size"
        return int(self.config.training.get(key, DEFAULTS[key]))

    # bookkeeping

    _NEEDS = {
        "adaptation": ["model", "task", "data", "adapter", "training", "seed", "quality.adapt_steps"],
        "scores": ["quality"],
        "sensitivity": ["ranks.sensitivity"],
        "plan": ["ranks"],
        "training": [],
        "evaluation": ["metrics"],
    }
    """What each stage depends on beside the stage before it."""

    def _inputs(self, stage: str) -> str:
        stages = list(self._NEEDS)
        before = stages.index(stage)
        plain = self.config.to_dict()
        needed = {key: _dig(plain, key) for key in self._NEEDS[stage]}
        upstream = self._inputs(stages[before - 1]) if before else self._fingerprints()
        return digest(stage, needed, upstream)

    def _fingerprints(self) -> dict[str, str]:
        return {name: dataset_fingerprint(rows) for name, rows in self.raw.items()}


def _dig(mapping: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        mapping = mapping[part]
    return mapping


def trained_parameters(model: PeftModel, plan: RankPlan) -> int:
    """The plan's parameters and those of modules_to_save; headroom, always zero, is not counted."""
    others = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n)
    return plan.parameters + others


def _how(config: RunConfig) -> str:
    return "moving" if config.ranks.dynamic else "fixed"


def model_card(config: RunConfig, task: Task) -> str:
    """README.md of the adapter: how to load it without tsqlora."""
    labels = f", num_labels={len(task.labels)}" if task.labels else ""
    return f"""---
base_model: {config.model}
library_name: peft
tags: [lora, tsqlora]
---
# LoRA adapter for {config.model}

A plain PEFT LoRA adapter for {task.kind}, trained by TsqLoRA on `{config.data.train}`.

```python
from peft import {_AUTO_PEFT[task.peft_task_type]}

model = {_AUTO_PEFT[task.peft_task_type]}.from_pretrained("path/to/this/folder"{labels})
model = model.merge_and_unload()  # optional: a plain model
```
"""


_AUTO_PEFT = {
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
    "CAUSAL_LM": "AutoPeftModelForCausalLM",
}
