"""What the benchmarks share: models with batches of real data, a counter of memory, a clock."""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
import warnings
import weakref
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers as tf
import yaml
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from tsqlora.batches import Batch
from tsqlora.config import RunConfig
from tsqlora.inputs import Inputs
from tsqlora.packaged import encoder_folder

HERE = Path(__file__).resolve().parent


class Alive(TorchDispatchMode):
    """Counts the bytes of storages that operations make, while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._note, result)
        return result

    def _note(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage not in self._seen:
            self._seen.add(storage)
            size = storage.nbytes()
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, size)
        return tensor

    def _gone(self, size: int) -> None:
        self.now -= size


def peak_memory(call: Callable[[], Any], model: nn.Module, device: str) -> int:
    """Bytes of the weights and of the most that `call` has alive at once."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    with Alive() as alive:
        call()
    return weights + alive.peak


Case = tuple[nn.Module, list[Batch]]


def example_inputs(name: str, shared: Path, samples: int) -> Inputs:
    """What an example configuration names, with its data below `shared`."""
    text = (HERE.parent / "examples" / f"{name}.yaml").read_text(encoding="utf-8")
    config = yaml.safe_load(text.replace("../shared", str(shared)))
    config["data"]["max_train_samples"] = samples
    if config["model"] == MINILM:
        config["model"] = str(minilm())
    return Inputs(RunConfig.from_dict(config))


def example(name: str, shared: Path, batch_size: int, batches: int) -> Case:
    """The model of an example configuration and batches of its data."""
    inputs = example_inputs(name, shared, batch_size * batches)
    rows = [inputs.splits.train[i] for i in range(batch_size * batches)]
    rows.sort(key=lambda row: len(row["input_ids"]))
    chunks = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    return inputs.base_model(), [inputs.task.collate(chunk) for chunk in chunks]


MINILM = "sentence-transformers/all-MiniLM-L6-v2"


@cache
def minilm() -> Path:
    """MiniLM where gpu.sh has put it, else the copy that the demo's package holds, checked once."""
    carried = HERE.parents[1] / "shared" / "models" / "minilm"
    return carried if carried.exists() else encoder_folder()


def llama(size: int, layers: int, length: int, samples: int) -> Case:
    """A Llama of random weights on random tokens."""
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=8000,
        hidden_size=size,
        intermediate_size=size * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=size // 64,
        num_key_value_heads=size // 64,
    )
    ids = torch.randint(0, 8000, (samples, length))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    return tf.LlamaForCausalLM(config), [batch]


def timed(call: Callable[[], Any], device: str) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def options_of(description: str, result: str) -> argparse.ArgumentParser:
    """The options that every benchmark on these models takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--models", nargs="+", default=["minilm", "bart", "bart-64", "llama"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument(
        "--llama",
        type=int,
        nargs=4,
        default=[1024, 12, 64, 4],
        metavar="N",
        help="width, layers, tokens, samples",
    )
    parser.add_argument("--shared", type=Path, default=HERE.parents[1] / "shared")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=HERE / "results" / result)
    return parser


def cases_of(options: argparse.Namespace) -> dict[str, Callable[[], Case]]:
    """How each model asked for is made."""
    warnings.simplefilter("ignore")
    tf.utils.logging.set_verbosity_error()
    cases: dict[str, Callable[[], Case]] = {
        "minilm": lambda: example("sst2", options.shared, options.batch_size, options.batches),
        "bart": lambda: example("g2p", options.shared, options.batch_size, options.batches),
        "bart-64": lambda: example("g2p", options.shared, 64, options.batches),
        "llama": lambda: llama(*options.llama),
    }
    return {name: cases[name] for name in options.models}


def save(options: argparse.Namespace, name: str, figures: dict[str, Any]) -> None:
    """A model's figures into the results, as soon as they are there; other models' stay."""
    there = json.loads(options.out.read_text()) if options.out.exists() else {}
    used = {k: v for k, v in vars(options).items() if isinstance(v, int | list) and k != "models"}
    report = {
        "device": options.device,
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "models": {**there.get("models", {}), name: figures},
        "options": {**there.get("options", {}), name: used},
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """What a JSON Lines file holds; a line cut off by an interruption is not there."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [line for line in map(_whole, lines) if line is not None]


def _whole(text: str) -> dict[str, Any] | None:
    try:
        line: dict[str, Any] = json.loads(text)
    except ValueError:
        return None
    return line


def append_line(path: Path, line: dict[str, Any]) -> None:
    """A line more, on a line of its own even where an interruption cut the last one off."""
    with path.open("a+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        cut_off = size > 0 and file.read() != b"\n"
        file.write(b"\n" * cut_off + json.dumps(line).encode() + b"\n")
