"""The fake executor: a toy language model with real gradients, honest to every rule of the port.

It stands in for an accelerator in tests, benchmarks of the server, and demonstrations without torch.
"""

import hashlib
import math
import operator
import platform
import struct
import time
from array import array
from collections.abc import Sequence

import msgspec

from tinkerbell.errors import InvalidRequest, NotFound, ServerError, TinkerbellError, UserError
from tinkerbell.executors import fake_losses
from tinkerbell.executors.fake_adapter import FakeAdapter, NonFinite
from tinkerbell.executors.fake_model import BaseModel, Distribution
from tinkerbell.executors.meter import Meter
from tinkerbell.executors.port import (
    AdapterReport,
    AdapterState,
    Batch,
    BatchResult,
    Environment,
    ForwardBackward,
    ForwardBackwardDone,
    OptimStep,
    OptimStepDone,
    Sample,
    SampleDone,
    Unit,
    UnitFailed,
    UnitResult,
)
from tinkerbell.executors.progress import mark
from tinkerbell.executors.protocol import ExecutorOptions
from tinkerbell.types import TARGET_PRESETS, AdapterId, DatumOutputs, LoraConfig, ModelInfo, OutputSpec, SampledSequence

TARGETS = (*TARGET_PRESETS["all-linear"], "lm_head")
EOS_TOKEN = 0
PAUSE_S = 0.25
"""Longest sleep without a mark of progress."""


class LostChunk(ServerError):
    """An earlier chunk of the request is not in this executor."""

    slug = "lost-chunk"


class _OpenRequest:
    """A request whose last chunk has not come yet."""

    def __init__(self, request: int, length: int) -> None:
        self.request = request
        self.gradient = array("d", bytes(8 * length))
        self.failure: UnitFailed | None = None
        """Of its first chunk that failed."""


