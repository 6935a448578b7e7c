"""The scheduler as the server sees it: a thread with the event loop, the executor and the lease."""

import asyncio
import contextlib
import logging
import threading

from tinkerbell.config import Settings
from tinkerbell.errors import AlreadyAnswered, ExecutorDied, Fenced, NotFound
from tinkerbell.events.holders import name_this_process
from tinkerbell.events.leases import SCHEDULER, Lease
from tinkerbell.events.store import EventStore
from tinkerbell.scheduler.cost import CostModel
from tinkerbell.scheduler.host import ExecutorHost, wait_for
from tinkerbell.scheduler.leader import Leader
from tinkerbell.scheduler.setbacks import TRY_AGAIN

log = logging.getLogger("tinkerbell.scheduler")

RESOURCE = SCHEDULER
"""The lease of the one leader."""

PAUSE_S = 1.0
"""Between attempts while the database does not answer, and after a leadership that failed; then longer each time."""
LONGEST_PAUSE_S = 30.0


class SchedulerService:
    """Runs the scheduler in a thread of its own. With several services on one database one leads, the others
    wait.

    `failed` is set, and the thread ends, when the executor cannot start. A leadership that fails is followed by the
    next one.
    """

    def __init__(self, store: EventStore, settings: Settings) -> None:
        self.failed: Exception | None = None
        self._store = store
        self._settings = settings
        self._holder = name_this_process()
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self._started: threading.Event = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._host: ExecutorHost | None = None
        self._leader: Leader | None = None
        self._stopping: asyncio.Event | None = None
        self._grace_s = 3.0
        self._blamed: dict[int, int] = {}
        """Position of a request -> leaderships that ended over it, alone or among others."""
        self._failures = 0
        """Leaderships in a row that failed before a batch ran."""

    @property
    def executor_pid(self) -> int | None:
        """Of the executor process that runs now."""
        return self._host.link.pid if self._host is not None else None

    @property
    def executor_away(self) -> bool:
        """Whether the executor has ended and is not there again yet."""
        return self._host is None or not self._host.up

    @property
    def leading(self) -> bool:
        """Whether this service holds the lease."""
        return self._leader is not None

    def start(self) -> None:
        """Start the executor; returns when it is up. Raises what it raised if it cannot start."""
        self._thread.start()
        self._started.wait()
        if self.failed is not None:
            self._thread.join()
            raise self.failed

    def stop(self, grace_s: float = 3.0) -> None:
        """End the running batch if `grace_s` allows, write recovery points, give the lease back, end the
        executor.

        Returns within about `grace_s` and one second. What was accepted and not answered waits in the log.
        """
        self._grace_s = grace_s
        if self._loop is not None and self._thread.is_alive():
            with contextlib.suppress(RuntimeError):  # the loop has ended by itself meanwhile
                self._loop.call_soon_threadsafe(self._stop)
        if self._thread.is_alive():
            self._thread.join(grace_s + 2.0)

    def _stop(self) -> None:
        assert self._stopping is not None
        self._stopping.set()
        if self._leader is not None:
            self._leader.stop()

    def _run(self) -> None:
        try:
            asyncio.run(self._main())
        except Exception as exc:
            self.failed = exc
            if self._started.is_set():
                log.exception("scheduler failed holder=%s", self._holder)
        finally:
            self._started.set()

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        self._host = ExecutorHost(self._settings)
        cost = CostModel()
        await self._host.start()
        try:
            while not self._stopping.is_set():
                lease = await self._acquire()
                if lease is not None:
                    await wait_for(self._stopping, await self._lead(lease, cost))
        finally:
            await self._host.link.stop(0.5)

    async def _acquire(self) -> Lease | None:
        """The lease, as soon as nobody else holds it; None on the way out."""
        assert self._stopping is not None
        waiting = False
        while not self._stopping.is_set():
            pause_s = min(self._settings.lease_ttl_s / 10, 1.0)
            try:
                lease = await asyncio.to_thread(
                    self._store.acquire_lease, RESOURCE, self._holder, self._settings.lease_ttl_s
                )
                if lease is not None:
                    self._started.set()
                    return lease
                if not waiting:
                    log.info("waiting for the lease holder=%s", self._holder)
                waiting = True
            except TRY_AGAIN as exc:
                log.error("database does not answer detail=%s", exc)
                pause_s = PAUSE_S
            except Exception:
                log.exception("the lease could not be asked for")
                pause_s = PAUSE_S
            self._started.set()
            await wait_for(self._stopping, pause_s)
        return None

    async def _lead(self, lease: Lease, cost: CostModel) -> float:
        """One leadership, from the lease to its end; for how long then to leave it to others."""
        assert self._stopping is not None and self._host is not None
        if not self._host.link.alive and await self._host.restart(self._stopping) is None:
            return 0.0
        leader = self._leader = Leader(self._store, self._settings, self._host, lease, cost, self._blamed)
        if self._stopping.is_set():
            leader.stop()
        heartbeat = asyncio.create_task(self._renew(lease, leader))
        leading = asyncio.create_task(leader.run())
        stopping = asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait({leading, stopping}, return_when=asyncio.FIRST_COMPLETED)
            deadline = asyncio.get_running_loop().time() + self._grace_s
            if not leading.done():
                await asyncio.wait({leading}, timeout=self._grace_s)
            if not leading.done():
                log.warning("stopped in the middle of a batch holder=%s", self._holder)
                leading.cancel()
                await asyncio.wait({leading})
                return 0.0
            leading.result()
            await leader.write_checkpoints(deadline)
        except Fenced as exc:
            log.warning("lease lost epoch=%d detail=%s", lease.epoch, exc)
        except ExecutorDied as exc:
            log.warning("no recovery points: the executor died detail=%s", exc)
        except TRY_AGAIN as exc:
            log.error("database does not answer detail=%s", exc)
            return PAUSE_S
        except (AlreadyAnswered, NotFound) as exc:
            # What this leader believed is not what the log says. The next one begins with the log.
            log.error("a result was refused epoch=%d detail=%s", lease.epoch, exc)
            return PAUSE_S
        except Exception:
            log.exception("leadership failed epoch=%d requests=%s", lease.epoch, leader.blamed)
            return self._blame(leader)
        finally:
            self._leader = None
            leader.close()
            for task in (heartbeat, stopping):
                task.cancel()
            await asyncio.gather(heartbeat, stopping, return_exceptions=True)
            try:
                await asyncio.to_thread(self._store.release_lease, lease)
            except Exception as exc:  # noqa: BLE001 - it runs out by itself
                log.warning("lease not given back epoch=%d detail=%s", lease.epoch, exc)
        return 0.0

    def _blame(self, leader: Leader) -> float:
        """Remember what the leadership ended over; how long to wait before the next one."""
        # Of those before, whatever is answered by now is known no more.
        self._blamed = {position: self._blamed.get(position, 0) + 1 for position in leader.blamed}
        self._failures = 0 if leader.num_batches > 1 else self._failures + 1
        return min(PAUSE_S * 2.0 ** min(self._failures, 10), LONGEST_PAUSE_S)

    async def _renew(self, lease: Lease, leader: Leader) -> None:
        """Keep the lease; tell the leader when that fails for as long as the lease is good."""
        loop = asyncio.get_running_loop()
        ttl_s = self._settings.lease_ttl_s
        good_until = loop.time() + ttl_s
        while True:
            await asyncio.sleep(ttl_s / 3)
            asked = loop.time()
            try:
                renewed = await asyncio.wait_for(
                    asyncio.to_thread(self._store.renew_lease, lease, ttl_s), max(good_until - asked, 0.001)
                )
            except Exception as exc:  # noqa: BLE001 - nobody waits for this task: its end would not be seen
                log.warning("lease not renewed epoch=%d detail=%r", lease.epoch, exc)
                if loop.time() < good_until:
                    continue
                renewed = False
            if not renewed:
                leader.lose(Fenced(f"the lease of epoch {lease.epoch} could not be renewed"))
                return
            good_until = asked + ttl_s
