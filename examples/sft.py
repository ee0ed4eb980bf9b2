"""Teach a chat model by TRL's SFTTrainer, on chats drawn by their quality."""

import argparse

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

import tsqlora as tsq
from tsqlora.demo_data import make_demo_data


def chat(text: str, intent: str) -> dict[str, list[dict[str, str]]]:
    asked = {"role": "user", "content": f"What does this customer want? {text}"}
    return {"prompt": [asked], "completion": [{"role": "assistant", "content": intent}]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--data", help="JSONL of chats, any form that TRL takes (default: made up)")
    parser.add_argument("--out", default="runs/sft")
    asked = parser.parse_args()

    made_up = Dataset.from_list([chat(**row) for row in make_demo_data(train=400).train])
    trainer = SFTTrainer(
        asked.model,
        SFTConfig(
            asked.out,
            num_train_epochs=2,
            learning_rate=2e-4,
            max_length=512,
            bf16=torch.cuda.is_available(),
            report_to="none",
        ),
        train_dataset=Dataset.from_json(asked.data) if asked.data else made_up,
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
        callbacks=[tsq.DynamicRankCallback()],
    )
    rows = trainer.train_dataset  # what TRL trains on: tokenised, masked, cut to max_length
    scores = tsq.score_samples(trainer.model, rows, trainer.data_collator)
    tsq.QualitySampler(scores, fraction=0.5).attach(trainer)
    trainer.train()
    tsq.export_adapter(trainer.model, f"{asked.out}/adapter")
    print(scores.verdict)
    for row in rows.select(np.argsort(scores.credibility, kind="stable")[:5]):
        print("most doubtful:", row.get("completion") or row.get("messages") or row)


if __name__ == "__main__":
    main()
