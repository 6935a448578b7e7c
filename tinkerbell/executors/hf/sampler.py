"""Runs Sample units: prompts once through the model, then all their samples token by token, together.

Samples join while others are under way and leave when they end. Shapes: P tokens of a prompt, V vocabulary.
"""

import logging
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinkerbell.errors import InvalidRequest, NotFound, UserError
from tinkerbell.executors.hf import prompt_scores
from tinkerbell.executors.hf.adapter import Adapter
from tinkerbell.executors.hf.decode import MAX_ROWS, Decoder, Row
from tinkerbell.executors.hf.failures import NonFinite, failed
from tinkerbell.executors.hf.kv_cache import Cache, PrefillAttention, Prefix, Store
from tinkerbell.executors.hf.packing import PACK_TOKENS, arrange, check_token_ids, column
from tinkerbell.executors.hf.prompt_scores import Scores
from tinkerbell.executors.hf.runtime import RowRange, Runtime
from tinkerbell.executors.hf.sampling import choose, likeliest, normaliser
from tinkerbell.executors.hf.stop import StopTexts, load_tokenizer
from tinkerbell.executors.meter import Meter
from tinkerbell.executors.port import Sample, SampleDone, UnitFailed
from tinkerbell.executors.randomness import uniform
from tinkerbell.types import AdapterId, ModelInfo, SampledSequence

CACHE_BYTES = 2 * 1024**3
"""For keys and values of samples under way, counted at the length they may reach; one sample always runs."""

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Job:
    """One unit on its way to its answer."""

    unit: Sample
    adapter: Adapter | None
    prompt: list[int]
    max_tokens: int
    stop_tokens: frozenset[int]
    stop_texts: StopTexts | None
    """After the prompt, for each sample to go on from."""
    prefix: Prefix | None = None
    """Of the prompt without its last token, until the last sample has started."""
    scores: Scores = (None, None)
    waiting: deque[int] = field(default_factory=deque)
    """Indices of samples that have not started, in order."""
    sequences: dict[int, SampledSequence] = field(default_factory=dict)
    """Finished ones by sample index."""
    failure: UnitFailed | None = None

    @property
    def longest(self) -> int:
        """Tokens one of its samples may come to, the prompt included."""
        return len(self.prompt) + self.max_tokens

    def answer(self) -> SampleDone | UnitFailed:
        """Once every sample has finished, or one has failed."""
        if self.failure is not None:
            return self.failure
        sequences = [self.sequences[index] for index in self.unit.indices]
        logprobs, scores = self.scores
        return SampleDone(
            request=self.unit.request, sequences=sequences, prompt_logprobs=logprobs, prompt_scores=scores
        )


class _Stream:
    """One sample under way."""

    def __init__(self, job: _Job, index: int, cache: Cache) -> None:
        self.job = job
        self.index = index
        self.cache = cache
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.top_tokens: list[Tensor] = []
        """[k] of each token, where they are asked for."""
        self.top_logprobs: list[Tensor] = []
        self.stop_texts = job.stop_texts.fork() if job.stop_texts is not None else None

    def row(self) -> Row:
        """What the model is asked next."""
        return Row(self.job.adapter, self.tokens[-1] if self.tokens else self.job.prompt[-1], self.cache)

    def extend(self, logits: Tensor) -> bool:
        """Add the next token, given logits [V]; whether the sample has ended. Raises NonFinite."""
        unit = self.job.unit
        normal = normaliser(logits)
        if not math.isfinite(normal):
            raise NonFinite("the model's logits are not finite; the adapter's weights may be too large")
        token = choose(logits, unit.params, uniform(unit.seed, self.index, len(self.tokens)))
        self.tokens.append(token)
        self.logprobs.append(float(logits[token]) - normal)
        if unit.params.top_logprobs:
            top = likeliest(logits, unit.params.top_logprobs)
            self.top_tokens.append(top)
            self.top_logprobs.append(logits[top].double() - normal)
        stopped = token in self.job.stop_tokens
        if self.stop_texts is not None and self.stop_texts.push(token):
            stopped = True
        if stopped or len(self.tokens) == self.job.max_tokens:
            self.job.sequences[self.index] = SampledSequence(
                np.asarray(self.tokens, "<i4").tobytes(),
                np.asarray(self.logprobs, "<f4").tobytes(),
                "stop" if stopped else "length",
                *self._top(),
            )
            return True
        return False

    def _top(self) -> tuple[bytes, bytes] | tuple[None, None]:
        """([M, k] int32 likeliest tokens, [M, k] float32 their logprobs)."""
        if not self.top_tokens:
            return None, None
        tokens, logprobs = torch.stack(self.top_tokens), torch.stack(self.top_logprobs)
        return tokens.numpy().astype("<i4").tobytes(), logprobs.numpy().astype("<f4").tobytes()


