"""One forward pass of the frozen model over rows that belong to many adapters.

How a pass is run:

    plan = Pass(
        bounds=(0, 40, 52, 117),                  # micro-batches: rows 0-39, 40-51, 52-116
        ranges=(RowRange(0, 40, adapter_a), RowRange(52, 117, adapter_b)),   # rows 40-51: base model alone
        attention=PackedCausal([25, 15, 12, 65]),  # any AttentionBackend; here four sequences
    )
    with torch.no_grad():                          # or with gradients, see RowRange.gradient
        hidden_TD = runtime.hidden(tokens_T, positions_T, plan)
        logits_NV = runtime.logits(hidden_TD[rows], head_plan)

- Every row of `[0, T)` is one token. All linear layers and rotary tables are computed separately for each interval of
  `bounds`, with the shape that interval has when it is alone, and so are activations where that decides bits: that
  makes the bits of a micro-batch independent of its company. Everything else in a decoder layer works on single rows.
- Or micro-batches share the products of linear layers: then `bounds` says where these are split (see `gemm`), and
  `micro_batches` where activations and rotary tables are.
- `ranges` says which adapter's LoRA is added to which rows: ascending, disjoint, not across a bound. Rows in no
  range see the base model.
- `attention` is called once per layer with rotated queries and keys of all T rows. A sampler passes its own
  backend to write a KV cache (prefill) or to read one (decode).
- `logits` takes the hidden rows that are wanted and a `Pass` over *those* rows (only its bounds and ranges are
  read), so that a LoRA on the unembedding is applied.

A pass is not reentrant and not thread-safe: `Runtime.current` is the pass in flight.

Shapes: T rows, N wanted rows, D hidden size, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from tinkerbell.executors.hf.adapter import Adapter, Buffer, LinearShape
from tinkerbell.executors.hf.attention import AttentionBackend, PackedCausal
from tinkerbell.executors.hf.gemm import Heights, in_whole_vectors
from tinkerbell.executors.hf.lora import MultiLoraLinear


@dataclass(frozen=True, slots=True)
class RowRange:
    """Rows [start, stop) belong to `adapter`."""

    start: int
    stop: int
    adapter: Adapter
    gradient: Buffer | None = None
    """Backward adds this range's LoRA gradients here; None: they are not computed."""


@dataclass(frozen=True, slots=True)
class Pass:
    """What the hooked layers need to know about the rows in flight; see the module."""

    bounds: tuple[int, ...]
    """0 = first < ... < last = T: where the products of linear layers are split."""
    ranges: tuple[RowRange, ...] = ()
    attention: AttentionBackend = field(default_factory=lambda: PackedCausal(()))
    micro_batches: tuple[int, ...] | None = None
    """Bounds of the micro-batches where they are not `bounds`, because products run over rows of several."""
    heights: Heights | None = None
    """Of products over rows of several micro-batches that leave them their bits; None: they are not shared so."""
    few_rows: bool = False
    """Reading the weights takes longer than multiplying them; there is no backward."""
    recompute: bool = False
    """Whether backward computes the inside of each decoder layer again instead of keeping it: the same bits."""

    @property
    def apart(self) -> tuple[int, ...]:
        """Bounds of the micro-batches: what must not mix whatever is computed together."""
        return self.micro_batches or self.bounds

    def vectors_apart(self, width: int) -> tuple[int, ...]:
        """Bounds of what a function of single numbers is applied to at a time, in rows of `width`: micro-batches where
        the number of rows decides which of them are in the remainder of a loop over vectors."""
        return (0, self.bounds[-1]) if in_whole_vectors(width) else self.apart

    @property
    def sizes(self) -> list[int]:
        """Rows of each micro-batch."""
        return [stop - start for start, stop in pairwise(self.apart)]

    def on(self, module: str) -> list[RowRange]:
        """The ranges whose adapter has a LoRA on `module`."""
        return [r for r in self.ranges if module in r.adapter.layout.shapes]


class Runtime:
    """The hooked model and the pass in flight. Built by `hooks.install`."""

    head: MultiLoraLinear
    """The unembedding."""
    shapes: dict[str, LinearShape]
    """Every layer a LoRA can sit on, by full module name, in the model's order."""
    heights: Heights
    """Of products over rows of several micro-batches."""

    def __init__(self, decoder: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
        """`decoder` maps input_ids [1, T] to hidden states; its hooked layers see this runtime."""
        self._decoder = decoder
        self.dtype = dtype
        """Of the frozen base model and of all activations."""
        self.device = device
        self.adapter_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        """fp32 master weights and moments whatever the base model's dtype (fp64 only for an fp64 base)."""
        self.anchor = torch.zeros((), device=self.device, requires_grad=True)
        """Requires a gradient, so that autograd records layers whose input does not."""
        self._current: Pass | None = None

    @property
    def current(self) -> Pass:
        """The pass in flight."""
        assert self._current is not None, "a hooked layer ran outside a pass"
        return self._current

    def weights(self) -> Iterator[Tensor]:
        """Of the frozen model, the unembedding included."""
        yield from self._decoder.parameters()
        yield self.head.weight

    def products(self) -> Literal["shared", "split"]:
        """How base products can run without changing bits, with the present number of threads; see packing."""
        return "shared" if self.heights.alike() else "split"

    @contextmanager
    def running(self, plan: Pass) -> Iterator[None]:
        """Make `plan` the pass in flight; again within itself is fine."""
        before = self._current
        assert before is None or before is plan, "a pass is already in flight"
        self._current = plan
        try:
            yield
        finally:
            self._current = before

    def hidden(self, tokens: Tensor, positions: Tensor, plan: Pass) -> Tensor:
        """[T, D] hidden states before the unembedding of tokens [T] int64 at positions [T] int64 in their sequences.

        A backward pass through the result must follow before the adapters of `plan` change.
        """
        assert tokens.shape[0] == plan.bounds[-1]
        with self.running(plan):
            output = self._decoder(input_ids=tokens[None], position_ids=positions[None], use_cache=False)
        hidden: Tensor = output.last_hidden_state[0]
        return hidden

    def logits(self, hidden: Tensor, plan: Pass) -> Tensor:
        """[N, V] logits of hidden rows [N, D] in the model's dtype; `plan` is over these N rows."""
        assert hidden.shape[0] == plan.bounds[-1]
        with self.running(plan):
            logits: Tensor = self.head(hidden)
        return logits
