"""One adapter of yours on a server, for synchronous programs."""

import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, Unpack

from tinkerbell import wire
from tinkerbell.sdk import calls
from tinkerbell.sdk.calls import Call
from tinkerbell.sdk.future import Future
from tinkerbell.sdk.settings import Adam, Outputs, Sampling

if TYPE_CHECKING:
    from tinkerbell.sdk.client import Client

R = TypeVar("R")


class Adapter:
    """Handle of an adapter. Requests run in the order of the calls: a call returns as soon as its request
    is in the server's log, without waiting for the answer, so forward_backward and optim_step can both be
    on their way.

    Threads may share a handle; their calls are then accepted one after another, in whichever order they come.
    """

    def __init__(self, client: "Client", id: str) -> None:
        self._client = client
        self.id = id
        self._turn = threading.Lock()

    def forward_backward(
        self,
        data: Sequence[wire.DatumBody],
        loss: str = "cross_entropy",
        config: Mapping[str, float] | None = None,
        num_targets: int = 1,
    ) -> Future[wire.ForwardBackwardResult]:
        """Add the gradient of the loss, summed over all tokens of `data`, to the adapter's.

        `config` holds settings of the loss, e.g. {"clip_low_threshold": 0.8} for ppo. With `num_targets` K, targets,
        loss inputs and the logprobs of the answer are [N, K] for N tokens, row after row.
        """
        return self._ask(calls.forward_backward(self.id, data, loss, config, num_targets), wire.ForwardBackwardResult)

    def forward(
        self,
        data: Sequence[wire.DatumBody],
        loss: str = "cross_entropy",
        config: Mapping[str, float] | None = None,
        num_targets: int = 1,
        **outputs: Unpack[Outputs],
    ) -> Future[wire.ForwardBackwardResult]:
        """Loss and logprobs, no gradient; and of each token's distribution what `outputs` asks for, e.g.
        entropy=True, top_k=5, logits=True. They are in the result's `outputs`, one entry for each datum."""
        return self._ask(calls.forward(self.id, data, loss, config, num_targets, outputs), wire.ForwardBackwardResult)

    def optim_step(self, **settings: Unpack[Adam]) -> Future[wire.OptimStepResult]:
        """Apply the accumulated gradient with AdamW, and clear it."""
        return self._ask(calls.optim_step(self.id, settings), wire.OptimStepResult)

    def sample(self, prompt: Sequence[int] | str, **settings: Unpack[Sampling]) -> Future[wire.SampleResult]:
        """Continue a prompt with the weights this adapter has after the calls made before.

        A string is encoded by `client.tokenizer()` as it stands, without a chat template.
        """
        return self._ask(calls.sample(self.id, self._client.encode(prompt), settings), wire.SampleResult)

    def save(self, name: str | None = None, *, overwrite: bool = False) -> Future[wire.SaveResult]:
        """Keep weights and optimizer as a checkpoint. A name is the adapter's only one, unless it may `overwrite`."""
        return self._ask(calls.save(self.id, name, overwrite), wire.SaveResult)

    def load(
        self, checkpoint: str | wire.Checkpoint | wire.SaveResult, with_optimizer: bool = True
    ) -> Future[wire.LoadResult]:
        """Put a checkpoint in the adapter's place; without the optimizer its moments and step count start
        anew."""
        return self._ask(calls.load(self.id, checkpoint_id(checkpoint), with_optimizer), wire.LoadResult)

    def remove(self) -> Future[wire.RemoveLoraResult]:
        """Drop the adapter from the server's memory, after what was asked before. Its checkpoints stay."""
        return self._ask(calls.remove_lora(self.id), wire.RemoveLoraResult)

    def info(self) -> wire.Adapter:
        """What the server knows of it now."""
        return self._client.do(calls.adapter(self.id))

    def run(self, after_step: int = 0) -> wire.Run:
        """Its history: one point for each optimizer step after `after_step`, the first 1000 of them."""
        return self._client.do(calls.run(self.id, after_step))

    def checkpoints(self) -> list[wire.Checkpoint]:
        """Its checkpoints, oldest first."""
        return self._client.checkpoints(self.id)

    def _ask(self, call: Call[wire.Future], kind: type[R]) -> Future[R]:
        with self._turn:
            return Future[Any](self._client, self._client.do(call), kind)

    def __repr__(self) -> str:
        return f"<Adapter {self.id}>"


def checkpoint_id(checkpoint: str | wire.Checkpoint | wire.SaveResult) -> str:
    """The id of whatever names a checkpoint."""
    if isinstance(checkpoint, wire.Checkpoint):
        return checkpoint.id
    return checkpoint.checkpoint_id if isinstance(checkpoint, wire.SaveResult) else checkpoint
