"""The server's side of an executor process: starts it, sends calls in order, notices when it dies or hangs."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
from collections import deque
from dataclasses import dataclass
from typing import Generic, TypeVar

import msgspec

from tinkerbell.errors import ExecutorDied, ServerError
from tinkerbell.executors import protocol
from tinkerbell.executors.port import AdapterReport, AdapterState, Batch, BatchResult, Environment
from tinkerbell.executors.protocol import ExecutorOptions
from tinkerbell.types import AdapterId, LoraConfig

T = TypeVar("T")
R = TypeVar("R", bound=protocol.Reply)

SILENCE_S = 60.0
FIRST_WORD_S = 60.0
"""How long an interpreter may take, on a busy machine, until it gives its first sign of life."""
PATIENCE = 3.0
"""How many times its estimate a batch may take, on top, without any mark of progress: for executors that make few."""

BUFFER_BYTES = 4 * 1024 * 1024
"""Of one read from the socket: checkpoints are hundreds of megabytes."""

log = logging.getLogger(__name__)


class Timed(msgspec.Struct, Generic[T], frozen=True):
    """A call's answer and what it cost."""

    value: T
    busy_us: int
    """Microseconds inside the executor process."""


@dataclass(slots=True, eq=False)
class _Call:
    """A command that waits for its reply."""

    command: str
    answer: asyncio.Future[protocol.Reply]
    patience_s: float
    """How long no progress is no hang, on top of what holds for every call."""


