"""Forward and backward of many tenants: our executor against PEFT, and against the GEMMs that cannot be saved."""

from collections.abc import Callable, Sequence

import msgspec

from tinkerbell.cli.bench import adamw
from tinkerbell.cli.bench.cost import Cost, compare
from tinkerbell.cli.bench.gemm import Gemms
from tinkerbell.cli.bench.ours import Ours, has_fast_mode
from tinkerbell.cli.bench.with_peft import WithPeft
from tinkerbell.cli.bench.workload import Tenant, tenants
from tinkerbell.errors import ServerError
from tinkerbell.executors.hf.model import locate

FUSED = "fused, exact"
FAST = "fused, fast"
ALONE = "ours, one at a time"
TURNS = "peft, taking turns"
PADDED = "peft, padded batches"
PADDED_512 = "peft, padded to 512"
LIMIT = "gemm limit"
PAD_TO = 512
CALLS = 3
"""Of a variant in a row, where they are short."""

SAME_LOSS = 1e-4
"""Largest relative difference between two variants' losses; the adapters change them by far more."""


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """One load and what each variant took for it."""

    length: str
    num_tenants: int
    num_tokens: int
    lora_token_weights: int
    """Sum over tokens of the parameters of the token's adapter."""
    costs: dict[str, Cost]
    """By variant."""


class Bench:
    """The models in memory and the adapters of up to `num_tenants` tenants."""

    def __init__(self, model: str, threads: int, num_tenants: int, *, fast: bool, padded_512: bool) -> None:
        self.exact = Ours(model, threads)
        for number, tenant in enumerate(tenants("tiny", num_tenants, self.exact.info.vocab_size)):
            self.exact.create(tenant.adapter, tenant.lora, number)
        self.peft = WithPeft(locate(model), self.exact.states)
        self.fast = Ours(model, threads, fast=True) if fast and has_fast_mode() else None
        if self.fast is not None:
            self.fast.load(self.exact.states)
        # Weights that were never read may still lie in their file: reading them is no part of a pass.
        self.peft.taking_turns(tenants("tiny", 1, self.exact.info.vocab_size))
        self._padded_512 = padded_512
        self.gemms = Gemms(self.peft.layers.values())
        """Measured at every turn of every cell."""

    def cell(self, length: str, num_tenants: int, repeats: int, tell: Callable[[str], object]) -> Cell:
        """Measure one load; `tell` is called with the name of a variant whenever it has had a turn."""
        load = tenants(length, num_tenants, self.exact.info.vocab_size)
        variants = self._variants(load)
        losses: dict[str, list[float]] = {}

        def recorded(name: str) -> Callable[[], None]:
            def call() -> None:
                losses[name] = variants[name](load)

            return call

        def after(name: str) -> None:
            if name == FUSED:
                self.gemms.measure()
            tell(name)

        costs = compare(
            {name: recorded(name) for name in variants}, repeats, calls=CALLS, fresh=self._drop_gradients,
            each_turn=after,
        )  # fmt: skip
        same_work(losses)
        return Cell(
            length=length,
            num_tenants=num_tenants,
            num_tokens=sum(tenant.num_tokens for tenant in load),
            lora_token_weights=sum(tenant.num_tokens * self.exact.num_parameters[tenant.adapter] for tenant in load),
            costs=costs,
        )

    def limit(self, cell: Cell) -> float:
        """CPU seconds its GEMMs take at the highest rate seen in this run."""
        return self.gemms.least_cpu_s(cell.num_tokens, cell.lora_token_weights)

    def optimizer_steps(self, num_adapters: int, repeats: int) -> adamw.Steps:
        """AdamW steps of the first tenants' adapters."""
        return adamw.measure(tenants("tiny", num_adapters, self.exact.info.vocab_size), self.peft.layers, repeats)

    def _drop_gradients(self) -> None:
        self.exact.reset()
        self.peft.reset()
        if self.fast is not None:
            self.fast.reset()

    def _variants(self, load: Sequence[Tenant]) -> dict[str, Callable[[Sequence[Tenant]], list[float]]]:
        found: dict[str, Callable[[Sequence[Tenant]], list[float]]] = {FUSED: self.exact.together}
        if self.fast is not None:
            found[FAST] = self.fast.together
        if len(load) > 1:
            found[ALONE] = self.exact.one_at_a_time
        found |= {TURNS: self.peft.taking_turns, PADDED: self.peft.padded}
        if self._padded_512:
            found[PADDED_512] = lambda load: self.peft.taking_turns(load, pad_to=PAD_TO)
        return found

    @property
    def num_variants(self) -> int:
        """At most, of one cell."""
        return 4 + (self.fast is not None) + self._padded_512


def same_work(losses: dict[str, list[float]]) -> None:
    """Raises ServerError where a variant computed something else: its time would say nothing."""
    for name, found in losses.items():
        for ours, theirs in zip(losses[FUSED], found, strict=True):
            if not abs(theirs - ours) <= SAME_LOSS * abs(ours):
                raise ServerError(f"`{name}` computes a loss of {theirs}, ours is {ours}: they cannot be compared")
