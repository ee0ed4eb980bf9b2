"""One module's share of each estimator of sensitivity, from its X (N, T, in) and D (N, T, out).

The gradient of sample i, ∇W ℓ_i = D_iᵀ X_i (out, in), is formed in pieces of up to `room` numbers,
never more than one module's in memory.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator

import torch
from torch import Tensor

from tsqlora import processes
from tsqlora.hooks import by_sample
from tsqlora.lora_layers import LoraModule, base_weight

OVERSAMPLING = 8
"""Columns of a sketch beyond the singular values that are wanted."""
NOUGHT = 1e-2
"""Below this part of the largest, float32 knows the vector of a singular value too badly."""


def weight_gradient(module: LoraModule, inputs: Tensor, gradients: Tensor, room: int) -> Tensor:
    """Σ_i Σ |W ⊙ ∇W ℓ_i|, as the dot product of |∇W ℓ_i| with |W|, rows of W by rows."""
    weight = base_weight(module.base)
    total = torch.zeros((), dtype=torch.float32, device=gradients.device).to(exact(gradients))
    rows = max(1, min(len(weight), room // (4 * weight.shape[1])))
    for start in range(0, len(weight), rows):
        block = weight[start : start + rows].to(gradients).abs().flatten()
        part = gradients[..., start : start + rows]
        for piece in _pieces(inputs, part, room - len(block)):
            total += (piece.abs_().flatten(1) @ block).sum(dtype=total.dtype)
    return total


def fisher(module: LoraModule, inputs: Tensor, gradients: Tensor, room: int) -> Tensor:
    """Σ_i Σ (∇W ℓ_i)², on the cheaper side.

    For few tokens Σ (DDᵀ) ⊙ (XXᵀ), which never forms ∇W (ghost norms, Li et al. 2022, arXiv
    2110.05679), else from ∇W itself.
    """
    tokens, (out, width) = inputs.shape[1], module.shape
    dtype = exact(gradients)
    total = torch.zeros((), dtype=dtype, device=gradients.device)
    if tokens * (out + width) < out * width and 2 * tokens**2 <= room:
        count = max(1, room // (2 * tokens**2))
        for d, x in zip(gradients.split(count), inputs.split(count), strict=True):
            inner = torch.bmm(d, d.transpose(1, 2))
            total += inner.mul_(torch.bmm(x, x.transpose(1, 2))).sum(dtype=dtype)
        return total
    rows = max(1, min(out, room // width))
    for start in range(0, out, rows):
        for piece in _pieces(inputs, gradients[..., start : start + rows], room):
            flat = piece.flatten()
            total += (flat @ flat).to(dtype)
    return total


def exact(like: Tensor) -> torch.dtype:
    """What sums of numbers like these are taken in."""
    return torch.float64 if like.dtype == torch.float64 else torch.float32


def _pieces(inputs: Tensor, gradients: Tensor, room: int) -> Iterator[Tensor]:
    """∇W by sample (n, rows, in), as many samples at once as fit; each overwrites the last."""
    size = gradients.shape[-1] * inputs.shape[-1]
    count = min(len(inputs), max(1, room // size))
    buffer = gradients.new_empty(count * size)
    for d, x in zip(gradients.split(count), inputs.split(count), strict=True):
        piece = buffer[: len(d) * size].view(len(d), d.shape[-1], x.shape[-1])
        yield torch.bmm(d.transpose(1, 2), x, out=piece)


class Direction:
    """A random direction v = a bᵀ in every module, of its own for every sample, a and b signs.

    E[v vᵀ] = I, so vᵀHv is Hutchinson's estimate of tr H, and neither v nor Hv is ever formed: the
    module's output moves by ε (x·b) a. Signs are a hash of seed, module, row of the data set and
    index: the same in whatever batch, or process, a sample comes.
    """

    def __init__(self, seed: int, positions: Tensor) -> None:
        self.seed, self.positions = seed, positions

    def signs(self, module: LoraModule, like: Tensor) -> tuple[Tensor, Tensor]:
        """a (N, out) and b (N, in)."""
        out, width = module.shape
        start = zlib.crc32(f"{self.seed}/{module.name}".encode())
        rows = self.positions.to(like.device)[:, None]
        columns = torch.arange(out + width, device=like.device)
        mixed = _mix(_mix(rows + start) + columns)
        both = ((mixed >> 17) & 1).mul(2).sub(1).to(like.dtype)
        return both[:, :out], both[:, out:]

    def move(
        self, module: LoraModule, entered: Tensor, output: Tensor, size: float, lengths: set[int]
    ) -> Tensor:
        """The module's output with W + size · v for W."""
        samples = len(self.positions)
        a, b = self.signs(module, output)
        along = by_sample(entered.to(output.dtype), samples, lengths) @ b[:, :, None]
        return output + (along * (size * a)[:, None]).view_as(output)

    def along(self, module: LoraModule, inputs: Tensor, gradients: Tensor) -> Tensor:
        """Σ_i ⟨v_i, ∇W ℓ_i⟩."""
        a, b = self.signs(module, gradients)
        products = (inputs @ b[:, :, None]) * (gradients @ a[:, :, None])
        return products.sum(dtype=exact(gradients))


