"""Sessions from their beginning to their end, and keys that are given back."""

import time

from litestar.exceptions import HTTPException

from tinkerbell.api.tinker import messages as m
from tinkerbell.api.tinker import names
from tinkerbell.api.tinker.base import TinkerSubmitting
from tinkerbell.errors import SessionOver
from tinkerbell.events import kinds
from tinkerbell.events.sessions import end
from tinkerbell.types import SessionId

SIGNS_OF_LIFE = 8
"""How many of a session are written down, at most, in the time after which its silence would end it."""


class SessionSubmitting(TinkerSubmitting):
    """Submits what concerns sessions and keys."""

    async def create_session(self, body: m.CreateSession, client: str) -> SessionId:
        """A session of the caller's. Its retry gives the same one."""
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
        try:
            row = await self._context.read(self._tenant, self._living_session, id)
            if expiry_s is not None and time.time_ns() // 1000 - row.heard_us > expiry_s * 1e6 / SIGNS_OF_LIFE:
                # By its key: of many that come at once, one is written.
                key = f"tinker:heard:{row.id}:{row.heard_us}"
                await self._write(self._event(kinds.SessionHeard(session=row.id), key, session=row.id))
        except SessionOver as exc:
            raise HTTPException(status_code=410, detail=f"The session {id} has ended.") from exc

    async def finish_session(self, session: SessionId, reason: str, detail: str | None) -> None:
        """What it made leaves the executor; what it saved stays. Once is enough: again is fine."""
        caller, store = self._caller, self._context.store

        def finish() -> None:
            row = self.session(session)
            who = {"actor": caller.principal.key_id, "correlation": caller.correlation}
            end(store, self._tenant, row.id, reason, detail, **who)

        await self._prepared(finish)

    async def revoke_key(self, key_id: str) -> None:
        """A key of the caller's."""
        await self._write(self._event(kinds.KeyRevoked(key_id=key_id), f"tinker:revoke:{key_id}"))
