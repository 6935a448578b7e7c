"""Checkpoints: what is there, how long it stays, where to fetch it."""

import time
from typing import Any

from litestar import Router, delete, get, post, put
from litestar.di import NamedDependency, Provide
from litestar.params import FromPath, JSONBody
from litestar.response import Response

from tinkerbell.api import archive
from tinkerbell.api.auth import PUBLIC, Principal
from tinkerbell.api.context import Context
from tinkerbell.api.paging import Limit, Offset
from tinkerbell.api.requests import ApiRequest
from tinkerbell.api.tinker import downloads, names, reading
from tinkerbell.api.tinker import messages as m
from tinkerbell.api.tinker.base import base_model
from tinkerbell.api.tinker.catalog import Catalog, ask, now_us
from tinkerbell.api.tinker.dependencies import Submit
from tinkerbell.api.tinker.submitter import TinkerSubmitter
from tinkerbell.api.views import rfc3339
from tinkerbell.errors import InvalidRequest, NotFound
from tinkerbell.events.rows import CheckpointRow
from tinkerbell.types import SYSTEM_TENANT, TARGET_PRESETS


@get("/training_runs/{run_id:str}/checkpoints")
async def list_checkpoints_of_run(
    run_id: FromPath[str], context: NamedDependency[Context], principal: NamedDependency[Principal]
) -> dict[str, Any]:
    """Newest first."""

    def read(catalog: Catalog) -> dict[str, Any]:
        rows = catalog.checkpoints(catalog.adapter(run_id).id)
        return {"checkpoints": [reading.checkpoint(row) for row in rows], "cursor": None}

    return await ask(context, principal, read)


@get("/checkpoints")
async def list_checkpoints(
    context: NamedDependency[Context], principal: NamedDependency[Principal], limit: Limit = 100, offset: Offset = 0
) -> dict[str, Any]:
    """Of all runs, newest first."""

    def read(catalog: Catalog) -> dict[str, Any]:
        rows = catalog.checkpoints(offset=offset, limit=limit)
        return {
            "checkpoints": [reading.checkpoint(row) for row in rows],
            "cursor": {"offset": offset, "limit": limit, "total_count": catalog.num_checkpoints()},
        }

    return await ask(context, principal, read)


async def provide_checkpoint(
    run_id: FromPath[str],
    kind: FromPath[str],
    name: FromPath[str],
    context: NamedDependency[Context],
    principal: NamedDependency[Principal],
) -> CheckpointRow:
    """The one that the path names. Raises NotFound, InvalidRequest."""
    return await ask(context, principal, lambda catalog: catalog.at(run_id, kind, name))


async def provide_change(request: ApiRequest, submit: NamedDependency[Submit]) -> TinkerSubmitter:
    """What happens once for all that carry the SDK's key of one call."""
    key = request.headers.get("x-idempotency-key")
    return submit(key and f"change:{key}")


@delete("/", status_code=204)
async def delete_checkpoint(
    run_id: FromPath[str],
    kind: FromPath[str],
    name: FromPath[str],
    context: NamedDependency[Context],
    principal: NamedDependency[Principal],
    change: NamedDependency[TinkerSubmitter],
) -> None:
    """Nobody can use it from now on; `tinkerbell db compact` frees its bytes. Asked again, nothing more happens."""
    await change.delete_checkpoints(await ask(context, principal, lambda catalog: catalog.all_at(run_id, kind, name)))


@post("/publish", status_code=204)
async def publish_checkpoint(
    checkpoint: NamedDependency[CheckpointRow], change: NamedDependency[TinkerSubmitter]
) -> None:
    """Marks it; tenants see their own checkpoints only, published or not."""
    await change.change_checkpoint(checkpoint, published=True)


@delete("/publish", status_code=204)
async def unpublish_checkpoint(
    checkpoint: NamedDependency[CheckpointRow], change: NamedDependency[TinkerSubmitter]
) -> None:
    """Takes the mark back."""
    await change.change_checkpoint(checkpoint, published=False)


@put("/ttl", status_code=204)
async def set_ttl(
    data: JSONBody[m.Ttl], checkpoint: NamedDependency[CheckpointRow], change: NamedDependency[TinkerSubmitter]
) -> None:
    """From now on; none keeps it for good."""
    expires_us = None if data.ttl_seconds is None else now_us() + data.ttl_seconds * 1_000_000
    await change.change_checkpoint(checkpoint, expires_us=expires_us)