def _mix(value: Tensor) -> Tensor:
    """A hash of 64-bit integers (the finaliser of MurmurHash3, its constants made positive)."""
    value = (value ^ ((value >> 33) & 0x7FFFFFFF)) * 0x7F51AFD7ED558CCD
    return (value ^ ((value >> 33) & 0x7FFFFFFF)) * 0x44CEB9FE1A85EC53


class MeanGradient:
    """A sketch of G = Σ_i ∇W ℓ_i (out, in), enough for its largest singular values and vectors.

    Y = GΩ (out, k) and Z = GᵀΨ (in, 2k + 1) with Ω, Ψ random, added up batch by batch, then
    G ≈ Q (ΨᵀQ)⁺ Zᵀ for Y = QR (Tropp et al. 2017, arXiv 1609.00048, algorithm 4). As many numbers
    as a LoRA adapter of rank 3k; a module that is smaller has its G added up itself. Convolutions
    of GPT-2 are linear modules here; embeddings and experts have no rank to plan, so no sketch.
    """

    def __init__(self, module: LoraModule, wanted: int, seed: int) -> None:
        self.wanted, self.shape = wanted, module.shape
        self.seed = zlib.crc32(f"{seed}/{module.name}/sketch".encode())
        self.width = wanted + OVERSAMPLING
        out, into = self.shape
        self.whole = self.width * out + (2 * self.width + 1) * into >= out * into
        self.parts: list[Tensor] = []

    def add(self, inputs: Tensor, gradients: Tensor) -> None:
        """One batch."""
        x, d = inputs.flatten(0, 1), gradients.flatten(0, 1)
        if self.whole:
            found = [d.T @ x]
        else:
            right, left = self._random(d)
            found = [d.T @ (x @ right), x.T @ (d @ left)]
        wide = [part.to(exact(part)) for part in found]
        if not self.parts:
            self.parts = wide
            return
        for total, part in zip(self.parts, wide, strict=True):
            total += part

    def unite(self) -> None:
        """Take in what the other processes have added; the same in all of them."""
        found = processes.gather([part.cpu() for part in self.parts])
        self.parts = [torch.stack(parts).sum(0) for parts in zip(*filter(None, found), strict=True)]

    def spectrum(self, samples: int) -> tuple[list[float], Tensor]:
        """Of the mean over so many samples: σ_1 ≥ σ_2 ≥ ..., and their right singular vectors.

        The vectors (at most `wanted`, in) are float32, of length 1, their largest entry positive;
        those of σ_j ≤ `NOUGHT` σ_1 mean nothing and are left out, as all are of a mean that is
        zero or not finite.
        """
        none = torch.zeros(0, self.shape[1])
        if not self.parts:
            return [0.0] * self.wanted, none
        parts = [part.double().cpu() / samples for part in self.parts]
        if not all(bool(part.isfinite().all()) for part in parts):
            return [math.nan] * self.wanted, none
        core = parts[0]
        if not self.whole:
            _, left = self._random(parts[0])
            q, _ = torch.linalg.qr(parts[0])
            core = torch.linalg.lstsq(left.T @ q, parts[1].T).solution
        _, values, vectors = torch.linalg.svd(core, full_matrices=False)
        values = values[: self.wanted]
        kept = vectors[: len(values)][values > NOUGHT * values[0]]
        largest = kept.gather(1, kept.abs().argmax(1, keepdim=True))
        return values.tolist(), (kept * largest.sign()).float()

    def _random(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Ω (in, k) and Ψ (out, 2k + 1), drawn again each time instead of kept."""
        generator = torch.Generator().manual_seed(self.seed)
        out, into = self.shape
        right = torch.randn(into, self.width, generator=generator)
        left = torch.randn(out, 2 * self.width + 1, generator=generator)
        return right.to(like), left.to(like)
