"""`tinkerbell bench store`: durable appends, group commit against one transaction for each event."""

import asyncio
import itertools
import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import click
import msgspec
import sqlalchemy as sa

from tinkerbell.cli.bench import machine
from tinkerbell.cli.bench.measure import AsyncOperation, Rate, closed_loop_async
from tinkerbell.cli.bench.report import Report, at_least, json_file_option, publish
from tinkerbell.config import Settings
from tinkerbell.events import schema
from tinkerbell.events.kinds import NewEvent, SampleBody, SampleRequested
from tinkerbell.events.store import EventStore
from tinkerbell.types import SamplingParams

GAIN = 8.0
"""How many times faster group commit must be at GAIN_AT writers."""
GAIN_AT = 64
GROUP, OWN, IN_TURN = "group", "own connection", "in turn"
"""How writers come to their commits."""
FAST_SYNC_MS = 1.0
"""Where a sync takes less, grouping has little to save: a transaction of one event is then mostly its statements."""
COLUMNS = ("database", "sync_ms", "commit", "writers", "events_per_s", "p50_ms", "p99_ms", "group_gain")


@click.command()
@click.option("--seconds", type=click.FloatRange(min=0.1), default=4.0, show_default=True, help="Per row.")
@click.option("--event-bytes", type=click.IntRange(min=4), default=2048, show_default=True, help="Body of an event.")
@click.option("--writers", type=click.IntRange(min=1), multiple=True, default=(1, 16, 64), show_default=True)
@click.option(
    "--added-sync-ms",
    type=click.FloatRange(min=0),
    multiple=True,
    default=(0.0, 2.0),
    show_default=True,
    help="Wait this much longer at each commit, as on a disk whose syncs take that much more.",
)
@click.option(
    "--database",
    "databases",
    type=click.Choice(["sqlite", "postgres"]),
    multiple=True,
    default=("sqlite", "postgres"),
    show_default=True,
)
@click.option(
    "--database-url",
    help="An empty Postgres database to fill; without it a scratch server is started from the installed binaries.",
)
@json_file_option
def store(
    seconds: float,
    event_bytes: int,
    writers: tuple[int, ...],
    added_sync_ms: tuple[float, ...],
    databases: tuple[str, ...],
    database_url: str | None,
    json_file: Path | None,
) -> None:
    """Durable appends per second, and how long one takes.

    Each writer appends one event, waits until it is durable as the HTTP edge does, and appends the next. Every event
    is a whole request: envelope, hash chain, body and projections. Two baselines write one transaction for each event
    with the same tables, statements and lock: `own connection`, a connection for each writer, as a server with a
    connection pool does it; and `in turn`, one connection that all writers queue for, where nothing but the grouping
    differs. The expectation is over the second: it is fair to every writer, the first may starve some.

    What grouping saves is the sync of each commit, so it depends on the disk. Rows with --added-sync-ms show a slower
    one: every commit, grouped or not, takes that much longer. The expectation is for disks whose sync, added time
    included, takes at least a millisecond.

    \b
    tinkerbell bench store
    tinkerbell bench store --database sqlite --seconds 10
    """
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="tinkerbell-bench-") as scratch:
        facts = machine.describe(Path(scratch))
        for database in databases:
            with database_of(database, database_url, Path(scratch)) as settings:
                for added_ms in added_sync_ms:
                    with slower_commits(added_ms):
                        measured = measure(settings, writers, event_bytes, seconds)
                    disk = {"database": database, "sync_ms": facts.fdatasync_ms + added_ms}
                    rows += [disk | row for row in measured]
    report = Report(
        benchmark="store",
        parameters={"seconds": seconds, "event_bytes": event_bytes, "durability": "full"},
        machine=facts,
        rows=rows,
        expectations=[
            at_least(
                f"{row['database']}, {GAIN_AT} writers, a sync of {row['sync_ms']:.2g} ms: group over {IN_TURN}",
                row["group_gain"],
                GAIN,
            )
            for row in rows
            if row["writers"] == GAIN_AT and row["commit"] == IN_TURN and row["sync_ms"] >= FAST_SYNC_MS
        ],
    )
    publish(report, COLUMNS, json_file)


@contextmanager
def database_of(database: str, url: str | None, scratch: Path) -> Iterator[Settings]:
    """Settings of an empty database with this release's schema."""
    data_dir = scratch / database
    if database == "sqlite":
        settings = Settings(data_dir=str(data_dir))
        schema.upgrade(settings.url)
        yield settings
        return
    if url is not None:
        settings = Settings(data_dir=str(data_dir), database_url=url)
        if not schema.is_empty(settings.url):
            raise click.UsageError("--database-url is not empty; the benchmark fills an empty database.")
        schema.upgrade(settings.url)
        yield settings
        return
    from tinkerbell.cli.bench.postgres import scratch_postgres

    with scratch_postgres() as server:
        settings = Settings(data_dir=str(data_dir), database_url=server.url())
        schema.upgrade(settings.url)
        yield settings


@contextmanager
def slower_commits(added_ms: float) -> Iterator[None]:
    """Every commit of this process takes this much longer."""

    def wait(_: sa.Connection) -> None:
        time.sleep(added_ms / 1e3)

    if added_ms:
        sa.event.listen(sa.Engine, "commit", wait)
    try:
        yield
    finally:
        if added_ms:
            sa.event.remove(sa.Engine, "commit", wait)


def measure(settings: Settings, writers: tuple[int, ...], event_bytes: int, seconds: float) -> list[dict[str, Any]]:
    """Rows of the three ways to commit, for every number of writers; they alternate, so that a disk that slows down
    meanwhile slows all."""
    rows = []
    for num_writers in writers:
        rates = {
            commit: rate_of(commit, settings, num_writers, event_bytes, seconds) for commit in (IN_TURN, OWN, GROUP)
        }
        for commit, rate in rates.items():
            rows.append(
                {
                    "commit": commit,
                    "writers": num_writers,
                    "events_per_s": rate.per_second,
                    "group_gain": None if commit == GROUP else rates[GROUP].per_second / rate.per_second,
                    **msgspec.to_builtins(rate),
                }
            )
    return rows


def rate_of(commit: str, settings: Settings, num_writers: int, event_bytes: int, seconds: float) -> Rate:
    """The rate of `num_writers` closed-loop writers."""
    options = {} if commit == GROUP else {"group_events": 1}
    num_stores = num_writers if commit == OWN else 1
    with ExitStack() as stack:
        logs = [EventStore.open(settings, **options) for _ in range(num_stores)]
        for log in logs:
            stack.callback(log.close)
        appenders = [appender(logs[writer % num_stores], writer, event_bytes) for writer in range(num_writers)]
        return asyncio.run(closed_loop_async(appenders, seconds))


def appender(log: EventStore, writer: int, event_bytes: int) -> AsyncOperation:
    """Appends one request of a tenant of its own, with a body that does not compress, and waits as the HTTP edge
    does: in an event loop."""
    noise = random.Random(writer)
    tenant = f"bench-{writer}"
    event = SampleRequested(params=SamplingParams(), num_tokens=event_bytes // 4)
    bodies = itertools.cycle([SampleBody(noise.randbytes(event_bytes // 4 * 4)) for _ in range(8)])

    async def append() -> None:
        new = NewEvent(event=event, tenant=tenant, stream=f"tenant/{tenant}", body=next(bodies))
        await log.submit_from(asyncio.get_running_loop(), new)

    return append
