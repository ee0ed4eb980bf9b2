from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tiny_text as tiny
from tsqlora.encoding import causal_row
from tsqlora.errors import DataError, ModelError
from tsqlora.losses import CAUSAL_LM, IGNORED, sample_losses

TEXTS = ["a good film", "bad", "the film was not very good", "dull dull dull one two"]
CHAT = [
    {"role": "user", "content": "is the film good"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "why"},
    {"role": "assistant", "content": "it is not dull"},
]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.save_llama(tmp_path_factory.mktemp("llama"), tiny.CHAT_TEMPLATE)


def targets_of(row: dict[str, Any]) -> list[int]:
    return [label for label in row["labels"] if label != IGNORED]


_text = st.text(st.sampled_from("abr :\nQé😀"), max_size=12)


@given(prompt=_text, completion=_text.filter(bool))
def test_targets_of_a_completion_are_its_characters_and_an_end_token(
    llama: str, prompt: str, completion: str
) -> None:
    train = tiny.rows(prompt=[prompt], completion=[completion])
    data = {"text": "prompt", "target": "completion", "max_length": 128}
    task = tiny.task_of(llama, "causal-lm", data, train)
    row = task.encode(train, "data.train")[0]
    targets = targets_of(row)
    boundary = len(row["labels"]) - len(targets)
    decode = task.tokenizer.decode
    assert row["labels"][boundary:] == targets == row["input_ids"][boundary:]
    assert targets[-1] == task.tokenizer.eos_token_id
    assert decode(row["input_ids"][1:-1]) == prompt + completion
    assert decode(targets[:-1]).endswith(completion)
    assert not decode(targets[1:-1]).endswith(completion) or not completion  # none but its own


def test_the_loss_of_a_completion_does_not_see_which_prompt_tokens_were_right(llama: str) -> None:
    train = tiny.rows(prompt=["the film is"], completion=[" good"])
    task = tiny.task_of(llama, "causal-lm", {"text": "prompt", "target": "completion"}, train)
    batch = task.collate(task.encode(train, "data.train").to_list())
    logits = task.load_model().eval()(**batch).logits.detach()
    first = (batch["labels"][0] != IGNORED).nonzero()[0]
    changed = logits.clone()
    changed[:, : first - 1] += torch.randn_like(changed[:, : first - 1])
    losses = [sample_losses(CAUSAL_LM, each, batch["labels"]) for each in (logits, changed)]
    assert torch.equal(*losses)


def test_every_token_of_plain_text_is_a_target(llama: str) -> None:
    train = tiny.rows(text=TEXTS)
    task = tiny.task_of(llama, "causal-lm", {"text": "text"}, train)
    assert all(row["labels"] == row["input_ids"] for row in task.encode(train, "data.train"))


def test_chat_targets_are_exactly_the_assistant_turns(llama: str) -> None:
    train = tiny.rows(messages=[CHAT, [{"role": "system", "content": "Hé"}, *CHAT]])
    task = tiny.task_of(llama, "causal-lm", {"messages": "messages", "max_length": 128}, train)
    for row in task.encode(train, "data.train"):
        runs = "".join(
            "|" if label == IGNORED else task.tokenizer.decode([label]) for label in row["labels"]
        )
        turns = [run for run in runs.split("|") if run]
        assert turns == ["yes</s>\n", "it is not dull</s>\n"]


def test_a_chat_as_sharegpt_writes_it_is_the_same_chat(llama: str) -> None:
    said = {"user": "human", "assistant": "gpt"}
    theirs = [{"from": said[turn["role"]], "value": turn["content"]} for turn in CHAT]
    system = [[{"role": "system", "content": "be dull"}], [{"from": "system", "value": "be dull"}]]
    task = tiny.task_of(llama, "causal-lm", {"messages": "messages"}, tiny.rows(messages=[CHAT]))
    for start, like in zip([[], system[0]], [[], system[1]], strict=True):
        ours, others = (tiny.rows(messages=[[*a, *b]]) for a, b in ((start, CHAT), (like, theirs)))
        encoded = [task.encode(rows, "data.train").to_list() for rows in (ours, others)]
        assert encoded[0] == encoded[1]


def test_of_a_prompt_and_a_completion_the_second_alone_is_learnt(llama: str) -> None:
    whole, parts = tiny.rows(messages=[CHAT]), tiny.rows(prompt=[CHAT[:3]], completion=[CHAT[3:]])
    ids, learnt = [], []
    for columns, rows in (("messages", whole), (("prompt", "completion"), parts)):
        task = tiny.task_of(llama, "causal-lm", {"messages": columns}, rows)
        row = task.encode(rows, "data.train")[0]
        ids.append(row["input_ids"])
        learnt.append(task.tokenizer.decode(targets_of(row)))
    assert ids[0] == ids[1]
    assert learnt == ["yes</s>\nit is not dull</s>\n", "it is not dull</s>\n"]


