"""AdamW steps of several adapters: our flat buffers against torch.optim.AdamW on their tensors."""

from collections.abc import Sequence

import msgspec
import torch

from tinkerbell.cli.bench.cost import Cost, compare
from tinkerbell.cli.bench.workload import Tenant
from tinkerbell.executors.hf import optimizer
from tinkerbell.executors.hf.adapter import Adapter, Buffer, LinearShape, target_shapes
from tinkerbell.types import AdamParams

TOGETHER = "all in one call"
EACH = "one adapter at a time"
LOOP = "torch.optim.AdamW, for-loop"
FUSED = "torch.optim.AdamW, fused"
DIGESTS = "sha256 of all states"
CHECKED_STEPS = 3


class Steps(msgspec.Struct, frozen=True, kw_only=True):
    """What one step of all adapters took."""

    num_adapters: int
    num_parameters: int
    num_tensors: int
    costs: dict[str, Cost]
    same_bits: bool
    """Whether steps in one call leave what steps of one adapter at a time leave."""


def measure(load: Sequence[Tenant], shapes: dict[str, LinearShape], repeats: int) -> Steps:
    """Adapters of the tenants in `load` on a model with linear layers of `shapes`, on the CPU."""
    adapters = [adapter_of(tenant, shapes, seed) for seed, tenant in enumerate(load)]
    gradients = [gradient_of(adapter, seed) for seed, adapter in enumerate(adapters)]
    settings = [AdamParams(learning_rate=1e-4 * (1 + number % 2)) for number in range(len(adapters))]
    cycle = list(zip(adapters, settings, strict=True))
    theirs = {
        name: [_torch_adamw(*triple, fused) for triple in zip(adapters, settings, gradients, strict=True)]
        for name, fused in ((LOOP, False), (FUSED, True))
    }

    def together() -> None:
        _give(adapters, gradients)
        optimizer.steps(cycle)

    def each() -> None:
        _give(adapters, gradients)
        for adapter, adam in cycle:
            optimizer.step(adapter, adam)

    def torch_steps(name: str) -> None:
        for each_optimizer in theirs[name]:
            each_optimizer.step()

    costs = compare(
        {
            TOGETHER: together,
            EACH: each,
            LOOP: lambda: torch_steps(LOOP),
            FUSED: lambda: torch_steps(FUSED),
            DIGESTS: lambda: optimizer.digests(adapters),
        },
        repeats,
    )
    return Steps(
        num_adapters=len(adapters),
        num_parameters=sum(adapter.layout.num_parameters for adapter in adapters),
        num_tensors=sum(2 * len(adapter.layout.shapes) for adapter in adapters),
        costs=costs,
        same_bits=_same_bits(load, shapes, gradients, settings),
    )


def _same_bits(
    load: Sequence[Tenant],
    shapes: dict[str, LinearShape],
    gradients: Sequence[Buffer],
    settings: Sequence[AdamParams],
) -> bool:
    digests = []
    for together in (True, False):
        adapters = [adapter_of(tenant, shapes, seed) for seed, tenant in enumerate(load)]
        cycle = list(zip(adapters, settings, strict=True))
        for _ in range(CHECKED_STEPS):
            _give(adapters, gradients)
            for part in [cycle] if together else [[pair] for pair in cycle]:
                optimizer.steps(part)
        digests.append(optimizer.digests(adapters))
    return digests[0] == digests[1]


def adapter_of(tenant: Tenant, shapes: dict[str, LinearShape], seed: int) -> Adapter:
    """Like a tenant's, fresh, on the CPU."""
    adapter = Adapter(tenant.lora, target_shapes(tenant.lora, shapes), torch.float32, torch.device("cpu"))
    adapter.initialise(seed)
    return adapter


def gradient_of(adapter: Adapter, seed: int) -> Buffer:
    """Noise of the adapter's layout."""
    gradient = adapter.new_buffer()
    gradient.flat.normal_(generator=torch.Generator().manual_seed(seed))
    return gradient


def _give(adapters: Sequence[Adapter], gradients: Sequence[Buffer]) -> None:
    for adapter, gradient in zip(adapters, gradients, strict=True):
        adapter.gradient = gradient


def _torch_adamw(adapter: Adapter, adam: AdamParams, gradient: Buffer, fused: bool) -> torch.optim.AdamW:
    parameters = []
    for name, pair in adapter.weights.pairs.items():
        for weight, its_gradient in zip(pair, gradient.pairs[name], strict=True):
            parameter = torch.nn.Parameter(weight.clone())
            parameter.grad = its_gradient.clone()
            parameters.append(parameter)
    return torch.optim.AdamW(
        parameters, lr=adam.learning_rate, betas=(adam.beta1, adam.beta2), eps=adam.eps,
        weight_decay=adam.weight_decay, foreach=False, fused=fused,
    )  # fmt: skip
