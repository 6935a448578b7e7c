"""The HTTP edge in this process, without a network: one loop, many keys, results appended by hand."""

import asyncio
import hashlib
import secrets
from collections.abc import Callable, Coroutine
from typing import Any, Self

import httpx
import msgspec
import numpy as np
from litestar import Litestar

from tinkerbell.api.app import create_app
from tinkerbell.config import Settings
from tinkerbell.events import kinds
from tinkerbell.events.kinds import NewEvent, Recorded
from tinkerbell.events.leases import SCHEDULER
from tinkerbell.events.store import EventStore
from tinkerbell.types import SYSTEM_TENANT, DatumOutputs, ModelInfo, PromptScores, SampledSequence

MODEL = ModelInfo(
    name="tiny",
    vocab_size=100,
    max_length=32,
    targets=("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    eos_tokens=(0,),
    tokenizer="",
)

LOGPROB = -0.1
"""Of every token the driver answers with; not a float32, so that rounding shows."""


def record_environment(store: EventStore, model: ModelInfo = MODEL) -> None:
    """As if an executor had come up."""
    event = kinds.EnvironmentRecorded(digest="e" * 64, executor="fake", exact=True, model=model, facts={})
    store.append(NewEvent(event=event, tenant=SYSTEM_TENANT, stream="system/scheduler"))


def lead(store: EventStore) -> None:
    """As if a scheduler led."""
    assert store.acquire_lease(SCHEDULER, "a scheduler", 3600.0) is not None


def create_key(store: EventStore, tenant: str, *, admin: bool = False) -> str:
    """An API key's text."""
    key_id, secret = f"k_{secrets.token_hex(8)}", secrets.token_urlsafe(32)
    event = kinds.KeyCreated(key_id=key_id, key_hash=hashlib.sha256(secret.encode()).hexdigest(), admin=admin)
    store.append(NewEvent(event=event, tenant=tenant, stream=f"tenant/{tenant}"))
    return f"tb-{key_id}-{secret}"


def revoke_key(store: EventStore, tenant: str, key: str) -> None:
    """The key opens nothing any more."""
    event = kinds.KeyRevoked(key_id=key.split("-")[1])
    store.append(NewEvent(event=event, tenant=tenant, stream=f"tenant/{tenant}"))


def datum(n: int = 3, **loss_inputs: list[float]) -> dict[str, Any]:
    """A valid datum of n tokens."""
    return {
        "tokens": [1 + i for i in range(n)],
        "targets": [2 + i for i in range(n)],
        "loss_inputs": loss_inputs,
    }


def floats(n: int) -> bytes:
    """[n] float32 LOGPROB."""
    return np.full(n, LOGPROB, "<f4").tobytes()


def answer(store: EventStore, position: int, event: kinds.AnyResult | None = None) -> Recorded:
    """Append the result of a request: `event`, or a plausible success."""
    request = store.get(position)
    assert request is not None
    completed, body, blobs = _success(store, request)
    made = event or completed
    if made.cost_us:
        ran = kinds.BatchRan(batch=f"1.{position}", busy_us=made.cost_us, charges=[(position, made.cost_us)])
        store.append(NewEvent(event=ran, tenant=SYSTEM_TENANT, stream="system/scheduler"))
    (recorded,) = store.append(
        NewEvent(
            event=made,
            body=body if event is None or not isinstance(event, kinds.Failed) else None,
            blobs=blobs if event is None else {},
            tenant=request.tenant,
            stream=request.stream,
            adapter=request.adapter,
            causation=position,
            actor="driver",
        )
    )
    return recorded


def _outputs(event: kinds.ForwardRequested, data: kinds.ForwardBackwardBody) -> list[DatumOutputs]:
    """Made up: the entropies count, the likeliest tokens are the first, the logits are zero."""
    spec = event.outputs
    if spec is None:
        return []
    return [
        DatumOutputs(
            entropy=floats(n) if spec.entropy else None,
            logsumexp=floats(n) if spec.logsumexp else None,
            top_tokens=np.tile(np.arange(spec.top_k, dtype="<i4"), n).tobytes() if spec.top_k else None,
            top_logprobs=floats(n * spec.top_k) if spec.top_k else None,
            logits=bytes(4 * n * MODEL.vocab_size) if spec.logits else None,
        )
        for n in (datum.num_tokens for datum in data.data)
    ]


def _top(n: int, k: int) -> tuple[bytes, bytes] | tuple[None, None]:
    """Of each token the likeliest are the first."""
    return (np.tile(np.arange(k, dtype="<i4"), n).tobytes(), floats(n * k)) if k else (None, None)


def _scores(event: kinds.SampleRequested, asked: kinds.SampleBody) -> PromptScores | None:
    """Made up; the targets have gaps where they must."""
    top_tokens, top_logprobs = _top(event.num_tokens - 1, event.params.prompt_top_logprobs)
    drawn_tokens, drawn_logprobs = _top(event.num_tokens - 1, event.params.prompt_draws)
    found = PromptScores(
        top_tokens=top_tokens, top_logprobs=top_logprobs, drawn_tokens=drawn_tokens, drawn_logprobs=drawn_logprobs
    )
    if asked.prompt_targets is None:
        return found if found != PromptScores() else None
    targets = np.frombuffer(asked.prompt_targets, "<i4").reshape(event.num_tokens, -1)
    logprobs = np.where(targets < 0, np.nan, LOGPROB).astype("<f4")
    logprobs[0] = np.nan
    return msgspec.structs.replace(found, target_logprobs=logprobs.tobytes())


def _success(store: EventStore, request: Recorded) -> tuple[kinds.AnyResult, kinds.Body | None, dict[str, bytes]]:
    digest = hashlib.sha256(str(request.position).encode()).hexdigest()
    event = request.event
    match event:
        case kinds.AddLoraRequested():
            return kinds.AddLoraCompleted(num_parameters=10, step=0, state_digest=digest), None, {}
        case kinds.RemoveLoraRequested():
            return kinds.RemoveLoraCompleted(), None, {}
        case kinds.ForwardRequested() | kinds.ForwardBackwardRequested():
            data = store.body(request)
            assert isinstance(data, kinds.ForwardBackwardBody)
            cls = (
                kinds.ForwardCompleted if isinstance(event, kinds.ForwardRequested) else kinds.ForwardBackwardCompleted
            )
            logprobs = [floats(len(datum.targets) // 4) for datum in data.data]
            body = kinds.LogprobsBody(logprobs)
            if isinstance(event, kinds.ForwardRequested):
                body = kinds.OutputsBody(logprobs, _outputs(event, data))
            done = cls(
                loss=1.5, metrics={"m": 2.0}, num_tokens=event.num_tokens, num_targets=event.num_targets, cost_us=7
            )
            return done, body, {}
        case kinds.OptimStepRequested():
            return kinds.OptimStepCompleted(step=1, grad_norm=0.5, state_digest=digest, cost_us=3), None, {}
        case kinds.SampleRequested():
            tokens = np.arange(4, dtype="<i4").tobytes()
            top = _top(4, event.params.top_logprobs)
            sequence = SampledSequence(tokens, floats(4), "length", *top)
            prompt = floats(event.num_tokens - 1) if event.params.prompt_logprobs else None
            asked = store.body(request)
            assert isinstance(asked, kinds.SampleBody)
            completed = kinds.SampleCompleted(step=0, num_prompt_tokens=event.num_tokens, num_sampled_tokens=4)
            return completed, kinds.SamplesBody([sequence], prompt, _scores(event, asked)), {}
        case kinds.SaveRequested():
            assert request.adapter is not None
            row = store.queries.adapter(request.tenant, request.adapter)
            assert row is not None
            blobs = {"weights": b"w" * 1000, "adapter_config": b"{}", "optimizer": b"o" * 500}
            saved = kinds.SaveCompleted(
                checkpoint=event.checkpoint,
                name=event.name,
                step=row.step,
                lora=row.lora,
                num_bytes=1502,
                state_digest=digest,
                use=event.use,
                ttl_s=event.ttl_s,
                user_metadata=event.user_metadata,
                replaces=event.replaces,
            )
            return saved, None, blobs
        case kinds.LoadRequested():
            return kinds.LoadCompleted(checkpoint=event.checkpoint, step=0, state_digest=digest), None, {}
        case other:
            raise AssertionError(other)


class ApiDriver:
    """The app over a store, its lifespan open, called as several tenants."""

    def __init__(
        self,
        settings: Settings,
        store: EventStore,
        *,
        scheduler_failed: Callable[[], Exception | None] | None = None,
    ) -> None:
        self.settings, self.store = settings, store
        self.app: Litestar = create_app(settings, store, scheduler_failed=scheduler_failed)
        self._runner = asyncio.Runner()
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        self.client = httpx.AsyncClient(transport=transport, base_url="http://localhost")
        self._close = asyncio.Event()
        self._life: asyncio.Task[None] | None = None
        self._keys: dict[str, str] = {}

    def __enter__(self) -> Self:
        self.run(self._open())
        return self

    def __exit__(self, *_: object) -> None:
        self.run(self._shut())
        self._runner.close()

    async def _open(self) -> None:
        opened = asyncio.Event()

        async def live() -> None:
            async with self.app.lifespan():
                opened.set()
                await self._close.wait()

        self._life = asyncio.create_task(live())
        await opened.wait()

    async def _shut(self) -> None:
        self._close.set()
        assert self._life is not None
        await self._life
        await self.client.aclose()

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """In the app's loop."""
        return self._runner.run(coroutine)

    def key(self, tenant: str) -> str:
        """The tenant's key, made on first use; the tenant `root` gets an admin key."""
        if tenant not in self._keys:
            self._keys[tenant] = create_key(self.store, tenant, admin=tenant == "root")
        return self._keys[tenant]

    async def acall(self, method: str, path: str, tenant: str | None = None, **kwargs: Any) -> httpx.Response:
        """One request, as a tenant or without a key."""
        headers = dict(kwargs.pop("headers", {}))
        if tenant is not None:
            headers["Authorization"] = f"Bearer {self.key(tenant)}"
        return await self.client.request(method, path, headers=headers, **kwargs)

    def call(self, method: str, path: str, tenant: str | None = None, **kwargs: Any) -> httpx.Response:
        """One request, as a tenant or without a key."""
        response: httpx.Response = self.run(self.acall(method, path, tenant, **kwargs))
        return response

    def get(self, path: str, tenant: str | None = None, **kwargs: Any) -> httpx.Response:
        """GET."""
        return self.call("GET", path, tenant, **kwargs)

    def post(self, path: str, tenant: str | None = None, json: Any = None, **kwargs: Any) -> httpx.Response:
        """POST a JSON body."""
        return self.call("POST", path, tenant, json={} if json is None else json, **kwargs)

    def submit(self, path: str, tenant: str | None = None, json: Any = None, **kwargs: Any) -> dict[str, Any]:
        """POST that must be accepted; the future."""
        response = self.post(path, tenant, json, **kwargs)
        assert response.status_code == 202, response.text
        future: dict[str, Any] = response.json()
        return future

    def complete(self, path: str, tenant: str | None = None, json: Any = None) -> dict[str, Any]:
        """POST, answer it, and give the finished future."""
        future = self.submit(path, tenant, json)
        answer(self.store, future["id"])
        done: dict[str, Any] = self.get(f"/v1/futures/{future['id']}", tenant).json()
        assert done["state"] == "completed", done
        return done

    def adapter(self, tenant: str | None = None, **body: Any) -> str:
        """Id of a ready adapter."""
        identity: str = self.complete("/v1/adapters", tenant, body)["adapter_id"]
        return identity


def problem(response: httpx.Response, status: int, slug: str) -> dict[str, Any]:
    """The body of a problem, checked for its form."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = msgspec.json.decode(response.content)
    assert body["type"] == f"urn:tinkerbell:problem:{slug}", body
    assert body["status"] == status
    assert body["title"]
    assert body["detail"]
    return body
