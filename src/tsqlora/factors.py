"""A and B of every kind of layer that PEFT adapts: their gradients by sample, and steps on them.

A *site* is a module that is tapped for its input X and output gradient D, and that yields the
gradients of the factors it holds. Names of factors are "module.A" and "module.B". Experts have no
such D: `experts.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tsqlora.errors import ModelError
from tsqlora.hooks import by_sample
from tsqlora.lora_layers import LoraModule, adapted_layers


class Columns(NamedTuple):
    """Which of a factor's `width` columns a gradient holds (U, ascending); the others are 0."""

    ids: Tensor
    width: int


Gradient = tuple[str, Tensor, Columns | None]
"""A factor's name, its gradients (N, rows, columns), and which columns they are (all if None)."""
Hook = Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]

QUANTISED = ("GPTQLora", "AwqLora", "EetqLora", "HqqLora", "AqlmLora")
"""Further layers whose forward calls A and B as two linear modules, whatever holds the weight."""
SUPPORTED = ("Linear", "Embedding", "ParamWrapper", *QUANTISED)
"""Beginnings of the names of PEFT's layers whose per-sample gradients are exact."""


@dataclass(frozen=True)
class LinearSite:
    """The linear module that holds one factor: ∇ℓ_i = D_iᵀ X_i."""

    name: str
    module: nn.Linear

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """The factor."""
        return {self.name: self.module.get_parameter("weight")}

    def gradients(self, inputs: Tensor, gradients: Tensor) -> Iterator[Gradient]:
        """One gradient."""
        yield self.name, outer(gradients, inputs), None

    def moved(self, deltas: Mapping[str, Gradient], lengths: set[int]) -> Hook | None:
        """X_i (W − delta_i)ᵀ."""
        if self.name not in deltas:
            return None
        delta = deltas[self.name][1].transpose(1, 2)

        def hook(_: nn.Module, entered: tuple[Tensor, ...], output: Tensor) -> Tensor:
            inputs = by_sample(entered[0], len(delta), lengths)
            before = output.reshape(*inputs.shape[:2], output.shape[-1])
            moved = torch.baddbmm(before, inputs, delta.to(inputs.dtype), alpha=-1)
            return moved.reshape(output.shape)

        return hook


@dataclass(frozen=True)
class EmbeddingSite:
    """An adapted embedding, y = base(x) + s·(A[:, x])ᵀ Bᵀ, whose X is one-hot and never formed.

    ∇_B ℓ_i = s·D_iᵀ A[:, x_i]ᵀ, and ∇_A ℓ_i adds up rows of s·D_i B by token id: only the ids of
    the batch have columns that are not 0.
    """

    name: str
    lora: LoraModule

    @property
    def module(self) -> nn.Module:
        """The whole layer: its factors are bare parameters."""
        return self.lora.layer

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """A (r, vocabulary) and B (out, r)."""
        layer, adapter = self.lora.layer, self.lora.adapter
        a, b = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
        return {f"{self.name}.A": a, f"{self.name}.B": b}

    def gradients(self, inputs: Tensor, gradients: Tensor) -> Iterator[Gradient]:
        """B's, then A's at the ids that the batch has."""
        ids = inputs.squeeze(-1)
        a, b = self.weights.values()
        scaled = gradients * self._scale()
        looked_up = F.embedding(ids, a.detach().T).to(scaled.dtype)
        yield f"{self.name}.B", outer(scaled, looked_up), None
        inner = scaled @ b.detach().to(scaled.dtype)
        padding = getattr(self.lora.base, "padding_idx", None)
        if padding is not None:  # PEFT looks A up with it, and that passes no gradient
            inner = inner.masked_fill((ids == padding).unsqueeze(-1), 0)
        columns, position = ids.unique(return_inverse=True)
        added = inner.new_zeros(len(ids), len(columns), inner.shape[-1])
        added.scatter_add_(1, position.unsqueeze(-1).expand_as(inner), inner)
        yield f"{self.name}.A", added.transpose(1, 2), Columns(columns, int(a.shape[1]))

    def moved(self, deltas: Mapping[str, Gradient], lengths: set[int]) -> Hook | None:
        """s·(A_i[:, x])ᵀ B_iᵀ in place of s·(A[:, x])ᵀ Bᵀ, A_i = A − delta_i at the batch's ids."""
        if f"{self.name}.A" not in deltas:
            return None
        (_, delta_a, columns), (_, delta_b, _) = (deltas[f"{self.name}.{f}"] for f in "AB")
        assert columns is not None

        def hook(_: nn.Module, entered: tuple[Tensor, ...], output: Tensor) -> Tensor:
            ids = by_sample(entered[0].unsqueeze(-1), len(delta_a), lengths).squeeze(-1)
            a, b = (weight.detach() for weight in self.weights.values())
            looked_up = F.embedding(ids, a.T)
            position = torch.searchsorted(columns.ids, ids).unsqueeze(-1)
            own = delta_a.transpose(1, 2).gather(1, position.expand(-1, -1, a.shape[0]))
            after = torch.bmm(looked_up - own, (b - delta_b).transpose(1, 2))
            change = (after - looked_up @ b.T) * self._scale()
            return output + change.reshape(output.shape).to(output.dtype)

        return hook

    def _scale(self) -> float | Tensor:
        own = self.lora.layer._get_embed_scale()  # of embeddings that multiply what they look up
        return self.lora.scale if own is None else self.lora.scale * own


