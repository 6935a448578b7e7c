"""`tinkerbell bench store`: durable appends, group commit against one transaction for each event."""

import itertools
import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import msgspec

from tinkerbell.cli.bench import machine
from tinkerbell.cli.bench.measure import Rate, closed_loop
from tinkerbell.cli.bench.report import Report, at_least, json_file_option, publish
from tinkerbell.config import Settings
from tinkerbell.events import schema
from tinkerbell.events.kinds import NewEvent, SampleBody, SampleRequested
from tinkerbell.events.store import EventStore
from tinkerbell.types import SamplingParams

GAIN = 8.0
"""How many times faster group commit must be at GAIN_AT writers."""
GAIN_AT = 64
GROUP, SINGLE = "group", "one by one"
COLUMNS = ("database", "commit", "writers", "events_per_s", "p50_ms", "p99_ms", "gain")


@click.command()
@click.option("--seconds", type=click.FloatRange(min=0.1), default=4.0, show_default=True, help="Per row.")
@click.option("--event-bytes", type=click.IntRange(min=4), default=2048, show_default=True, help="Body of an event.")
@click.option("--writers", type=click.IntRange(min=1), multiple=True, default=(1, 16, 64), show_default=True)
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
    databases: tuple[str, ...],
    database_url: str | None,
    json_file: Path | None,
) -> None:
    """Durable appends per second, and how long one takes.

    Each writer appends one event, waits until it is durable, and appends the next. The baseline is the same store
    with groups of one: same tables, same statements, same lock, same single connection, so that nothing but the
    grouping differs. Every event is a whole request: envelope, hash chain, body and projections.

    \b
    tinkerbell bench store
    tinkerbell bench store --database sqlite --seconds 10
    """
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="tinkerbell-bench-") as scratch:
        facts = machine.describe(Path(scratch))
        for database in databases:
            with database_of(database, database_url, Path(scratch)) as settings:
                rows += measure(database, settings, writers, event_bytes, seconds)
    report = Report(
        benchmark="store",
        parameters={"seconds": seconds, "event_bytes": event_bytes, "durability": "full"},
        machine=facts,
        rows=rows,
        expectations=[
            at_least(
                f"{row['database']}, {GAIN_AT} writers: group commit over single transactions",
                row["gain"],
                GAIN,
            )
            for row in rows
            if row["writers"] == GAIN_AT and row["commit"] == GROUP
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


def measure(
    database: str, settings: Settings, writers: tuple[int, ...], event_bytes: int, seconds: float
) -> list[dict[str, Any]]:
    """Rows of both ways of committing, for every number of writers. The two alternate, so that a disk that slows
    down meanwhile slows both."""
    rows = []
    for num_writers in writers:
        single = rate_of(settings, 1, num_writers, event_bytes, seconds)
        group = rate_of(settings, None, num_writers, event_bytes, seconds)
        gain = group.per_second / single.per_second
        rows.append(_row(database, SINGLE, single, None))
        rows.append(_row(database, GROUP, group, gain))
    return rows


def _row(database: str, commit: str, rate: Rate, gain: float | None) -> dict[str, Any]:
    return {
        "database": database,
        "commit": commit,
        "writers": rate.num_clients,
        "events_per_s": rate.per_second,
        "gain": gain,
        **msgspec.to_builtins(rate),
    }


def rate_of(settings: Settings, group_events: int | None, num_writers: int, event_bytes: int, seconds: float) -> Rate:
    """The rate of `num_writers` threads; at most `group_events` events in one transaction (None: the default)."""
    log = EventStore.open(settings) if group_events is None else EventStore.open(settings, group_events=group_events)
    try:
        return closed_loop([appender(log, writer, event_bytes) for writer in range(num_writers)], seconds)
    finally:
        log.close()


def appender(log: EventStore, writer: int, event_bytes: int) -> Callable[[], None]:
    """Appends one request of a tenant of its own with a body that does not compress."""
    noise = random.Random(writer)
    tenant = f"bench-{writer}"
    event = SampleRequested(params=SamplingParams(), num_tokens=event_bytes // 4)
    bodies = itertools.cycle([noise.randbytes(event_bytes // 4 * 4) for _ in range(8)])

    def append(body: bytes) -> None:
        log.append(NewEvent(event=event, tenant=tenant, stream=f"tenant/{tenant}", body=SampleBody(body)))

    return lambda: append(next(bodies))