@get("/external_weights_urls")
async def external_weights_urls(
    request: ApiRequest, checkpoint: NamedDependency[CheckpointRow], context: NamedDependency[Context]
) -> dict[str, Any]:
    """Addresses of a PEFT directory's files; whoever has one can fetch it until it expires, or the key is revoked that
    asked for it."""
    if checkpoint.use != "external":
        raise InvalidRequest(
            f"{names.KINDS[checkpoint.use]} have no addresses; save_weights_external makes a checkpoint that has."
        )
    http, key_id = context.settings.http, request.user.key_id
    expires_s = int(time.time() + http.download_valid_s)
    base = (http.public_url or str(request.base_url)).rstrip("/")

    def read() -> dict[str, str]:
        files = archive.files_of(checkpoint, with_optimizer=False)
        context.store.require_blobs(files.values())
        tickets = {file: downloads.Ticket(checkpoint.tenant, checkpoint.id, file, expires_s, key_id) for file in files}
        return {
            file: f"{base}/api/v1/downloads/{downloads.issue(context.store, ticket)}"
            for file, ticket in tickets.items()
        }

    return {"urls": await context.read(checkpoint.tenant, read), "expires": rfc3339(expires_s * 1_000_000)}


@get("/downloads/{ticket:str}", opt=PUBLIC)
async def download(ticket: FromPath[str], request: ApiRequest, context: NamedDependency[Context]) -> Response[bytes]:
    """A file of a checkpoint."""

    found = await context.threads.gate.run(SYSTEM_TENANT, downloads.redeem, context.store, ticket)
    if not await context.gate.still_valid(Principal(tenant=found.tenant, key_id=found.key_id, admin=False)):
        raise NotFound("There is no such download.")
    context.shares.enter(request.scope, found.tenant, found.key_id, None)

    def read() -> bytes:
        row = context.store.queries.checkpoint(found.tenant, found.checkpoint)
        if row is None or not row.is_usable(now_us()):
            raise NotFound("There is no such download.")
        content = context.store.blob(archive.files_of(row, with_optimizer=False)[found.file])
        return archive.shown(found.file, content, here=context.gate.loopback)

    return Response(await context.read(found.tenant, read), media_type="application/octet-stream")


@post("/weights_info", status_code=200)
async def weights_info(
    data: JSONBody[m.WeightsInfo], context: NamedDependency[Context], principal: NamedDependency[Principal]
) -> dict[str, Any]:
    """What a path leads to."""
    path = names.parse_path(data.tinker_path)

    def read(catalog: Catalog) -> dict[str, Any]:
        lora = catalog.at(path.model, names.KINDS[path.use], path.name).lora

        def trains(preset: str) -> bool:
            return any(target in (preset, *TARGET_PRESETS[preset]) for target in lora.targets) or (
                preset in ("attention", "mlp") and "all-linear" in lora.targets
            )

        return {
            "base_model": base_model(context.model()),
            "is_lora": True,
            "lora_rank": lora.rank,
            "train_unembed": trains("unembed"),
            "train_mlp": trains("mlp"),
            "train_attn": trains("attention"),
            "optimizer_config": {"type": "adamw"},
        }

    return await ask(context, principal, read)


@post("/copy_weights", status_code=200)
async def copy_weights(
    data: JSONBody[m.CopyWeights], request: ApiRequest, submit: NamedDependency[Submit]
) -> dict[str, str]:
    """A checkpoint once more, in a run of its own; the bytes are shared."""
    if data.weights_access_token is not None or "x-tinker-weights-access-token" in request.headers:
        raise InvalidRequest(
            "weights_access_token: there are no access tokens here, and copies are made of your own checkpoints only;"
            " leave it out."
        )
    key, version = request.headers.get("x-idempotency-key"), request.headers.get("x-sdk-version")
    client = f"tinker/{version}" if version else "tinker"
    path = await submit(key and f"copy:{key}").copy_weights(data, client)
    return {"tinker_path": str(path)}


router = Router(
    path="/",
    route_handlers=[
        list_checkpoints_of_run,
        list_checkpoints,
        download,
        weights_info,
        copy_weights,
        Router(
            path="/training_runs/{run_id:str}/checkpoints/{kind:str}/{name:str}",
            route_handlers=[
                delete_checkpoint,
                publish_checkpoint,
                unpublish_checkpoint,
                set_ttl,
                external_weights_urls,
            ],
            dependencies={"checkpoint": Provide(provide_checkpoint), "change": Provide(provide_change)},
        ),
    ],
)
