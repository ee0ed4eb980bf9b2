"""Allocation: exact, bounded, monotone, whatever the order and the scale."""

from __future__ import annotations

import random
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference import looped_allocation
from tsqlora.allocation import RankPlan, allocate_ranks, pattern_key
from tsqlora.errors import ConfigError, RunError
from tsqlora.rank_rules import RULES, worth_by
from tsqlora.sensitivity import LayerSensitivity

sizes = st.tuples(st.integers(2, 40), st.integers(2, 40))
scores = st.one_of(st.just(0.0), st.floats(1e-6, 1e6))
spectra = st.lists(st.floats(0, 10), max_size=6).map(lambda s: sorted(s, reverse=True))
modules = st.dictionaries(
    st.text("abcdef", min_size=1, max_size=4),
    st.tuples(scores, sizes, spectra),
    min_size=1,
    max_size=8,
)
rules = st.sampled_from(RULES)


def sensitivity_of(found) -> LayerSensitivity:
    """From {name: (value, shape, spectrum)}."""
    values, shapes, spectrum = ({name: each[i] for name, each in found.items()} for i in range(3))
    return LayerSensitivity("weight_gradient", values, shapes, spectrum)


def more(sensitivity: LayerSensitivity, name: str, factor: float) -> LayerSensitivity:
    """The same with all of one module's scores so many times as large."""
    values, spectrum = dict(sensitivity.modules), dict(sensitivity.spectrum)
    values[name] *= factor
    spectrum[name] = [value * factor for value in spectrum[name]]
    return replace(sensitivity, modules=values, spectrum=spectrum)


@given(modules, rules, st.booleans(), st.floats(0.3, 6), st.integers(0, 1), st.integers(1, 12))
def test_exact_within_budget_and_bounds(
    found, rule: str, exact: bool, mean: float, least: int, most: int
) -> None:
    sensitivity, costs = sensitivity_of(found), [sum(each[1]) for each in found.values()]
    caps = {n: min(most, *each[1]) for n, each in found.items()}
    least = min(least, *caps.values())
    parameters = max(int(mean * sum(costs)), least * sum(costs), min(costs))
    budget = {"parameters": parameters} if exact else {"mean_rank": max(mean, least, 1)}
    plan = allocate_ranks(sensitivity, **budget, min_rank=least, max_rank=most, rule=rule)
    assert plan.parameters <= plan.budget
    if exact:
        assert plan.budget == parameters
    else:
        assert plan.budget == Fraction(str(max(mean, least, 1))) * sum(costs) // 1
    assert all(least <= plan.ranks[n] <= caps[n] for n in found)
    growing = [sum(each[1]) for n, each in found.items() if plan.ranks[n] < caps[n]]
    assert not growing or plan.budget - plan.parameters < min(growing)
    assert allocate_ranks(sensitivity, **budget, min_rank=least, max_rank=most, rule=rule) == plan


@given(modules, rules, st.integers(1, 4))
def test_equals_looking_at_every_module_for_every_rank(found, rule: str, mean: int) -> None:
    sensitivity = sensitivity_of(found)
    plan = allocate_ranks(sensitivity, mean_rank=mean, max_rank=9, rule=rule)
    worth = worth_by(rule, sensitivity)
    expected = looped_allocation(
        {n: [worth(n, j) for j in range(1, 10)] for n in found},
        sensitivity.modules,
        {n: sum(shape) for n, shape in sensitivity.shapes.items()},
        {n: min(9, *shape) for n, shape in sensitivity.shapes.items()},
        plan.budget,
    )
    assert plan.ranks == expected


@given(modules, rules)
def test_a_further_rank_is_never_worth_more(found, rule: str) -> None:
    worth = worth_by(rule, sensitivity_of(found))
    for name in found:
        falling = [worth(name, j) for j in range(1, 12)]
        assert falling == sorted(falling, reverse=True)
        assert falling[-1] >= 0


@given(modules, rules, st.randoms(use_true_random=False))
def test_the_order_of_modules_is_irrelevant(found, rule: str, shuffler: random.Random) -> None:
    names = list(found)
    shuffler.shuffle(names)
    one = allocate_ranks(sensitivity_of(found), mean_rank=3, rule=rule)
    other = allocate_ranks(sensitivity_of({n: found[n] for n in names}), mean_rank=3, rule=rule)
    assert one.ranks == other.ranks


