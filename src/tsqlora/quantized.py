"""Bases in 4 bits, by bitsandbytes (QLoRA, arXiv 2305.14314): whether that works here, and how."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tsqlora.errors import ConfigError

if TYPE_CHECKING:
    from tsqlora.config import RunConfig

logger = logging.getLogger("tsqlora")

_WIDTH = 64
"""Of the layer that is tried out: one block of NF4."""


@dataclass(frozen=True)
class Quantization:
    """Frozen weights in NF4 with double quantisation, on `device`, multiplied in `compute`.

    Modules named in `whole` are trained whole and stay as they are.
    """

    device: str
    compute: torch.dtype
    whole: tuple[str, ...] = ()

    @classmethod
    def of(cls, config: RunConfig) -> Quantization | None:
        """What the configuration asks for, on the device that the Trainer will take."""
        if config.quantization is None:
            return None
        training = config.training
        device = "cpu"
        if torch.cuda.is_available() and not training.get("use_cpu"):
            device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        compute = torch.float16 if training.get("fp16") else torch.float32
        compute = torch.bfloat16 if training.get("bf16") else compute
        return cls(device, compute, config.adapter.modules_to_save)

    def check(self) -> None:
        """Quantise a small layer on the device and go through it, forward and backward.

        Raises:
            ConfigError: bitsandbytes is missing, or cannot do it on this device.
        """
        try:
            import bitsandbytes
        except ImportError as error:
            raise ConfigError(
                "quantization: 4bit needs bitsandbytes: pip install 'tsqlora[quantized]', or leave "
                "`quantization` out."
            ) from error
        try:
            layer = bitsandbytes.nn.Linear4bit(
                _WIDTH, _WIDTH, bias=False, compute_dtype=self.compute, quant_type="nf4"
            ).to(self.device)
            inputs = torch.ones(1, _WIDTH, device=self.device, requires_grad=True)
            layer(inputs).sum().backward()
        except Exception as error:  # each back end has its own way to fail
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ConfigError(
                f"quantization: bitsandbytes {bitsandbytes.__version__} cannot work in 4 bits on "
                f"{self.device} ({reason}). Take another device or release, or leave "
                "`quantization` out."
            ) from error

    def settings(self, skip: Sequence[str]) -> dict[str, Any]:
        """Keywords for `from_pretrained`; modules named in `skip` keep their precision too."""
        from transformers import BitsAndBytesConfig

        packed = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=self.compute,
            llm_int8_skip_modules=[*skip, *self.whole],  # of 4 bits too, whatever its name
        )
        return {"quantization_config": packed, "device_map": {"": self.device}}


def note_stacked(model: nn.Module) -> None:
    """Say what stays whole: experts stacked in parameters of three dimensions are not packed."""
    convolutions = [m for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd)]
    kernels = {id(module.weight) for module in convolutions}
    of_three = [p for p in model.parameters() if p.ndim == 3 and id(p) not in kernels]
    stacked = sum(p.numel() for p in of_three)
    if stacked:
        logger.warning(
            "quantization: %.0f %% of the weights are stacked experts, which bitsandbytes does not "
            "pack: they take %.1f GB in float32.",
            100 * stacked / sum(p.numel() for p in model.parameters()),
            4e-9 * stacked,
        )


def keep_exact(model: nn.Module) -> None:
    """Forbid the repacking that bitsandbytes does in eval mode on some CPUs.

    It rounds the quantisation's own scales to bfloat16, in place and for good, and leaves weights
    that can neither be read nor trained through.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
