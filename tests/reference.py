"""Slow, obvious versions of everything that the package does fast."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction
from itertools import pairwise

import torch
from torch import Tensor, nn

from tsqlora.lora_layers import LoraModule, base_weight, lora_modules
from tsqlora.losses import sample_losses
from tsqlora.per_sample_grads import PerSampleGradients

Batch = Mapping[str, Tensor]


def one_by_one(batch: Batch) -> list[dict[str, Tensor]]:
    """The samples of a batch, each as a batch of one."""
    return [{k: v[i : i + 1] for k, v in batch.items()} for i in range(len(batch["labels"]))]


def loss_of(model: nn.Module, kind: str, batch: Batch) -> Tensor:
    """The losses of a batch (N), by the model's own forward."""
    inputs = {k: v for k, v in batch.items() if k != "labels" or kind == "seq2seq"}
    return sample_losses(kind, model(**inputs).logits, batch["labels"])


def looped_gradients(model: nn.Module, kind: str, batch: Batch) -> list[dict[str, Tensor]]:
    """Every sample's factor gradients by a forward and backward of its own."""
    weights = PerSampleGradients(model).weights
    result = []
    for sample in one_by_one(batch):
        loss = loss_of(model, kind, sample).sum()
        found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        result.append(
            {
                name: torch.zeros_like(weight) if g is None else g
                for (name, weight), g in zip(weights.items(), found, strict=True)
            }
        )
    return result


def looped_lookahead(model: nn.Module, kind: str, batch: Batch, steps: Tensor) -> Tensor:
    """The loss of every sample after a real step on it alone, taken and taken back."""
    weights = PerSampleGradients(model).weights
    gradients = looped_gradients(model, kind, batch)
    losses = []
    for sample, own, step in zip(one_by_one(batch), gradients, steps, strict=True):
        before = {name: weight.detach().clone() for name, weight in weights.items()}
        with torch.no_grad():
            for name, weight in weights.items():
                weight.sub_(step * own[name])
            losses.append(loss_of(model, kind, sample).sum())
            for name, weight in weights.items():
                weight.copy_(before[name])
    return torch.stack(losses)


def looped_alignment(model: nn.Module, kind: str, batch: Batch, trusted: Batch) -> Tensor:
    """The cosine of every sample's gradient with the mean unit gradient of trusted samples."""

    def flat(which: Batch) -> Tensor:
        gradients = looped_gradients(model, kind, which)
        return torch.stack([torch.cat([g.flatten() for g in each.values()]) for each in gradients])

    mean = nn.functional.normalize(flat(trusted)).mean(0)
    return nn.functional.cosine_similarity(flat(batch), mean[None])


def looped_curvature(model: nn.Module, kind: str, batch: Batch) -> Tensor:
    """g_iᵀ H_i g_i of every sample, by a second backward."""
    weights = list(PerSampleGradients(model).weights.values())
    found = []
    for sample in one_by_one(batch):
        loss = loss_of(model, kind, sample).sum()
        first = torch.autograd.grad(loss, weights, create_graph=True)
        slope = sum((g * g.detach()).sum() for g in first)
        second = torch.autograd.grad(slope, weights)
        found.append(sum((h * g.detach()).sum() for h, g in zip(second, first, strict=True)))
    return torch.stack(found)


def sample_weight_gradients(model: nn.Module, kind: str, sample: Batch) -> dict[str, Tensor]:
    """∇W (out, in) of every target module, with the frozen weights really trainable."""
    modules = lora_modules(model)
    with_gradient(modules)
    loss = loss_of(model, kind, sample).sum()
    found = torch.autograd.grad(loss, [m.base.weight for m in modules], allow_unused=True)
    result = {}
    for module, gradient in zip(modules, found, strict=True):
        gradient = torch.zeros_like(module.base.weight) if gradient is None else gradient
        transposed = type(module.base).__name__ == "Conv1D"
        result[module.name] = gradient.T if transposed else gradient
    return result


def mean_gradients(model: nn.Module, kind: str, batch: Batch) -> dict[str, Tensor]:
    """E_i ∇W ℓ_i (out, in) of every target module, sample by sample."""
    totals: dict[str, Tensor] = {}
    samples = one_by_one(batch)
    for sample in samples:
        for name, gradient in sample_weight_gradients(model, kind, sample).items():
            totals[name] = totals.get(name, 0) + gradient / len(samples)
    return totals


def gram_schmidt(rows: Tensor, directions: Tensor, given: Sequence[int]) -> list[int]:
    """The directions of which rows and directions before hold at most half, by least squares."""
    found, there = [], list(rows)
    for number, direction in enumerate(directions):
        rest = direction
        if there:
            span = torch.stack(there).T
            rest = direction - span @ torch.linalg.lstsq(span, direction).solution
        if number not in given and rest.square().sum() >= 0.5:
            there.append(direction)
            found.append(number)
    return found


def looped_sensitivity(
    model: nn.Module, kind: str, batch: Batch, estimator: str
) -> dict[str, float]:
    """E_i Σ|W ⊙ ∇W ℓ_i| or E_i Σ ∇W²."""
    weights = {m.name: base_weight(m.base) for m in lora_modules(model)}
    totals = dict.fromkeys(weights, 0.0)
    samples = one_by_one(batch)
    for sample in samples:
        for name, gradient in sample_weight_gradients(model, kind, sample).items():
            product = (weights[name] * gradient).abs()
            term = product if estimator == "weight_gradient" else gradient.square()
            totals[name] += float(term.sum()) / len(samples)
    return totals


