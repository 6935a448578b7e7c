"""Training runs, their checkpoints, sessions: what is there."""

import asyncio
import time
from collections.abc import Callable
from typing import Any, TypeVar

from litestar import Request, Router, delete, get, post, put
from litestar.di import NamedDependency
from litestar.params import FromPath, JSONBody
from litestar.response import Response

from tinkerbell.api import archive, validation
from tinkerbell.api.auth import PUBLIC, Principal
from tinkerbell.api.context import Context
from tinkerbell.api.paging import Limit, Offset, page
from tinkerbell.api.tinker import downloads, names, reading
from tinkerbell.api.tinker import messages as m
from tinkerbell.api.tinker.base import base_model
from tinkerbell.api.tinker.dependencies import Submit
from tinkerbell.api.views import rfc3339
from tinkerbell.errors import InvalidRequest, NotFound
from tinkerbell.events.queries import Queries
from tinkerbell.events.rows import AdapterRow, CheckpointRow
from tinkerbell.types import TARGET_PRESETS, is_sampler

T = TypeVar("T")
CKPT = "/training_runs/{run_id:str}/checkpoints/{kind:str}/{name:str}"


def _now_us() -> int:
    return time.time_ns() // 1000


class Reader:
    """Reads what one tenant has. Blocking: for a thread."""

    def __init__(self, context: Context, principal: Principal) -> None:
        self._context = context
        self._tenant = principal.tenant
        self._queries: Queries = context.store.queries

    def adapters(self) -> list[AdapterRow]:
        """Models, newest first."""
        rows = [row for row in self._queries.adapters(self._tenant) if not is_sampler(row.id)]
        return rows[::-1]

    def checkpoints(self, adapter: str | None = None) -> list[CheckpointRow]:
        """Those with a name that can be used, newest first."""
        now_us = _now_us()
        rows = self._queries.checkpoints(self._tenant, adapter)
        return [row for row in rows if row.is_usable(now_us) and (row.name or row.use == "state")][::-1]

    def run(self, row: AdapterRow) -> dict[str, Any]:
        """A training run."""
        checkpoints = self.checkpoints(row.id)

        def newest(use: str) -> dict[str, Any] | None:
            return next((reading.checkpoint(each) for each in checkpoints if each.use == use), None)

        return {
            "training_run_id": row.id,
            "base_model": base_model(self._context.model()),
            "model_owner": row.tenant,
            "is_lora": True,
            "corrupted": row.state == "failed",
            "lora_rank": row.lora.rank,
            "last_request_time": rfc3339(self._queries.last_request_us(row.id) or row.created_us),
            "last_checkpoint": newest("state"),
            "last_sampler_checkpoint": newest("sampler"),
            "user_metadata": row.user_metadata or None,
        }

    def adapter(self, id: str) -> AdapterRow:
        """Raises NotFound."""
        row = self._queries.adapter(self._tenant, validation.adapter_id(id))
        if row is None:
            raise validation.no_adapter(id)
        return row

    def at(self, run_id: str, kind: str, name: str) -> CheckpointRow:
        """Raises NotFound, InvalidRequest."""
        path = names.parse_path(f"tinker://{run_id}/{kind}/{name}")
        row = self._queries.saved(self._tenant, path.model, path.use, path.name)
        if row is None and path.use == "state":
            # Saved through /v1 without a name.
            found = self._queries.checkpoint(self._tenant, path.name)
            row = found if found is not None and found.kind == "save" and found.adapter == path.model else None
        if row is None or not row.is_usable(_now_us()):
            raise names.no_path(path)
        return row


async def _read(context: Context, principal: Principal, question: Callable[[Reader], T]) -> T:
    return await asyncio.to_thread(lambda: question(Reader(context, principal)))


@get("/training_runs")
async def list_runs(
    context: NamedDependency[Context], principal: NamedDependency[Principal], limit: Limit = 20, offset: Offset = 0
) -> dict[str, Any]:
    """Newest first."""

    def read(reader: Reader) -> dict[str, Any]:
        rows = reader.adapters()
        return {
            "training_runs": [reader.run(row) for row in page(rows, limit, offset)],
            "cursor": {"offset": offset, "limit": limit, "total_count": len(rows)},
        }

    return await _read(context, principal, read)


@get("/training_runs/{run_id:str}")
async def show_run(
    run_id: FromPath[str], context: NamedDependency[Context], principal: NamedDependency[Principal]
) -> dict[str, Any]:
    """One of them."""
    return await _read(context, principal, lambda reader: reader.run(reader.adapter(run_id)))


@get("/training_runs/{run_id:str}/checkpoints")
async def list_checkpoints_of_run(
    run_id: FromPath[str], context: NamedDependency[Context], principal: NamedDependency[Principal]
) -> dict[str, Any]:
    """Newest first."""

    def read(reader: Reader) -> dict[str, Any]:
        rows = reader.checkpoints(reader.adapter(run_id).id)
        return {"checkpoints": [reading.checkpoint(row) for row in rows], "cursor": None}

    return await _read(context, principal, read)


@get("/checkpoints")
async def list_checkpoints(
    context: NamedDependency[Context], principal: NamedDependency[Principal], limit: Limit = 100, offset: Offset = 0
) -> dict[str, Any]:
    """Of all runs, newest first."""

    def read(reader: Reader) -> dict[str, Any]:
        rows = reader.checkpoints()
        return {
            "checkpoints": [reading.checkpoint(row) for row in page(rows, limit, offset)],
            "cursor": {"offset": offset, "limit": limit, "total_count": len(rows)},
        }

    return await _read(context, principal, read)


