"""Every architecture goes the whole way: score, plan, train, export, reload without tsqlora."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments

import tsqlora as tsq
from tiny import KINDS, all_terms, collate, rows_of, tiny_batch, tiny_model
from tsqlora.batches import forward_logits
from tsqlora.dynamic_rank import RankSchedule
from tsqlora.lora_layers import PEFT_TASK_TYPES

STEPS = 3


@pytest.mark.parametrize("name", KINDS)
def test_what_was_trained_is_what_plain_peft_loads(name: str, tmp_path: Path) -> None:
    kind, model = KINDS[name], tiny_model(name)
    batch = tiny_batch(kind, samples=8)
    pool = Dataset.from_list(rows_of(batch))
    before = {n: p.clone() for n, p in model.named_parameters()}
    scores = tsq.score_samples(model, pool, collate, all_terms(adapt_steps=2), batch_size=4)
    subset = tsq.select_samples(pool, scores, fraction=0.5)
    plan = tsq.allocate_ranks(tsq.layer_sensitivity(model, subset, collate), mean_rank=2)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    adapted = get_peft_model(model, tsq.lora_config(plan, task_type=PEFT_TASK_TYPES[kind]))
    arguments = TrainingArguments(
        str(tmp_path / "trainer"), max_steps=STEPS, per_device_train_batch_size=4,
        learning_rate=0.05, save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    moving = tsq.DynamicRankCallback(
        plan, schedule=RankSchedule(start=0.3, moves=1, move_share=0.5)
    )
    Trainer(
        adapted, arguments, train_dataset=pool, data_collator=collate, callbacks=[moving]
    ).train()
    tsq.export_adapter(adapted, tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(tiny_model(name), str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        trained = forward_logits(adapted.eval(), kind, batch)
        untouched = forward_logits(tiny_model(name), kind, batch)
        assert (trained - untouched).abs().max() > 1e-4, "nothing was learnt"
        assert (forward_logits(loaded, kind, batch) - trained).abs().max() < 1e-5
        merged = forward_logits(loaded.merge_and_unload(), kind, batch)
        assert (merged - trained).abs().max() < 1e-5