class FakeExecutor:
    """Implements port.Executor.

    Options in `extra`, all whole numbers: `vocab_size` and `max_length` of the model; `latency_us` per batch
    and `us_per_token`, which are slept away to look like an accelerator; `rounding_ppm`, to look like another machine.
    """

    def __init__(self, options: ExecutorOptions) -> None:
        known = {"vocab_size": 256, "max_length": 4096, "latency_us": 0, "us_per_token": 0, "rounding_ppm": 0}
        settings = known | _integers(options.extra, known)
        self._latency_us = settings["latency_us"]
        self._us_per_token = settings["us_per_token"]
        self._rounding_ppm = settings["rounding_ppm"]
        self._info = ModelInfo(
            name="fake",
            vocab_size=settings["vocab_size"],
            max_length=settings["max_length"],
            targets=TARGETS,
            eos_tokens=(EOS_TOKEN,),
            tokenizer="",
            # All there is to its weights: every other option is of the machine.
            hash=hashlib.sha256(f"fake {settings['vocab_size']}".encode()).hexdigest(),
        )
        self._base = BaseModel(self._info.vocab_size, settings["rounding_ppm"])
        self._base_distribution = Distribution(self._base, None)
        self._adapters: dict[AdapterId, FakeAdapter] = {}
        self._distributions: dict[AdapterId, Distribution] = {}
        self._open: dict[AdapterId, _OpenRequest] = {}

    def describe(self) -> Environment:
        """See port.Executor."""
        facts = {
            "arithmetic": f"float64 of Python {platform.python_version()}",
            "vocab_size": str(self._info.vocab_size),
            "rounding_ppm": str(self._rounding_ppm),
        }
        return Environment(executor="fake", model=self._info, exact=True, facts=facts)

    def create(self, adapter: AdapterId, lora: LoraConfig, seed: int) -> AdapterReport:
        """See port.Executor. The number of parameters depends on the rank alone."""
        for target in lora.targets:
            if target not in TARGETS and target not in TARGET_PRESETS:
                raise InvalidRequest(f"target `{target}`: the model has {', '.join(TARGETS)}")
        fresh = FakeAdapter(lora)
        fresh.initialise(seed)
        return self._install(adapter, fresh)

    def load(self, adapter: AdapterId, state: AdapterState, with_optimizer: bool) -> AdapterReport:
        """See port.Executor."""
        return self._install(adapter, FakeAdapter.from_state(state, with_optimizer))

    def snapshot(self, adapter: AdapterId) -> AdapterState:
        """See port.Executor."""
        return self._find(adapter).state()

    def remove(self, adapter: AdapterId) -> None:
        """See port.Executor."""
        for table in (self._adapters, self._distributions, self._open):
            table.pop(adapter, None)

    def run(self, batch: Batch) -> BatchResult:
        """See port.Executor."""
        started = time.perf_counter_ns()
        meter = Meter()
        results: list[UnitResult] = []
        for unit in batch.units:
            with meter.of(unit):
                results.append(self._run(unit))
        per_token = list(zip(batch.units, map(_num_tokens, batch.units, results), strict=True))
        if num_tokens := self._us_per_token and sum(number for _, number in per_token):
            with meter.divided(per_token):
                _pause(self._us_per_token * num_tokens / 1e6)
        _pause(self._latency_us / 1e6)
        busy_us = (time.perf_counter_ns() - started) // 1000
        return BatchResult(results=results, busy_us=busy_us, own_us=meter.own_us(batch.units))

    def _run(self, unit: Unit) -> UnitResult:
        mark()
        try:
            match unit:
                case ForwardBackward():
                    return self._forward_backward(unit)
                case OptimStep():
                    return self._optim_step(unit)
                case Sample():
                    return self._sample(unit)
        except TinkerbellError as exc:
            return UnitFailed(request=unit.request, category=exc.category, code=exc.slug, message=exc.detail)

    def _forward_backward(self, unit: ForwardBackward) -> UnitResult:
        adapter = self._find(unit.adapter)
        if unit.first:
            self._open[unit.adapter] = _OpenRequest(unit.request, len(adapter.weights))
        request = self._open.get(unit.adapter)
        if request is None or request.request != unit.request:
            raise LostChunk("an earlier chunk of this request is not in this executor")
        if unit.last:
            del self._open[unit.adapter]
        if request.failure is not None:
            message = f"an earlier chunk of this request failed: {request.failure.message}"
            return msgspec.structs.replace(request.failure, message=message)
        try:
            done = self._chunk(unit, adapter, request)
        except UserError as exc:
            request.failure = UnitFailed(request=unit.request, category=exc.category, code=exc.slug, message=exc.detail)
            return request.failure
        if unit.last and unit.backward:
            adapter.accumulate(request.gradient)
        return done

    def _chunk(self, unit: ForwardBackward, adapter: FakeAdapter, request: _OpenRequest) -> ForwardBackwardDone:
        """Add the chunk's gradient to its request's, all or nothing."""
        if not unit.data:
            raise InvalidRequest("there is no datum in this request")
        if unit.outputs is not None and unit.outputs.top_k > self._info.vocab_size:
            raise InvalidRequest(f"top_k of {unit.outputs.top_k}; this model has {self._info.vocab_size} tokens")
        distribution = self._distribution(unit.adapter)
        total = array("d", bytes(8 * len(adapter.weights)))
        losses: list[float] = []
        metrics: dict[str, float] = {}
        logprobs: list[bytes] = []
        outputs: list[DatumOutputs] = []
        for datum in unit.data:
            tokens, targets = self._tokens(datum.tokens), self._tokens(datum.targets)
            inputs = fake_losses.loss_inputs(unit.loss, datum)
            if len(datum.targets) * len(unit.data[0].tokens) != len(datum.tokens) * len(unit.data[0].targets):
                raise InvalidRequest("all data of one request must have as many targets for a token")
            # One for each target.
            before = [token for token in tokens for _ in range(len(targets) // len(tokens))]
            found = distribution.target_logprobs(before, targets)
            value = fake_losses.evaluate(unit.loss, found, inputs)
            losses.append(value.loss)
            mark()
            for name, metric in value.metrics.items():
                metrics[name] = metrics.get(name, 0.0) + metric
            logprobs.append(struct.pack(f"<{len(found)}f", *found))
            if unit.outputs is not None:
                outputs.append(distribution.outputs(tokens, unit.outputs))
            if unit.backward:
                by_delta = distribution.gradient(before, targets, value.slopes)
                total = array("d", map(operator.add, total, adapter.chain(by_delta)))
        loss = math.fsum(losses)
        if not all(map(math.isfinite, (loss, *metrics.values(), *total))):
            raise NonFinite("the loss or the gradient of this request is not finite")
        request.gradient = array("d", map(operator.add, request.gradient, total))
        return ForwardBackwardDone(
            request=unit.request,
            loss=loss,
            metrics=metrics,
            logprobs=logprobs,
            outputs=outputs if unit.outputs is not None else None,
        )

    def _optim_step(self, unit: OptimStep) -> UnitResult:
        adapter = self._find(unit.adapter)
        gradient_digest = adapter.gradient_digest()
        grad_norm = adapter.optim_step(unit.adam)
        self._distributions.pop(unit.adapter, None)
        return OptimStepDone(
            request=unit.request,
            step=adapter.step,
            grad_norm=grad_norm,
            state_digest=adapter.digest(),
            gradient_digest=gradient_digest,
            weights_digest=adapter.weights_digest(),
        )

    def _sample(self, unit: Sample) -> UnitResult:
        distribution = self._base_distribution if unit.adapter is None else self._distribution(unit.adapter)
        prompt = self._tokens(unit.prompt)
        params = unit.params
        max_tokens = min(params.max_tokens, self._info.room(len(prompt)))
        if max(params.top_logprobs, params.prompt_top_logprobs) > self._info.vocab_size:
            raise InvalidRequest(f"more top_logprobs than the {self._info.vocab_size} tokens this model has")
        targets = None if unit.prompt_targets is None else self._targets(unit.prompt_targets, len(prompt))
        stop_tokens = set(self._info.eos_tokens if params.stop_tokens is None else params.stop_tokens)
        sequences: list[SampledSequence] = []
        for sample in unit.indices:
            tokens, logprobs, stopped = distribution.sample(prompt, params, unit.seed, sample, max_tokens, stop_tokens)
            mark()
            top = distribution.outputs([prompt[-1], *tokens[:-1]], OutputSpec(top_k=params.top_logprobs))
            sequences.append(
                SampledSequence(
                    struct.pack(f"<{len(tokens)}i", *tokens),
                    struct.pack(f"<{len(logprobs)}f", *logprobs),
                    "stop" if stopped else "length",
                    top.top_tokens,
                    top.top_logprobs,
                )
            )
        prompt_logprobs = None
        if params.prompt_logprobs:
            found = distribution.target_logprobs(prompt[:-1], prompt[1:])
            prompt_logprobs = struct.pack(f"<{len(found)}f", *found)
        return SampleDone(
            request=unit.request,
            sequences=sequences,
            prompt_logprobs=prompt_logprobs,
            prompt_scores=distribution.prompt_scores(prompt, params, unit.seed, unit.draws, targets),
        )

    def _install(self, name: AdapterId, adapter: FakeAdapter) -> AdapterReport:
        self.remove(name)
        self._adapters[name] = adapter
        return AdapterReport(num_parameters=len(adapter.weights), step=adapter.step, state_digest=adapter.digest())

    def _find(self, name: AdapterId) -> FakeAdapter:
        adapter = self._adapters.get(name)
        if adapter is None:
            raise NotFound(f"adapter {name} is not in the executor")
        return adapter

    def _distribution(self, name: AdapterId) -> Distribution:
        """Of the adapter's present weights; kept until they change."""
        adapter = self._find(name)
        found = self._distributions.get(name)
        if found is None:
            found = self._distributions[name] = Distribution(self._base, adapter.deltas())
        return found

    def _tokens(self, raw: bytes) -> Sequence[int]:
        """[N] ids. Raises InvalidRequest for none, too many, or one outside the vocabulary."""
        if not raw or len(raw) % 4:
            raise InvalidRequest("a sequence needs at least one token of four bytes")
        tokens = struct.unpack(f"<{len(raw) // 4}i", raw)
        if len(tokens) > self._info.max_length:
            raise InvalidRequest(f"{len(tokens)} tokens are more than the model's {self._info.max_length}")
        for token in tokens:
            if not 0 <= token < self._info.vocab_size:
                raise InvalidRequest(f"token {token} is outside the vocabulary of {self._info.vocab_size}")
        return tokens

    def _targets(self, raw: bytes, num_tokens: int) -> Sequence[int]:
        """[P * K] ids or -1. Raises InvalidRequest for another number of them, or one outside the vocabulary."""
        if not raw or len(raw) % (4 * num_tokens):
            raise InvalidRequest(f"prompt_targets: {len(raw)} bytes are no int32 rows for {num_tokens} tokens")
        targets = struct.unpack(f"<{len(raw) // 4}i", raw)
        for target in targets:
            if not -1 <= target < self._info.vocab_size:
                raise InvalidRequest(f"prompt_targets: {target} is outside the vocabulary of {self._info.vocab_size}")
        return targets


def _pause(pause_s: float) -> None:
    """As an accelerator that works its way through a batch."""
    until = time.monotonic() + pause_s
    while (left_s := until - time.monotonic()) > 0:
        time.sleep(min(left_s, PAUSE_S))
        mark()


def _num_tokens(unit: Unit, result: UnitResult) -> int:
    """Tokens an accelerator would have to push through the model for this unit."""
    match unit, result:
        case ForwardBackward(), _:
            return sum(datum.num_tokens for datum in unit.data)
        case Sample(), SampleDone():
            return (len(unit.prompt) + sum(len(sequence.tokens) for sequence in result.sequences)) // 4
    return 0


def _integers(extra: dict[str, str], known: dict[str, int]) -> dict[str, int]:
    for name, value in extra.items():
        if name not in known or not value.isdigit():
            raise InvalidRequest(f"fake executor: `{name}={value}`; it knows whole numbers for {', '.join(known)}")
    return {name: int(value) for name, value in extra.items()}
