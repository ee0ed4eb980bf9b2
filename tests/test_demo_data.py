"""The demo's data: the same everywhere, dirty exactly as promised, not to be learnt by heart."""

from __future__ import annotations

import hashlib
import json
import re
from difflib import SequenceMatcher
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from tsqlora import demo_data
from tsqlora.demo_data import DemoData, intents, make_demo_data, write_demo_data

# Printed by `python tests/test_demo_data.py`; it changes whenever the grammar does.
GOLDEN = "b88738da752144ca734552f89fa8e0ae331aacb53dd6459374d4240c3f1589c4"

sizes = st.integers(0, 60)
shares = st.floats(0, 1)


def digest() -> str:
    data = make_demo_data(seed=7, train=300, validation=40, test=80)
    rows = [data.train, data.validation, data.test, sorted(data.wrong), sorted(data.duplicates)]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


@pytest.fixture(scope="module")
def data() -> DemoData:
    return make_demo_data()


@pytest.fixture(scope="module")
def truth() -> DemoData:
    """The same texts with no label replaced."""
    return make_demo_data(wrong_share=0.0)


def texts(rows: list[dict[str, str]]) -> list[str]:
    return [row["text"] for row in rows]


def test_a_seed_gives_the_golden_data() -> None:
    assert digest() == GOLDEN


def test_seeds_differ() -> None:
    one, other = (make_demo_data(seed, train=50, validation=0, test=0) for seed in (0, 1))
    assert not set(texts(one.train)) & set(texts(other.train))


@settings(max_examples=40)
@given(st.integers(0, 10**6), sizes, sizes, shares, shares)
def test_sizes_and_shares_are_as_asked(
    seed: int, train: int, test: int, wrong: float, duplicate: float
) -> None:
    data = make_demo_data(seed, train, 3, test, wrong_share=wrong, duplicate_share=duplicate)
    assert (len(data.train), len(data.validation), len(data.test)) == (train, 3, test)
    assert abs(len(data.wrong) - wrong * train) <= 1
    assert abs(len(data.duplicates) - duplicate * train) <= 1
    everything = texts(data.train + data.validation + data.test)
    assert len(set(everything)) == len(everything)
    assert {row["intent"] for row in data.train + data.test} <= set(intents())


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_an_impossible_share_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="must lie in"):
        make_demo_data(wrong_share=share)


def test_wrong_rows_and_no_others_have_another_intent(data: DemoData, truth: DemoData) -> None:
    assert texts(data.train) == texts(truth.train)
    pairs = zip(data.train, truth.train, strict=True)
    changed = {n for n, (one, other) in enumerate(pairs) if one["intent"] != other["intent"]}
    assert changed == data.wrong
    assert (data.validation, data.test) == (truth.validation, truth.test)


def test_a_quarter_of_the_wrong_labels_is_the_confusable_intent(
    data: DemoData, truth: DemoData
) -> None:
    partner = demo_data._partners()
    wrong = [(data.train[n]["intent"], truth.train[n]["intent"]) for n in data.wrong]
    confused = sum(partner[true] == false for false, true in wrong) / len(wrong)
    assert confused == pytest.approx(0.25 + 0.75 / (len(intents()) - 1), abs=0.05)


def test_validation_is_spoilt_on_request_only(truth: DemoData) -> None:
    dirty = make_demo_data(wrong_share=0.0, validation_wrong_share=0.3)
    changed = sum(a != b for a, b in zip(dirty.validation, truth.validation, strict=True))
    assert changed == round(0.3 * len(truth.validation))
    assert dirty.train == truth.train


def test_duplicates_are_near_an_earlier_row_of_the_same_true_intent(truth: DemoData) -> None:
    for number in sorted(truth.duplicates)[:60]:
        row = truth.train[number]
        earlier = [r["text"] for r in truth.train[:number] if r["intent"] == row["intent"]]
        assert row["text"] not in earlier
        assert max(likeness(row["text"], text) for text in alike(row["text"], earlier)) > 0.8


def likeness(one: str, other: str) -> float:
    return SequenceMatcher(None, one.lower(), other.lower(), autojunk=False).ratio()


def alike(text: str, others: list[str]) -> list[str]:
    """The few of ``others`` that share most words with ``text``: likeness itself is slow."""
    words = set(re.findall(r"\w+", text.lower()))
    return sorted(others, key=lambda o: -len(words & set(re.findall(r"\w+", o.lower()))))[:5]


def test_held_out_phrases_and_fillers_are_not_those_of_train() -> None:
    grammar = demo_data._grammar()
    lists = list(grammar["slots"].values())
    lists += [phrases[part] for phrases in grammar["intents"].values() for part in phrases]
    assert all(not set(both["train"]) & set(both["held_out"]) for both in lists)


def test_the_splits_keep_to_their_own_fillers(truth: DemoData) -> None:
    fillers = demo_data._grammar()["slots"]["item"]
    for split, foreign in ((truth.train, "held_out"), (truth.test, "train")):
        written = "\n".join(texts(split)).lower()
        assert not [item for item in fillers[foreign] if item in written]


def test_every_intent_has_one_partner_and_is_well_represented(truth: DemoData) -> None:
    partner = demo_data._partners()
    assert set(partner) == set(intents())
    assert all(partner[partner[intent]] == intent != partner[intent] for intent in intents())
    counts = [sum(row["intent"] == intent for row in truth.test) for intent in intents()]
    assert min(counts) > 0.5 * len(truth.test) / len(intents())


def test_no_grammar_mark_is_left_in_a_message(data: DemoData) -> None:
    assert not [text for text in texts(data.train + data.test) if set(text) & set("[]{}|#")]


def test_messages_have_from_5_to_45_words(data: DemoData) -> None:
    lengths = [len(text.split()) for text in texts(data.train + data.test)]
    assert min(lengths) >= 5
    assert max(lengths) <= 45
    assert 14 < sum(lengths) / len(lengths) < 24


def test_words_alone_solve_neither_nothing_nor_all() -> None:
    data = make_demo_data(train=1000, test=400, wrong_share=0.0)
    words = make_pipeline(TfidfVectorizer(), LogisticRegression(C=10, max_iter=300))
    words.fit(texts(data.train), [row["intent"] for row in data.train])
    accuracy = words.score(texts(data.test), [row["intent"] for row in data.test])
    assert 0.6 < accuracy < 0.85


def test_the_files_hold_the_data(tmp_path: Path) -> None:
    data = make_demo_data(train=30, validation=5, test=5)
    write_demo_data(tmp_path / "new" / "folder", data)
    for split in ("train", "validation", "test"):
        lines = (tmp_path / "new/folder" / f"{split}.jsonl").read_text("utf-8").splitlines()
        assert [json.loads(line) for line in lines] == getattr(data, split)
    planted = json.loads((tmp_path / "new/folder/planted.json").read_text("utf-8"))
    assert planted == {"wrong": sorted(data.wrong), "duplicates": sorted(data.duplicates)}


if __name__ == "__main__":
    print(digest())
