"""The one executor process of a scheduler: starts it, and starts it again after it died."""

import asyncio
import logging

from tinkerbell.config import Settings
from tinkerbell.errors import TinkerbellError
from tinkerbell.events.kinds import EnvironmentRecorded
from tinkerbell.executors.link import ExecutorLink
from tinkerbell.executors.protocol import ExecutorOptions
from tinkerbell.scheduler.environments import environment_event

log = logging.getLogger("tinkerbell.scheduler")

FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 10.0


class ExecutorHost:
    """Owns the link. `environment` is that of the process running now."""

    def __init__(self, settings: Settings) -> None:
        self._options = ExecutorOptions(
            model=settings.model,
            threads=settings.threads,
            extra=settings.executor_options,
        )
        self.link = ExecutorLink(settings.executor, self._options, settings.executor_silence_s)
        self.environment: EnvironmentRecorded | None = None
        self._started = False
        self._deaths = 0
        """Since a batch last succeeded."""

    @property
    def up(self) -> bool:
        """Whether an executor runs that has loaded its model."""
        return self._started and self.link.alive

    async def start(self) -> EnvironmentRecorded:
        """Raises what the executor raised when it cannot start."""
        self._started = False
        self.environment = environment_event(await self.link.start(), self._options)
        self._started = True
        return self.environment

    def worked(self) -> None:
        """A batch came back, so the next restart need not wait."""
        self._deaths = 0

    async def restart(self, stopping: asyncio.Event) -> EnvironmentRecorded | None:
        """Start again until it succeeds, with growing pauses; None once `stopping` is set."""
        await self.link.stop(0.0)
        while not stopping.is_set():
            pause_s = FIRST_PAUSE_S * (2 ** min(self._deaths, 10) - 1)
            self._deaths += 1
            if await wait_for(stopping, min(pause_s, LONGEST_PAUSE_S)):
                return None
            try:
                environment = await self.start()
            except (TinkerbellError, OSError) as exc:
                log.error("executor start failed attempt=%d detail=%s", self._deaths, exc)
                continue
            log.warning("executor restarted pid=%s environment=%s", self.link.pid, environment.digest[:12])
            return environment
        return None


async def wait_for(event: asyncio.Event, timeout_s: float) -> bool:
    """Whether the event came before the time was over."""
    try:
        await asyncio.wait_for(event.wait(), timeout_s)
    except TimeoutError:
        return False
    return True
