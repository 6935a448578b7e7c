"""Samples for requests of many adapters: our executor against `generate` on the same adapters and prompts."""

import random
from collections.abc import Callable

import msgspec

from tinkerbell.cli.bench import sample
from tinkerbell.cli.bench.cost import Cost, compare
from tinkerbell.cli.bench.options import Tell
from tinkerbell.cli.bench.ours import Ours
from tinkerbell.cli.bench.with_peft import WithPeft
from tinkerbell.cli.bench.workload import int32, tenants
from tinkerbell.errors import ServerError
from tinkerbell.executors.hf.model import locate
from tinkerbell.types import AdapterId

Prompts = list[tuple[AdapterId, bytes]]


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """What was found."""

    model: str
    costs: dict[str, Cost]
    same: dict[str, float]
    """Part of a variant's samples that equal ours."""


def measure(
    model: str,
    threads: int,
    num_requests: int,
    num_tokens: int,
    num_adapters: int,
    prompt_tokens: int,
    repeats: int,
    tell: Tell,
) -> Measured:
    """Load the models and let the variants take turns."""
    tell("loading the model", 0, 1)
    ours = Ours(model, threads)
    vocab_size = ours.info.vocab_size
    load = tenants("tiny", num_adapters, vocab_size)
    for number, tenant in enumerate(load):
        ours.create(tenant.adapter, tenant.lora, number)
    peft = WithPeft(locate(model), ours.states)
    noise = random.Random("prompts")
    prompts: Prompts = []
    for number in range(num_requests):
        length = noise.randint(max(1, prompt_tokens // 2), prompt_tokens * 3 // 2)
        prompts.append(
            (load[number % num_adapters].adapter, int32([noise.randrange(vocab_size) for _ in range(length)]))
        )
    variants: dict[str, Callable[[Prompts, int], list[bytes]]] = {
        sample.OURS: ours.sample,
        sample.ONE_BY_ONE: peft.generate_one_by_one,
        sample.BY_ADAPTER: peft.generate_by_adapter,
        sample.MIXED: peft.generate_mixed,
    }
    found: dict[str, list[bytes]] = {}
    turns = 0

    def recorded(name: str) -> Callable[[], None]:
        def call() -> None:
            found[name] = variants[name](prompts, num_tokens)

        return call

    def after(name: str) -> None:
        nonlocal turns
        turns += 1
        tell(name, turns, len(variants) * (repeats + 1))

    # What runs for the first time allocates and compiles; a short one first, untimed.
    for name in variants:
        variants[name](prompts, 1)
        after(name)
    costs = compare({name: recorded(name) for name in variants}, repeats, each_turn=after)
    for name, samples in found.items():
        if any(len(tokens) != 4 * num_tokens for tokens in samples):
            raise ServerError(f"`{name}` sampled fewer than {num_tokens} tokens: it cannot be compared")
    same = {
        name: sum(a == b for a, b in zip(samples, found[sample.OURS], strict=True)) / num_requests
        for name, samples in found.items()
    }
    return Measured(model=ours.info.name, costs=costs, same=same)
