"""Each verb of the HTTP API as plain data, so that the sync and the async client send the very same thing."""

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import index
from typing import Any, Generic, TypeVar
from urllib.parse import quote

import msgspec

from tinkerbell import wire
from tinkerbell.errors import InvalidRequest, ServerError
from tinkerbell.sdk.settings import Adam, Outputs, Sampling
from tinkerbell.sdk.sse import Message
from tinkerbell.types import AdamParams, LoraConfig, LossSpec, ModelInfo, OutputSpec, SamplingParams

T = TypeVar("T")

LONG_POLL_S = 30.0
"""How long one look at a future may wait on the server."""

PAGE = 1000
"""Items of a list that are asked for at a time: as many as the server gives."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call(Generic[T]):
    """One HTTP request and the type of its answer."""

    method: str
    path: str
    answer: type[T]
    body: bytes | None = None
    params: dict[str, str] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    """Holds the idempotency key, which so is the same in every attempt."""
    wait_s: float = 0.0
    """How long the server may take by agreement, on top of ordinary slowness."""

    @property
    def what(self) -> str:
        """For messages: `POST /v1/adapters`."""
        return f"{self.method} {self.path}"

    def decode(self, content: bytes) -> T:
        """The answer. Raises ServerError where it is not of the agreed form."""
        try:
            return msgspec.json.decode(content, type=self.answer)
        except msgspec.DecodeError as exc:
            raise ServerError(f"{self.what}: the answer is not what this client expects ({exc})") from exc


def add_lora(
    *,
    rank: int | None,
    alpha: float | None,
    targets: Sequence[str] | str | None,
    seed: int | None,
    name: str | None,
    base_model: str | None,
    checkpoint: str | None,
    with_optimizer: bool,
) -> Call[wire.Future]:
    """POST /v1/adapters. Shape settings that are None take LoraConfig's defaults, or the checkpoint's."""
    given: dict[str, Any] = {"rank": rank, "alpha": alpha, "targets": _words(targets)}
    given = {key: value for key, value in given.items() if value is not None}
    if checkpoint is not None and given:
        raise InvalidRequest(f"{', '.join(given)}: an adapter from a checkpoint has the checkpoint's shape")
    body = wire.AddLora(
        base_model=base_model,
        lora=None if checkpoint is not None else _checked(LoraConfig, given),
        seed=seed,
        name=name,
        checkpoint=checkpoint,
        with_optimizer=with_optimizer,
    )
    return _post("/v1/adapters", body)


def remove_lora(adapter: str) -> Call[wire.Future]:
    """DELETE /v1/adapters/{id}"""
    return Call(method="DELETE", path=_adapter(adapter), answer=wire.Future, headers=_idempotent())


def forward_backward(
    adapter: str,
    data: Sequence[wire.DatumBody],
    loss: str,
    config: Mapping[str, float] | None,
    num_targets: int,
) -> Call[wire.Future]:
    """POST /v1/adapters/{id}/fwdbwd"""
    body = wire.ForwardBackward(
        data=_finite(data), loss=LossSpec(name=loss, config=dict(config or {})), num_targets=num_targets
    )
    return _post(f"{_adapter(adapter)}/fwdbwd", body)


def forward(
    adapter: str,
    data: Sequence[wire.DatumBody],
    loss: str,
    config: Mapping[str, float] | None,
    num_targets: int,
    outputs: Outputs,
) -> Call[wire.Future]:
    """POST /v1/adapters/{id}/forward; `outputs` are fields of OutputSpec"""
    body = wire.Forward(
        data=_finite(data),
        loss=LossSpec(name=loss, config=dict(config or {})),
        num_targets=num_targets,
        outputs=_checked(OutputSpec, outputs) if outputs else None,
    )
    return _post(f"{_adapter(adapter)}/forward", body)


def _finite(data: Sequence[wire.DatumBody]) -> list[wire.DatumBody]:
    """The data. Raises InvalidRequest naming a number that JSON cannot carry."""
    for place, datum in enumerate(data):
        for name, values in datum.loss_inputs.items():
            # JSON has no NaN; it would travel as null and come back as a puzzling message about types.
            if not all(map(math.isfinite, values)):
                raise InvalidRequest(f"datum {place}: loss_inputs[{name!r}] holds a number that is not finite")
    return list(data)


def optim_step(adapter: str, settings: Adam) -> Call[wire.Future]:
    """POST /v1/adapters/{id}/optim_step; `settings` are fields of AdamParams"""
    return _post(f"{_adapter(adapter)}/optim_step", wire.OptimStep(adam=_checked(AdamParams, settings)))


def sample(adapter: str | None, prompt: Sequence[int], settings: Sampling) -> Call[wire.Future]:
    """POST /v1/adapters/{id}/sample, or /v1/sample; `settings` are fields of SamplingParams, and prompt_targets"""
    # A lone string is one stop text; as a sequence it would be many of one letter.
    given: dict[str, object] = dict(settings)
    if isinstance(given.get("stop"), str):
        given["stop"] = [given["stop"]]
    targets = settings.get("prompt_targets")
    given.pop("prompt_targets", None)
    # index() takes the integers of array libraries as well, which JSON encoders refuse.
    body = wire.Sample(
        prompt=[index(token) for token in prompt],
        params=_checked(SamplingParams, given),
        prompt_targets=None if targets is None else [[index(token) for token in row] for row in targets],
    )
    return _post("/v1/sample" if adapter is None else f"{_adapter(adapter)}/sample", body)


def save(adapter: str, name: str | None, overwrite: bool) -> Call[wire.Future]:
    """POST /v1/adapters/{id}/checkpoints"""
    return _post(f"{_adapter(adapter)}/checkpoints", wire.Save(name=name, overwrite=overwrite))


def load(adapter: str, checkpoint: str, with_optimizer: bool) -> Call[wire.Future]:
    """POST /v1/adapters/{id}/load"""
    return _post(f"{_adapter(adapter)}/load", wire.Load(checkpoint=checkpoint, with_optimizer=with_optimizer))


def future(id: int, wait_s: float) -> Call[wire.Future]:
    """GET /v1/futures/{id}"""
    return _get(f"/v1/futures/{id}", wire.Future, params={"wait_s": f"{wait_s:.3f}"}, wait_s=wait_s)


def adapters(last: wire.Adapter | None) -> Call[list[wire.Adapter]]:
    """GET /v1/adapters, the page after this one"""
    return _get("/v1/adapters", list[wire.Adapter], params=_page(None if last is None else last.id))


def adapter(id: str) -> Call[wire.Adapter]:
    """GET /v1/adapters/{id}"""
    return _get(_adapter(id), wire.Adapter)


def checkpoints(adapter: str | None, last: wire.Checkpoint | None) -> Call[list[wire.Checkpoint]]:
    """GET /v1/checkpoints or those of one adapter, the page after this one"""
    path = "/v1/checkpoints" if adapter is None else f"{_adapter(adapter)}/checkpoints"
    return _get(path, list[wire.Checkpoint], params=_page(None if last is None else last.id))


def checkpoint(id: str) -> Call[wire.Checkpoint]:
    """GET /v1/checkpoints/{id}"""
    return _get(f"/v1/checkpoints/{_part(id)}", wire.Checkpoint)


def download(id: str, with_optimizer: bool) -> Call[None]:
    """GET /v1/checkpoints/{id}/download; the answer is an archive, not JSON"""
    path = f"/v1/checkpoints/{_part(id)}/download"
    return _get(path, type(None), params={"optimizer": "true"} if with_optimizer else None)


def runs(last: wire.Run | None) -> Call[list[wire.Run]]:
    """GET /v1/runs, the page after this one"""
    return _get("/v1/runs", list[wire.Run], params=_page(None if last is None else last.adapter.id))


def run(adapter: str, after_step: int) -> Call[wire.Run]:
    """GET /v1/runs/{adapter_id}"""
    params = {"after_step": str(after_step), "limit": str(PAGE)}
    return _get(f"/v1/runs/{_part(adapter)}", wire.Run, params=params)


def usage(all_tenants: bool, last: wire.UsageRow | None) -> Call[list[wire.UsageRow]]:
    """GET /v1/usage, the page after this row"""
    key = None if last is None else f"{last.tenant}/{last.adapter_id or ''}/{last.kind}"
    return _get("/v1/usage", list[wire.UsageRow], params=_scope(all_tenants) | _page(key))


def limits() -> Call[wire.Quotas]:
    """GET /v1/limits"""
    return _get("/v1/limits", wire.Quotas)


def queue(all_tenants: bool) -> Call[wire.Queue]:
    """GET /v1/queue"""
    return _get("/v1/queue", wire.Queue, params=_scope(all_tenants))


def models() -> Call[list[ModelInfo]]:
    """GET /v1/models"""
    return _get("/v1/models", list[ModelInfo])


def events(last: int | None) -> Call[None]:
    """GET /v1/events after position `last`; the answer is a stream of server-sent events"""
    headers = {"Accept": "text/event-stream"} | ({} if last is None else {"Last-Event-ID": str(last)})
    return Call(method="GET", path="/v1/events", answer=type(None), headers=headers, wait_s=LONG_POLL_S)


def event(message: Message) -> wire.LogEvent:
    """One event of that stream. Raises ServerError where it is not of the agreed form."""
    try:
        return msgspec.json.decode(message.data, type=wire.LogEvent)
    except msgspec.DecodeError as exc:
        raise ServerError(f"GET /v1/events: an event is not what this client expects ({exc})") from exc


def _get(path: str, answer: type[T], params: dict[str, str] | None = None, wait_s: float = 0.0) -> Call[T]:
    return Call(method="GET", path=path, answer=answer, params=params or {}, wait_s=wait_s)


def _page(after: str | None) -> dict[str, str]:
    return {"limit": str(PAGE)} | ({} if after is None else {"after": after})


def _scope(all_tenants: bool) -> dict[str, str]:
    return {"all_tenants": "true"} if all_tenants else {}


def _post(path: str, body: wire.Body) -> Call[wire.Future]:
    headers = {"Content-Type": "application/json", **_idempotent()}
    return Call(method="POST", path=path, answer=wire.Future, body=msgspec.json.encode(body), headers=headers)


def _idempotent() -> dict[str, str]:
    return {"Idempotency-Key": secrets.token_hex(16)}


def _adapter(id: str) -> str:
    return f"/v1/adapters/{_part(id)}"


def _part(id: str) -> str:
    if not id:
        raise InvalidRequest("an id is needed, and it is empty")
    return quote(id, safe="")


def _words(words: Sequence[str] | str | None) -> list[str] | None:
    return [words] if isinstance(words, str) else None if words is None else list(words)


S = TypeVar("S", LoraConfig, AdamParams, SamplingParams, OutputSpec)


def _checked(struct: type[S], settings: Mapping[str, object]) -> S:
    # The same check the server makes, but before anything is sent, and in the caller's traceback.
    try:
        return msgspec.convert(dict(settings), struct)
    except msgspec.ValidationError as exc:
        raise InvalidRequest(f"{struct.__name__}: {exc}") from exc
