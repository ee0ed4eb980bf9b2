"""Fine-tune a classifier in a loop of one's own: in one process, or in several.

accelerate launch --num_processes 2 examples/accelerate_loop.py    (on CPUs add --multi_gpu)
"""

import argparse

import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import get_peft_model
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
)

import tsqlora as tsq
from tsqlora.demo_data import make_demo_data

EPOCHS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument("--data", help="CSV with columns text and label (default: made up here)")
    parser.add_argument("--out", default="runs/accelerate_loop")
    asked = parser.parse_args()

    accelerator = Accelerator()
    made_up = Dataset.from_list(make_demo_data(train=600).train).rename_column("intent", "label")
    rows = Dataset.from_csv(asked.data) if asked.data else made_up
    rows = rows.class_encode_column("label")
    classes = rows.features["label"].num_classes
    tokenizer = AutoTokenizer.from_pretrained(asked.model)
    rows = rows.map(lambda row: tokenizer(row["text"], truncation=True), remove_columns="text")
    collator = DataCollatorWithPadding(tokenizer)
    model = AutoModelForSequenceClassification.from_pretrained(asked.model, num_labels=classes)
    model.to(accelerator.device)

    scores = tsq.score_samples(model, rows, collator, together=True)
    chosen = tsq.select_samples(rows, scores, fraction=0.5)
    sensitivity = tsq.layer_sensitivity(model, chosen, collator, together=True)
    plan = tsq.allocate_ranks(sensitivity, mean_rank=8)
    model = get_peft_model(model, tsq.lora_config(plan, task_type="SEQ_CLS"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    sampler = tsq.QualitySampler(scores, fraction=0.5)
    loader = DataLoader(rows, batch_size=8, sampler=sampler, collate_fn=collator)
    loader = accelerator.prepare(loader)
    ranks = tsq.DynamicRank(model, optimizer, total_steps=EPOCHS * len(loader), headroom=2)
    model, optimizer = accelerator.prepare(model, optimizer)
    model.train()
    for epoch in range(EPOCHS):
        for batch in loader:
            loss = model(**batch).loss
            accelerator.backward(loss)
            ranks.step()
            optimizer.step()
            optimizer.zero_grad()
        accelerator.print(
            f"epoch {epoch + 1}: loss {loss:.3f}, {len(ranks.history)} moves of ranks"
        )
    if accelerator.is_main_process:
        tsq.export_adapter(accelerator.unwrap_model(model), f"{asked.out}/adapter")


if __name__ == "__main__":
    main()
