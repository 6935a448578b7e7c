"""Steps, digests and checkpoints of the HF executor, timed in turn."""

import hashlib
import itertools
from collections.abc import Callable
from pathlib import Path

import msgspec
import safetensors.torch

from tinkerbell.cli.bench import adamw
from tinkerbell.cli.bench.cost import Cost, compare
from tinkerbell.cli.bench.options import Tell
from tinkerbell.cli.bench.ours import Ours
from tinkerbell.cli.bench.recovery import CHECKPOINTS, DIGESTS, STEP
from tinkerbell.cli.bench.workload import tenants
from tinkerbell.events.blobs import BlobStore
from tinkerbell.executors.hf import optimizer
from tinkerbell.executors.hf.adapter import LinearShape
from tinkerbell.executors.port import AdapterState
from tinkerbell.scheduler.recovery import state_blobs
from tinkerbell.types import AdamParams


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """What was found."""

    model: str
    num_tokens: int
    """Of a cycle."""
    costs: dict[str, Cost]
    """Of a cycle of all tenants; checkpoints: one of each."""
    snapshot: Cost
    """Of the first tenant's."""
    snapshot_bytes: int


def measure(
    scratch: Path, model: str, threads: int, num_tenants: int, length: str, repeats: int, tell: Tell
) -> Measured:
    """Loads the model in this process; blobs go to `scratch`."""
    tell("loading the model", 0, 1)
    ours = Ours(model, threads)
    load = tenants(length, num_tenants, ours.info.vocab_size)
    for seed, tenant in enumerate(load):
        ours.create(tenant.adapter, tenant.lora, seed)
    twins = [adamw.adapter_of(tenant, _shapes(ours.states[tenant.adapter]), seed) for seed, tenant in enumerate(load)]
    gradients = [adamw.gradient_of(adapter, seed) for seed, adapter in enumerate(twins)]
    logprobs = [bytes(4 * tenant.num_tokens) for tenant in load]
    written = 0

    def steps() -> None:
        ours.step(load, AdamParams(learning_rate=1e-4))

    def digests() -> None:
        optimizer.hashed(twins, gradients)
        for each in logprobs:
            hashlib.sha256(each).hexdigest()

    def checkpoints() -> None:
        nonlocal written
        written += 1
        # A place of its own each time: what is there already would not be written again.
        store = BlobStore(scratch / str(written))
        for tenant in load:
            for blob in state_blobs(ours.executor.snapshot(tenant.adapter)).values():
                store.put(blob)

    first = load[0].adapter
    parts: dict[str, Callable[[], object]] = {
        STEP: steps,
        DIGESTS: digests,
        CHECKPOINTS: checkpoints,
        "snapshot": lambda: ours.executor.snapshot(first),
    }
    done = itertools.count(1)
    costs = compare(parts, repeats + 1, each_turn=lambda name: tell(name, next(done), (repeats + 1) * len(parts)))
    snapshot = costs.pop("snapshot")
    # A step as the executor takes it has its digests in it.
    costs[STEP].cpu_s -= costs[DIGESTS].cpu_s
    costs[STEP].wall_s -= costs[DIGESTS].wall_s
    return Measured(
        model=ours.info.name,
        num_tokens=sum(tenant.num_tokens for tenant in load),
        costs=costs,
        snapshot=snapshot,
        snapshot_bytes=sum(map(len, state_blobs(ours.executor.snapshot(first)).values())),
    )


def _shapes(state: AdapterState) -> dict[str, LinearShape]:
    """The layers an adapter sits on, by the names in its file."""
    tensors = safetensors.torch.load(state.weights)
    return {
        name.removesuffix(".lora_A.weight"): LinearShape(a.shape[1], tensors[name.replace("lora_A", "lora_B")].shape[0])
        for name, a in tensors.items()
        if name.endswith(".lora_A.weight")
    }
