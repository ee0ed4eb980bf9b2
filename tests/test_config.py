"""The configuration: it replays, and it says everything that is wrong with it at once."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tsqlora.config import (
    METRICS,
    AdapterConfig,
    DataConfig,
    QualityConfig,
    QualityWeights,
    RanksConfig,
    RunConfig,
)
from tsqlora.errors import ConfigError
from tsqlora.rank_rules import RULES

GOOD: Mapping[str, Any] = {
    "model": "some/model",
    "task": "classification",
    "data": {"train": "train.jsonl", "text": "sentence", "target": "label"},
    "output": "runs/x",
}

SCHEMA = [
    "model", "tokenizer", "target_tokenizer", "quantization", "task", "data", "quality", "ranks",
    "adapter", "metrics", "training", "output", "seed",
]  # fmt: skip

words = st.text(min_size=1, max_size=12)
paths = words.filter(lambda path: not path.startswith("~"))
positive = st.floats(1e-9, 1e9)
training = st.fixed_dictionaries(
    {},
    optional={
        "learning_rate": st.floats(1e-8, 1),
        "max_steps": st.integers(-1, 10**6),
        "run_name": st.none() | words,
        "bf16": st.booleans(),
        "lr_scheduler_kwargs": st.dictionaries(words, st.lists(st.none() | positive | words)),
    },
)


@st.composite
def rank_configs(draw: st.DrawFn) -> RanksConfig:
    low, high = sorted((draw(st.integers(0, 64)), draw(st.integers(1, 64))))
    budget = draw(st.none() | st.integers(1, 10**9))
    mean = draw(st.integers(max(low, 1), high) | st.floats(max(low, 0.5), high))
    estimator = draw(st.sampled_from(["weight_gradient", "fisher", "hessian"]))
    mean_rank, rule = None if budget else mean, draw(st.sampled_from(RULES))
    dynamic = draw(st.booleans())
    compact = dynamic and draw(st.booleans())
    return RanksConfig(mean_rank, budget, low, high, estimator, rule, dynamic, compact)


@st.composite
def run_configs(draw: st.DrawFn) -> RunConfig:
    task = draw(st.sampled_from(sorted(METRICS)))
    validation = draw(st.none() | paths | st.floats(0.001, 0.999))
    references = st.none() | paths | st.just("validation")
    reference = draw(references if validation is not None else st.none() | st.just("trusted.csv"))
    named = draw(st.none() | st.lists(st.sampled_from(METRICS[task]), min_size=1))
    modules = st.lists(words, min_size=1).map(tuple)
    return RunConfig(
        model=draw(paths),
        tokenizer=draw(st.none() | paths),
        target_tokenizer=draw(paths) if task == "seq2seq" else None,
        quantization=draw(st.sampled_from(["4bit", None])),
        task=task,
        data=DataConfig(
            draw(paths), validation, None, draw(words | st.tuples(words, words)), draw(words)
        ),
        quality=QualityConfig(
            fraction=draw(st.floats(0.01, 1)),
            weights=QualityWeights(draw(st.floats(-3, 3))),
            temperature=draw(positive),
            preset="default" if reference else draw(st.sampled_from(["default", "paper"])),
            reference=reference,
            lookahead=draw(st.sampled_from(["exact", "first_order", "second_order"])),
            depth=draw(st.floats(0.01, 1)),
            batch_size=draw(st.none() | st.just("auto") | st.integers(1, 99)),
        ),
        ranks=draw(rank_configs()),
        adapter=AdapterConfig(
            draw(words | modules), scale=draw(st.none() | positive), init=draw(st.none() | paths)
        ),
        metrics=None if named is None else tuple(named),
        training=draw(training),
        output=draw(paths),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("config") / "config.yaml"


@settings(max_examples=50)
@given(config=run_configs())
def test_the_resolved_yaml_replays_the_run(config: RunConfig, scratch: Path) -> None:
    scratch.write_text(config.to_yaml(), encoding="utf-8", newline="")
    again = RunConfig.from_yaml(scratch)
    assert again == config
    assert hash(again) == hash(config)
    assert again.to_yaml() == config.to_yaml()
    assert RunConfig.from_dict(config.to_dict()) == config


@settings(max_examples=50)
@given(config=run_configs())
def test_the_dict_is_plain_and_in_the_order_of_the_schema(config: RunConfig) -> None:
    plain = config.to_dict()
    assert yaml.safe_load(yaml.safe_dump(plain, allow_unicode=False)) == plain
    assert list(plain) == SCHEMA
    assert list(plain["data"]) == [
        "train", "validation", "test", "text", "target", "messages", "chat", "max_length",
        "max_train_samples",
    ]  # fmt: skip


def test_a_text_with_an_odd_line_break_survives_the_yaml(scratch: Path) -> None:
    odd = "{q}\x85\u2028é\n😀 "
    config = RunConfig.from_dict(changed("data.text", odd))
    scratch.write_text(config.to_yaml(), encoding="utf-8")
    assert RunConfig.from_yaml(scratch).data.text == odd


def test_what_was_not_given_has_the_documented_default() -> None:
    config = RunConfig.from_dict(GOOD)
    assert config.data == DataConfig("train.jsonl", text="sentence", target="label", max_length=128)
    assert (config.quality, config.ranks) == (QualityConfig(), RanksConfig(mean_rank=8))
    assert (config.adapter, config.training) == (AdapterConfig("all-linear", (), None, 0.0), {})
    assert RunConfig.from_dict({**GOOD, "quality": None, "training": None}) == config


def test_a_configuration_never_changes() -> None:
    config = RunConfig.from_dict(GOOD)
    with pytest.raises(FrozenInstanceError):
        config.seed = 1  # type: ignore[misc]


def test_a_configuration_made_in_python_is_checked_like_a_file() -> None:
    data = DataConfig("train.jsonl", text="a", target="b")
    with pytest.raises(ConfigError, match=r"quality\.fraction must be a number"):
        RunConfig(
            model="m", task="seq2seq", data=data, output="o", quality=QualityConfig(fraction=2)
        )


@pytest.mark.parametrize("number", ["1e-3", "1.0e-3", "0.001", 0.001])
def test_a_number_written_as_text_is_a_number(number: object) -> None:
    mapping = {**GOOD, "training": {"learning_rate": number}, "adapter": {"scale": number}}
    config = RunConfig.from_dict(mapping)
    assert config.training["learning_rate"] == config.adapter.scale == 0.001


@pytest.mark.parametrize(
    ("ranks", "scale"),
    [
        ({}, 2),
        ({"mean_rank": 64, "max_rank": 64}, 2),
        ({"mean_rank": 6}, 3),
        ({"mean_rank": 4}, 4),
        ({"mean_rank": 3}, 5),
        ({"mean_rank": 1.5}, 11),
        ({"mean_rank": 0.25}, 16),
        ({"parameters": 1000}, 2),
    ],
)
def test_alpha_is_sixteen_below_rank_eight_and_twice_the_rank_above(
    ranks: dict[str, float], scale: float
) -> None:
    assert RunConfig.from_dict({**GOOD, "ranks": ranks}).scale == scale
    given = {**GOOD, "ranks": ranks, "adapter": {"scale": 0.5}}
    assert RunConfig.from_dict(given).scale == 0.5


def test_text_that_looks_like_a_number_stays_text_where_text_is_asked_for() -> None:
    config = RunConfig.from_dict({**changed("data.target", "1"), "training": {"run_name": "7"}})
    assert (config.data.target, config.training["run_name"]) == ("1", "7")


def test_a_home_folder_is_expanded_in_paths_only() -> None:
    mapping = changed("data.train", "~/train.jsonl")
    mapping["data"]["text"] = "~/{q}"
    config = RunConfig.from_dict(mapping)
    assert config.data.train == os.path.expanduser("~/train.jsonl") != "~/train.jsonl"
    assert config.data.text == "~/{q}"


def test_the_exact_budget_replaces_the_default_mean_rank() -> None:
    ranks = RunConfig.from_dict(changed("ranks.parameters", 10_000)).ranks
    assert (ranks.mean_rank, ranks.parameters) == (None, 10_000)


def test_the_mode_of_scoring_chooses_its_own_defaults() -> None:
    online = RunConfig.from_dict(changed("quality", {"mode": "online"}))
    assert (online.quality.fraction, online.quality.weights.loss_reduction) == (1.0, 0.0)
    assert online.quality == RunConfig.from_dict(changed("quality", {})).quality
    for upfront in (
        {"preset": "paper"},
        {"depth": 0.4},
        {"lookahead": "first_order"},
        {"weights": {"loss_reduction": 1}},
    ):
        found = RunConfig.from_dict(changed("quality", upfront)).quality
        assert (found.mode, found.fraction) == ("upfront", 0.5)
        assert (found.weights.convergence == 1.0) == ("preset" in upfront)
    trusted = {"reference": "trusted.jsonl"}
    assert RunConfig.from_dict(changed("quality", trusted)).quality.mode == "online"
    sharded = changed("training.fsdp", "full_shard")
    for quality, fraction in (({}, 0.5), ({"fraction": 0.8}, 0.8)):
        found = RunConfig.from_dict({**sharded, "quality": quality}).quality
        assert (found.mode, found.fraction) == ("upfront", fraction)
    none = RunConfig.from_dict(changed("quality", {"mode": "none"}))
    assert none.quality.fraction == 1.0
    for config in (online, none):
        assert RunConfig.from_dict(config.to_dict()) == config


# Each: the key, a bad value, what the message says.
BAD = [
    ("quality.fraction", 0, "quality.fraction must be a number above 0 and at most 1, not 0"),
    ("quality.fraction", 1.5, "not 1.5"),
    ("quality.fraction", float("nan"), "not nan"),
    ("quality.fraction", True, "not true"),
    ("quality.temperature", 0, "quality.temperature must be a number above 0"),
    ("quality.temperature", ".inf", "quality.temperature must be a number above 0"),
    ("quality.preset", "papr", "quality.preset must be default or paper, not 'papr'"),
    (
        "quality.mode",
        "sometimes",
        "quality.mode must be auto, upfront, online or none, not 'sometimes'",
    ),
    ("quality", {"mode": "online", "weights": {"loss_reduction": 1}}, "takes a forward of its own"),
    ("quality", {"mode": "online", "preset": "paper"}, "quality.preset: paper is for quality.mode"),
    ("quality", {"mode": "none", "reference": "r"}, "quality.reference is for quality.mode"),
    ("quality", {"mode": "online", "depth": 0.1}, "quality.depth is for quality.mode: upfront"),
    (
        "quality",
        {"mode": "none", "lookahead": "first_order"},
        "quality.lookahead is for quality.mo",
    ),
    ("quality", {"preset": "paper", "reference": "r"}, "quality.preset: paper knows none"),
    ("quality", {"mode": "none", "fraction": 0.3}, "quality.mode: none draws all samples"),
    ("quality.lookahead", "third", "must be exact, first_order or second_order, not 'third'"),
    ("quality.depth", 0, "quality.depth must be a number above 0 and at most 1, not 0"),
    ("quality.depth", 1.1, "not 1.1"),
    ("quality.batch_size", 0, "must be auto, a whole number of at least 1 or null, not 0"),
    ("quality.batch_size", "large", "must be auto, a whole number of at least 1 or null"),
    ("quality.adapt_steps", -1, "quality.adapt_steps must be a whole number of at least 0"),
    ("quality.reference", "validation", "quality.reference: validation needs data.validation"),
    ("training.learning_rate", -1, "training.learning_rate must be a number of at least 0"),
    ("training.num_train_epochs", 0, "training.num_train_epochs must be a number above 0"),
    ("training.per_device_train_batch_size", 0, "must be a whole number of at least 1, not 0"),
    ("training.gradient_accumulation_steps", 0, "must be a whole number of at least 1, not 0"),
    ("quality", [1], "quality must be a mapping of keys, not [1]"),
    ("ranks.min_rank", 33, "ranks.min_rank (33) must not exceed ranks.max_rank (32)"),
    ("ranks.min_rank", -1, "ranks.min_rank must be a whole number of at least 0, not -1"),
    ("ranks.min_rank", 1.5, "ranks.min_rank must be a whole number"),
    ("ranks.max_rank", 4, "ranks.mean_rank (8) must lie from min_rank (0) to max_rank (4)"),
    ("ranks.mean_rank", -2, "ranks.mean_rank must be a number above 0 or null, not -2"),
    ("ranks.mean_rank", None, "ranks.mean_rank or ranks.parameters is required: both are null"),
    (
        "ranks",
        {"mean_rank": 8, "parameters": 9},
        "give ranks.mean_rank or ranks.parameters, not both",
    ),
    ("ranks.sensitivity", "fischer", "weight_gradient, fisher or hessian, not 'fischer'"),
    ("ranks.compact", 1, "ranks.compact must be true or false, not 1"),
    ("ranks", {"dynamic": False, "compact": True}, "ranks.compact is for ranks.dynamic: true"),
    ("ranks.rule", "wasserfall", "waterfill, marginal_gain or uniform, not 'wasserfall'"),
    ("ranks.dynamic", "yes", "ranks.dynamic must be true or false, not 'yes'"),
    ("adapter.scale", 0, "adapter.scale must be a number above 0 or null, not 0"),
    ("adapter.dropout", 1, "adapter.dropout must be a number of at least 0 and below 1, not 1"),
    ("adapter.target_modules", [], "adapter.target_modules must be text or a list (text), not []"),
    ("data.max_length", 0, "data.max_length must be a whole number of at least 1, not 0"),
    (
        "data.validation",
        1.0,
        "data.validation must be text, a list (text), a number above 0 and below 1 or null",
    ),
    ("data.text", ["a", "b", "c"], "data.text must be text, a list (2 times text) or null"),
    ("data.text", {"question": None}, "not {'question': None}"),
    ("data.text", None, "data.text is required: a column, a pair of columns or a template"),
    ("data.target", None, "data.target is required for classification"),
    ("data.target", 3, "data.target must be text or null, not 3"),
    ("data.messages", "chat", "give data.messages, or data.text and data.target, not both"),
    ("data", {"train": "t", "messages": "chat"}, "data.messages is for causal-lm"),
    ("data.chat", True, "data.chat is for causal-lm with data.text and data.target"),
    ("data.chat", "yes", "data.chat must be true or false, not 'yes'"),
    ("data", {"text": "a", "target": "b"}, "data.train is required"),
    ("task", "chat", "task must be classification, regression, seq2seq or causal-lm, not 'chat'"),
    ("task", ["causal-lm"], "task must be"),
    ("model", "", "model must be text, not ''"),
    ("model", None, "model must be text, not null"),
    ("seed", -1, "seed must be a whole number from 0 to 4294967295, not -1"),
    (
        "metrics",
        ["rouge"],
        "metrics: rouge is not a metric of classification; choose from accuracy",
    ),
    ("metrics", "f1", "metrics must be a list (text) or null, not 'f1'"),
    ("target_tokenizer", "t", "target_tokenizer is for seq2seq, not for classification"),
    ("training", "fast", "training must be a mapping of keys, not 'fast'"),
    (
        "training.learning_rate",
        "fast",
        "training.learning_rate must be a number of at least 0, not 'fast'",
    ),
    ("training.bf16", "true", "training.bf16 must be true or false, not 'true'"),
    (
        "training.report_to",
        {1, 2},
        "training.report_to must be made of plain YAML values, not {1, 2}",
    ),
    (
        "training.lerning_rate",
        1,
        "training.lerning_rate: unknown key; did you mean training.learning",
    ),
    ("training.output_dir", "x", "training.output_dir is not yours to set: set `output`"),
    ("training.seed", 1, "training.seed is not yours to set: set the top-level `seed`"),
    ("training.data_seed", 1, "set the top-level `seed`"),
    ("training.remove_unused_columns", True, "tsqlora keeps the columns it needs"),
    ("training.label_names", ["a"], "choose their column with `data.target`"),
    ("training.hub_token", "secret", "set the variable HF_TOKEN instead"),
    ("outptu", "x", "outptu: unknown key; did you mean output?"),
    ("quality.weights.convergense", 1, "did you mean quality.weights.convergence?"),
    ("fraction", 0.1, "fraction: unknown key; did you mean quality.fraction?"),
    ("adapter.zzz", 1, "the keys here are target_modules, modules_to_save, scale, dropout, init"),
    (1, "x", "1: unknown key"),
]


@pytest.mark.parametrize(("key", "value", "message"), BAD, ids=[f"{k}={v}" for k, v, _ in BAD])
def test_a_bad_value_is_named_with_what_is_wanted(key: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_dict(changed(key, value))
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1, "one mistake, one message"


@pytest.mark.parametrize("key", ["model", "task", "data.train", "output", "data.text"])
def test_a_required_key_is_asked_for(key: str) -> None:
    mapping = copy.deepcopy(dict(GOOD))
    section, _, last = key.rpartition(".")
    del (mapping[section] if section else mapping)[last]
    with pytest.raises(ConfigError, match=f"{key} is required"):
        RunConfig.from_dict(mapping)


def test_all_problems_are_reported_together() -> None:
    mapping = copy.deepcopy(dict(GOOD))
    mapping |= {"quality": {"fraction": 2, "mode": "offline"}, "ranks": {"min_rank": 40}, "sed": 1}
    mapping["training"] = {"seed": 3, "max_steps": 1.5}
    mapping["data"] = {"train": "t", "max_length": 0}
    del mapping["output"]
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_dict(mapping)
    lines = str(caught.value).splitlines()
    for key in (
        "quality.fraction", "quality.mode", "ranks.min_rank", "sed", "training.seed",
        "training.max_steps", "data.max_length", "data.text", "data.target", "output",
    ):  # fmt: skip
        assert sum(line.startswith(f"- {key}") for line in lines) == 1, key
    assert len(lines) == 10


@pytest.mark.parametrize("task", ["causal-lm"])
@pytest.mark.parametrize(
    "data", [{"messages": "chat"}, {"text": "t"}, {"text": "t", "target": "a"}]
)
def test_a_causal_language_model_needs_no_target(task: str, data: dict[str, str]) -> None:
    config = RunConfig.from_dict({**GOOD, "task": task, "data": {"train": "t.jsonl", **data}})
    assert config.data.target == data.get("target")


def test_overrides_are_read_as_yaml_and_make_their_sections(tmp_path: Path) -> None:
    path = written(tmp_path, yaml.safe_dump(dict(GOOD)))
    overrides = [
        "quality.weights.convergence=2", "training.learning_rate=1e-3", "data.validation=0.1",
        "metrics=[f1, accuracy]", "data.text='{a} = {b}'", "tokenizer=",
    ]  # fmt: skip
    config = RunConfig.from_yaml(path, overrides)
    assert config.quality.weights == QualityWeights(convergence=2)
    assert (config.training, config.data.validation) == ({"learning_rate": 0.001}, 0.1)
    assert (config.metrics, config.data.text) == (("f1", "accuracy"), "{a} = {b}")
    assert config.tokenizer is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "--set seed: write section.key=value"),
        ("=3", "write section.key=value"),
        ("model.x=1", "--set model.x=1: model is not a section"),
        ("data.text={a} {b}", "the value is not YAML; put it in quotes"),
        ("quality.fracton=1", "quality.fracton: unknown key; did you mean quality.fraction?"),
    ],
)
def test_a_bad_override_is_quoted(tmp_path: Path, override: str, message: str) -> None:
    path = written(tmp_path, yaml.safe_dump(dict(GOOD)))
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_yaml(path, [override])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"model: x\ntask: [a\n", "line 3: not valid YAML"),
        (b"model: x\ndata:\n  text: {a} b\n", "line 3: not valid YAML"),
        (b"model: x\nmodel: y\n", "line 2: not valid YAML, the key model stands twice"),
        (b"model: !!python/object:os.system x\n", "line 1: not valid YAML"),
        (b"model: 2020-13-45\n", "not valid YAML"),
        (b"- model\n", "must hold a mapping (model: ..., task: ...), not ['model']"),
        (b"", "must hold a mapping (model: ..., task: ...), not null"),
        (b"model: \xff\n", "not valid YAML in UTF-8"),
        (b"[" * 5000, "not valid YAML"),
        (b"modl: x\n", "modl: unknown key; did you mean model?"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_yaml(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["missing.yaml", "."])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be read: "):
        RunConfig.from_yaml(tmp_path / name)


def test_a_byte_order_mark_is_let_pass(tmp_path: Path) -> None:
    path = written(tmp_path, "\ufeff" + yaml.safe_dump(dict(GOOD)))
    assert RunConfig.from_yaml(path) == RunConfig.from_dict(GOOD)


def changed(key: object, value: object) -> dict[str, Any]:
    """GOOD with one value set, sections made where there are none."""
    mapping = copy.deepcopy(dict(GOOD))
    inner: dict[Any, Any] = mapping
    *sections, last = key.split(".") if isinstance(key, str) else [key]
    for section in sections:
        inner = inner.setdefault(section, {})
    inner[last] = value
    return mapping


def written(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path
