"""TsqLoRA: sensitivity and quality low-rank adaptation (arXiv 2509.18585), and beyond it."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "score_samples": "samples",
    "select_samples": "selection",
    "QualitySampler": "selection",
    "layer_sensitivity": "sensitivity",
    "allocate_ranks": "allocation",
    "lora_config": "adapter",
    "start_from_gradient": "directions",
    "DynamicRank": "dynamic_rank",
    "DynamicRankCallback": "callback",
    "export_adapter": "export",
    "write_report": "report",
    "train": "pipeline",
    "RunConfig": "config",
    "QualityScores": "quality",
    "LayerSensitivity": "sensitivity",
    "RankPlan": "allocation",
    "TsqloraError": "errors",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """Public names are imported when first used, so that `tsqlora --help` needs no torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'tsqlora' has no attribute {name!r}")
    return getattr(import_module(f"tsqlora.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
