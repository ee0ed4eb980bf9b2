"""Scoring a pool: batches by length, memory, parts on disk, and any collator."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel

from reference import looped_alignment, looped_gradients
from runs import WORDS, classification_run, tokenizer
from tiny import KINDS, all_terms, collate, rows_of, tiny_batch, tiny_model, with_lora
from tsqlora import QualityScores, calibration, null, score_samples, scoring
from tsqlora.batches import OWN, Pool, batches
from tsqlora.collected import predictions
from tsqlora.errors import DataError, ModelError
from tsqlora.losses import IGNORED
from tsqlora.mismatch import mismatched_pairs
from tsqlora.parts import Parts
from tsqlora.pipeline import Run
from tsqlora.visits import Visits

TERMS = ("loss", "gradient_norm", "loss_reduction", "convergence")


def pool(kind: str, samples: int = 24, longest: int = 12) -> Dataset:
    return Dataset.from_list(rows_of(tiny_batch(kind, samples, longest=longest)))


def adapted(name: str) -> Any:
    return with_lora(tiny_model(name), KINDS[name])


@settings(max_examples=30)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=80),
    batch_size=st.integers(1, 9),
)
def test_batches_hold_every_sample_once_longest_first_and_never_more_than_the_longest(
    lengths: list[int], batch_size: int
) -> None:
    rows = Dataset.from_list([{"input_ids": [3] * n, "labels": 0} for n in lengths])
    plan = Pool(tiny_model("bert"), rows, collate, batch_size).plan
    taken = np.concatenate(plan)
    assert sorted(taken) == list(range(len(lengths)))
    assert (np.diff(np.array(lengths)[taken]) <= 0).all()
    most = batch_size * (max(lengths) + OWN)
    for positions in plan:
        assert len(positions) * (max(lengths[i] for i in positions) + OWN) <= most
        assert len(positions) >= min(batch_size, len(lengths)) or positions is plan[-1]


def test_a_collator_that_pads_to_a_fixed_length_gets_no_larger_batches() -> None:
    rows = pool("classification", 64, longest=40)
    padder = tf.DataCollatorWithPadding(tokenizer(), padding="max_length", max_length=48)
    sizes = [len(p) for p, _ in batches(tiny_model("bert"), rows, padder, 4, "x")]
    assert max(sizes) <= 6
    assert sum(sizes) == 64


@pytest.mark.parametrize("name", ["bert", "llama", "bart"])
def test_scores_do_not_depend_on_the_size_of_the_batches(name: str) -> None:
    model, rows = adapted(name), pool(KINDS[name])
    own = tf.DataCollatorForSeq2Seq(tokenizer()) if name == "bart" else collate
    alone = score_samples(model, rows, own, all_terms(), batch_size=1)
    for size in (3, 32):
        together = score_samples(model, rows, own, all_terms(), batch_size=size)
        for term in (*TERMS, "quality"):
            wanted = getattr(alone, term)
            np.testing.assert_allclose(getattr(together, term), wanted, rtol=1e-3, atol=2e-4)
        np.testing.assert_allclose(together.loss, alone.loss, rtol=1e-5)
        assert together.wrong_share == pytest.approx(alone.wrong_share, nan_ok=True)


def test_predictions_are_the_classes_that_the_model_says() -> None:
    model, rows = adapted("bert"), pool("classification")
    scores = score_samples(model, rows, collate, all_terms(), batch_size=5)
    with torch.no_grad():
        said = [int(model(**collate([row])).logits.argmax()) for row in rows.to_list()]
    assert scores.prediction is not None
    assert scores.prediction.tolist() == said
    assert len(set(said)) > 1


def test_predictions_of_numbers_are_the_outputs() -> None:
    visits = Visits(4)
    found = {"loss": [1.0, 2.0], "gradient_norm": [1.0, 1.0], "label": [0.5, -0.5]}
    columns = {name: np.array(values, np.float32) for name, values in found.items()}
    output = np.array([[0.25], [4.0]], np.float32)
    visits.add(0, {"position": np.array([3, 1]), "output": output, **columns})
    visits.settle()
    assert predictions(visits, "regression")["predicted"].tolist() == [4.0, 0.25]


def test_generation_leaves_no_predictions() -> None:
    scores = score_samples(adapted("llama"), pool("causal-lm"), collate, all_terms(), batch_size=5)
    assert scores.prediction is None


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
    ids=["cuda", "cpu"],
)
def test_batches_are_halved_when_memory_runs_out(error: RuntimeError) -> None:
    model, rows = adapted("bert"), pool("classification")
    plain = score_samples(model, rows, collate, all_terms(), batch_size=16)
    room = 5

    def limited(_: Any, __: Any, inputs: dict[str, torch.Tensor]) -> None:
        if len(inputs["input_ids"]) > room:
            raise error

    model.get_base_model().register_forward_pre_hook(limited, with_kwargs=True)
    halved = score_samples(model, rows, collate, all_terms(), batch_size=16)
    np.testing.assert_allclose(halved.gradient_norm, plain.gradient_norm, rtol=1e-5)
    np.testing.assert_allclose(halved.convergence, plain.convergence, atol=1e-5)
    room = 0
    with pytest.raises(ModelError, match="single sample"):
        scoring.Scorer(collate, all_terms()).score(model, rows)


def test_other_errors_are_not_taken_for_want_of_memory() -> None:
    model, rows = adapted("bert"), pool("classification")

    def broken(*_: Any) -> None:
        raise RuntimeError("the shapes do not match")

    model.get_base_model().register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="shapes"):
        score_samples(model, rows, collate)


def test_a_partner_has_another_label_and_each_is_as_likely() -> None:
    labels = np.array([0, 1, 1, 2, 2, 2])
    counts = np.zeros((6, 6))
    for seed in range(3000):
        counts[np.arange(6), null.others(labels, np.random.default_rng(seed))] += 1
    differs = labels[:, None] != labels[None, :]
    assert (counts[~differs] == 0).all()
    np.testing.assert_allclose(counts, 3000 * differs / differs.sum(1, keepdims=True), atol=180)
    same = null.others(np.ones(3), np.random.default_rng(0))
    assert same.tolist() == [0, 1, 2]


@pytest.mark.parametrize("kind", ["seq2seq", "causal-lm"])
def test_a_mismatched_pair_has_another_target_than_its_own(kind: str) -> None:
    prompts, targets = [[5], [6, 7], [8], [9]], [[1, 2], [1, 2], [3], [4, 2]]
    before = [[IGNORED] * len(prompt) for prompt in prompts]
    joined = kind == "causal-lm"
    rows = [
        {
            "input_ids": prompt + target if joined else prompt,
            "labels": masked + target if joined else target,
        }
        for prompt, masked, target in zip(prompts, before, targets, strict=True)
    ]
    found = mismatched_pairs(Dataset.from_list(rows), kind)
    assert found is not None
    pairs, owners = found
    wrong = [[token for token in row["labels"] if token != IGNORED] for row in pairs]
    assert wrong == [[4, 2], [1, 2], [3]], "the second has the first's own target"
    assert [targets[owner] for owner in owners] == wrong
    assert mismatched_pairs(Dataset.from_list(rows[:2]), kind) is None


@pytest.mark.parametrize(("name", "kind"), [("llama", "causal-lm"), ("bart", "seq2seq")])
def test_of_mismatched_pairs_the_targets_own_losses_are_those_of_their_rows(
    name: str, kind: str
) -> None:
    model, rows = adapted(name), pool(kind)
    how = model, kind, rows, collate, 4, 0, 6
    (wrong, owners), (own, same) = (null.null_of_pairs(*how, own=asked) for asked in (False, True))
    assert len(wrong) > 2
    np.testing.assert_array_equal(owners, same)
    every = score_samples(model, rows, collate, batch_size=5).loss
    np.testing.assert_allclose(own, every[owners], rtol=1e-4)
    assert not np.allclose(wrong, own, rtol=1e-3)


def text_collator(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    batch = dict(tokenizer()([row["words"] for row in rows], padding=True, return_tensors="pt"))
    return {**batch, "labels": torch.tensor([row["grade"] for row in rows])}


def collated(which: str) -> tuple[str, Dataset, Callable[..., Any]]:
    """A model's name, rows and a collator as Trainer users have them."""
    padded = tokenizer()
    if which == "with padding":
        rows = pool("classification").rename_column("labels", "label")
        return "bert", rows, tf.DataCollatorWithPadding(padded)
    if which == "default":
        fixed = [{"input_ids": [3 + i % 7] * 6, "label": i % 3} for i in range(24)]
        return "bert", Dataset.from_list(fixed), tf.default_data_collator
    if which == "seq2seq":
        model = tiny_model("bart")
        return "bart", pool("seq2seq"), tf.DataCollatorForSeq2Seq(padded, model=model)
    if which == "language modelling":
        rows = pool("causal-lm").remove_columns(["labels"])
        return "llama", rows, tf.DataCollatorForLanguageModeling(padded, mlm=False)
    texts = [{"words": " ".join(WORDS[i : i + 1 + i % 5]), "grade": i % 3} for i in range(24)]
    return "bert", Dataset.from_list(texts), text_collator