def test_content_in_parts_of_text_is_one_text(llama: str) -> None:
    cut = [
        {
            "role": turn["role"],
            "content": [{"type": "text", "text": part} for part in turn["content"].partition(" ")],
        }
        for turn in CHAT
    ]
    task = tiny.task_of(llama, "causal-lm", {"messages": "messages"}, tiny.rows(messages=[CHAT]))
    encoded = [task.encode(tiny.rows(messages=[chat]), "data.train") for chat in (CHAT, cut)]
    assert encoded[0].to_list() == encoded[1].to_list()


def test_chats_that_cannot_be_learnt_from_are_named(llama: str) -> None:
    task = tiny.task_of(llama, "causal-lm", {"messages": "messages"}, tiny.rows(messages=[CHAT]))
    for chat, message in (
        (CHAT[:1], "no assistant turn"),
        (CHAT[1:], "begins with the assistant"),
        ([], "no assistant turn"),
        ([CHAT[0], {"role": "assistant", "content": None}], "no `content`"),
        ([CHAT[0], {"from": "gpt", "value": None}], "no `content`"),
        ([CHAT[0], {"content": "yes"}], "`role` and `content`"),
        ([CHAT[0], {"role": "assistant", "content": " "}], "turns are empty"),
    ):
        with pytest.raises(DataError, match=f"^data.test: row 1: .*{message}"):
            task.encode(tiny.rows(messages=[CHAT, chat]), "data.test")
    picture = [{"role": role, "content": [{"type": "image"}]} for role in ("user", "assistant")]
    with pytest.raises(DataError, match=r"row 0: a message of the user holds .*, but text alone"):
        task.encode(tiny.rows(messages=[picture]), "data.test")


def test_a_template_that_rewrites_earlier_turns_is_refused(tmp_path: Path) -> None:
    model = tiny.save_llama(tmp_path, tiny.FORGETFUL_TEMPLATE)
    train = tiny.rows(messages=[CHAT])
    task = tiny.task_of(model, "causal-lm", {"messages": "messages"}, train)
    with pytest.raises(ModelError, match="rewrites earlier turns"):
        task.encode(train, "data.train")
    assert len(task.encode(tiny.rows(messages=[CHAT[:2]]), "data.train")) == 1


def test_chats_need_a_chat_template(tmp_path: Path) -> None:
    model = tiny.save_llama(tmp_path)
    with pytest.raises(ModelError, match=r"no chat template, which data.messages.*tokenizer:"):
        tiny.task_of(model, "causal-lm", {"messages": "messages"}, tiny.rows(messages=[CHAT]))
    with pytest.raises(ModelError, match=r"no chat template, which data.chat.*tokenizer:"):
        tiny.task_of(model, "causal-lm", AS_CHAT, tiny.rows(asked=["red"], said=["blue"]))


AS_CHAT = {"text": "{asked}\n", "target": "said", "chat": True}


@given(asked=st.text("ab \n", max_size=9), said=st.text("ab \n", max_size=9))
def test_text_and_target_as_a_chat_are_the_chat_of_their_turns(
    llama: str, asked: str, said: str
) -> None:
    turns = [("user", asked.strip()), ("assistant", said.strip())]
    chat = [{"role": role, "content": text} for role, text in turns]
    columns, whole = tiny.rows(asked=[asked], said=[said]), tiny.rows(messages=[chat])
    ours = tiny.task_of(llama, "causal-lm", AS_CHAT, columns)
    theirs = tiny.task_of(llama, "causal-lm", {"messages": "messages"}, whole)
    if asked.strip() and said.strip():
        encoded = ours.encode(columns, "data.train").to_list()
        assert encoded == theirs.encode(whole, "data.train").to_list()
    else:
        missing = "the assistant's turns are empty" if asked.strip() else "the text is blank"
        with pytest.raises(DataError, match=f"^data.train: row 0: {missing}"):
            ours.encode(columns, "data.train")


@given(
    prompt=st.integers(1, 40),
    target=st.integers(1, 40),
    limit=st.integers(2, 50),
    bos=st.booleans(),
)
def test_an_over_long_sample_keeps_the_head_of_its_target_and_the_end_of_its_prompt(
    prompt: int, target: int, limit: int, bos: bool
) -> None:
    ids = list(range(prompt + target))
    labels = [IGNORED] * prompt + ids[prompt:]
    row = causal_row(ids, labels, limit, 0 if bos else None)
    assert isinstance(row, dict)
    kept, learnt = row["input_ids"], targets_of(row)
    assert len(kept) == len(row["labels"]) == min(limit, prompt + target)
    assert learnt == ids[prompt : prompt + len(learnt)]
    assert len(learnt) >= min(target, limit // 2)
    context = kept[: len(kept) - len(learnt)]
    if bos:
        assert context[0] == 0
        context = context[1:]
    assert context == ids[prompt - len(context) : prompt]
