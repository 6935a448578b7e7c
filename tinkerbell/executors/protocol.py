"""Messages between a server and its executor process, and the frames they travel in.

A frame is an 8-byte little-endian length and that many bytes of msgpack. The parent sends commands, the child
answers each with one reply, in order. In between it sends beats: a sign of life that says how far its work has come.
"""

import socket
import struct

import msgspec

from tinkerbell.errors import ExecutorDied, ServerError, TinkerbellError, UserError
from tinkerbell.executors.port import AdapterReport, AdapterState, Batch, BatchResult, Environment
from tinkerbell.executors.progress import mark
from tinkerbell.types import AdapterId, Category, LoraConfig

HEADER = struct.Struct("<Q")
BEAT_S = 1.0
"""How often the child sends a Beat."""
MAX_FRAME_BYTES = 1 << 36
"""A longer announced length can only be a stream that lost its place."""


class ExecutorOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What an executor class is constructed with."""

    model: str | None = None
    """Directory, hub id, or `package:NAME`; the fake needs none."""
    threads: int | None = None
    """None: one per core."""
    extra: dict[str, str] = {}
    """Settings of one kind of executor."""


class Start(msgspec.Struct, frozen=True, tag="start"):
    """Construct the executor; must be the first command, once. Answered by Described."""

    options: ExecutorOptions


class Describe(msgspec.Struct, frozen=True, tag="describe"):
    """Executor.describe; answered by Described."""


class Create(msgspec.Struct, frozen=True, tag="create"):
    """Executor.create; answered by Reported."""

    adapter: AdapterId
    lora: LoraConfig
    seed: int


class Load(msgspec.Struct, frozen=True, tag="load"):
    """Executor.load; answered by Reported."""

    adapter: AdapterId
    state: AdapterState
    with_optimizer: bool


class Snapshot(msgspec.Struct, frozen=True, tag="snapshot"):
    """Executor.snapshot; answered by Snapped."""

    adapter: AdapterId


class Remove(msgspec.Struct, frozen=True, tag="remove"):
    """Executor.remove; answered by Removed."""

    adapter: AdapterId


class Run(msgspec.Struct, frozen=True, tag="run"):
    """Executor.run; answered by Ran."""

    batch: Batch


class Stop(msgspec.Struct, frozen=True, tag="stop"):
    """End the process; answered by the end of the stream."""


Command = Start | Describe | Create | Load | Snapshot | Remove | Run | Stop


class Described(msgspec.Struct, frozen=True, tag="described"):
    """What Executor.describe returned."""

    environment: Environment
    busy_us: int
    """Microseconds the call took inside the child; so in every reply."""


class Reported(msgspec.Struct, frozen=True, tag="reported"):
    """What Executor.create or load returned."""

    report: AdapterReport
    busy_us: int


class Snapped(msgspec.Struct, frozen=True, tag="snapped"):
    """What Executor.snapshot returned."""

    state: AdapterState
    busy_us: int


class Removed(msgspec.Struct, frozen=True, tag="removed"):
    """The adapter is forgotten."""

    busy_us: int


class Ran(msgspec.Struct, frozen=True, tag="ran"):
    """What Executor.run returned."""

    result: BatchResult
    busy_us: int


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The call raised."""

    slug: str
    """Of the class in `errors`."""
    detail: str
    category: Category
    busy_us: int

    def exception(self) -> TinkerbellError:
        """The error as the class it was in the child."""
        general = UserError if self.category == "user" else ServerError
        return _CLASSES.get(self.slug, general)(self.detail)


Reply = Described | Reported | Snapped | Removed | Ran | Failed


class Beat(msgspec.Struct, frozen=True, tag="beat"):
    """The process runs. Whether the call it is busy with does, show the marks: see `progress`."""

    marks: int


def _classes(root: type[TinkerbellError]) -> dict[str, type[TinkerbellError]]:
    found = {root.slug: root}
    for child in root.__subclasses__():
        found.update(_classes(child))
    return found


_CLASSES = _classes(TinkerbellError)

_encoder = msgspec.msgpack.Encoder()
command_decoder: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)
reply_decoder: msgspec.msgpack.Decoder[Reply | Beat] = msgspec.msgpack.Decoder(Reply | Beat)


def frame(message: Command | Reply | Beat) -> bytearray:
    """Length and body of one message."""
    buffer = bytearray(HEADER.size)
    _encoder.encode_into(message, buffer, HEADER.size)
    HEADER.pack_into(buffer, 0, len(buffer) - HEADER.size)
    return buffer


def frame_length(header: bytes | bytearray) -> int:
    """Bytes of the body that follows `header`. Raises ExecutorDied where the stream makes no sense."""
    length: int = HEADER.unpack(header)[0]
    if length > MAX_FRAME_BYTES:
        raise ExecutorDied("the stream between server and executor is garbled")
    return length


def read_frame(stream: socket.socket) -> bytearray | None:
    """Body of the next frame from a blocking socket; None where the stream ends."""
    header = _read_exactly(stream, HEADER.size)
    return None if header is None else _read_exactly(stream, frame_length(header))


def _read_exactly(stream: socket.socket, num_bytes: int) -> bytearray | None:
    buffer = bytearray(num_bytes)
    view = memoryview(buffer)
    while len(view):
        received = stream.recv_into(view)
        if received == 0:
            return None
        view = view[received:]
        mark()  # a checkpoint takes a while
    return buffer


def failed(exc: TinkerbellError, busy_us: int) -> Failed:
    """The reply for an expected error."""
    return Failed(slug=exc.slug, detail=exc.detail, category=exc.category, busy_us=busy_us)