COLLATORS = ["with padding", "default", "seq2seq", "language modelling", "own, of raw text"]


@pytest.mark.parametrize("lora", [True, False], ids=["adapted", "plain"])
@pytest.mark.parametrize("which", COLLATORS)
def test_every_collator_of_a_trainer_will_do_and_the_model_stays_as_it_was(
    which: str, lora: bool
) -> None:
    name, rows, collator = collated(which)
    model = adapted(name) if lora else tiny_model(name)
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    required = {key: p.requires_grad for key, p in model.named_parameters()}
    scores = score_samples(model, rows, collator, all_terms(adapt_steps=2), batch_size=4)
    assert len(scores.ids) == len(rows)
    for term in TERMS:
        assert np.isfinite(getattr(scores, term)).all()
    assert scores.probability.sum() == pytest.approx(1)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert required == {key: p.requires_grad for key, p in model.named_parameters()}
    assert all(p.grad is None for p in model.parameters()) or not lora
    assert model.training


@pytest.mark.parametrize("name", ["bert", "bert-regression", "llama"])
def test_convergence_is_the_cosine_with_the_other_kins_mean_unit_gradient(name: str) -> None:
    """Kin: of one class; numbers predicted too high, or too low; all texts. (Sketches: 0.02.)"""
    base, kind = tiny_model(name.split("-")[0]), KINDS.get(name, "regression")
    if kind == "regression":
        base.classifier, base.num_labels, base.config.num_labels = torch.nn.Linear(16, 1), 1, 1
    model, rows = with_lora(base, kind), pool(kind)
    batch = collate(list(rows))
    gradients = looped_gradients(model, kind, batch)
    units = torch.stack([torch.cat([g.flatten() for g in each.values()]) for each in gradients])
    units = torch.nn.functional.normalize(units)
    kin = torch.zeros(len(rows))
    if kind == "classification":
        kin = batch["labels"]
    if kind == "regression":
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        kin = model(**inputs).logits[:, 0] > batch["labels"]
    got = score_samples(model, rows, collate, all_terms()).convergence
    for i in range(len(rows)):
        others = (kin == kin[i]) & (torch.arange(len(rows)) != i)
        wanted = torch.cosine_similarity(units[i], units[others].mean(0), dim=0)
        assert got[i] == pytest.approx(float(wanted), abs=0.1)


