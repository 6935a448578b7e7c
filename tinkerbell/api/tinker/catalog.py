"""Models and checkpoints of one tenant, as the REST routes show them."""

import time
from collections.abc import Callable
from typing import Any, TypeVar

from tinkerbell.api import validation
from tinkerbell.api.auth import Principal
from tinkerbell.api.context import Context
from tinkerbell.api.tinker import names, reading
from tinkerbell.api.tinker.base import base_model, named_by, usable_at
from tinkerbell.api.views import rfc3339
from tinkerbell.events.names import SavedName
from tinkerbell.events.queries import Queries
from tinkerbell.events.rows import AdapterRow, CheckpointRow

T = TypeVar("T")


def now_us() -> int:
    """Microseconds since 1970."""
    return time.time_ns() // 1000


class Catalog:
    """What one tenant has, read from the database. Blocking: for a thread."""

    def __init__(self, context: Context, principal: Principal) -> None:
        self._context = context
        self._tenant = principal.tenant
        self._queries: Queries = context.store.queries

    def num_runs(self) -> int:
        """Models there ever were."""
        return self._queries.num_models(self._tenant)

    def runs(self, offset: int, limit: int) -> list[dict[str, Any]]:
        """Training runs, newest first."""
        return self._runs(self._queries.models(self._tenant, offset=offset, limit=limit))

    def run(self, id: str) -> dict[str, Any]:
        """A training run. Raises NotFound."""
        (run,) = self._runs([self.adapter(id)])
        return run

    def _runs(self, rows: list[AdapterRow]) -> list[dict[str, Any]]:
        ids, at_us, model = [row.id for row in rows], now_us(), base_model(self._context.model())
        asked_us = self._queries.last_requests_us(ids)
        state, sampler = (self._queries.newest_kept(ids, use, at_us) for use in ("state", "sampler"))
        return [
            {
                "training_run_id": row.id,
                "base_model": model,
                "model_owner": row.tenant,
                "is_lora": True,
                "corrupted": row.state == "failed",
                "lora_rank": row.lora.rank,
                "last_request_time": rfc3339(asked_us.get(row.id) or row.created_us),
                "last_checkpoint": _listed(state.get(row.id)),
                "last_sampler_checkpoint": _listed(sampler.get(row.id)),
                "user_metadata": row.user_metadata or None,
            }
            for row in rows
        ]

    def num_checkpoints(self) -> int:
        """Those with a name that can be used."""
        return self._queries.num_kept(self._tenant, now_us())

    def checkpoints(self, adapter: str | None = None, offset: int = 0, limit: int | None = None) -> list[CheckpointRow]:
        """Those, newest first."""
        return self._queries.kept(self._tenant, now_us(), adapter=adapter, offset=offset, limit=limit)

    def adapter(self, id: str) -> AdapterRow:
        """Raises NotFound."""
        row = self._queries.adapter(self._tenant, validation.adapter_id(id))
        if row is None:
            raise validation.no_adapter(id)
        return row

    def at(self, run_id: str, kind: str, name: str) -> CheckpointRow:
        """Raises NotFound, InvalidRequest."""
        path = names.parse_path(f"tinker://{run_id}/{kind}/{name}")
        return usable_at(self._queries, self._tenant, path)

    def all_at(self, run_id: str, kind: str, name: str) -> list[CheckpointRow]:
        """Those that can be used of all that have the path; older releases let several have one. Raises NotFound where
        none ever had it, InvalidRequest."""
        path = names.parse_path(f"tinker://{run_id}/{kind}/{name}")
        last = named_by(self._queries, self._tenant, path)
        ids = [last.id]
        if last.name is not None:
            ids = [id for id, holder in self._queries.name_holders(SavedName(*path)).items() if holder.saved]
        rows = [self._queries.checkpoint(self._tenant, id) for id in ids]
        return [row for row in rows if row is not None and row.is_usable(now_us())]


def _listed(row: CheckpointRow | None) -> dict[str, Any] | None:
    return None if row is None else reading.checkpoint(row)


async def ask(context: Context, principal: Principal, question: Callable[[Catalog], T]) -> T:
    """The answer to a question, from a thread."""
    return await context.read(principal.tenant, lambda: question(Catalog(context, principal)))
