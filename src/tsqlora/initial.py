"""An adapter that is there already, for a run to go on from: `adapter.init`."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel

from tsqlora.adapter import changes_base, set_patterns
from tsqlora.artefacts import digest
from tsqlora.config import RunConfig
from tsqlora.errors import ModelError
from tsqlora.loading import load_config, quiet
from tsqlora.lora_layers import PEFT_TASK_TYPES, lora_modules
from tsqlora.targets import linear_names

logger = logging.getLogger("tsqlora")

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
HEADS = {"classifier", "score"}
"""What PEFT takes for the head of a SEQ_CLS model."""
NAMED = 3
"""At most so many modules that do not fit are named."""
_REFUSED = {
    "use_dora": "DoRA",
    "target_parameters": "expert parameters",
    "alora_invocation_tokens": "aLoRA",
    "trainable_token_indices": "trained tokens",
}


@dataclass(frozen=True)
class InitialAdapter:
    """A LoRA adapter on disk: its configuration, and (out, in) of every module it adapts."""

    folder: Path
    config: LoraConfig
    shapes: Mapping[str, tuple[int, int]]

    @classmethod
    def read(cls, folder: str) -> InitialAdapter:
        """Configuration and shapes; no weight is read.

        Raises:
            ModelError: no adapter there, a broken one, or one of another kind.
        """
        path = Path(folder)
        missing = [name for name in (CONFIG, WEIGHTS) if not (path / name).is_file()]
        if missing:
            raise ModelError(
                f"adapter.init: {path} holds no {' and no '.join(missing)}; give a folder written "
                "by save_pretrained, with weights in safetensors."
            )
        try:
            kind = json.loads((path / CONFIG).read_text(encoding="utf-8"))["peft_type"]
            config = LoraConfig.from_pretrained(str(path)) if kind == "LORA" else None
            with safe_open(path / WEIGHTS, "pt") as file:
                sizes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise ModelError(f"adapter.init: {path} cannot be read ({error}).") from error
        if not isinstance(config, LoraConfig):
            raise ModelError(f"adapter.init: {path} is {kind}, not a LoRA adapter.")
        _require_plain(path, config, sizes)
        return cls(path, config, _shapes(sizes))

    @property
    def modules_to_save(self) -> tuple[str, ...]:
        """Modules that it holds whole."""
        return tuple(self.config.modules_to_save or ())

    def digest(self) -> str:
        """Of all that it says and holds."""
        return digest(
            (self.folder / CONFIG).read_text(), (self.folder / WEIGHTS).read_bytes().hex()
        )

    def check(self, config: RunConfig, auto_model: Any) -> None:
        """Against the architecture of the run's model, before its weights or any row are read.

        Raises:
            ModelError: it is no adapter of this model, or `adapter` of the configuration asks for
                other modules than it has.
        """
        with quiet(), torch.device("meta"):
            skeleton = auto_model.from_config(load_config(config.model))
        misfits = [*self._misfits(skeleton)]
        if len(misfits) > NAMED:
            misfits[NAMED:] = [f"adapter.init: {len(misfits) - NAMED} more modules do not fit."]
        if problems := [*misfits, *self._conflicts(skeleton, config)]:
            raise ModelError.of(problems)
        said = self.config.base_model_name_or_path
        if said and Path(said).name != Path(config.model).name:
            logger.warning(
                "adapter.init: %s says that it was trained on %s; the model here is %s, of the "
                "same shapes. Go on only if they are the same.",
                self.folder,
                said,
                config.model,
            )

    def load(self, base: PreTrainedModel, scale: float) -> PeftModel:
        """`base` under this adapter, trainable, dropout off, every module's factors on `scale`.

        Raises:
            ModelError: a head or another module of the model is of another size.
        """
        self.config.lora_dropout, self.config.init_lora_weights = 0.0, True
        try:
            model = PeftModel.from_pretrained(
                base, str(self.folder), is_trainable=True, config=self.config
            )
        except (RuntimeError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ModelError(
                f"adapter.init: {self.folder} does not fit the model ({reason})."
            ) from error
        for module in lora_modules(model):
            with torch.no_grad():
                module.b.weight.mul_(module.scale / scale)
            module.set_rank(module.rank, scale)
        ranks = {module.name: module.rank for module in lora_modules(model)}
        set_patterns(self.config, ranks, dict.fromkeys(ranks, scale))
        return model

    def _misfits(self, skeleton: nn.Module) -> Iterator[str]:
        modules = dict(skeleton.named_modules())
        for name, shape in self.shapes.items():
            if name not in modules:
                yield f"adapter.init: {type(skeleton).__name__} has no module {name}: wrong base?"
            elif (own := _shape(modules[name])) != shape:
                yield (
                    f"adapter.init: {name} is {own} in {type(skeleton).__name__}, {shape} in "
                    f"{self.folder}: wrong base?"
                )

    def _conflicts(self, skeleton: nn.Module, config: RunConfig) -> Iterator[str]:
        wanted, found = PEFT_TASK_TYPES[config.task], self.config.task_type
        if found not in (wanted, None):
            yield f"adapter.init: {self.folder} was trained as {found}, not for {config.task}."
        elif found is None and wanted == "SEQ_CLS" and not HEADS & set(self.modules_to_save):
            yield (
                f"adapter.init: {self.folder} holds no head for {config.task}, through which its "
                "layers are measured: give one trained with task_type SEQ_CLS, or leave it out."
            )
        modules = config.adapter.target_modules
        if modules != "all-linear":
            named = {n for n in linear_names(skeleton) if _matches(n, modules)}
            other = sorted(named ^ set(self.shapes))
            if other:
                yield (
                    f"adapter.target_modules and adapter.init differ in {len(other)} modules "
                    f"({', '.join(other[:3])}): leave target_modules out to take the adapter's."
                )
        extra = sorted(set(config.adapter.modules_to_save) - set(self.modules_to_save))
        if extra:
            yield f"adapter.modules_to_save: adapter.init, which decides, lacks {', '.join(extra)}."


def _require_plain(path: Path, config: LoraConfig, sizes: Mapping[str, Any]) -> None:
    problems = [f"{what} ({key})" for key, what in _REFUSED.items() if getattr(config, key, None)]
    if any("lora_embedding_" in name for name in sizes):
        problems.append("an adapted embedding")
    if config.lora_bias or config.bias != "none":
        problems.append("trained biases")
    if changes_base(config):
        problems.append(f"init_lora_weights = {config.init_lora_weights}, which changed its base")
    if problems:
        raise ModelError(
            f"adapter.init: {path} has {', '.join(problems)}, whose ranks cannot be planned and "
            "moved; give a plain LoRA or rsLoRA adapter of linear modules."
        )


def _shapes(sizes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, int]]:
    shapes = {}
    for key, size in sizes.items():
        if key.endswith(".lora_A.weight"):
            name = key.removesuffix(".lora_A.weight")
            shapes[name.removeprefix(_PREFIX)] = (sizes[f"{name}.lora_B.weight"][0], size[1])
    return shapes


def _shape(module: nn.Module) -> tuple[int, ...]:
    size = tuple(module.weight.shape)  # type: ignore[union-attr,arg-type]
    return size[::-1] if type(module).__name__ == "Conv1D" else size


def _matches(name: str, wanted: str | tuple[str, ...]) -> bool:
    if isinstance(wanted, str):
        return bool(re.fullmatch(wanted, name))
    return any(name == each or name.endswith(f".{each}") for each in wanted)