def test_a_collator_that_packs_rows_is_refused() -> None:
    packing = tf.DataCollatorWithFlattening()
    with pytest.raises(DataError, match="made 1 samples of"):
        score_samples(adapted("llama"), pool("causal-lm"), packing)


def embeddings_too(kind: str) -> Any:
    model = tiny_model("bert")
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    return with_lora(model, kind, target_modules=["word_embeddings", *names[:4]])


@settings(max_examples=15)
@given(
    name=st.sampled_from(["bert", "bart", "gpt2", "qwen2-moe", "embeddings"]),
    samples=st.integers(1, 9),
    trusted=st.integers(1, 9),
    batch_size=st.integers(1, 4),
    part=st.integers(1, 2),
    seed=st.integers(0, 10**6),
)
def test_convergence_towards_a_reference_is_the_exact_cosine_with_its_mean_unit_gradient(
    name: str, samples: int, trusted: int, batch_size: int, part: int, seed: int
) -> None:
    kind = KINDS.get(name, "classification")
    model = embeddings_too(kind) if name == "embeddings" else adapted(name)
    batches = [tiny_batch(kind, samples, seed), tiny_batch(kind, trusted, seed + 1)]
    rows, reference = (Dataset.from_list(rows_of(batch)) for batch in batches)
    scorer = scoring.Scorer(collate, all_terms(), batch_size=batch_size)
    with pytest.MonkeyPatch.context() as patch, sdpa_kernel(SDPBackend.MATH):
        patch.setattr(scoring, "PART", part)
        got = scorer.score(model, rows, reference).convergence
        wanted = looped_alignment(model, kind, *batches).detach().numpy()
    np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_a_reference_is_flat_in_memory_takes_no_step_and_leaves_few_sums(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "PART", 1)
    monkeypatch.setattr(scoring, "MOST_SUMS", 3)
    model, rows = adapted("bert"), pool("classification")
    forwards: list[int] = []
    model.register_forward_pre_hook(lambda *_: forwards.append(1))
    scorer = scoring.Scorer(collate, all_terms(), batch_size=4)
    assert scorer.passes("classification", 20, 24) == 1.5 * 20 + 24
    scorer.measure(model, rows.select(range(2)), rows, tmp_path)
    reference = Parts(tmp_path / "reference", len(rows))
    sums = list(reference.folder.glob("*.safetensors"))
    assert 1 < len(sums) <= 3
    assert len(sums) == len(reference.there())
    batches_taken = len(Pool(model, rows, collate, 4).plan)
    assert len(forwards) <= (batches_taken + 4) + (2 + 3)  # and a first look at three samples each
    assert "sketch" not in reference.names
    assert "sketch" not in Parts(tmp_path / "quality", 2).names


