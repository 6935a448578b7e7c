"""Models and checkpoints of one tenant, as the REST routes show them."""

import time
from collections.abc import Callable
from typing import Any, TypeVar

from tinkerbell.api import validation
from tinkerbell.api.auth import Principal
from tinkerbell.api.context import Context
from tinkerbell.api.tinker import names, reading
from tinkerbell.api.tinker.base import base_model, usable_at
from tinkerbell.api.views import rfc3339
from tinkerbell.events.queries import Queries
from tinkerbell.events.rows import AdapterRow, CheckpointRow
from tinkerbell.types import is_sampler

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

    def adapters(self) -> list[AdapterRow]:
        """Models, newest first."""
        rows = [row for row in self._queries.adapters(self._tenant) if not is_sampler(row.id)]
        return rows[::-1]

    def checkpoints(self, adapter: str | None = None) -> list[CheckpointRow]:
        """Those with a name that can be used, newest first."""
        at_us = now_us()
        rows = self._queries.checkpoints(self._tenant, adapter)
        return [row for row in rows if row.is_usable(at_us) and (row.name or row.use == "state")][::-1]

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
        return usable_at(self._queries, self._tenant, path)


async def ask(context: Context, principal: Principal, question: Callable[[Catalog], T]) -> T:
    """The answer to a question, from a thread."""
    return await context.read(principal.tenant, lambda: question(Catalog(context, principal)))
