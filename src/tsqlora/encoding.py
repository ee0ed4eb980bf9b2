"""Text ─► token ids and labels; always a whole batch of texts to one call of the tokenizer.

Every encoder gives one `Encoded` for each text: the columns of the sample, or, as a string, what is
wrong with the text and what to do, so that the caller can name the row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from tsqlora.errors import DataError, ModelError, short
from tsqlora.losses import IGNORED

Encoded = dict[str, Any] | str
Span = tuple[int, int]
"""First character and end of a target in its text."""

_NOTHING = "the {} encodes to nothing. Fill it in or drop the row."
_TO_THE_END = 1 << 62


def encode_texts(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    pairs: Sequence[str] | None,
    limit: int,
) -> list[Encoded]:
    """Texts, or pairs of them, with the tokenizer's special tokens, cut to `limit` tokens."""
    columns = tokenizer(
        list(texts),
        list(pairs) if pairs is not None else None,
        truncation=True,
        max_length=limit,
        return_attention_mask=True,
        return_special_tokens_mask=True,
    )
    return _rows(columns, "text")


def encode_targets(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], limit: int
) -> list[Encoded]:
    """The targets of seq2seq: `labels` alone, with end tokens as the tokenizer sets them."""
    columns = tokenizer(
        text_target=list(texts), truncation=True, max_length=limit, return_special_tokens_mask=True
    )
    rows = _rows(columns, "target")
    return [row if isinstance(row, str) else {"labels": row["input_ids"]} for row in rows]


def encode_plain(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], limit: int
) -> list[Encoded]:
    """Causal language modelling on plain text: every token is a target, no end token is added."""
    encoded = encode_texts(tokenizer, texts, None, limit)
    rows = [
        row if isinstance(row, str) else (row["input_ids"], row["input_ids"]) for row in encoded
    ]
    return [row if isinstance(row, str) else causal_row(*row, limit) for row in rows]


def encode_completions(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    completions: Sequence[str],
    limit: int,
) -> list[Encoded]:
    """Causal language modelling of completions: prompt and completion tokenized as one text.

    A token with any character of the completion is a target, and so is the end token put after it.
    """
    texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    spans = [[(len(prompt), _TO_THE_END)] for prompt in prompts]
    encoded: list[Encoded] = []
    for ids, labels in _with_span_labels(tokenizer, texts, spans, special_tokens=True):
        if all(label == IGNORED for label in labels):
            encoded.append(_NOTHING.format("target"))
            continue
        if labels[0] != IGNORED:
            encoded.append("no token comes before the target. Fill in the text or drop the row.")
            continue
        if (eos := tokenizer.eos_token_id) is not None:
            ends = ids[-1] == eos
            ids, labels = [*ids, *[eos] * (not ends)], [*labels[: len(ids) - ends], eos]
        encoded.append(causal_row(ids, labels, limit, tokenizer.bos_token_id))
    return encoded


def encode_chats(
    tokenizer: PreTrainedTokenizerBase, chats: Sequence[tuple[str, Sequence[Span]]], limit: int
) -> list[Encoded]:
    """Causal language modelling of chats as `render_chat` gives them: the spans are the targets."""
    texts, spans = [text for text, _ in chats], [spans for _, spans in chats]
    labelled = _with_span_labels(tokenizer, texts, spans, special_tokens=False)
    return [causal_row(*row, limit, tokenizer.bos_token_id) for row in labelled]