def test_a_reference_is_summed_once_though_memory_ran_out() -> None:
    model, rows = adapted("bert"), pool("classification")
    plain = scoring.Scorer(collate, all_terms(), batch_size=16).score(model, rows, rows).convergence
    rooms = iter([16, 16, 16, 16, 9, 5, 9, 5, 9])

    def limited(_: Any, __: Any, inputs: dict[str, torch.Tensor]) -> None:
        if len(inputs["input_ids"]) > next(rooms, 8):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    model.get_base_model().register_forward_pre_hook(limited, with_kwargs=True)
    halved = (
        scoring.Scorer(collate, all_terms(), batch_size=16).score(model, rows, rows).convergence
    )
    np.testing.assert_allclose(halved, plain, atol=1e-5)


def test_an_empty_reference_is_refused() -> None:
    rows = pool("classification")
    with pytest.raises(DataError, match="reference is empty"):
        score_samples(adapted("bert"), rows, collate, reference=rows.select([]))


class Killed(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("task", ["classification", "causal-lm", "economical"])
def test_scoring_cut_off_at_any_part_ends_with_the_same_bytes(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "PART", 2)
    monkeypatch.setattr(calibration, "LEAST", 20)
    changes: dict[str, Any] = {"quality.reference": "validation"}
    if task == "causal-lm":
        from runs import save_model

        changes |= {"model": str(save_model(tmp_path / "llama", "llama")), "task": task}
        changes |= {"data.target": "label", "data.text": "{text} "}
    if task == "economical":
        changes |= {"quality.depth": 0.4}
    config = classification_run(tmp_path, 60, **changes)
    run = Run.start(config)
    run.score()
    whole = run.folder.scores.read_bytes()
    write, written = Parts.write, 0

    def cut(self: Parts, *rest: Any) -> None:
        nonlocal written
        if written == stop:
            raise Killed
        written += 1
        write(self, *rest)

    monkeypatch.setattr(Parts, "write", cut)
    run.folder.scores.unlink()
    cuts = 0
    while not run.folder.scores.exists():
        stop, written = 1 + cuts % 2, 0
        try:
            Run.start(config).score()
        except Killed:
            cuts += 1
    assert cuts >= 3
    assert run.folder.scores.read_bytes() == whole
    assert not run.folder.measured.exists()
    assert QualityScores.from_parquet(run.folder.scores).ids.tolist() == list(range(60))


def test_parts_of_another_measurement_are_not_taken_up(tmp_path: Path) -> None:
    parts = Parts(tmp_path / "x", 2)
    parts.prepare("one")
    columns = {"position": np.arange(2), "loss": np.ones(2, dtype=np.float32)}
    parts.write(0, [columns], halvings=1)
    parts.prepare("one")
    assert (parts.there(), parts.halvings) == ({0}, 1)
    assert parts.column("loss").tolist() == [1, 1]
    parts.prepare("two")
    assert parts.there() == set()


def test_parts_that_were_cut_off_or_have_rotted_are_measured_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    parts = Parts(tmp_path / "x", 8)
    parts.prepare("one")
    for number in range(4):
        values = np.full(2, 7.25, dtype=np.float32)
        columns = {"position": np.arange(2) + 2 * number, "loss": values}
        parts.write(number, [columns], 0, sums={"a": values}, seconds=1.5)
    assert parts.seconds == 6
    files = sorted(parts.folder.glob("part-*.parquet"))
    sums = [file.with_suffix(".safetensors") for file in files]
    content = files[0].read_bytes()
    assert values.tobytes() in content
    files[0].write_bytes(content.replace(values.tobytes(), (values + 1).tobytes()))
    files[1].write_bytes(files[1].read_bytes()[:-9])
    sums[2].write_bytes(sums[2].read_bytes()[:-1])
    assert parts.seconds == 4.5
    parts.prepare("one")
    assert parts.there() == {3}
    assert all(f"{file} is broken: it is measured again" in caplog.text for file in files[:3])
    assert parts.summed()["a"].tolist() == [7.25, 7.25]
