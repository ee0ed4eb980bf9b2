"""Allocation: exact, bounded, monotone, whatever the order and the scale."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference import looped_allocation
from tsqlora.allocation import RankPlan, _integers, allocate_ranks, pattern_key
from tsqlora.errors import ConfigError, RunError
from tsqlora.sensitivity import LayerSensitivity

sizes = st.tuples(st.integers(2, 40), st.integers(2, 40))
scores = st.one_of(st.just(0.0), st.floats(1e-6, 1e6))
modules = st.dictionaries(
    st.text("abcdef", min_size=1, max_size=4), st.tuples(scores, sizes), min_size=1, max_size=8
)


def sensitivity_of(found: dict[str, tuple[float, tuple[int, int]]]) -> LayerSensitivity:
    values = {name: value for name, (value, _) in found.items()}
    return LayerSensitivity(
        "weight_gradient", values, {n: shape for n, (_, shape) in found.items()}
    )


@given(modules, st.integers(1, 6), st.integers(0, 1), st.integers(1, 12))
def test_exact_within_budget_and_bounds(found, mean: int, least: int, most: int) -> None:
    sensitivity = sensitivity_of(found)
    caps = {n: min(most, *shape) for n, (_, shape) in found.items()}
    least = min(least, *caps.values())
    if mean < least or mean == 0:
        mean = max(least, 1)
    plan = allocate_ranks(sensitivity, mean_rank=mean, min_rank=least, max_rank=most)
    assert plan.parameters <= plan.budget == mean * sum(sum(s) for _, s in found.values())
    assert all(least <= plan.ranks[n] <= caps[n] for n in found)
    growing = [sum(shape) for n, (_, shape) in found.items() if plan.ranks[n] < caps[n]]
    assert not growing or plan.budget - plan.parameters < min(growing)


@given(modules, st.integers(1, 4))
def test_equals_looking_at_every_module_for_every_rank(found, mean: int) -> None:
    sensitivity = sensitivity_of(found)
    plan = allocate_ranks(sensitivity, mean_rank=mean, max_rank=9)
    expected = looped_allocation(
        _integers(sensitivity.modules),
        {n: sum(shape) for n, (_, shape) in found.items()},
        {n: min(9, *shape) for n, (_, shape) in found.items()},
        plan.budget,
        0,
    )
    assert plan.ranks == expected


@given(modules, st.randoms(use_true_random=False))
def test_the_order_of_modules_is_irrelevant(found, shuffler: random.Random) -> None:
    names = list(found)
    shuffler.shuffle(names)
    one = allocate_ranks(sensitivity_of(found), mean_rank=3)
    other = allocate_ranks(sensitivity_of({n: found[n] for n in names}), mean_rank=3)
    assert one.ranks == other.ranks


@given(modules, st.floats(1e-3, 1e3))
def test_the_scale_of_scores_is_irrelevant(found, factor: float) -> None:
    scaled = {n: (value * factor, shape) for n, (value, shape) in found.items()}
    one, other = (allocate_ranks(sensitivity_of(f), mean_rank=3) for f in (found, scaled))
    assert one.ranks == other.ranks


@given(modules)
def test_more_sensitivity_never_gives_less_rank_at_equal_cost(found) -> None:
    alike = {name: (value, (12, 20)) for name, (value, _) in found.items()}
    plan = allocate_ranks(sensitivity_of(alike), mean_rank=3)
    ranked = sorted(alike, key=lambda n: (alike[n][0], plan.ranks[n]))
    ranks = [plan.ranks[name] for name in ranked if alike[name][0] >= 1e-6]
    assert ranks == sorted(ranks)


@given(modules, st.floats(1.1, 100))
def test_raising_one_sensitivity_never_lowers_its_rank(found, factor: float) -> None:
    name = min(found)
    raised = {**found, name: (found[name][0] * factor, found[name][1])}
    before = allocate_ranks(sensitivity_of(found), mean_rank=3).ranks[name]
    assert allocate_ranks(sensitivity_of(raised), mean_rank=3).ranks[name] >= before


def test_equal_sensitivities_get_equal_ranks() -> None:
    found = {f"layer.{i}": (0.1, (16, 16)) for i in range(5)}
    assert set(allocate_ranks(sensitivity_of(found), mean_rank=4).ranks.values()) == {4}


def test_the_budget_may_be_given_in_parameters() -> None:
    plan = allocate_ranks(sensitivity_of({"a": (1.0, (10, 10))}), parameters=70)
    assert (plan.ranks, plan.parameters, plan.budget) == ({"a": 3}, 60, 70)


def test_impossible_bounds_are_all_named_at_once() -> None:
    found = sensitivity_of({"small": (1.0, (4, 30)), "large": (1.0, (30, 30))})
    with pytest.raises(ConfigError, match=r"(?s)min_rank = 6.*small.*\(4, 30\).*below the minimum"):
        allocate_ranks(found, mean_rank=2, min_rank=6)
    with pytest.raises(ConfigError, match="budget of 3 parameters"):
        allocate_ranks(found, parameters=3)
    with pytest.raises(ConfigError, match="not both"):
        allocate_ranks(found, mean_rank=2, parameters=100)


def test_patterns_match_the_whole_name_only() -> None:
    import re

    key = pattern_key("layer.1.q")
    match = rf"(.*\.)?({key})$"
    assert re.match(match, "layer.1.q")
    assert not re.match(match, "encoder.layer.1.q")
    assert not re.match(match, "layer.11q")


def test_saves_and_loads(tmp_path) -> None:  # type: ignore[no-untyped-def]
    plan = RankPlan({"a": 0, "b": 3}, {"a": (2, 3), "b": (4, 5)}, 2.0, 30)
    plan.save(tmp_path / "plan.json")
    assert RankPlan.load(tmp_path / "plan.json") == plan
    assert plan.rank_pattern() == {"^b": 3}
    assert plan.alpha_pattern() == {"^b": 6.0}
    (tmp_path / "bad.json").write_text("[1]")
    with pytest.raises(RunError, match=r"bad.json"):
        RankPlan.load(tmp_path / "bad.json")
