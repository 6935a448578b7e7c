"""AdamW steps of the adapters of one cycle, on their flat buffers, each with its own settings.

An adapter's bits do not depend on the others: nothing is ever summed over two adapters.

Shapes: P parameters of one adapter.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from tinkerbell.errors import NotFound, UserError
from tinkerbell.executors.hf.adapter import Adapter, Buffer, Digests
from tinkerbell.executors.hf.failures import NoGradients, NonFinite, failed
from tinkerbell.executors.port import OptimStep, OptimStepDone, UnitFailed
from tinkerbell.executors.progress import mark
from tinkerbell.types import AdamParams, AdapterId

_HARMLESS = 1e18
"""Below it a gradient's square and a weight's decay stay finite in fp32."""
_NEGLIGIBLE = 1e-12
"""Above it no element that matters to a norm has a square that vanishes in fp32."""
_NORM_ELEMENTS = 1024
"""Added up in fp32 at a time: the sum's relative error is then about 1e-9, of all P at once it is about 1e-4."""


@dataclass(frozen=True, slots=True)
class _Ready:
    """An adapter whose step can be taken."""

    adapter: Adapter
    gradient: Tensor
    """[P] after clipping."""
    norm: float
    """L2, before clipping."""
    before: tuple[Tensor, ...]
    """Copies of its state where the step could overflow, else empty: they cost more than the step."""
    count: Tensor
    """[] optimizer steps so far; the kernel adds one."""


def run(units: Sequence[OptimStep], adapters: Mapping[AdapterId, Adapter]) -> list[OptimStepDone | UnitFailed]:
    """Answers in the order of `units`. A unit that fails leaves the others untouched."""
    known = [index for index, unit in enumerate(units) if unit.adapter in adapters]
    # A step takes the gradient from its adapter and leaves its bytes as they are.
    gradients = {index: adapters[units[index].adapter].gradient for index in known}
    taken = steps([(adapters[units[index].adapter], units[index].adam) for index in known])
    outcomes = dict(zip(known, taken, strict=True))
    # After all steps: a second unit of one adapter finds no gradient, so it cannot have changed what is hashed.
    done = [index for index in known if isinstance(outcomes[index], float)]
    applied = [gradient for index in done if (gradient := gradients[index]) is not None]
    found, hashes_found = hashed([adapters[units[index].adapter] for index in done], applied)
    states, hashes = dict(zip(done, found, strict=True)), dict(zip(done, hashes_found, strict=True))
    answers: list[OptimStepDone | UnitFailed] = []
    for index, unit in enumerate(units):
        outcome = outcomes.get(index, NotFound(f"this executor has no adapter {unit.adapter}"))
        if isinstance(outcome, UserError):
            answers.append(failed(unit.request, outcome))
        else:
            answers.append(
                OptimStepDone(
                    request=unit.request, step=adapters[unit.adapter].step, grad_norm=outcome,
                    state_digest=states[index].state, weights_digest=states[index].weights,
                    gradient_digest=hashes[index],
                )
            )  # fmt: skip
    return answers


def step(adapter: Adapter, adam: AdamParams) -> float:
    """`steps` of one adapter; raises what that would return."""
    (outcome,) = steps([(adapter, adam)])
    if isinstance(outcome, UserError):
        raise outcome
    return outcome


@torch.no_grad()
def steps(cycle: Sequence[tuple[Adapter, AdamParams]]) -> list[float | UserError]:
    """Clip, apply and clear the accumulated gradient of each; its L2 norm before clipping, or why there was no step.

    AdamW as torch.optim.AdamW does it (Loshchilov & Hutter 2017, arXiv 1711.05101, algorithm 2, weight decay
    multiplied by the learning rate), clipping as torch.nn.utils.clip_grad_norm_ does it:
    g <- g min(1, clip / (norm + 1e-6)).
    NoGradients where there is none; NonFinite where the gradient or the new weights are not finite: weights, moments
    and step count are then as they were, and the gradient is dropped, since no later sum could be finite.
    """
    outcomes: list[float | UserError] = []
    ready: dict[AdamParams, list[tuple[int, _Ready]]] = {}
    for place, (adapter, adam) in enumerate(cycle):
        mark()
        try:
            prepared = _prepare(adapter, adam)
        except UserError as exc:
            outcomes.append(exc)
        else:
            outcomes.append(prepared.norm)
            ready.setdefault(adam, []).append((place, prepared))
    for adam, group in ready.items():
        _apply([prepared for _, prepared in group], adam)
        for place, prepared in group:
            if _restored(prepared):
                text = "this step would make weights that are not finite; the gradient was dropped"
                outcomes[place] = NonFinite(text)
            else:
                prepared.adapter.step += 1
    return outcomes


