"""What a sample asks of its prompt's own distributions: logprobs of its tokens, likeliest tokens, logprobs of targets,
draws.

Shapes: P tokens of the prompt, D hidden size, k likeliest tokens, K targets and d draws at each position.
"""

from functools import partial

import numpy as np
import torch
from torch import Tensor

from tinkerbell.errors import InvalidRequest
from tinkerbell.executors.hf.adapter import Adapter
from tinkerbell.executors.hf.failures import NonFinite
from tinkerbell.executors.hf.head import target_logprobs, wide
from tinkerbell.executors.hf.head_outputs import Rows, Sweep
from tinkerbell.executors.hf.packing import check_token_ids
from tinkerbell.executors.hf.prompt_draws import Draws
from tinkerbell.executors.hf.runtime import Pass, RowRange, Runtime
from tinkerbell.executors.port import Sample
from tinkerbell.types import ModelInfo, OutputSpec, PromptScores

Scores = tuple[bytes | None, PromptScores | None]
"""`prompt_logprobs` and `prompt_scores` of a SampleDone."""


def check(unit: Sample, info: ModelInfo) -> None:
    """Raises InvalidRequest for more likeliest tokens than there are, and for targets that cannot be."""
    params = unit.params
    if max(params.top_logprobs, params.prompt_top_logprobs) > info.vocab_size:
        raise InvalidRequest(f"more top_logprobs than the {info.vocab_size} tokens this model has")
    if unit.prompt_targets is None:
        return
    if not unit.prompt_targets or len(unit.prompt_targets) % len(unit.prompt):
        raise InvalidRequest(
            f"prompt_targets: {len(unit.prompt_targets)} bytes are no int32 rows for {len(unit.prompt) // 4} tokens"
        )
    targets = np.frombuffer(unit.prompt_targets, "<i4")
    check_token_ids("prompt_targets", targets[targets != -1].tobytes(), info)


def wanted(unit: Sample) -> bool:
    """Whether anything is asked of the prompt."""
    return unit.params.prompt_logprobs or _wants_more(unit)


def _wants_more(unit: Sample) -> bool:
    return unit.params.prompt_top_logprobs > 0 or bool(unit.draws) or unit.prompt_targets is not None


def score(runtime: Runtime, unit: Sample, adapter: Adapter | None, hidden: Tensor | None) -> Scores:
    """Of a prompt, given hidden rows [P - 1, D] of its tokens but the last; None for a prompt of one token. Raises
    NonFinite."""
    top_k, num_draws = unit.params.prompt_top_logprobs, len(unit.draws)
    greedy = num_draws > 0 and unit.params.temperature == 0
    # What is drawn at temperature 0 is the likeliest token.
    spec = OutputSpec(top_k=max(top_k, int(greedy)))
    targets = _targets(unit)
    if hidden is None:
        logprobs, rows = None, None
    else:
        count = len(hidden)
        ranges = () if adapter is None else (RowRange(0, count, adapter),)
        shared = runtime.products() == "shared"
        plan = Pass((0, count), ranges, heights=runtime.heights if shared else None)
        prompt = torch.from_numpy(np.frombuffer(unit.prompt, "<i4").astype("i8")).to(hidden.device)
        rows = None
        if _wants_more(unit):
            like = hidden.new_empty(0, dtype=wide(hidden.dtype))
            others = None if targets is None else targets[1:].to(hidden.device)
            draws = None
            if num_draws and not greedy:
                draws = Draws(count, unit.draws, unit.params.temperature, unit.seed, like)
            rows = Rows(0, count, spec, runtime.head.out_features, like, others, draws)
        observer = None if rows is None else partial(Sweep, [rows])
        logprobs = target_logprobs(runtime, hidden, [prompt[1:, None]], plan, observer)
        if not bool(torch.isfinite(logprobs).all()) or not (rows is None or rows.finite()):
            raise NonFinite("the prompt's logprobs are not finite")
    scores = None
    if _wants_more(unit):
        found = None if rows is None else rows.target_logprobs
        top_tokens, top_logprobs = (None, None) if rows is None else (rows.top_tokens, rows.top_logprobs)
        drawn_tokens, drawn_logprobs = _drawn(rows, num_draws)
        scores = PromptScores(
            top_tokens=_bytes(None if top_tokens is None else top_tokens[:, :top_k], "<i4") if top_k else None,
            top_logprobs=_bytes(None if top_logprobs is None else top_logprobs[:, :top_k], "<f4") if top_k else None,
            target_logprobs=None if targets is None else _nothing_known(targets.shape[1]) + _bytes(found, "<f4"),
            drawn_tokens=_bytes(drawn_tokens, "<i4") if num_draws else None,
            drawn_logprobs=_bytes(drawn_logprobs, "<f4") if num_draws else None,
        )
    return _bytes(logprobs, "<f4") if unit.params.prompt_logprobs else None, scores


def _drawn(rows: Rows | None, num_draws: int) -> tuple[Tensor | None, Tensor | None]:
    """([P - 1, d] tokens, [P - 1, d] their logprobs)"""
    if rows is None or rows.draws is not None or rows.top_tokens is None or rows.top_logprobs is None:
        draws = None if rows is None else rows.draws
        return (None, None) if draws is None else (draws.tokens, draws.logprobs)
    return rows.top_tokens[:, :1].expand(-1, num_draws), rows.top_logprobs[:, :1].expand(-1, num_draws)


def _targets(unit: Sample) -> Tensor | None:
    """[P, K] int64, -1 being none."""
    if unit.prompt_targets is None:
        return None
    ids = np.frombuffer(unit.prompt_targets, "<i4").astype("i8")
    return torch.from_numpy(ids).view(len(unit.prompt) // 4, -1)


def _nothing_known(width: int) -> bytes:
    """NaNs of the first position, which has no tokens before it."""
    return np.full(width, np.nan, "<f4").tobytes()


def _bytes(rows: Tensor | None, dtype: str) -> bytes:
    return b"" if rows is None else rows.cpu().numpy().astype(dtype).tobytes()
