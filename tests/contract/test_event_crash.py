"""What was acknowledged survives: kill -9 of the process, loss of the connection. On SQLite and Postgres."""

import subprocess
import sys
import threading
from pathlib import Path

import msgspec
import pytest
import sqlalchemy as sa

from tests.support import log
from tests.support.waiting import PATIENCE_S
from tinkerbell.cli.bench.postgres import ScratchPostgres
from tinkerbell.config import Settings
from tinkerbell.errors import Unavailable
from tinkerbell.events.store import EventStore

WRITER = """
import itertools, sys, threading
import msgspec
from tests.support import log
from tinkerbell.config import Settings
from tinkerbell.events.store import EventStore

store = EventStore.open(msgspec.json.decode(sys.argv[1], type=Settings))
said = threading.Lock()

def run(name):
    for number in itertools.count():
        if number == 0:
            news = [log.add_lora(name, key=f"{name}-0")]
        else:
            news = [log.forward_backward(name, key=f"{name}-{number}"), log.save(name, checkpoint=f"{name}-{number}")]
        recorded = store.append(*news)
        with said:
            print(name, number, recorded[-1].position, flush=True)

for n in range(4):
    threading.Thread(target=run, args=(f"ad_{sys.argv[2]}_{n}",)).start()
"""


def test_kill_9(database_settings: Settings) -> None:
    """Three lives, each killed in the middle of its work by four threads."""
    acknowledged: dict[tuple[str, int], int] = {}
    for life, words in enumerate((40, 3, 25)):
        encoded = msgspec.json.encode(database_settings).decode()
        child = subprocess.Popen(
            [sys.executable, "-c", WRITER, encoded, str(life)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        assert child.stdout is not None
        for _ in range(words):
            name, number, position = child.stdout.readline().split()
            acknowledged[name, int(number)] = int(position)
        child.kill()
        for line in child.stdout:
            if len(parts := line.split()) == 3:
                acknowledged[parts[0], int(parts[1])] = int(parts[2])
        child.wait()
        child.stdout.close()
        store = EventStore.open(database_settings)
        store.check()
        for (name, number), position in acknowledged.items():
            recorded = store.get(position)
            assert recorded is not None and recorded.adapter == name
            # A retry of what was acknowledged changes nothing.
            key = f"{name}-{number}"
            retry = log.forward_backward(name, key=key) if number else log.add_lora(name, key=key)
            (again,) = store.append(retry)
            assert again.position == (position - 1 if number else position)
        store.close()


@pytest.mark.postgres
def test_lost_connections_are_made_again(postgres: ScratchPostgres, postgres_url: str, settings: Settings) -> None:
    settings = msgspec.structs.replace(settings, database_url=postgres_url)
    store = EventStore.open(settings)
    seen: list[int] = []
    caught_up = threading.Event()

    def see(events: object) -> None:
        seen.extend(item.position for item in events)  # type: ignore[attr-defined]
        if seen[-1] == 60:
            caught_up.set()

    store.subscribe(see)
    store.append(log.add_lora())
    admin = sa.create_engine(postgres.url(), isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
    kill = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :name AND pid <> pg_backend_pid()"
    futures = []
    for number in range(59):
        futures.append(store.submit(log.forward_backward(key=f"k{number}")))
        if number % 20 == 10:
            with admin.connect() as connection:
                connection.execute(sa.text(kill), {"name": postgres_url.rpartition("?")[0].rpartition("/")[2]})
    for number, future in enumerate(futures):
        error = future.exception()
        while error is not None:
            assert isinstance(error, Unavailable)
            error = store.submit(log.forward_backward(key=f"k{number}")).exception()
    assert caught_up.wait(PATIENCE_S)
    assert seen == list(range(1, 61))
    assert store.check().num_events == 60
    store.close()