def exact_hessian_trace(model: nn.Module, kind: str, batch: Batch, module: LoraModule) -> float:
    """tr of the Hessian of Σ ℓ_i in one frozen weight, entry by entry, over N."""
    weight = module.base.weight
    weight.requires_grad_(True)
    loss = loss_of(model, kind, batch).sum()
    (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
    flat = gradient.flatten()
    trace = 0.0
    for i in range(len(flat)):
        (row,) = torch.autograd.grad(flat[i], weight, retain_graph=True)
        trace += float(row.flatten()[i])
    return trace / len(batch["labels"])


def with_gradient(modules: list[LoraModule]) -> None:
    """Make the frozen weights of the target modules trainable."""
    for module in modules:
        module.base.weight.requires_grad_(True)


def looped_allocation(
    worths: Mapping[str, Sequence[Fraction]],
    values: Mapping[str, float],
    costs: Mapping[str, int],
    caps: Mapping[str, int],
    budget: int,
) -> dict[str, int]:
    """The next rank to the largest worth, by looking at every module for every single rank."""
    ranks = dict.fromkeys(sorted(costs), 0)
    left = budget
    while True:
        able = [n for n in ranks if ranks[n] < caps[n] and costs[n] <= left]
        if not able:
            return ranks
        best = min(able, key=lambda n: (-worths[n][ranks[n]], ranks[n], -values[n], n))
        ranks[best] += 1
        left -= costs[best]


def dense_delta(module: LoraModule) -> Tensor:
    """scale · B A (out, in)."""
    return module.scale * module.b.weight @ module.a.weight


def looped_duplicates(
    texts: Sequence[Sequence[int]], targets: Sequence[object], threshold: float
) -> list[int]:
    """The group of every text, by comparing each with each: by J and by J with weights."""
    counted = [Counter([*text, *pairwise([None, *text, None])]) for text in texts]
    sets = [{(x, k) for x, n in c.items() for k in range(n)} for c in counted]
    holders = Counter((x, target) for s, target in zip(sets, targets, strict=True) for x in s)
    groups = list(range(len(texts)))
    for i, one in enumerate(sets):
        for j, other in enumerate(sets[:i]):
            weight = {x: math.log(1 + len(texts) / max(1, holders[x, targets[i]]))
                      for x in one | other}  # fmt: skip
            plain = len(one & other) / len(one | other)
            weighted = sum(map(weight.get, one & other)) / sum(weight.values())  # type: ignore[arg-type]
            if min(plain, weighted) >= threshold and targets[i] == targets[j]:
                groups = [groups[j] if group == groups[i] else group for group in groups]
    return groups


def inclusion_one_by_one(wanted: Sequence[float], groups: Sequence[int]) -> list[float]:
    """q_i = d_i / max(1, Σ d_j over the samples j of i's group)."""
    found = []
    for d, group in zip(wanted, groups, strict=True):
        total = sum(float(o) for o, g in zip(wanted, groups, strict=True) if g == group)
        found.append(float(d) / max(1.0, total))
    return found


def raised_one_by_one(
    shares: Sequence[float], classes: Sequence[int], floor: float, most: float
) -> list[float]:
    """min(most, max(1, floor · s / K / s_k)), the sums s_k taken for each sample anew."""
    found = []
    for own in classes:
        held = sum(s for s, other in zip(shares, classes, strict=True) if other == own)
        found.append(min(most, max(1.0, floor * sum(shares) / len(set(classes)) / held)))
    return found


def looped_mirror(pairs: list[tuple[float, float]]) -> list[float]:
    """c of `pairs.py` by the min-max formula of isotonic regression: of every run of targets that
    a target of |t| lies in, the share that costs more after its own input."""
    t = [(own - other) / (own + other) for own, other in pairs]
    order = sorted(range(len(t)), key=lambda i: abs(t[i]))
    above = [float(t[i] > 0) for i in order]
    found = [0.0] * len(t)
    for place, i in enumerate(order):
        share = min(
            max(
                sum(above[first : last + 1]) / (last + 1 - first)
                for last in range(place, len(order))
            )
            for first in range(place + 1)
        )
        share = min(share, 0.5)
        found[i] = 1 - share / (1 - share) if t[i] < 0 else 0.0
    return found


def looped_early_loss(visits: Sequence[Sequence[Sequence[float]]]) -> list[float]:
    """3 log(1 - <t, p>) of samples at their last visit, from the logits of all their visits."""
    found = []
    for logits in visits:
        belief = [0.0] * len(logits[0])
        for one in logits:
            raised = [math.exp(z - max(one)) for z in one]
            p = [min(max(e / sum(raised), 1e-4), 1 - 1e-4) for e in raised]
            p = [each / sum(p) for each in p]
            belief = [0.7 * t + 0.3 * each for t, each in zip(belief, p, strict=True)]
        agreed = sum(t * each for t, each in zip(belief, p, strict=True))
        found.append(3 * math.log(1 - agreed) if len(logits) > 3 else 0.0)
    return found
