"""Sessions from their beginning to their end, and keys that are given back."""

import asyncio
import time

import msgspec
from litestar.exceptions import HTTPException

from tinkerbell.api.tinker import messages as m
from tinkerbell.api.tinker import names
from tinkerbell.api.tinker.base import TinkerSubmitting
from tinkerbell.events import kinds
from tinkerbell.events.sessions import ending
from tinkerbell.types import SessionId

SIGNS_OF_LIFE = 8
"""How many of a session are written down, at most, in the time after which its silence would end it."""


class SessionSubmitting(TinkerSubmitting):
    """Submits what concerns sessions and keys."""

    async def create_session(self, body: m.CreateSession, client: str) -> SessionId:
        """A session of the caller's. Its retry gives the same one."""
        self._require_small()
        started = kinds.SessionStarted(
            session=names.new_session(),
            client=client,
            display_name=body.display_name,
            tags=body.tags,
            user_metadata=body.user_metadata or {},
        )
        key = self._caller.idempotency_key
        recorded = await self._write(self._event(started, f"tinker:session:{key}" if key else None))
        assert isinstance(recorded.event, kinds.SessionStarted)
        return recorded.event.session

    async def hear_of_session(self, id: str) -> None:
        """Its program runs. Raises HTTPException 410 where it has ended.

        Written down only as often as it takes to know that it did not fall silent for `session_expiry_s`.
        """
        expiry_s = self._context.settings.session_expiry_s
        row = await asyncio.to_thread(self.session, id)
        if row.ended_us is not None:
            raise HTTPException(status_code=410, detail=f"The session {row.id} has ended.")
        if expiry_s is not None and time.time_ns() // 1000 - row.heard_us > expiry_s * 1e6 / SIGNS_OF_LIFE:
            await self._write(self._event(kinds.SessionHeard(session=row.id), None))

    async def finish_session(self, session: SessionId, reason: str, detail: str | None) -> None:
        """What it made leaves the executor; what it saved stays. Once is enough: again is fine."""
        self._require_small()
        row = await asyncio.to_thread(self.session, session)
        if row.ended_us is not None:
            return
        events = await asyncio.to_thread(ending, self._queries, self._tenant, row.id, reason, detail)
        key, trace = self._caller.principal.key_id, self._caller.correlation
        await self._write(*(msgspec.structs.replace(each, actor=key, correlation=trace) for each in events))

    async def revoke_key(self, key_id: str) -> None:
        """A key of the caller's."""
        await self._write(self._event(kinds.KeyRevoked(key_id=key_id), None))
