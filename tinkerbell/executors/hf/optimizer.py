"""One AdamW step of one adapter, on its flat buffers.

Shapes: P parameters of the adapter.
"""

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from tinkerbell.executors.hf.adapter import Adapter
from tinkerbell.executors.hf.failures import NoGradients, NonFinite
from tinkerbell.types import AdamParams

_HARMLESS = 1e18
"""Below it a gradient's square and a weight's decay stay finite in fp32."""


@torch.no_grad()
def step(adapter: Adapter, adam: AdamParams) -> float:
    """Clip, apply and clear the accumulated gradient; returns its L2 norm before clipping.

    AdamW as torch.optim.AdamW does it (Loshchilov & Hutter 2017, arXiv 1711.05101, algorithm 2, weight decay
    multiplied by the learning rate), clipping as torch.nn.utils.clip_grad_norm_ does it:
    g <- g min(1, clip / (norm + 1e-6)).
    Raises NoGradients; NonFinite where the gradient or the new weights are not finite: weights, moments and step
    count are then as they were, and the gradient is dropped, since no later sum could be finite.
    """
    if adapter.gradient is None:
        raise NoGradients("there is no gradient: no forward_backward succeeded since the last optim_step")
    gradient = adapter.gradient.flat
    adapter.gradient = None
    norm = torch.linalg.vector_norm(gradient, dtype=torch.float64)
    if not bool(torch.isfinite(norm)):
        raise NonFinite("the accumulated gradient is not finite; it was dropped, the weights are as they were")
    if adam.grad_clip_norm > 0:
        gradient = _clipped(gradient, norm, adam.grad_clip_norm)
    state = [adapter.weights.flat, adapter.exp_avg.flat, adapter.exp_avg_sq.flat]
    # A copy of everything costs more than the step, so it is made only where the step could overflow.
    risky = float(norm) > _HARMLESS or any(float(torch.linalg.vector_norm(x, torch.inf)) > _HARMLESS for x in state)
    before = [x.clone() for x in state] if risky else []
    count = torch.tensor(float(adapter.step), device=adapter.device)
    adamw(
        [state[0]], [gradient], [state[1]], [state[2]], [], [count],
        fused=True, amsgrad=False, maximize=False,
        beta1=adam.beta1, beta2=adam.beta2, lr=adam.learning_rate, weight_decay=adam.weight_decay, eps=adam.eps,
    )  # fmt: skip
    if before and not all(bool(torch.isfinite(x).all()) for x in state):
        for x, old in zip(state, before, strict=True):
            x.copy_(old)
        raise NonFinite("this step would make weights that are not finite; the gradient was dropped")
    adapter.step += 1
    return float(norm.item())


def _clipped(gradient: Tensor, norm: Tensor, largest: float) -> Tensor:
    factor = torch.clamp(largest / (norm + 1e-6), max=1.0)
    return gradient * factor.to(gradient.dtype)
