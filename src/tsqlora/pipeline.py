"""The stages in order; each is skipped when its artefact is there and its inputs are unchanged."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import TrainingArguments

from tsqlora import processes, starting
from tsqlora.adaptation import Adaptation, adapt_briefly
from tsqlora.allocation import RankPlan, allocate_ranks
from tsqlora.artefacts import (
    atomic_file,
    atomic_folder,
    atomic_write_lines,
    prepare_folder,
    read_json,
    remove,
)
from tsqlora.callback import DynamicRankCallback
from tsqlora.checkpoints import last_checkpoint, seconds_before
from tsqlora.config import RunConfig
from tsqlora.cost import counted, record_parameters
from tsqlora.dynamic_rank import Reallocation
from tsqlora.finished import FinishedRun, finish, measure
from tsqlora.inputs import Inputs
from tsqlora.lora_layers import load_trainable_state, trainable_state
from tsqlora.losses import CAUSAL_LM, SEQ2SEQ
from tsqlora.metrics import in_training
from tsqlora.online_training import keep_scores, pool_trainer
from tsqlora.preflight import check_config, check_run
from tsqlora.progress import Stages, tell
from tsqlora.quality import QualityScores
from tsqlora.report import write_report
from tsqlora.reported import Reported, of_samples
from tsqlora.run_folder import RunFolder
from tsqlora.scoring import Scorer
from tsqlora.seals import seal, why_broken
from tsqlora.selection import QualitySampler, unscored
from tsqlora.sensitivity import HESSIAN, LayerSensitivity, layer_sensitivity
from tsqlora.training import run_training
from tsqlora.trusted import first_rows
from tsqlora.two_parts import first_steps, last_arguments, scorer_of

logger = logging.getLogger("tsqlora")

SENSITIVITY_SAMPLES = 128
"""Selected samples that the layer sensitivity is averaged over, at 1½ passes each (Hessian: 2)."""


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
        self.stages = Stages()
        self.inputs = Inputs(config, folder.encoded)

    @classmethod
    def start(
        cls, config: RunConfig | str | Path, resume: bool = False, scoring: bool = False
    ) -> Run:
        """Check configuration, folder and every row of the data before anything long starts.

        For `scoring` alone it is upfront; the folder keeps the configuration as given."""
        processes.join()
        wanted = config if isinstance(config, RunConfig) else RunConfig.from_yaml(config)
        check_config(wanted)
        folder = processes.from_main(lambda: RunFolder.create(wanted.output, wanted, resume))
        processes.require_shared(folder.path)
        if scoring:
            wanted = replace(wanted, quality=replace(wanted.quality, mode="upfront"))
        run = cls(wanted, folder)
        if not processes.is_main():
            logger.setLevel(logging.WARNING)
        processes.from_main(lambda: run.inputs.load())
        run.inputs.load()
        run.arguments  # noqa: B018  transformers checks the training section
        return run

    @classmethod
    def open(cls, folder: str | Path) -> Run:
        """A run that is there already."""
        found = RunFolder.open(folder)
        return cls(found.load_config(), found)

    @cached_property
    def warm_model(self) -> PeftModel:
        """Stage 0: the model under a uniform adapter, briefly adapted, or as it was saved then."""
        model = starting.first_model(self.config, self.inputs.base_model())
        saved = self.folder.warmup / "state.safetensors"
        processes.from_main(lambda: self._adapted(model, saved))
        load_trainable_state(model, load_file(saved))
        return model.to(self.arguments.device)

    def _adapted(self, model: PeftModel, saved: Path) -> None:
        """See that `saved` is there."""
        inputs = self.inputs.digest("adaptation")
        done = self.folder.is_done("adaptation", inputs, [saved])
        if done and (reason := why_broken(self.folder.warmup)):
            logger.warning("%s is made again: %s.", self.folder.warmup, reason)
            done = False
        if not done:
            self._adapt(model, inputs)
            with atomic_folder(self.folder.warmup) as folder:
                save_file(trainable_state(model), folder / saved.name)
                seal(folder)
            self.folder.mark_done("adaptation", inputs)
        remove(self.folder.adapting)

    def _adapt(self, model: PeftModel, inputs: str) -> None:
        """In one process, whatever their number, so that all score under the same model."""
        task, splits = self.inputs.task, self.inputs.splits
        check_run(self.config, model, splits, task.collate)
        first, folder = self.first, self.folder.adapting
        prepare_folder(folder, inputs)
        before = seconds_before(last_checkpoint(folder))
        passes = first.steps * first.batch
        rows = first_rows(splits.train, splits.trusted, passes, self.config.seed)
        self.stages("score", f"first steps, {first.steps:,} of {first.batch:,} samples")
        with processes.alone(), counted(self.folder, "adaptation", passes, before):
            adapt_briefly(model, rows, task.collate, first, folder)

    def score(self) -> QualityScores:
        """Stage 1: the quality of every sample; all alike where none is scored before training."""
        if (mode := self.config.quality.mode) != "upfront":
            ids, fraction = self.inputs.splits.train["id"], self.config.quality.fraction
            self.stages("score", f"nothing beforehand, by quality.mode: {mode}")
            return unscored(np.asarray(ids), fraction, self.config.seed, f"quality.mode: {mode}")
        if self._done("scores", self.folder.scores):
            self.stages.there("score")
        else:
            self._score(self.inputs.digest("scores"))
        if processes.is_main():
            remove(self.folder.measured)
        return QualityScores.from_parquet(self.folder.scores)

    def _score(self, inputs: str) -> None:
        """Measured by all processes, a share each, or gone on with; the main one scores."""
        pool, reference = self.inputs.splits.train, self.inputs.splits.reference
        model, measured, scorer = self.warm_model, self.folder.measured, self.scorer
        self.stages("score", f"the quality of {len(pool):,} samples")
        passes = partial(scorer.passes, self.config.task, len(pool), len(reference or ()), measured)
        if processes.is_main():
            prepare_folder(measured, inputs)
        with counted(self.folder, "scores", passes, scorer.seconds_before(measured)):
            scorer.measure(model, pool, reference, measured, inputs)
            processes.wait()
            processes.from_main(lambda: self._save_scores(model, inputs))

    def _save_scores(self, model: PeftModel, inputs: str) -> None:
        pool, reference = self.inputs.splits.train, self.inputs.splits.reference
        scores = self.scorer.scores(model, pool, reference, self.folder.measured)
        with atomic_file(self.folder.scores) as file:
            scores.to_parquet(file)
        self.folder.mark_done("scores", inputs)
        effective = scores.effective_samples / len(scores.ids)
        tell(f"    {scores.verdict}; effective share of the pool {100 * effective:.0f} %")

    def sensitivity(self) -> LayerSensitivity:
        """Stage 2: the sensitivity of every layer on the selected samples."""
        if self._done("sensitivity", *starting.measured_files(self.config, self.folder)):
            return LayerSensitivity.load(self.folder.sensitivity)
        scores = self.score()
        selected = self.inputs.splits.train.select(np.flatnonzero(scores.selected))
        model, ranks = self.warm_model, self.config.ranks
        self.stages("plan", f"layer sensitivity ({ranks.sensitivity})")
        each = 2.0 if ranks.sensitivity == HESSIAN else 1.5
        with counted(self.folder, "sensitivity", each * min(len(selected), SENSITIVITY_SAMPLES)):
            sensitivity = layer_sensitivity(
                model,
                selected,
                self.inputs.task.collate,
                estimator=ranks.sensitivity,
                max_samples=SENSITIVITY_SAMPLES,
                batch_size=self.scorer.batch_size or self.first.batch_size // self.inputs.together,
                seed=self.config.seed,
                spectrum=starting.spectrum_of(self.config),
                together=True,
            )
        if processes.is_main():
            sensitivity.save(self.folder.sensitivity)
            self.folder.mark_done("sensitivity", self.inputs.digest("sensitivity"))
        return sensitivity

    def plan(self) -> RankPlan:
        """Stage 3: the rank of every module."""
        sensitivity = self.sensitivity()
        if self._done("plan", self.folder.plan):
            self.stages.there("plan")
            return RankPlan.load(self.folder.plan)
        return processes.from_main(lambda: self._allocate(sensitivity))

    def _allocate(self, sensitivity: LayerSensitivity) -> RankPlan:
        ranks = self.config.ranks
        plan = allocate_ranks(
            sensitivity,
            mean_rank=ranks.mean_rank,
            parameters=ranks.parameters,
            min_rank=ranks.min_rank,
            max_rank=ranks.max_rank,
            scale=self.config.scale,
            rule=ranks.rule,
        )
        plan.save(self.folder.plan)
        self.folder.mark_done("plan", self.inputs.digest("plan"))
        low, high, used = min(plan.ranks.values()), max(plan.ranks.values()), plan.parameters
        modules, budget = len(plan.ranks), plan.budget
        what = f"{modules} modules, ranks {low} to {high}, {used:,} of {budget:,} parameters"
        self.stages("plan", what)
        return plan

    def train(self) -> None:
        """Stage 4: training with moving ranks, then the compact adapter.

        In all processes; what was measured for another number of them is measured again.
        """
        if self.inputs.together != processes.count():
            self.inputs.together = processes.count()
            for made in ("first", "scorer", "warm_model"):
                self.__dict__.pop(made, None)
        if self._done("training", self.folder.adapter):
            self.stages.there("train")
            return
        scores, plan = self.score(), self.plan()
        sampler = self._sampler(scores)
        model = self._planned_model(plan)
        checkpoint = processes.from_main(self._checkpoint)
        dynamic = DynamicRankCallback(
            plan,
            seed=self.config.seed,
            on_moves=self._save_moves,
            compact=self.config.ranks.compact,
            bounds=(self.config.ranks.min_rank, self.config.ranks.max_rank),
            resume_from=checkpoint,
            sensitivity=starting.first_directions(self.config, self.folder),
        )
        trainer = pool_trainer(self.scorer, self.inputs.splits.trusted)(
            sampler,
            reported=Reported(dynamic.figures, of_samples(scores, len(sampler))),
            model=model,
            args=self.arguments,
            train_dataset=self.inputs.splits.train,
            eval_dataset=self.inputs.splits.validation,
            data_collator=self.inputs.task.collate,
            callbacks=[dynamic] if self.config.ranks.dynamic else [],
            **in_training(
                self.inputs.task, self.config.metrics or self.inputs.task.default_metrics
            ),
        )
        self.stages("train", f"{len(sampler):,} samples an epoch")
        with counted(self.folder, "training", trainer.passes(), seconds_before(checkpoint)):
            run_training(trainer, checkpoint, self.folder.tensorboard)
        keep_scores(trainer, self.folder)
        if processes.is_main():
            log = [x for x in trainer.state.log_history if {"loss", "eval_loss"} & x.keys()]
            atomic_write_lines(self.folder.train_log, log)
            record_parameters(self.folder, starting.trained_parameters(model, plan))
        finish(self.config, self.folder, self.inputs.task, model)
        if processes.is_main():
            self.folder.mark_done("training", self.inputs.digest("training"))

    def evaluate(self) -> dict[str, Any]:
        """Metrics of the adapter on what splits there are, the untouched model's beside them."""
        return processes.from_main(self._evaluate)

    def _evaluate(self) -> dict[str, Any]:
        finished, inputs = self.finished, self.inputs.digest("evaluation")
        if not self.folder.is_done("evaluation", inputs, [self.folder.metrics]):
            sections, task, splits = {}, self.inputs.task, self.inputs.splits.measured
            what = ", ".join(f"{len(rows):,} samples of {name}" for name, rows in splits.items())
            self.stages("evaluate", what or "no validation or test data")
            if splits and task.kind in (SEQ2SEQ, CAUSAL_LM):
                rows = next(iter(splits.values()))
                sections["base"] = measure(self.config, task, self.inputs.base_model(), rows)
            self.folder.update_metrics({**sections, **finished.evaluate(splits)})
            self.folder.mark_done("evaluation", inputs)
        return read_json(self.folder.metrics)

    def report(self) -> Path:
        """`report.html`, from the folder alone."""
        return processes.from_main(lambda: write_report(self.folder.path))

    @property
    def finished(self) -> FinishedRun:
        """What the run left, once it is trained."""
        return FinishedRun(self.config, self.folder)

    @cached_property
    def first(self) -> Adaptation:
        """How stage 0 goes."""
        return first_steps(self.config, len(self.inputs.splits.train), self.inputs.together)

    @property
    def arguments(self) -> TrainingArguments:
        """The `TrainingArguments` of stage 4, made anew: they set accelerate's global state."""
        return last_arguments(self.config, self.first, self.folder.training)

    @cached_property
    def scorer(self) -> Scorer:
        """How samples are measured: by default as the training takes them."""
        batch_size = self.first.batch_size // self.inputs.together
        return scorer_of(self.config, self.inputs.task.collate, self.first, batch_size)

    def _done(self, stage: str, *outputs: Path) -> bool:
        """What the main process finds, before it can write anything new."""
        return processes.from_main(
            lambda: self.folder.is_done(stage, self.inputs.digest(stage), outputs)
        )

    def _checkpoint(self) -> Path | None:
        prepare_folder(self.folder.training, self.inputs.digest("training"))
        return last_checkpoint(self.folder.training)

    def _planned_model(self, plan: RankPlan) -> PeftModel:
        self.warm_model  # noqa: B018  its state is there, whichever stages were skipped
        self.__dict__.pop("warm_model", None)  # its memory is wanted
        base, state = self.inputs.base_model(), load_file(self.folder.warmup / "state.safetensors")
        directions = starting.first_directions(self.config, self.folder)
        return starting.planned_model(self.config, base, plan, state, directions)

    def _sampler(self, scores: QualityScores) -> QualitySampler:
        if self.config.quality.preset == "paper":  # one draw, kept
            scores = replace(scores, probability=scores.selected / scores.selected.sum())
        return QualitySampler(scores, self.config.quality.fraction, self.config.seed)

    def _save_moves(self, moves: Sequence[Reallocation]) -> None:
        if processes.is_main():
            atomic_write_lines(self.folder.ranks, (move.to_dict() for move in moves))