def render_chat(
    tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, Any]], given: int = 0
) -> tuple[str, list[Span]]:
    """A chat as the tokenizer's template writes it, and where its assistant turns stand.

    The first `given` turns are not learnt, whoever says them.

    Turn i stands from the end of the messages before it, rendered with the generation prompt, to
    the end of the messages up to it: just what the model has to write when its turn comes.

    Raises:
        DataError: a turn holds no text, there is no assistant turn, or the template refuses them.
        ModelError: the template writes a message otherwise when more messages follow.
    """
    for turn in turns:
        _require_text(turn)
    assistant = [i for i, turn in enumerate(turns) if turn["role"] == "assistant" and i >= given]
    if not assistant:
        raise DataError("the chat has no assistant turn to learn. Add one or drop the row.")
    if not any(turns[i].get("tool_calls") or str(turns[i]["content"]).strip() for i in assistant):
        raise DataError("the assistant's turns are empty. Fill one in or drop the row.")
    if assistant[0] == 0:
        raise DataError("the chat begins with the assistant. Put a user or system turn first.")
    try:
        text = _rendered(tokenizer, turns, False)
        spans = []
        for i in assistant:
            before, after = (
                _rendered(tokenizer, turns[:i], True),
                _rendered(tokenizer, turns[: i + 1]),
            )
            if not (after.startswith(before) and text.startswith(after)):
                raise ModelError(
                    f"The chat template of {tokenizer.name_or_path} rewrites earlier turns when "
                    "more follow, so the assistant's tokens cannot be told apart: keep one user "
                    "and one assistant turn a row, or set `tokenizer:` to one with another "
                    "chat_template."
                )
            spans.append((len(before), len(after)))
    except TemplateError as error:
        raise DataError(
            f"the chat template refuses the messages ({error}). Mend the row."
        ) from None
    return text, spans


def causal_row(
    ids: Sequence[int], labels: Sequence[int], limit: int, bos: int | None = None
) -> Encoded:
    """The columns of a sample of at most `limit` tokens, or what is wrong with it.

    Over-long samples lose their end, but never so much that fewer than limit/2 tokens from the
    first target on remain (or all of them, if there are fewer): instead the prompt then loses its
    beginning, though not the token `bos`.
    """
    first = next((i for i, label in enumerate(labels) if label != IGNORED), len(labels))
    kept = max(limit - first, min(len(ids) - first, limit // 2))
    over = first - (limit - kept)
    keep_bos = over > 0 and limit - kept > 0 and ids[0] == bos
    start = max(over, 0) + keep_bos
    head = slice(0, 1 if keep_bos else 0)
    ids = [*ids[head], *ids[start : first + kept]]
    labels = [*labels[head], *labels[start : first + kept]]
    if all(label == IGNORED for label in labels[1:]):
        return "nothing is left to predict: at least one token must come before the target."
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


def _rows(columns: Mapping[str, list[list[int]]], what: str) -> list[Encoded]:
    """Columns as rows; a text without any token but the added special ones is a fault."""
    names = [name for name in columns if name != "special_tokens_mask"]
    return [
        _NOTHING.format(what)
        if all(columns["special_tokens_mask"][i])
        else {name: columns[name][i] for name in names}
        for i in range(len(columns["input_ids"]))
    ]


def _with_span_labels(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    spans: Sequence[Sequence[Span]],
    special_tokens: bool,
) -> list[tuple[list[int], list[int]]]:
    """(ids, labels) of each text: a token is a target if any of its characters is in a span."""
    columns = tokenizer(
        list(texts),
        add_special_tokens=special_tokens,
        return_offsets_mapping=True,
        verbose=False,
    )
    labelled = []
    for ids, offsets, own in zip(
        columns["input_ids"], columns["offset_mapping"], spans, strict=True
    ):
        target = [any(b < stop and e > start for start, stop in own) for b, e in offsets]
        labels = [i if wanted else IGNORED for i, wanted in zip(ids, target, strict=True)]
        labelled.append((ids, labels))
    return labelled


def _require_text(turn: Mapping[str, Any]) -> None:
    if "content" not in turn and not turn.get("tool_calls"):
        raise DataError(f"a message of the {turn['role']} has no `content`. Mend the row.")
    if not isinstance(turn.get("content", ""), str):
        raise DataError(
            f"a message of the {turn['role']} holds {short(turn['content'])}, but text alone is "
            "learnt. Drop the row, or what is no text in it."
        )


def _rendered(
    tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, Any]], prompt: bool = False
) -> str:
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt)
    assert isinstance(text, str)
    return text
