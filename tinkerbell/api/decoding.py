"""The process in which long bodies are decoded: `python -m tinkerbell.api.decoding FD`, started by decoders.py."""

import os
import pickle
import resource
import signal
import socket
import sys

import msgspec

from tinkerbell.api.bodies import KINDS, Decoded, decode_data
from tinkerbell.api.decoders import Job, receive, send
from tinkerbell.errors import TinkerbellError, TooLarge

MEMORY_BYTES = 6 * 1024**3
"""Of addresses. What elements may take was counted before; this is for what the count does not foresee."""

NICENESS = 5

_TARGETS = {target.__name__: target for target in KINDS}


def answer(job: Job, raw: bytes) -> Decoded | TinkerbellError:
    """The body, or what is wrong with it."""
    try:
        target = _TARGETS[job.target]
        return decode_data(raw, target, job.max_elements, job.max_tokens, job.path_id, keyed=job.keyed)
    except MemoryError:
        return TooLarge("The body takes more memory than there is for one; send less at a time.")
    except TinkerbellError as error:
        return error


def main() -> None:
    """Until the other side is gone."""
    for sign in (signal.SIGINT, signal.SIGTERM):
        # A terminal tells all of its processes; the server ends this one when it is done.
        signal.signal(sign, signal.SIG_IGN)
    # What the server does meanwhile comes first, where cores are scarce.
    os.nice(NICENESS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    jobs = msgspec.msgpack.Decoder(Job)
    with socket.socket(fileno=int(sys.argv[1])) as parent:
        while True:
            try:
                job = jobs.decode(receive(parent))
                raw = bytes(receive(parent))
                told = pickle.dumps(answer(job, raw), protocol=5)
                del raw
                send(parent, told)
            except (EOFError, ConnectionError):
                return


if __name__ == "__main__":
    main()
