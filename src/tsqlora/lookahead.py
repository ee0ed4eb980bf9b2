"""Δℓ_i = ℓ_i(θ) − ℓ_i(θ − η_i g_i): what each sample's own step would do to its own loss.

Exact: one further forward of the batch under `one_step`. Estimates, from the Taylor series along
the step: Δℓ_i ≈ η_i‖g_i‖² (`first_order`, free), less ½η_i² g_iᵀH_i g_i (`second_order`).
With η of a learning rate's size they rank as the exact one does; at a step of half a unit they do
not (`docs/choices.md`), so scores take the exact one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from tsqlora.per_sample_grads import Keep, PerSampleGradients


@contextmanager
def one_step(gradients: PerSampleGradients, kept: Keep, steps: Tensor) -> Iterator[None]:
    """Inside, every sample i sees the model at θ − steps_i·∇ℓ_i: its own step, for a whole batch.

    `kept` are the gradients of the batch, `steps` (N). A linear module then computes
    X_i (W − steps_i G_i)ᵀ, so one forward gives every sample's loss after its own step.
    """
    scale = steps.view(-1, 1, 1)
    deltas = {
        name: (name, scale * gradient, kept.columns.get(name))
        for name, gradient in kept.gradients.items()
    }
    with ExitStack() as stack:
        for site in gradients.sites.values():
            hook = site.moved(deltas, gradients.lengths)
            if hook is not None:
                stack.callback(site.module.register_forward_hook(hook).remove)
        for experts in gradients.experts:
            stack.enter_context(experts.moved(deltas))
        yield


def first_order(squared_norms: Tensor, steps: Tensor) -> Tensor:
    """η_i‖g_i‖² (N), from what the backward has already given."""
    return steps * squared_norms


NUDGE = 0.05
"""How far the small step goes that shows the curvature: far beside float32's rounding of a loss."""


def second_order(
    gradients: PerSampleGradients,
    kept: Keep,
    losses: Tensor,
    squared_norms: Tensor,
    steps: Tensor,
    forward: Callable[[], Tensor],
    nudge: float = NUDGE,
) -> Tensor:
    """a − b (N), a = η_i‖g_i‖², b = ½η_i² g_iᵀH_i g_i; where b > 0 as a²/(a + b).

    The two agree to second order (the second is the Padé approximant), but a loss that flattens out
    does not turn round as a parabola does.

    `forward` gives the batch's losses under the model as it then is. The curvature is
    2(ℓ_i(θ − εg_i) − ℓ_i + ε‖g_i‖²)/ε² with ε‖g_i‖ = `nudge`. It costs one forward whatever η is,
    so one pass serves any number of step sizes; for a single one, `one_step` costs the same and is
    exact. (Forward-mode differentiation would be two forwards, and fused attention lacks it.)
    """
    small = nudge / squared_norms.sqrt().clamp(min=1e-12)
    with torch.no_grad(), one_step(gradients, kept, small):
        nudged = forward()
    half_curvature = (nudged - losses + small * squared_norms) / small.square()
    slope, bend = steps * squared_norms, steps.square() * half_curvature
    return torch.where(bend > 0, slope.square() / (slope + bend), slope - bend)
