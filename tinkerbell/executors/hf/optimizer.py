"""One AdamW step of one adapter, on its flat buffers.

Shapes: P parameters of the adapter.
"""

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from tinkerbell.executors.hf.adapter import Adapter
from tinkerbell.executors.hf.failures import NoGradients, NonFinite
from tinkerbell.types import AdamParams


@torch.no_grad()
def step(adapter: Adapter, adam: AdamParams) -> float:
    """Clip, apply and clear the accumulated gradient; returns its L2 norm before clipping.

    AdamW as torch.optim.AdamW does it (Loshchilov & Hutter 2017, arXiv 1711.05101, algorithm 2, weight decay
    multiplied by the learning rate), clipping as torch.nn.utils.clip_grad_norm_ does it:
    g <- g min(1, clip / (norm + 1e-6)).
    Raises NoGradients, or NonFinite with the adapter left as it was.
    """
    if adapter.gradient is None:
        raise NoGradients("there is no gradient: no forward_backward succeeded since the last optim_step")
    gradient = adapter.gradient.flat
    norm = torch.linalg.vector_norm(gradient, dtype=torch.float64)
    if not bool(torch.isfinite(norm)):
        raise NonFinite("the accumulated gradient is not finite")
    if adam.grad_clip_norm > 0:
        gradient = _clipped(gradient, norm, adam.grad_clip_norm)
    count = torch.tensor(float(adapter.step), device=adapter.device)
    adamw(
        [adapter.weights.flat], [gradient], [adapter.exp_avg.flat], [adapter.exp_avg_sq.flat], [], [count],
        fused=True, amsgrad=False, maximize=False,
        beta1=adam.beta1, beta2=adam.beta2, lr=adam.learning_rate, weight_decay=adam.weight_decay, eps=adam.eps,
    )  # fmt: skip
    adapter.step += 1
    adapter.gradient = None
    return float(norm.item())


def _clipped(gradient: Tensor, norm: Tensor, largest: float) -> Tensor:
    factor = torch.clamp(largest / (norm + 1e-6), max=1.0)
    return gradient * factor.to(gradient.dtype)