class Sampler:
    """Sampling for the adapters of one runtime.

    A request's tokens and logprobs have the same bits alone and in any company: prompts run as micro-batches
    of their own, and single tokens as `decode` says.
    """

    def __init__(
        self,
        runtime: Runtime,
        info: ModelInfo,
        adapters: dict[AdapterId, Adapter],
        *,
        max_rows: int = MAX_ROWS,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        """`adapters` is the executor's own mapping, which adds and removes."""
        self._runtime = runtime
        self._info = info
        self._adapters = adapters
        self._max_rows = max_rows
        self._cache_bytes = cache_bytes
        self._tokenizer: Any = None
        self._meter = Meter()
        """Of the samples under way."""

    @cached_property
    def _decoder(self) -> Decoder:
        """Made for the first sample: what only trains need not wait for it."""
        return Decoder(self._runtime)

    def sample(self, units: Sequence[Sample], meter: Meter | None = None) -> list[SampleDone | UnitFailed]:
        """Answers in the order of `units`. A failed unit leaves the others untouched. `meter` is told whose all of it
        was: passes are divided by the rows of each unit."""
        self._meter = meter = meter or Meter()
        answers: dict[int, SampleDone | UnitFailed] = {}
        jobs: dict[int, _Job] = {}
        for index, unit in enumerate(units):
            try:
                jobs[index] = self._job(unit)
            except UserError as exc:
                answers[index] = failed(unit.request, exc)
        try:
            self._run(list(jobs.values()))
            answers |= {index: job.answer() for index, job in jobs.items()}
        except Exception as exc:
            log.exception("sampling failed: requests %s", [job.unit.request for job in jobs.values()])
            if len(jobs) == 1:
                answers |= {index: failed(job.unit.request, exc) for index, job in jobs.items()}
            else:
                # Each by itself, so that only the culprit fails.
                answers |= {index: self.sample([units[index]], meter)[0] for index in jobs}
        return [answers[index] for index in range(len(units))]

    def _job(self, unit: Sample) -> _Job:
        """Check a unit against the model. Raises NotFound or InvalidRequest."""
        adapter = None
        if unit.adapter is not None:
            adapter = self._adapters.get(unit.adapter)
            if adapter is None:
                raise NotFound(f"this executor has no adapter {unit.adapter}")
        if not unit.prompt or len(unit.prompt) % 4:
            raise InvalidRequest("prompt: must be int32, at least one token")
        check_token_ids("prompt", unit.prompt, self._info)
        prompt_scores.check(unit, self._info)
        prompt = np.frombuffer(unit.prompt, "<i4").tolist()
        room = self._info.room(len(prompt))
        if room < 1:
            raise InvalidRequest(
                f"prompt: {len(prompt)} tokens are more than the {self._info.max_length} this model takes"
            )
        params = unit.params
        stop_tokens = self._info.eos_tokens if params.stop_tokens is None else params.stop_tokens
        return _Job(
            unit=unit,
            adapter=adapter,
            prompt=prompt,
            max_tokens=min(params.max_tokens, room),
            stop_tokens=frozenset(stop_tokens),
            stop_texts=StopTexts(self._load_tokenizer(), params.stop, prompt) if params.stop else None,
            waiting=deque(unit.indices),
        )

    def _load_tokenizer(self) -> Any:
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self._info.tokenizer)
        return self._tokenizer

    @torch.inference_mode()
    def _run(self, jobs: list[_Job]) -> None:
        waiting = deque(jobs)
        streams: list[_Stream] = []
        store = Store()
        while waiting or streams:
            streams += self._admit(waiting, streams, store)
            rows = [stream.row() for stream in streams]
            with self._meter.divided([(stream.job.unit, 1.0) for stream in streams]):
                stepped = self._decoder.step(rows)
            for stream, logits in zip(streams, stepped, strict=True):
                job = stream.job
                with self._meter.of(job.unit):
                    try:
                        if job.failure is None and not stream.extend(logits):
                            continue
                    except NonFinite as exc:
                        job.failure = failed(job.unit.request, exc)
            ended = [s for s in streams if s.job.failure is not None or s.index in s.job.sequences]
            for stream in ended:
                stream.cache.close()
            streams = [s for s in streams if s not in ended]
            while waiting and waiting[0].failure is not None:
                waiting.popleft()

    def _admit(self, waiting: deque[_Job], streams: Sequence[_Stream], store: Store) -> list[_Stream]:
        """Start as many samples as there is room for, in order; prompts that are new run through the model."""
        rows = len(streams)
        tokens = sum(stream.job.longest for stream in streams)
        room_tokens = self._cache_bytes // self._decoder.token_bytes
        starting: list[tuple[_Job, int]] = []
        fresh: list[_Job] = []
        while waiting:
            job = waiting[0]
            if (rows or fresh) and (rows >= self._max_rows or tokens + job.longest > room_tokens):
                break
            if len(job.waiting) == len(job.unit.indices):
                fresh.append(job)
            if job.waiting:
                starting.append((job, job.waiting.popleft()))
                rows, tokens = rows + 1, tokens + job.longest
            if not job.waiting:
                waiting.popleft()
        for pack in _packs(fresh):
            self._prefill(pack)
        admitted: list[_Stream] = []
        for job, index in starting:
            if job.failure is None:
                assert job.prefix is not None
                admitted.append(_Stream(job, index, store.open(job.prefix)))
                if index == job.unit.indices[-1]:
                    job.prefix = None
        for job in fresh:
            if not job.unit.indices:
                job.prefix = None
        return admitted

    def _prefill(self, jobs: Sequence[_Job]) -> None:
        """Fill the jobs' prefixes; all in one pass, each a micro-batch of its own."""
        for job in jobs:
            job.prefix = Prefix(len(job.prompt) - 1)
            if not job.prefix.length:
                self._score(job, None)
        long = [(job, job.prefix) for job in jobs if job.prefix is not None and job.prefix.length]
        if not long:
            return
        bounds = [0]
        ranges: list[RowRange] = []
        for job, prefix in long:
            bounds.append(bounds[-1] + prefix.length)
            if job.adapter is not None:
                ranges.append(RowRange(bounds[-2], bounds[-1], job.adapter))
        device = self._runtime.device
        attention = PrefillAttention([prefix for _, prefix in long])
        plan = arrange(bounds, ranges, attention, self._runtime.products(), self._runtime.heights)
        num_rows = plan.bounds[-1]
        with self._meter.divided([(job.unit, float(prefix.length)) for job, prefix in long]):
            hidden = self._runtime.hidden(
                column([torch.tensor(job.prompt[:-1], device=device) for job, _ in long], num_rows),
                column([torch.arange(prefix.length, device=device) for _, prefix in long], num_rows),
                plan,
            )
        for (job, _), start, stop in zip(long, bounds, bounds[1:], strict=False):
            self._score(job, hidden[start:stop])

    def _score(self, job: _Job, hidden: Tensor | None) -> None:
        """What the job asks of its prompt, given hidden rows [P - 1, D] of the tokens before the last, if there are."""
        if not prompt_scores.wanted(job.unit):
            return
        try:
            with self._meter.of(job.unit):
                job.scores = prompt_scores.score(self._runtime, job.unit, job.adapter, hidden)
        except NonFinite as exc:
            job.failure = failed(job.unit.request, exc)


def _packs(jobs: Sequence[_Job]) -> list[list[_Job]]:
    """Whole prompts in order, at most PACK_TOKENS tokens together; a longer one is alone."""
    packs: list[list[_Job]] = []
    tokens = 0
    for job in jobs:
        if not packs or tokens + len(job.prompt) > PACK_TOKENS:
            packs.append([])
            tokens = 0
        packs[-1].append(job)
        tokens += len(job.prompt)
    return packs
