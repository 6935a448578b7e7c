"""What clients saw, and whether the log agrees: in the manner of Jepsen.

Every call that changes something is an operation: invoked, and then `ok` (the client was told the future's id) or
`info` (nobody knows: the connection broke, or the answer was lost on the way). Attempts of one operation share its key.
"""

import contextlib
import random
import threading
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import httpx
import msgspec
import sqlalchemy as sa

from tinkerbell import wire
from tinkerbell.config import Settings
from tinkerbell.events import tables
from tinkerbell.events.store import EventStore

KEY = "Idempotency-Key"


@dataclass
class Operation:
    """One call that changes something, with all its attempts. Times are places in the order of what clients saw."""

    key: str
    path: str
    invoked: int
    told: int | None = None
    future: int | None = None
    attempts: int = 1


@dataclass
class History:
    """Of all clients, who may be threads."""

    operations: dict[str, Operation] = field(default_factory=dict)
    answers: dict[int, set[bytes]] = field(default_factory=lambda: defaultdict(set))
    """What was read of each future, once it was not pending."""
    told_twice: list[str] = field(default_factory=list)
    num_lost: int = 0
    """Attempts without an answer."""
    _clock: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def invoke(self, key: str, path: str) -> None:
        with self._lock:
            self._clock += 1
            if key in self.operations:
                self.operations[key].attempts += 1
            else:
                self.operations[key] = Operation(key, path, self._clock)

    def ok(self, key: str, future: int) -> None:
        with self._lock:
            self._clock += 1
            operation = self.operations[key]
            if operation.future not in (None, future):
                self.told_twice.append(f"{operation.path}: {operation.future}, then {future}")
            operation.future = future
            operation.told = operation.told or self._clock

    def info(self) -> None:
        with self._lock:
            self.num_lost += 1

    def read(self, future: wire.Future) -> None:
        if future.state != "pending":
            with self._lock:
                self.answers[future.id].add(msgspec.json.encode([future.result, future.error, future.cost_us]))


class Recorder(httpx.BaseTransport):
    """Under a real SDK client: writes the history, and loses some answers that the server did send."""

    def __init__(self, history: History, loss: float, seed: object) -> None:
        """`loss`: the part of all answers that never reach the client."""
        self._inner = httpx.HTTPTransport()
        self._history = history
        self._loss = loss
        self._random = random.Random(str(seed))

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        key = request.headers.get(KEY)
        if key is not None:
            self._history.invoke(key, request.url.path)
        try:
            answer = self._inner.handle_request(request)
            with contextlib.closing(answer):
                content = answer.read()
            if self._random.random() < self._loss:
                raise httpx.ReadError("lost on its way to the client", request=request)
        except httpx.TransportError:
            self._history.info()
            raise
        if answer.is_success and "json" in answer.headers["content-type"]:
            self._note(key, request, content)
        headers = {name: value for name, value in answer.headers.items() if name != "content-encoding"}
        return httpx.Response(answer.status_code, headers=headers, content=content)

    def _note(self, key: str | None, request: httpx.Request, content: bytes) -> None:
        if key is not None:
            self._history.ok(key, msgspec.json.decode(content, type=wire.Future).id)
        elif request.url.path.startswith("/v1/futures/"):
            self._history.read(msgspec.json.decode(content, type=wire.Future))

    def close(self) -> None:
        self._inner.close()


def check(history: History, store: EventStore, settings: Settings, explain: Callable[[], str]) -> None:
    """The log has every operation that a client was told of exactly once, those of unknown outcome at most once, and no
    other; in an order that fits what clients saw; with one answer each, the one that was read."""
    assert not history.told_twice, f"one operation, two futures: {history.told_twice} {explain()}"
    engine = sa.create_engine(settings.url, poolclass=sa.NullPool)
    with engine.connect() as connection:
        columns = tables.events.c
        found = connection.execute(
            sa.select(columns.idempotency_key, columns.position).where(columns.idempotency_key.is_not(None))
        ).all()
        terminal = sa.select(columns.causation).where(
            sa.or_(columns.type.like("%.completed"), columns.type.like("%.failed"))
        )
        answered = connection.execute(terminal).scalars().all()
    engine.dispose()
    positions: dict[str, int] = dict(found)
    assert len(positions) == len(found), f"a key is there twice {explain()}"
    assert len(set(answered)) == len(answered), f"a request was answered twice {explain()}"
    unknown = set(positions) - set(history.operations)
    assert not unknown, f"nobody asked for {unknown} {explain()}"
    for operation in history.operations.values():
        if operation.future is not None:
            assert positions.get(operation.key) == operation.future, (
                f"{operation} {positions.get(operation.key)} {explain()}"
            )
    told = sorted((o for o in history.operations.values() if o.told is not None), key=lambda o: o.told or 0)
    newest = 0
    ends = iter([*told, None])
    end = next(ends)
    for operation in sorted(history.operations.values(), key=lambda o: o.invoked):
        # What was acknowledged before this one was asked for stands before it in the log.
        while end is not None and end.told is not None and end.told < operation.invoked:
            newest = max(newest, end.future or 0)
            end = next(ends)
        if operation.key in positions:
            assert positions[operation.key] > newest, f"{operation} stands before what was acknowledged {explain()}"
    for future, answers in history.answers.items():
        assert len(answers) == 1, f"future {future} was answered in {len(answers)} ways: {answers} {explain()}"
        assert future in set(answered), f"future {future} was read and has no answer in the log {explain()}"
    left = [position for position in positions.values() if position not in set(answered)]
    assert not left, f"requests without an answer: {left} {explain()}"
    assert not store.queries.pending(), explain()