class _Child:
    """One started process with its socket and the calls it has not answered yet, oldest first."""

    def __init__(
        self, process: "subprocess.Popen[bytes]", reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.process = process
        self.reader = reader
        self.writer = writer
        self.waiting: deque[_Call] = deque()
        self.pump: asyncio.Task[None] | None = None
        self.watch: asyncio.Task[None] | None = None
        self.marks = 0
        """Of its last beat."""
        self.progressed = True
        """Since the watch last looked: its work has come further, or it has none and gives signs of life."""
        self.spoken = False
        """Anything ever came from it."""
        self.heard = False
        """Since the watch last looked."""
        self.verdict: str | None = None
        """Why it was killed."""
        self.ended = False
        """No reply will come any more."""


class ExecutorLink:
    """One executor process. All methods belong to one event loop; calls are answered in order.

    After the process died, every call in flight and every later one raises ExecutorDied until `start` is
    called again. A cancelled call is still carried out by the child; its answer is dropped. A process that gives no
    sign of life for `silence_s`, or whose call makes no progress for so long, was stopped or hangs: it is killed.
    """

    def __init__(self, kind: str, options: ExecutorOptions, silence_s: float = SILENCE_S) -> None:
        """`kind`: an entry point of the group tinkerbell.executors. Nothing is started yet."""
        self.kind = kind
        self._options = options
        self._silence_s = silence_s
        self._child: _Child | None = None

    @property
    def pid(self) -> int | None:
        """Of the present child."""
        return self._child.process.pid if self._child is not None else None

    @property
    def alive(self) -> bool:
        """Whether calls can be answered now."""
        return self._child is not None and not self._child.ended

    async def start(self) -> Environment:
        """Start a fresh process, ending an earlier one. Returns when the model is loaded.

        Raises what the executor's constructor raised, as it raised it (MissingPackage, NotFound, ...), or
        ExecutorDied where the process ended before it said anything.
        """
        await self.stop()
        self._child = await self._spawn()
        try:
            reply = await self._call(protocol.Start(self._options), protocol.Described)
        except BaseException:
            await self.stop()
            raise
        log.info("executor started", extra={"executor": self.kind, "pid": self.pid, "busy_us": reply.busy_us})
        return reply.environment

    async def create(self, adapter: AdapterId, lora: LoraConfig, seed: int) -> Timed[AdapterReport]:
        """Executor.create."""
        reply = await self._call(protocol.Create(adapter, lora, seed), protocol.Reported)
        return Timed(reply.report, reply.busy_us)

    async def load(self, adapter: AdapterId, state: AdapterState, with_optimizer: bool) -> Timed[AdapterReport]:
        """Executor.load."""
        reply = await self._call(protocol.Load(adapter, state, with_optimizer), protocol.Reported)
        return Timed(reply.report, reply.busy_us)

    async def snapshot(self, adapter: AdapterId) -> Timed[AdapterState]:
        """Executor.snapshot."""
        reply = await self._call(protocol.Snapshot(adapter), protocol.Snapped)
        return Timed(reply.state, reply.busy_us)

    async def remove(self, adapter: AdapterId) -> Timed[None]:
        """Executor.remove."""
        reply = await self._call(protocol.Remove(adapter), protocol.Removed)
        return Timed(None, reply.busy_us)

    async def run(self, batch: Batch, estimated_s: float = 0.0) -> BatchResult:
        """Executor.run. `estimated_s`: how long it is expected to take, where anybody knows."""
        return (await self._call(protocol.Run(batch), protocol.Ran, PATIENCE * estimated_s)).result

    async def stop(self, grace_s: float = 2.0) -> None:
        """End the process: a stop message, after `grace_s` SIGTERM, after as long again SIGKILL.

        Returns when it is gone. Calls in flight end with ExecutorDied.
        """
        child, self._child = self._child, None
        if child is None:
            return
        if not child.ended:
            with contextlib.suppress(OSError):
                child.writer.write(protocol.frame(protocol.Stop()))
        code = await _exit_code(child.process, grace_s)
        for end in (signal.SIGTERM, signal.SIGKILL):
            if code is None:
                child.process.send_signal(end)
                code = await _exit_code(child.process, grace_s if end == signal.SIGTERM else None)
        if child.pump is not None:
            await child.pump
        log.info("executor stopped", extra={"executor": self.kind, "exit_code": code})

    async def _spawn(self) -> _Child:
        ours, theirs = socket.socketpair()
        variable = f"TINKERBELL_{self.kind.upper()}_PYTHON"
        interpreter = os.environ.get(variable) or sys.executable
        command = [interpreter, "-P", "-m", "tinkerbell.executors.worker", "--kind", self.kind]
        with theirs:
            try:
                process = subprocess.Popen(
                    [*command, "--fd", str(theirs.fileno())],
                    stdin=subprocess.DEVNULL,
                    stdout=2,  # what a library prints belongs with the log
                    pass_fds=(theirs.fileno(),),
                    env=self._variables(),
                )
            except OSError as exc:
                ours.close()
                raise ServerError(f"cannot run the interpreter `{interpreter}` (see {variable}): {exc}") from exc
        ours.setblocking(False)
        reader, writer = await asyncio.open_connection(sock=ours, limit=BUFFER_BYTES)
        child = _Child(process, reader, writer)
        child.pump = asyncio.create_task(self._receive(child), name=f"executor-{self.kind}")
        child.watch = asyncio.create_task(self._watch(child), name=f"executor-{self.kind}-watch")
        return child

    def _variables(self) -> dict[str, str]:
        """The child's environment."""
        variables = dict(os.environ)
        # An OpenMP thread that waits by spinning keeps the core from the thread it waits for as soon as anything
        # else runs on the machine, this process for one: steps then take tens of times as long.
        variables.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        if self._options.threads is not None:
            # Thread pools of BLAS libraries are sized when they are loaded.
            variables |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(self._options.threads))
        return variables

    async def _call(self, command: protocol.Command, expected: type[R], patience_s: float = 0.0) -> R:
        child = self._child
        if child is None or child.ended:
            raise ExecutorDied(f"the {self.kind} executor is not running")
        answer: asyncio.Future[protocol.Reply] = asyncio.get_running_loop().create_future()
        child.waiting.append(_Call(type(command).__name__.lower(), answer, patience_s))
        child.progressed = True
        child.writer.write(protocol.frame(command))
        reply = await answer
        if isinstance(reply, protocol.Failed):
            raise reply.exception()
        assert isinstance(reply, expected), f"{type(command).__name__} was answered by {type(reply).__name__}"
        return reply

    async def _receive(self, child: _Child) -> None:
        """Hand replies to the calls they answer until the stream ends, then fail those that are left."""
        try:
            while True:
                header = await child.reader.readexactly(protocol.HEADER.size)
                message = protocol.reply_decoder.decode(await _body(child, protocol.frame_length(header)))
                if isinstance(message, protocol.Beat):
                    child.progressed |= message.marks != child.marks or not child.waiting
                    child.marks = message.marks
                    continue
                answer = child.waiting.popleft().answer
                if not answer.done():
                    answer.set_result(message)
        except (asyncio.IncompleteReadError, OSError):
            pass  # the process is gone, or about to be
        except (ExecutorDied, msgspec.DecodeError, IndexError):
            log.exception("executor `%s` does not keep to the protocol; it is killed", self.kind)
            child.process.kill()
        finally:
            child.ended = True
            child.writer.close()
            if child.watch is not None:
                child.watch.cancel()
        code = await _exit_code(child.process, 10.0)
        died = ExecutorDied(f"the {self.kind} executor (pid {child.process.pid}) {child.verdict or _ending(code)}")
        while child.waiting:
            answer = child.waiting.popleft().answer
            if not answer.done():
                answer.set_exception(died)

    async def _watch(self, child: _Child) -> None:
        """Kill the process when many looks in a row see no progress. Looks are counted, not seconds: while this process
        was stopped itself nobody heard anything."""
        pause_s = self._silence_s / max(1, round(self._silence_s / protocol.BEAT_S))
        silent = still = 0
        while True:
            await asyncio.sleep(pause_s)
            silent = 0 if child.heard else silent + 1
            still = 0 if child.progressed else still + 1
            child.heard = child.progressed = False
            most_s = self._silence_s if child.spoken else max(self._silence_s, FIRST_WORD_S)
            if round(silent * pause_s, 3) >= most_s:
                child.verdict = f"gave no sign of life for {most_s:g} s and was killed"
                break
            call = child.waiting[0] if child.waiting else None
            if call is not None and child.spoken and round(still * pause_s, 3) >= self._silence_s + call.patience_s:
                child.verdict = f"made no progress in `{call.command}` for {still * pause_s:g} s and was killed"
                break
        log.error("executor `%s` (pid %d) %s", self.kind, child.process.pid, child.verdict)
        child.process.kill()