@given(modules, rules, st.floats(1e-3, 1e3))
def test_the_scale_of_scores_is_irrelevant(found, rule: str, factor: float) -> None:
    scaled = {
        n: (value * factor, shape, [v * factor for v in spectrum])
        for n, (value, shape, spectrum) in found.items()
    }
    one, other = (
        allocate_ranks(sensitivity_of(f), mean_rank=3, rule=rule) for f in (found, scaled)
    )
    assert one.ranks == other.ranks


@given(modules, rules.filter(lambda rule: rule != "marginal_gain"), st.integers(1, 5))
def test_more_sensitivity_never_gives_less_rank_at_equal_cost(found, rule: str, mean: int) -> None:
    alike = {name: (value, (12, 20), []) for name, (value, _, _) in found.items()}
    plan = allocate_ranks(sensitivity_of(alike), mean_rank=mean, rule=rule)
    ranked = sorted(alike, key=lambda n: (alike[n][0], plan.ranks[n]))
    ranks = [plan.ranks[name] for name in ranked]
    assert ranks == sorted(ranks)


@given(modules, st.integers(1, 5))
def test_a_larger_spectrum_never_gives_less_rank_at_equal_cost(found, mean: int) -> None:
    alike = {
        n: (0.0, (12, 20), [i + v for v in s]) for i, (n, (_, _, s)) in enumerate(found.items())
    }
    plan = allocate_ranks(sensitivity_of(alike), mean_rank=mean, rule="marginal_gain")
    for one, (_, _, larger) in alike.items():
        for other, (_, _, smaller) in alike.items():
            longer = smaller + [0.0] * (len(larger) - len(smaller))
            if len(larger) >= len(smaller) and all(
                a > b for a, b in zip(larger, longer, strict=True)
            ):
                assert plan.ranks[one] >= plan.ranks[other] - (one > other)


@given(modules, rules, st.floats(1.1, 100))
def test_raising_one_sensitivity_never_lowers_its_rank(found, rule: str, factor: float) -> None:
    name, sensitivity = min(found), sensitivity_of(found)
    before = allocate_ranks(sensitivity, mean_rank=3, rule=rule).ranks[name]
    raised = more(sensitivity, name, factor)
    assert allocate_ranks(raised, mean_rank=3, rule=rule).ranks[name] >= before


def test_each_rule_follows_its_formula() -> None:
    found = {"a": (16.0, (10, 10), [4.0, 3.0]), "b": (1.0, (10, 10), [3.5, 0.5])}
    sensitivity = sensitivity_of(found)

    def ranks(rule: str, total: int) -> tuple[int, ...]:
        plan = allocate_ranks(sensitivity, parameters=20 * total, max_rank=99, rule=rule)
        return tuple(plan.ranks.values())

    assert ranks("uniform", 10) == (5, 5)
    assert ranks("square_root", 10) == (8, 2)
    assert ranks("waterfill", 10) == (7, 3)
    assert ranks("proportional", 10) == ranks("per_parameter", 10) == (10, 0)
    assert [ranks("marginal_gain", n) for n in (1, 2, 3, 4)] == [(1, 0), (1, 1), (2, 1), (2, 2)]
    wide = {"a": (3.0, (10, 30), [1.0]), "b": (2.0, (10, 10), [1.0])}
    plan = allocate_ranks(sensitivity_of(wide), parameters=40, rule="per_parameter")
    assert plan.ranks == {"a": 0, "b": 2}


def test_what_a_rule_cannot_use_is_named() -> None:
    plain = LayerSensitivity("fisher", {"a": 1.0}, {"a": (9, 9)})
    with pytest.raises(ConfigError, match=r"'best'.*proportional"):
        allocate_ranks(plain, rule="best")
    with pytest.raises(ConfigError, match=r"a has none.*spectrum=max_rank"):
        allocate_ranks(plain, rule="marginal_gain")
    for value in (float("nan"), float("inf"), -1.0):
        with pytest.raises(ConfigError, match=r"sensitivity of a is"):
            allocate_ranks(replace(plain, modules={"a": value}))


def test_equal_sensitivities_get_equal_ranks() -> None:
    found = {f"layer.{i}": (0.1, (16, 16), []) for i in range(5)}
    assert set(allocate_ranks(sensitivity_of(found), mean_rank=4).ranks.values()) == {4}


def test_the_budget_may_be_given_in_parameters() -> None:
    plan = allocate_ranks(sensitivity_of({"a": (1.0, (10, 10), [])}), parameters=70)
    assert (plan.ranks, plan.parameters, plan.budget) == ({"a": 3}, 60, 70)


def test_impossible_bounds_are_all_named_at_once() -> None:
    found = sensitivity_of({"small": (1.0, (4, 30), []), "large": (1.0, (30, 30), [])})
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