@delete(CKPT, status_code=204)
async def delete_checkpoint(
    run_id: FromPath[str],
    kind: FromPath[str],
    name: FromPath[str],
    context: NamedDependency[Context],
    principal: NamedDependency[Principal],
    submit: NamedDependency[Submit],
) -> None:
    """Nobody can use it from now on; `tinkerbell db compact` frees its bytes."""
    row = await _read(context, principal, lambda reader: reader.at(run_id, kind, name))
    await submit(None).change_checkpoint(row, deleted=True)


@post(CKPT + "/publish", status_code=204)
async def publish_checkpoint(
    run_id: FromPath[str],
    kind: FromPath[str],
    name: FromPath[str],
    context: NamedDependency[Context],
    principal: NamedDependency[Principal],
    submit: NamedDependency[Submit],
) -> None:
    """Marks it; tenants see their own checkpoints only, published or not."""
    row = await _read(context, principal, lambda reader: reader.at(run_id, kind, name))
    await submit(None).change_checkpoint(row, published=True)


@delete(CKPT + "/publish", status_code=204)
async def unpublish_checkpoint(
    run_id: FromPath[str],
    kind: FromPath[str],
    name: FromPath[str],
    context: NamedDependency[Context],
    principal: NamedDependency[Principal],
    submit: NamedDependency[Submit],
) -> None:
    """Takes the mark back."""
    row = await _read(context, principal, lambda reader: reader.at(run_id, kind, name))
    await submit(None).change_checkpoint(row, published=False)


@put(CKPT + "/ttl", status_code=204)
async def set_ttl(
    run_id: FromPath[str],
    kind: FromPath[str],
    name: FromPath[str],
    data: JSONBody[m.Ttl],
    context: NamedDependency[Context],
    principal: NamedDependency[Principal],
    submit: NamedDependency[Submit],
) -> None:
    """From now on; none keeps it for good."""
    row = await _read(context, principal, lambda reader: reader.at(run_id, kind, name))
    expires_us = None if data.ttl_seconds is None else _now_us() + data.ttl_seconds * 1_000_000
    await submit(None).change_checkpoint(row, expires_us=expires_us)


@get(CKPT + "/external_weights_urls")
async def external_weights_urls(
    run_id: FromPath[str],
    kind: FromPath[str],
    name: FromPath[str],
    request: Request[Any, Any, Any],
    context: NamedDependency[Context],
    principal: NamedDependency[Principal],
) -> dict[str, Any]:
    """Addresses of a PEFT directory's files; whoever has one can fetch it until it expires."""
    if names.USES.get(kind) != "external":
        raise InvalidRequest(f"{kind} have no addresses; save_weights_external makes a checkpoint that has.")
    expires_s = int(time.time()) + downloads.VALID_S
    base = str(request.base_url).rstrip("/")

    def read(reader: Reader) -> dict[str, str]:
        row = reader.at(run_id, kind, name)
        files = archive.files_of(row, with_optimizer=False)
        context.store.require_blobs(files.values())
        return {
            file: f"{base}/api/v1/downloads/"
            + downloads.issue(context.store, downloads.Ticket(row.tenant, row.id, file, expires_s))
            for file in files
        }

    return {"urls": await _read(context, principal, read), "expires": rfc3339(expires_s * 1_000_000)}


@get("/downloads/{ticket:str}", opt=PUBLIC)
async def download(ticket: FromPath[str], context: NamedDependency[Context]) -> Response[bytes]:
    """A file of a checkpoint."""

    def read() -> bytes:
        found = downloads.redeem(context.store, ticket)
        row = context.store.queries.checkpoint(found.tenant, found.checkpoint)
        if row is None or not row.is_usable(_now_us()):
            raise NotFound("There is no such download.")
        return context.store.blob(archive.files_of(row, with_optimizer=False)[found.file])

    return Response(await asyncio.to_thread(read), media_type="application/octet-stream")


@post("/weights_info", status_code=200)
async def weights_info(
    data: JSONBody[m.WeightsInfo], context: NamedDependency[Context], principal: NamedDependency[Principal]
) -> dict[str, Any]:
    """What a path leads to."""
    path = names.parse_path(data.tinker_path)

    def read(reader: Reader) -> dict[str, Any]:
        lora = reader.at(path.model, names.KINDS[path.use], path.name).lora

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

    return await _read(context, principal, read)


@get("/sessions")
async def list_sessions(
    context: NamedDependency[Context], principal: NamedDependency[Principal], limit: Limit = 20, offset: Offset = 0
) -> dict[str, Any]:
    """Newest first."""
    rows = await asyncio.to_thread(context.store.queries.sessions, principal.tenant)
    return {"sessions": [row.id for row in page(rows, limit, offset)]}


@get("/sessions/{session_id:str}")
async def show_session(
    session_id: FromPath[str],
    context: NamedDependency[Context],
    principal: NamedDependency[Principal],
    submit: NamedDependency[Submit],
) -> dict[str, Any]:
    """What was made within it."""

    def read(reader: Reader) -> dict[str, Any]:
        row = submit(None).session(session_id)
        samplers = context.store.queries.samplers(principal.tenant, row.id)
        return {
            "training_run_ids": [each.id for each in reader.adapters()[::-1] if names.session_of(each.id) == row.id],
            "sampler_ids": [each.id for each in samplers],
            "user_metadata": row.user_metadata or None,
            "display_name": row.display_name,
        }

    return await _read(context, principal, read)


router = Router(
    path="/",
    route_handlers=[
        list_runs,
        show_run,
        list_checkpoints_of_run,
        list_checkpoints,
        delete_checkpoint,
        publish_checkpoint,
        unpublish_checkpoint,
        set_ttl,
        external_weights_urls,
        download,
        weights_info,
        list_sessions,
        show_session,
    ],
)