async def _body(child: _Child, num_bytes: int) -> bytearray:
    """The next bytes of the stream; each piece of a large message shows that the child goes on. Raises
    IncompleteReadError."""
    body = bytearray()
    while len(body) < num_bytes:
        piece = await child.reader.read(min(num_bytes - len(body), BUFFER_BYTES))
        if not piece:
            raise asyncio.IncompleteReadError(b"", num_bytes)
        body += piece
        child.spoken = child.heard = True
        child.progressed |= num_bytes > BUFFER_BYTES
    return body


async def _exit_code(process: "subprocess.Popen[bytes]", timeout_s: float | None) -> int | None:
    """The exit code, or None where it still runs after `timeout_s` (None: wait for ever)."""
    loop = asyncio.get_running_loop()
    deadline = None if timeout_s is None else loop.time() + timeout_s
    pause_s = 0.001
    # Polled, because a child watcher would tie this object to the main thread's loop.
    while (code := process.poll()) is None and (deadline is None or loop.time() < deadline):
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, 0.05)
    return code


def _ending(code: int | None) -> str:
    if code is None:
        return "closed its connection before it answered"
    if code < 0:
        return f"was ended by {signal.Signals(-code).name} before it answered"
    return f"ended with exit code {code} before it answered; its log is on standard error"
