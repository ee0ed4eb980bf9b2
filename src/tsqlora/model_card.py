"""README.md of an adapter: what it is and how it loads without tsqlora."""

from __future__ import annotations

from tsqlora.config import RunConfig
from tsqlora.tasks import Task

_LOADERS = {
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
    "CAUSAL_LM": "AutoPeftModelForCausalLM",
}
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

```python
from peft import {loader}

model = {loader}.from_pretrained("path/to/this/folder"{heads})
model = model.merge_and_unload()  # optional: a plain model, as fast as the base
```

PEFT and vLLM take it as it is; llama.cpp, TGI and SGLang need `tsqlora export RUN --format padded`.
{labels}"""


def model_card(config: RunConfig, task: Task) -> str:
    """The card's text."""
    heads = f", num_labels={max(len(task.labels), 1)}" if task.peft_task_type == "SEQ_CLS" else ""
    labels = [f"{i}: {name}" for i, name in enumerate(task.labels)]
    return _CARD.format(
        model=config.model,
        kind=task.kind,
        data=config.data.train,
        loader=_LOADERS[task.peft_task_type],
        heads=heads,
        labels="\nLabels: " + ", ".join(labels) + ".\n" if labels else "",
    )
