"""README.md of an adapter: what it is and how it loads without tsqlora."""

from __future__ import annotations

import json
from pathlib import Path

from tsqlora.config import DataConfig, RunConfig
from tsqlora.credibility import drawable
from tsqlora.quality import QualityScores
from tsqlora.sources import said
from tsqlora.tasks import Task

_LOADERS = {
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
    "CAUSAL_LM": "AutoPeftModelForCausalLM",
}
_COMPACT = (
    "PEFT and vLLM take it as it is; llama.cpp, TGI and SGLang need `tsqlora export RUN --format "
    "padded`."
)
_PADDED = "PEFT, vLLM, llama.cpp, TGI and SGLang take it as it is: of one rank throughout."
_CARD = """---
base_model: {model}
library_name: peft
tags:
- lora
- tsqlora
---
# LoRA adapter for {model}

A plain PEFT LoRA adapter for {kind}, trained by
[TsqLoRA](https://arxiv.org/abs/2509.18585) on `{data}`.
{dropped}
```python
from peft import {loader}

model = {loader}.from_pretrained("path/to/this/folder"{heads})
model = model.merge_and_unload()  # optional: a plain model, as fast as the base
```

{served}

{prompt}
{labels}"""


def dropped_line(scores: Path) -> str:
    """What of the training data was left out and why, by `scores.parquet`; nothing without it."""
    if not scores.exists():
        return ""
    found = QualityScores.from_parquet(scores)
    count = int((~drawable(found.credibility)).sum())
    left = f"{count:,} of its {len(found.ids):,} samples were left out or seldom drawn"
    return f"\n{left if count else 'None of its samples was left out'}: {found.verdict}.\n"


def prompt_line(data: DataConfig) -> str:
    """What the model was given as input, and has to be given again."""
    if data.messages is not None:
        return "Input: the turns of a chat, by the tokenizer's chat template."
    specs = [data.text] if isinstance(data.text, str) else list(data.text or ())
    names = " and ".join(f"`{json.dumps(spec, ensure_ascii=False)}`" for spec in specs)
    if data.chat:
        return f"Input: {names} as the user's turn, by the tokenizer's chat template."
    return f"Input: {names}{', as a pair' * (len(specs) > 1)}."


def model_card(config: RunConfig, task: Task, dropped: str = "", padded: bool = False) -> str:
    """The card's text; `dropped` as `dropped_line` says it."""
    heads = f", num_labels={max(len(task.labels), 1)}" if task.peft_task_type == "SEQ_CLS" else ""
    labels = [f"{i}: {name}" for i, name in enumerate(task.labels)]
    return _CARD.format(
        model=config.model,
        kind=task.kind,
        data=said(config.data.train),
        served=_PADDED if padded else _COMPACT,
        loader=_LOADERS[task.peft_task_type],
        heads=heads,
        dropped=dropped,
        prompt=prompt_line(config.data),
        labels="\nLabels: " + ", ".join(labels) + ".\n" if labels else "",
    )
