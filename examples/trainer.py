"""Fine-tune a classifier with transformers' Trainer, on samples drawn by their quality."""

import argparse

from datasets import Dataset
from peft import get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

import tsqlora as tsq
from tsqlora.demo_data import make_demo_data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument("--data", help="CSV with columns text and label (default: made up here)")
    parser.add_argument("--out", default="runs/trainer")
    asked = parser.parse_args()

    made_up = Dataset.from_list(make_demo_data(train=600).train).rename_column("intent", "label")
    rows = Dataset.from_csv(asked.data) if asked.data else made_up
    rows = rows.class_encode_column("label")
    classes = rows.features["label"].num_classes
    tokenizer = AutoTokenizer.from_pretrained(asked.model)
    rows = rows.map(lambda row: tokenizer(row["text"], truncation=True))
    train, test = rows.train_test_split(0.2, seed=0).values()
    collator = DataCollatorWithPadding(tokenizer)
    model = AutoModelForSequenceClassification.from_pretrained(asked.model, num_labels=classes)

    scores = tsq.score_samples(model, train, collator)
    chosen = tsq.select_samples(train, scores, fraction=0.5)
    layers = tsq.layer_sensitivity(model, chosen, collator, spectrum=32)
    plan = tsq.allocate_ranks(layers, mean_rank=8, max_rank=32)
    model = get_peft_model(model, tsq.lora_config(plan, task_type="SEQ_CLS"))
    tsq.start_from_gradient(model, layers)
    trainer = Trainer(
        model,
        TrainingArguments(asked.out, learning_rate=1e-3, num_train_epochs=4, report_to="none"),
        train_dataset=train,
        eval_dataset=test,
        data_collator=collator,
        compute_metrics=lambda p: {"accuracy": (p.predictions.argmax(-1) == p.label_ids).mean()},
        callbacks=[tsq.DynamicRankCallback(sensitivity=layers)],
    )
    tsq.QualitySampler(scores, fraction=0.5).attach(trainer)
    trainer.train()
    print(scores.verdict, trainer.evaluate(), sep="\n")
    tsq.export_adapter(trainer.model, f"{asked.out}/adapter")


if __name__ == "__main__":
    main()
