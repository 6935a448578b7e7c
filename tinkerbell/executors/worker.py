"""The process one executor runs in: reads commands from the parent's socket, answers them one by one.

Started by `link.ExecutorLink` as `python -m tinkerbell.executors.worker --kind KIND --fd FD`. Ends with its
parent; imports nothing but msgspec, the port and the backend, so that it can run under another interpreter.
"""

import argparse
import contextlib
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable

import msgspec

from tinkerbell.errors import InvalidRequest, ServerError, TinkerbellError
from tinkerbell.executors import protocol, registry
from tinkerbell.executors.port import Executor
from tinkerbell.executors.progress import PROGRESS

BusyUs = Callable[[], int]

LEAST_CPU_S = 0.02
"""Processor time since the last mark that shows a start to go on."""

log = logging.getLogger("tinkerbell.executors.worker")


class Worker:
    """Answers commands with the executor it constructs on Start."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._executor: Executor | None = None

    def answer(self, command: protocol.Command) -> bytearray:
        """Carry out one command other than Stop and frame its reply; every error becomes a Failed one."""
        started = time.perf_counter_ns()

        def busy_us() -> int:
            return (time.perf_counter_ns() - started) // 1000

        try:
            return protocol.frame(self._carry_out(command, busy_us))
        except TinkerbellError as exc:
            return protocol.frame(protocol.failed(exc, busy_us()))
        except Exception:
            log.exception("executor `%s` failed in `%s`", self._kind, type(command).__name__.lower())
            failure = ServerError(f"the {self._kind} executor failed; its log has the traceback")
            return protocol.frame(protocol.failed(failure, busy_us()))

    def _carry_out(self, command: protocol.Command, busy_us: BusyUs) -> protocol.Reply:
        if isinstance(command, protocol.Start):
            if self._executor is not None:
                raise InvalidRequest("the executor has been started already")
            self._executor = registry.load(self._kind)(command.options)
            return protocol.Described(self._executor.describe(), busy_us())
        executor = self._executor
        if executor is None:
            raise InvalidRequest("the executor has not been started")
        match command:
            case protocol.Describe():
                return protocol.Described(executor.describe(), busy_us())
            case protocol.Create(adapter, lora, seed):
                return protocol.Reported(executor.create(adapter, lora, seed), busy_us())
            case protocol.Load(adapter, state, with_optimizer):
                return protocol.Reported(executor.load(adapter, state, with_optimizer), busy_us())
            case protocol.Snapshot(adapter):
                return protocol.Snapped(executor.snapshot(adapter), busy_us())
            case protocol.Remove(adapter):
                executor.remove(adapter)
                return protocol.Removed(busy_us())
            case protocol.Run(batch):
                return protocol.Ran(executor.run(batch), busy_us())
        raise AssertionError(f"no such command: {command}")


class Voice:
    """The child's end of the stream, for threads that each send whole frames."""

    def __init__(self, stream: socket.socket) -> None:
        self._stream = stream
        self._lock = threading.Lock()

    def say(self, frame: bytes | bytearray) -> None:
        """Raises OSError where the parent is gone."""
        with self._lock:
            self._stream.sendall(frame)


class Pulse(threading.Thread):
    """Says that this process runs, and how far its work has come, as long as there is somebody to say it to."""

    def __init__(self, voice: Voice) -> None:
        super().__init__(name="pulse", daemon=True)
        self._voice = voice
        self._marked_s = 0.0
        self.starting = True
        """Imports and the loading of a model are other people's code, which makes no marks: until they are over, that
        the process computes, or takes in what it reads, counts as one."""

    def run(self) -> None:
        """Until the parent is gone."""
        with contextlib.suppress(OSError):
            while True:
                if self.starting:
                    self._mark_work()
                self._voice.say(protocol.frame(protocol.Beat(PROGRESS.marks)))
                time.sleep(protocol.BEAT_S)

    def _mark_work(self) -> None:
        worked_s = time.process_time() - time.thread_time()  # what this thread takes shows nothing
        if worked_s - self._marked_s >= LEAST_CPU_S:
            self._marked_s = worked_s
            PROGRESS.mark()


def serve(kind: str, stream: socket.socket) -> None:
    """Answer commands until Stop or the end of the stream."""
    worker = Worker(kind)
    voice = Voice(stream)
    pulse = Pulse(voice)
    pulse.start()
    while (body := protocol.read_frame(stream)) is not None:
        try:
            command = protocol.command_decoder.decode(body)
        except msgspec.DecodeError as exc:
            # Nothing was done: the adapters here are as they were.
            log.error("a command cannot be read: %s", exc)
            voice.say(protocol.frame(protocol.failed(ServerError(f"the executor cannot read the command: {exc}"), 0)))
            continue
        del body  # a load's weights need not be held twice
        if isinstance(command, protocol.Stop):
            return
        voice.say(worker.answer(command))
        pulse.starting = pulse.starting and not isinstance(command, protocol.Start)


def exit_with_parent(stream: socket.socket) -> None:
    """End this process as soon as the parent's end of the stream is closed, even in the middle of a batch."""
    poll = select.poll()
    poll.register(stream.fileno(), 0)  # no events asked for: only the hang-up is reported

    def watch() -> None:
        while True:
            for _, event in poll.poll():
                if event & (select.POLLHUP | select.POLLERR | select.POLLNVAL):
                    os._exit(0)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def main(argv: list[str] | None = None) -> int:
    """Entry point of the child process."""
    parser = argparse.ArgumentParser(prog="tinkerbell.executors.worker", description="One executor process.")
    parser.add_argument("--kind", required=True, help="entry point of the group tinkerbell.executors")
    parser.add_argument("--fd", required=True, type=int, help="inherited socket to the parent")
    arguments = parser.parse_args(argv)
    # Ctrl-C reaches the whole process group; the parent decides when the executor ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    stream = socket.socket(fileno=arguments.fd)
    stream.set_inheritable(False)  # else a process started by the backend would keep the parent's end waiting
    exit_with_parent(stream)
    try:
        serve(arguments.kind, stream)
    except (BrokenPipeError, ConnectionResetError):
        return 0  # the parent is gone
    return 0


if __name__ == "__main__":
    sys.exit(main())
