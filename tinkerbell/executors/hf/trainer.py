"""Runs ForwardBackward units: many micro-batches in one packed pass, one answer and one gradient each."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby

import torch
from torch import Tensor

from tinkerbell.errors import NotFound, UserError
from tinkerbell.executors.hf.adapter import Adapter, Buffer
from tinkerbell.executors.hf.failures import NonFinite, failed, out_of_memory
from tinkerbell.executors.hf.head import target_logprobs, wide
from tinkerbell.executors.hf.head_outputs import Rows, Sweep
from tinkerbell.executors.hf.memory import activation_bytes_per_token
from tinkerbell.executors.hf.packing import PACK_TOKENS, MicroBatch, Products, column, micro_batch, packs, plan
from tinkerbell.executors.hf.runtime import Runtime
from tinkerbell.executors.meter import Meter
from tinkerbell.executors.port import ForwardBackward, ForwardBackwardDone, UnitFailed
from tinkerbell.losses.registry import LossValue, evaluate
from tinkerbell.types import AdapterId, ModelInfo

LEAST_TOKENS = 128
"""A pack of fewer costs more time for each token than keeping fewer activations does."""

log = logging.getLogger(__name__)

Answer = ForwardBackwardDone | UnitFailed


@dataclass(slots=True)
class _OpenRequest:
    """A request of which some chunks have run."""

    request: int
    gradient: Buffer | None = None
    """Sum over its chunks so far."""
    failure: UnitFailed | None = None
    """Of its first chunk that failed."""


@dataclass(slots=True)
class _Entry:
    """One unit of a run, on its way to its answer."""

    unit: ForwardBackward
    batch: MicroBatch | None = None
    """None where the unit was not acceptable."""
    answer: Answer | None = None


class Trainer:
    """Forward and backward for the adapters of one runtime."""

    def __init__(
        self,
        runtime: Runtime,
        info: ModelInfo,
        adapters: dict[AdapterId, Adapter],
        pack_tokens: int = PACK_TOKENS,
        *,
        exact: bool = True,
        activation_bytes: int | None = None,
    ) -> None:
        """`adapters` is the executor's own mapping, which adds and removes. `exact`: a micro-batch has the same bits
        in any company; otherwise base products run over whole packs, which is faster for short ones.
        `activation_bytes`: packs get smaller so that their activations stay below it, but not below LEAST_TOKENS; those
        that do not fit then, keep only the input of each layer."""
        self._exact = exact
        self._runtime = runtime
        self._info = info
        self._adapters = adapters
        self._max_kept_tokens: int | None = None
        """Packs with more have their activations computed again in backward."""
        if activation_bytes is not None:
            self._max_kept_tokens = activation_bytes // activation_bytes_per_token(runtime)
            pack_tokens = min(pack_tokens, max(LEAST_TOKENS, self._max_kept_tokens))
        self._pack_tokens = pack_tokens
        self._open: dict[AdapterId, _OpenRequest] = {}
        self._meter = Meter()
        """Of the run in progress."""

    def products(self) -> Products:
        """How base products run, with the present number of threads."""
        return self._runtime.products() if self._exact else "whole"

    def forget(self, adapter: AdapterId) -> None:
        """Drop what an unfinished request of the adapter left."""
        self._open.pop(adapter, None)

    def run(self, units: Sequence[ForwardBackward], meter: Meter | None = None) -> list[Answer]:
        """Answers in the order of `units`, which has the chunks of each adapter in request order.

        A finished request's gradient is added to its adapter's. A failed unit leaves its adapter as it was and
        the other units untouched. `meter` is told what belongs to one unit alone: its loss, what it wants answered, and
        its gradient.
        """
        self._meter = meter or Meter()
        entries = [self._entry(unit) for unit in units]
        # In order: chunks of an adapter's next request may not be settled before those of this one.
        for backward, group in groupby(entries, key=lambda entry: entry.unit.backward):
            self._run_group(list(group), backward)
        answers = [entry.answer for entry in entries]
        return [answer for answer in answers if answer is not None]

    def _entry(self, unit: ForwardBackward) -> _Entry:
        adapter = self._adapters.get(unit.adapter)
        try:
            if adapter is None:
                raise NotFound(f"this executor has no adapter {unit.adapter}")
            return _Entry(unit, micro_batch(unit, adapter, self._info, self._runtime.device))
        except UserError as exc:
            return _Entry(unit, answer=failed(unit.request, exc))

    def _run_group(self, entries: list[_Entry], backward: bool) -> None:
        """Pack after pack; each is settled at once, so that gradients of one pack at a time are held."""
        settled = 0
        for pack in packs([entry.batch for entry in entries if entry.batch is not None], self._pack_tokens):
            answers = iter(self._run_pack(pack, backward))
            remaining = len(pack)
            while remaining:
                entry = entries[settled]
                if entry.batch is not None:
                    entry.answer = next(answers)
                    remaining -= 1
                self._settle(entry)
                settled += 1
        for entry in entries[settled:]:
            self._settle(entry)

    def _run_pack(self, pack: list[MicroBatch], backward: bool, recompute: bool = False) -> list[Answer]:
        """Run together; if that raises, each by itself, so that only the culprit fails; where memory did not suffice
        for one, once more with less."""
        try:
            return self._compute(pack, backward, recompute)
        except Exception as exc:
            log.exception("a pack failed: requests %s", [batch.unit.request for batch in pack])
            for batch in pack:
                batch.gradient = None
            failure = exc
        if out_of_memory(failure) and self._runtime.device.type == "cuda":
            torch.cuda.empty_cache()
        if len(pack) == 1 and backward and not recompute and out_of_memory(failure):
            return self._run_pack(pack, backward, recompute=True)
        if len(pack) == 1:
            return [failed(pack[0].unit.request, failure)]
        return [answer for batch in pack for answer in self._run_pack([batch], backward)]

    def _compute(self, pack: list[MicroBatch], backward: bool, recompute: bool) -> list[Answer]:
        for batch in pack:
            with self._meter.of(batch.unit):
                batch.gradient = batch.adapter.new_buffer() if backward else None
        rows = plan(pack, self.products(), self._runtime.heights)
        num_rows = rows.bounds[-1]
        if recompute or (self._max_kept_tokens is not None and num_rows > self._max_kept_tokens):
            rows = replace(rows, recompute=True)
        with torch.set_grad_enabled(backward):
            hidden = self._runtime.hidden(
                column([batch.tokens for batch in pack], num_rows),
                column([batch.positions for batch in pack], num_rows),
                rows,
            )
            targets = [batch.targets for batch in pack]
            wanted = self._outputs(pack, hidden)
            observer = partial(Sweep, [found for found in wanted if found is not None]) if any(wanted) else None
            logprobs = target_logprobs(self._runtime, hidden, targets, rows, observer)
        parts = torch.split(logprobs.detach(), [batch.targets.numel() for batch in pack])
        values: list[LossValue | UnitFailed] = []
        for batch, part in zip(pack, parts, strict=True):
            with self._meter.of(batch.unit):
                values.append(_evaluate(batch, part))
        if backward and any(isinstance(value, LossValue) for value in values):
            upstream = [
                value.gradient if isinstance(value, LossValue) else torch.zeros_like(part)
                for value, part in zip(values, parts, strict=True)
            ]
            torch.autograd.backward(logprobs, torch.cat(upstream))
        answers: list[Answer] = []
        for batch, value, part, outputs in zip(pack, values, parts, wanted, strict=True):
            with self._meter.of(batch.unit):
                answers.append(_answer(batch, value, part, outputs))
            self._meter.add(batch.unit, 0.0 if outputs is None else outputs.took_ns)
        return answers

    def _outputs(self, pack: list[MicroBatch], hidden: Tensor) -> list[Rows | None]:
        """Room for the outputs of each micro-batch that wants any."""
        like = hidden.new_empty(0, dtype=wide(hidden.dtype))
        found: list[Rows | None] = []
        start = 0
        for batch in pack:
            stop = start + batch.num_tokens
            spec = batch.unit.outputs
            found.append(None if spec is None else Rows(start, stop, spec, self._info.vocab_size, like))
            start = stop
        return found

    def _settle(self, entry: _Entry) -> None:
        """Let the unit take effect, in request order: chunks add to their request, its last one to the adapter."""
        with self._meter.of(entry.unit):
            self._take_effect(entry)

    def _take_effect(self, entry: _Entry) -> None:
        unit, answer = entry.unit, entry.answer
        assert answer is not None
        if unit.first:
            self._open[unit.adapter] = _OpenRequest(unit.request)
        request = self._open.get(unit.adapter)
        if request is None or request.request != unit.request:
            entry.answer = UnitFailed(
                request=unit.request, category="server", code="lost-chunk",
                message="an earlier chunk of this request is not in this executor",
            )  # fmt: skip
            return
        if request.failure is not None:
            entry.answer = UnitFailed(
                request=unit.request, category=request.failure.category, code=request.failure.code,
                message=f"an earlier chunk of this request failed: {request.failure.message}",
            )  # fmt: skip
        elif isinstance(answer, UnitFailed):
            request.failure, request.gradient = answer, None
        elif entry.batch is not None and entry.batch.gradient is not None:
            request.gradient = _plus(request.gradient, entry.batch.gradient)
        if entry.batch is not None:
            entry.batch.gradient = None
        if unit.last:
            del self._open[unit.adapter]
            if request.gradient is not None:
                adapter = self._adapters[unit.adapter]
                adapter.gradient = _plus(adapter.gradient, request.gradient)


def _plus(total: Buffer | None, part: Buffer) -> Buffer:
    """`part` added into `total`, or `part` itself."""
    if total is None:
        return part
    total.flat += part.flat
    return total


def _finite(flat: Tensor) -> bool:
    """Whether all elements are; a sum is finite only if they are, and finite ones rarely overflow it."""
    return bool(torch.isfinite(flat.sum())) or bool(torch.isfinite(flat).all())


def _evaluate(batch: MicroBatch, logprobs: Tensor) -> LossValue | UnitFailed:
    """The loss of one micro-batch; whatever goes wrong in it is that unit's failure."""
    try:
        value = evaluate(batch.loss, logprobs, batch.inputs, [n * batch.num_targets for n in batch.lengths])
        numbers = (value.loss, *value.metrics.values())
        if not all(map(math.isfinite, numbers)) or not bool(torch.isfinite(value.gradient).all()):
            raise NonFinite(f"the loss `{batch.unit.loss.name}` of this request is not finite")
    except UserError as exc:
        return failed(batch.unit.request, exc)
    except Exception as exc:
        log.exception("the loss of request %s failed", batch.unit.request)
        return failed(batch.unit.request, exc)
    return value


def _answer(batch: MicroBatch, value: LossValue | UnitFailed, logprobs: Tensor, outputs: Rows | None) -> Answer:
    if isinstance(value, UnitFailed):
        return value
    if batch.gradient is not None and not _finite(batch.gradient.flat):
        return failed(batch.unit.request, NonFinite("the gradient of this request is not finite"))
    if outputs is not None and not outputs.finite():
        return failed(batch.unit.request, NonFinite("the outputs of this request are not finite"))
    return ForwardBackwardDone(
        request=batch.unit.request,
        loss=value.loss,
        metrics=value.metrics,
        logprobs=[
            part.numpy().tobytes()
            for part in torch.split(logprobs.float().cpu(), [n * batch.num_targets for n in batch.lengths])
        ],
        outputs=None if outputs is None else outputs.split(batch.lengths),
    )
