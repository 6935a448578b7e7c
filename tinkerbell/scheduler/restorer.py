"""Keeps the executor's adapters complete: restores those that are needed, remembers those that cannot be."""

import logging

from tinkerbell.errors import ExecutorDied, OtherBaseModel
from tinkerbell.executors.link import ExecutorLink
from tinkerbell.scheduler.pending import Reason
from tinkerbell.scheduler.recovery import Recovery, StateLost
from tinkerbell.scheduler.residency import Residency
from tinkerbell.scheduler.setbacks import TRY_AGAIN, why
from tinkerbell.types import AdapterId, TenantId

log = logging.getLogger("tinkerbell.scheduler")


class Restorer:
    """Restores adapters, each at most `most_deaths` times at the cost of an executor."""

    def __init__(self, recovery: Recovery, residency: Residency, most_deaths: int) -> None:
        self._recovery = recovery
        self._residency = residency
        self._most_deaths = most_deaths
        self._lost: dict[AdapterId, Reason] = {}
        self._deaths: dict[AdapterId, int] = {}

    async def restore(self, link: ExecutorLink, tenant: TenantId, adapter: AdapterId) -> Reason | None:
        """Put the adapter into the executor, or say why it cannot be: then it is lost until `replaced`.

        Raises ExecutorDied, and what says nothing of the adapter (TRY_AGAIN).
        """
        deaths = self._deaths.get(adapter, 0)
        if deaths >= self._most_deaths:
            self._lost[adapter] = _lost(adapter, f"the executor died {deaths} times restoring it")
        if adapter in self._lost:
            return self._lost[adapter]
        try:
            resident = await self._recovery.restore(link, tenant, adapter)
        except ExecutorDied:
            self._deaths[adapter] = deaths + 1
            raise
        except TRY_AGAIN:
            raise
        except OtherBaseModel as exc:
            # Not lost: the model it belongs to may be served again at any start.
            log.warning("adapter of another base model adapter=%s detail=%s", adapter, exc.detail)
            return Reason(exc.category, exc.slug, exc.detail)
        except Exception as exc:  # noqa: BLE001 - whatever it is, it is this adapter's and nobody else's
            detail = exc.detail if isinstance(exc, StateLost) else why(exc).message
            reason = self._lost[adapter] = _lost(adapter, detail)
            log.error("adapter lost adapter=%s detail=%s", adapter, reason.message)
            return reason
        self._residency.put(resident)
        self._deaths.pop(adapter, None)
        log.info("adapter restored adapter=%s step=%d", adapter, resident.step)
        return None

    def replaced(self, adapter: AdapterId) -> None:
        """A load has put another state in the adapter's place."""
        self._lost.pop(adapter, None)
        self._deaths.pop(adapter, None)

    def new_executor(self) -> None:
        """What failed in the old process may succeed in the new one."""
        self._lost.clear()


def _lost(adapter: AdapterId, detail: str) -> Reason:
    return Reason("server", StateLost.slug, f"the state of adapter {adapter} is lost: {detail}")
