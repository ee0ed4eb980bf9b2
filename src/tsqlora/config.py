"""The configuration of a run: YAML in, checked dataclasses, resolved YAML out.

The type hints of the dataclasses are the schema, by which `tsqlora.schema` reads and checks.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, cast, get_args, get_type_hints

import yaml

from tsqlora.conflicts import conflicts, mode_conflicts, rank_conflicts
from tsqlora.errors import ConfigError
from tsqlora.schema import Rule, fit_keys, load_yaml, parse_yaml, plain, read

METRICS: Mapping[str, tuple[str, ...]] = {
    "classification": ("accuracy", "f1", "matthews_correlation"),
    "regression": ("pearson", "spearman"),
    "seq2seq": ("exact_match", "rouge", "bleu"),
    "causal-lm": ("loss", "perplexity", "exact_match", "rouge", "bleu"),
}
"""The metrics of each task."""

_REFUSED = {
    "output_dir": "set `output`",
    "seed": "set the top-level `seed`",
    "data_seed": "set the top-level `seed`",
    "remove_unused_columns": "tsqlora keeps the columns it needs; leave it out",
    "label_names": "tsqlora names the labels; choose their column with `data.target`",
    "hub_token": "config.yaml is kept in the run folder; set the variable HF_TOKEN instead",
}

_NOT_EMPTY = Rule("", bool)
_Name = Annotated[str, _NOT_EMPTY]
_Names = Annotated[tuple[_Name, ...], _NOT_EMPTY]
_Path = Annotated[str, _NOT_EMPTY, os.path.expanduser]
_Sources = _Path | Annotated[tuple[_Path, ...], _NOT_EMPTY]
_Share = Annotated[float, Rule(" above 0 and at most 1", lambda x: 0 < x <= 1)]
_Part = Annotated[float, Rule(" above 0 and below 1", lambda x: 0 < x < 1)]
_Dropout = Annotated[float, Rule(" of at least 0 and below 1", lambda x: 0 <= x < 1)]
_Positive = Annotated[float, Rule(" above 0", lambda x: x > 0)]
_Count = Annotated[int, Rule(" of at least 1", lambda x: x >= 1)]
_CountOrZero = Annotated[int, Rule(" of at least 0", lambda x: x >= 0)]
_NotNegative = Annotated[float, Rule(" of at least 0", lambda x: x >= 0)]
_Seed = Annotated[int, Rule(" from 0 to 4294967295", lambda x: 0 <= x < 2**32)]


@dataclass(frozen=True)
class DataConfig:
    """Where the samples are, and which columns hold the input and the target.

    `train`, `validation` and `test` are sources, or lists of them, as `tsqlora.data.load_dataset`
    takes them; `validation` may be a fraction. `text` is a column, a pair of columns or a template,
    `target` a column or template, `messages` the column of a chat (turns of `role` and `content`,
    or of `from` and `value`), or a pair of them, of which the second is learnt. `chat: true` writes
    `text` and `target` as a user's and an assistant's turn, by the tokenizer's chat template.
    `max_length` is in tokens. Of a larger train at most `max_train_samples` rows are taken, drawn
    by the run's seed.
    """

    train: _Sources
    validation: _Sources | _Part | None = None
    test: _Sources | None = None
    text: _Name | tuple[_Name, _Name] | None = None
    target: _Name | None = None
    messages: _Name | tuple[_Name, _Name] | None = None
    chat: bool = False
    max_length: _Count = 128
    max_train_samples: _Count | None = None


@dataclass(frozen=True)
class QualityWeights:
    """The weights α₁, α₂, α₃ of the three terms of quality; a term of weight 0 is not measured.

    All are 0 by default, as none has paid for itself yet (benchmarks/LOG.md), and 1 in the paper's
    preset.
    """

    gradient_norm: float = 0.0
    loss_reduction: float = 0.0
    convergence: float = 0.0


@dataclass(frozen=True)
class QualityConfig:
    """How samples are scored and drawn.

    `fraction` of the pool is kept, or drawn each epoch, more sharply at a lower `temperature`.
    `preset: paper` is the paper's literal formula: one subset kept, no reference. `reference` is a
    source of trusted samples, which online are trained on too (`trusted.py`); or the word
    validation, whose samples are only scored by. `adapt_steps` optimizer steps on the whole
    pool come before scoring; null takes as many as the training itself after, at most 500.

    `lookahead` is how the loss reduction of a sample's own step is had: exact by a further forward;
    `first_order` for nothing, but it ranks as the gradient norm does; `second_order` by a forward
    too. `depth` below 1 is the economical mode, best at 0.4: one sample in 16 (64 at least) is
    measured as ever, of the others the gradients of the last layers only, which hold this share of
    the adapted weights, and what they lack is predicted. What both are worth: docs/choices.md.

    `batch_size` of the longest samples come in a batch while they are measured, and of shorter ones
    more: null is the training's, `auto` is found by trial. Where memory runs out they are halved.

    `mode: upfront` scores the pool once, before the training. `online` scores samples by the passes
    that train on them: targets are judged as they go by, doubtful ones weigh less at once, and each
    epoch is drawn by what was seen so far (`judging.py`, `online.py`); without the loss reduction,
    which takes passes of its own. `none` scores nothing. For both `fraction` is 1 by default, 0.5
    else, and null in `adapt_steps` is a tenth of the training's steps under a new head (classes,
    numbers), which layers are measured after, and no step in generation. `auto` is online, or
    upfront where something is asked for that only it can do: preset paper, `reference: validation`,
    the loss reduction, lookahead, depth, and training.fsdp or deepspeed.

    `duplicates: once` lets a group of near-duplicates be drawn as one sample, and `rare_classes:
    raised` a class of few samples more often, at most four times (`rare_classes.py`; mode online).
    `early_learning` holds a classifier to what it predicted early, from the fourth epoch on, so
    that wrong labels are not learnt by heart (`early_learning.py`; mode online without `weights`).
    """

    fraction: _Share = None  # type: ignore[assignment]  # by the mode, once it is known
    weights: QualityWeights = QualityWeights()
    temperature: _Positive = 1.0
    preset: Literal["default", "paper"] = "default"
    reference: _Path | None = None
    mode: Literal["auto", "upfront", "online", "none"] = "auto"
    adapt_steps: _CountOrZero | None = None
    lookahead: Literal["exact", "first_order", "second_order"] = "exact"
    depth: _Share = 1.0
    batch_size: Literal["auto"] | _Count | None = None
    duplicates: Literal["once", "all"] = "once"
    rare_classes: Literal["raised", "as_found"] = "raised"
    early_learning: bool = True

    def __post_init__(self) -> None:
        if self.preset == "paper" and self.weights == QualityWeights():
            object.__setattr__(self, "weights", QualityWeights(1.0, 1.0, 1.0))
        if self.mode == "auto":
            object.__setattr__(self, "mode", "upfront" if self._needs_upfront() else "online")
        if self.fraction is None:
            object.__setattr__(self, "fraction", 0.5 if self.mode == "upfront" else 1.0)

    def _needs_upfront(self) -> bool:
        measured = self.reference == "validation"  # which is not trained on
        asked = self.preset == "paper", measured, self.lookahead != "exact", self.depth < 1
        return any(asked) or self.weights.loss_reduction != 0


@dataclass(frozen=True)
class RanksConfig:
    """The budget of ranks, as a mean rank or as an exact number of parameters, and its bounds.

    `parameters` replaces the default `mean_rank`; every module's rank is from `min_rank` (0: left
    out) to `max_rank`. `rule` says how ranks follow from sensitivity (formulas in `rank_rules.py`).
    `dynamic` ranks move while training; with `compact` the model is cut to its true ranks once they
    no longer move, in a single process: less memory and time.
    """

    mean_rank: _Positive | None = 8
    parameters: _Count | None = None
    min_rank: _CountOrZero = 0
    max_rank: _Count = 32
    sensitivity: Literal["weight_gradient", "fisher", "hessian"] = "weight_gradient"
    rule: Literal[
        "proportional", "square_root", "per_parameter", "waterfill", "marginal_gain", "uniform"
    ] = "proportional"
    dynamic: bool = True
    compact: bool = False

    def __post_init__(self) -> None:
        if self.parameters is not None and self.mean_rank == type(self).mean_rank:
            object.__setattr__(self, "mean_rank", None)


def default_scale(mean_rank: float | None) -> float:
    """alpha / r for this mean rank: 16 / mean_rank to a whole number, as alphas are then, from 2 to
    16; 2 where the budget is in parameters.

    Below rank 8 the fewer components have to take larger steps (benchmarks/LOG.md).
    """
    return float(min(16, max(2, round(16 / mean_rank)))) if mean_rank else 2.0


@dataclass(frozen=True)
class AdapterConfig:
    """Which modules are adapted or trained whole; `scale` is alpha / r, the same everywhere, by
    default `default_scale` of the mean rank.

    `dropout` is LoRA's, before A. `init` is the folder of a LoRA adapter to go on from: its modules
    are the targets, the first steps train it as it is, and the planned adapter begins as the best
    approximation of it that the planned ranks allow. Its factors are brought onto `scale`, its
    function kept. `start` is for components that have learnt nothing (B = 0): their rows of A begin
    along the module's mean gradient (docs/method.md §6), or `random`, as PEFT draws them. `auto` is
    gradient for generation, and random for classes and numbers, as a gradient through a new head
    says little.
    """

    target_modules: _Name | _Names = "all-linear"
    modules_to_save: tuple[_Name, ...] = ()
    scale: _Positive | None = None
    dropout: _Dropout = 0.0
    init: _Path | None = None
    start: Literal["auto", "gradient", "random"] = "auto"


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything a run needs: model, task, data, method and training.

    However it is made it is checked as a whole, and `from_yaml` of its `to_yaml` is equal to it.
    `tokenizer` is None where it lies beside the model; `target_tokenizer` is that of the targets of
    seq2seq where they have their own, such as phonemes.
    `training` holds keys of `transformers.TrainingArguments`; `metrics` None is the task's own.
    `quantization: 4bit` keeps the frozen weights in 4 bits (QLoRA: NF4, double quantisation), by
    bitsandbytes; computations are in float32, or in 16 bits with training.bf16 or training.fp16.
    Experts that are stacked in one parameter stay whole.

    Raises:
        ConfigError: everything that is wrong, in one message.
    """

    model: _Path
    tokenizer: _Path | None = None
    target_tokenizer: _Path | None = None
    quantization: Literal["4bit"] | None = None
    task: Literal["classification", "regression", "seq2seq", "causal-lm"]
    data: DataConfig
    quality: QualityConfig = QualityConfig()
    ranks: RanksConfig = RanksConfig()
    adapter: AdapterConfig = AdapterConfig()
    metrics: _Names | None = None
    training: Mapping[str, Any] = field(default_factory=dict, hash=False)
    output: _Path
    seed: _Seed = 0

    def __post_init__(self) -> None:
        values, problems = _checked(self.to_dict())
        if problems:
            raise ConfigError.of(problems)
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> RunConfig:
        """The configuration that a mapping of the YAML's shape describes."""
        values, problems = _checked(mapping)
        if problems:
            raise ConfigError.of(problems)
        return cls(**values)

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
        """Read a YAML file; each of `overrides` is `section.key=value`, its value YAML."""
        mapping = load_yaml(Path(path).expanduser())
        for each in overrides:
            override(mapping, each)
        values, problems = _checked(mapping)
        if problems:
            raise ConfigError.of([f"{path}: {problem}" for problem in problems])
        return cls(**values)

    @property
    def scale(self) -> float:
        """alpha / r of every module: `adapter.scale` or, by default, by the mean rank."""
        return self.adapter.scale or default_scale(self.ranks.mean_rank)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, all defaults written out, in the order of the documented schema."""
        return cast(dict[str, Any], plain(asdict(self)))

    def to_yaml(self) -> str:
        """The resolved configuration; as a file it replays the run."""
        values = self.to_dict()
        # PyYAML writes U+0085 as it stands and reads it as a line break.
        unicode = "\x85" not in yaml.safe_dump(values, allow_unicode=True)
        return yaml.safe_dump(values, allow_unicode=unicode, sort_keys=False, width=math.inf)


def _checked(mapping: Any) -> tuple[dict[str, Any], list[str]]:
    """The values for `RunConfig`, and all that is wrong with `mapping`."""
    problems: list[str] = []
    values = read(RunConfig, mapping, "", problems)
    if isinstance(training := values.get("training"), dict) and training:
        values["training"] = _fit_training(training, problems)
    given = mapping if isinstance(mapping, Mapping) else {}
    quality = given.get("quality") or {}
    sharded = {"fsdp", "deepspeed"} & set(values.get("training") or ())
    if sharded and isinstance(quality, Mapping) and quality.get("mode", "auto") == "auto":
        by_mode = {} if "fraction" in quality else {"fraction": None}
        values["quality"] = replace(values["quality"], mode="upfront", **by_mode)
    if not any(problem.startswith("ranks") for problem in problems):
        problems.extend(rank_conflicts(values["ranks"], given.get("ranks") or {}))
    if not any(problem.startswith("quality") for problem in problems):
        problems.extend(mode_conflicts(values["quality"], given.get("quality") or {}))
    return values, [*problems, *conflicts(values, METRICS)]


def _fit_training(given: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    refused = [key for key in given if key in _REFUSED]
    problems.extend(f"training.{key} is not yours to set: {_REFUSED[key]}" for key in refused)
    rest = {key: value for key, value in given.items() if key not in _REFUSED}
    for key in rest:
        if rest[key] is False and str(key).endswith("_strategy"):
            rest[key] = "no"  # which YAML reads as false
    return fit_keys(_training_hints(), rest, "training.", problems)


@cache
def _training_hints() -> dict[str, Any]:
    """The fields of TrainingArguments; those of plain scalars are checked, the others are not."""
    from transformers import TrainingArguments

    scalars, hints = {bool, int, float, str, NoneType}, get_type_hints(TrainingArguments)
    ranges = {
        "learning_rate": _NotNegative,
        "num_train_epochs": _Positive,
        "per_device_train_batch_size": _Count,
        "per_device_eval_batch_size": _Count,
        "gradient_accumulation_steps": _Count,
        "fsdp": bool | str | None,
    }
    return ranges | {
        each.name: hint if scalars.issuperset(get_args(hint) or (hint,)) else Any
        for each in fields(TrainingArguments)
        if each.init and each.name not in {*_REFUSED, *ranges} and (hint := hints[each.name])
    }


def override(mapping: dict[str, Any], given: str) -> None:
    """Set one `section.key=value` in `mapping`, its value read as YAML."""
    name, equals, text = given.partition("=")
    *sections, key = name.strip().split(".")
    if not equals or not key:
        raise ConfigError(f"--set {given}: write section.key=value.")
    for section in sections:
        if mapping.get(section) is None:
            mapping[section] = {}
        mapping = mapping[section]
        if not isinstance(mapping, dict):
            raise ConfigError(f"--set {given}: {section} is not a section.")
    try:
        mapping[key] = parse_yaml(text)
    except (yaml.YAMLError, ValueError):
        raise ConfigError(f"--set {given}: the value is not YAML; put it in quotes.") from None