def outer(left: Tensor, right: Tensor) -> Tensor:
    """leftᵀ right (N, out, in), the narrow one first: BLAS is several times faster that way."""
    if left.shape[-1] <= right.shape[-1]:
        return torch.bmm(left.transpose(1, 2), right)
    return torch.bmm(right.transpose(1, 2), left).transpose(1, 2).contiguous()


Site = LinearSite | EmbeddingSite


def scored_layers(model: nn.Module) -> list[LoraModule]:
    """The adapted layers, all of kinds whose per-sample gradients are exact.

    Raises:
        ModelError: another kind; factors shared by two layers; an embedding that scales gradients
            by how often a token stands in the batch.
    """
    layers = adapted_layers(model, SUPPORTED, "its gradient cannot be told apart by sample")
    seen: dict[int, str] = {}
    problems = []
    for lora in layers:
        if getattr(lora.base, "scale_grad_by_freq", False):
            problems.append(f"{lora.name}: scale_grad_by_freq mixes samples; turn it off")
        for name, parameter in lora.layer.named_parameters():
            if "lora_" not in name.split(".")[0] or parameter.data_ptr() == 0:
                continue
            other = seen.setdefault(parameter.data_ptr(), lora.name)  # one may be a view
            if other != lora.name:
                problems.append(
                    f"{lora.name}: shares a factor with {other}; adapt only one of the two, or set "
                    "ensure_weight_tying=False"
                )
    if problems:
        raise ModelError.of(list(dict.fromkeys(problems)))
    return layers


def last_layers(layers: Sequence[LoraModule], depth: float) -> list[LoraModule]:
    """The last of `layers` that hold a share `depth` of their weights, or less; at least one."""
    sizes = [_multiplications(lora) for lora in layers]
    kept, total = 0, sum(sizes)
    while kept < len(layers) and sum(sizes[-kept - 1 :]) <= depth * total:
        kept += 1
    return list(layers[-max(1, kept) :])


def _multiplications(lora: LoraModule) -> int:
    if type(lora.layer).__name__ == "Embedding":
        return 0
    experts = getattr(lora.layer, "num_experts", 1)
    return int(lora.layer.in_features * lora.layer.out_features * experts)


def sites(layers: Sequence[LoraModule]) -> list[Site]:
    """What to tap of linear and embedding layers, in the model's order."""
    found: list[Site] = []
    for lora in layers:
        if type(lora.layer).__name__ == "Embedding":
            found.append(EmbeddingSite(lora.name, lora))
        elif type(lora.layer).__name__ != "ParamWrapper":
            found += [LinearSite(f"{lora.name}.A", lora.a), LinearSite(f"{lora.name}.B", lora.b)]
    return found