def digests(adapters: Sequence[Adapter]) -> list[str]:
    """`Adapter.digest` of each."""
    return [found.state for found in hashed(adapters, ())[0]]


def hashed(adapters: Sequence[Adapter], gradients: Sequence[Buffer]) -> tuple[list[Digests], list[str]]:
    """`Adapter.digests` and `Buffer.digest` of each, as many at a time as torch has threads: hashing takes longer than
    the steps."""
    workers = min(len(adapters) + len(gradients), torch.get_num_threads())
    if workers < 2:
        return [adapter.digests() for adapter in adapters], [gradient.digest() for gradient in gradients]
    # Largest first, so that the last one to end is a small one; a gradient is a third of its adapter's state.
    of_adapters = sorted(range(len(adapters)), key=lambda index: -adapters[index].layout.num_parameters)
    of_gradients = sorted(range(len(gradients)), key=lambda index: -gradients[index].flat.numel())
    with ThreadPoolExecutor(workers, thread_name_prefix="digest") as pool:
        states = {index: pool.submit(adapters[index].digests) for index in of_adapters}
        hashes = {index: pool.submit(gradients[index].digest) for index in of_gradients}
    return (
        [states[index].result() for index in range(len(adapters))],
        [hashes[index].result() for index in range(len(gradients))],
    )


def gradient_norm(gradient: Tensor) -> float:
    """L2 norm of [P], to about 1e-9 relative; not finite where an element is not."""
    whole = gradient.numel() // _NORM_ELEMENTS * _NORM_ELEMENTS
    parts = torch.linalg.vector_norm(gradient[:whole].view(-1, _NORM_ELEMENTS), dim=1)
    rest = torch.linalg.vector_norm(gradient[whole:])
    norm = float(torch.linalg.vector_norm(torch.cat([parts, rest[None]]), dtype=torch.float64))
    if _NEGLIGIBLE < norm < _HARMLESS:
        return norm
    # Squares may have left the range of fp32, or something is not finite.
    return float(torch.linalg.vector_norm(gradient, dtype=torch.float64))


def _prepare(adapter: Adapter, adam: AdamParams) -> _Ready:
    """Takes the gradient from the adapter. Raises NoGradients or NonFinite."""
    if adapter.gradient is None:
        raise NoGradients("there is no gradient: no forward_backward succeeded since the last optim_step")
    gradient = adapter.gradient.flat
    adapter.gradient = None
    norm = gradient_norm(gradient)
    if not norm < float("inf"):
        raise NonFinite("the accumulated gradient is not finite; it was dropped, the weights are as they were")
    if adam.grad_clip_norm > 0 and norm + 1e-6 > adam.grad_clip_norm:
        gradient = gradient * (adam.grad_clip_norm / (norm + 1e-6))
    state = _state(adapter)
    risky = norm > _HARMLESS or any(_largest(x) > _HARMLESS for x in state)
    before = tuple(x.clone() for x in state) if risky else ()
    count = torch.tensor(float(adapter.step), device=adapter.device)
    return _Ready(adapter, gradient, norm, before, count)


def _apply(group: Sequence[_Ready], adam: AdamParams) -> None:
    """One call for all adapters with the same settings; the kernel goes tensor by tensor."""
    weights, exp_avg, exp_avg_sq = (list(column) for column in zip(*(_state(r.adapter) for r in group), strict=True))
    adamw(
        weights, [r.gradient for r in group], exp_avg, exp_avg_sq, [], [r.count for r in group],
        fused=True, amsgrad=False, maximize=False,
        beta1=adam.beta1, beta2=adam.beta2, lr=adam.learning_rate, weight_decay=adam.weight_decay, eps=adam.eps,
    )  # fmt: skip


def _restored(ready: _Ready) -> bool:
    """Whether the step had to be taken back."""
    state = _state(ready.adapter)
    if not ready.before or all(bool(torch.isfinite(x).all()) for x in state):
        return False
    for x, old in zip(state, ready.before, strict=True):
        x.copy_(old)
    return True


def _state(adapter: Adapter) -> tuple[Tensor, Tensor, Tensor]:
    return adapter.weights.flat, adapter.exp_avg.flat, adapter.exp_avg_sq.flat


def _largest(x: Tensor) -> float:
    """The largest absolute value; one pass and no copy, other than vector_norm."""
    low, high = torch.aminmax(x)
    return max(-float(low), float(high))
