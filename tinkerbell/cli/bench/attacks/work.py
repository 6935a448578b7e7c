"""Requests: valid ones, too many or too dear."""

import json
from multiprocessing.synchronize import Event

from tinkerbell.cli.bench.attacks.target import Caller, Target

PROMPT = [7] * 1500
NUM_POLLED = 64
METADATA = {"text": "x" * 60_000}


def prompt_draws(target: Target, stop: Event) -> None:
    """Samples with 64 draws at each of 1,500 positions."""
    _flood(target, stop, "/v1/sample", {"prompt": PROMPT, "params": {"prompt_draws": 64, "max_tokens": 1}})


def top_tokens(target: Target, stop: Event) -> None:
    """Forwards that want the 64 likeliest tokens of each of 1,500."""
    body = {"data": [{"tokens": PROMPT, "targets": PROMPT}], "outputs": {"top_k": 64, "entropy": True}}
    _flood(target, stop, f"/v1/adapters/{target.adapter}/forward", body)


def training(target: Target, stop: Event) -> None:
    """Training requests of 8,192 tokens."""
    tokens = [7] * 1024
    body = {"data": [{"tokens": tokens, "targets": tokens}] * 8}
    _flood(target, stop, f"/v1/adapters/{target.adapter}/fwdbwd", body)


def saves(target: Target, stop: Event) -> None:
    """Checkpoints."""
    _flood(target, stop, f"/v1/adapters/{target.adapter}/checkpoints", {})


def adapters(target: Target, stop: Event) -> None:
    """Adapters that are made and removed."""
    caller = Caller(target)
    while not stop.is_set():
        status, answer = caller.call("POST", "/v1/adapters", b"{}")
        if status == 202:
            caller.call("DELETE", f"/v1/adapters/{json.loads(answer)['adapter_id']}")


def sessions(target: Target, stop: Event) -> None:
    """Sessions with 60 KB of metadata."""
    caller = Caller(target)
    body = {"sdk_version": "0.38.0", "user_metadata": METADATA}
    while not stop.is_set():
        caller.post("/api/v1/create_session", body)


def long_polls(target: Target, stop: Event) -> None:
    """Long polls for requests that wait behind each other, one a connection."""
    caller, pollers = Caller(target), [Caller(target) for _ in range(4)]
    body = {"prompt": [7] * 100, "params": {"max_tokens": 200}}
    while not stop.is_set():
        ids = [caller.post("/v1/sample", body) for _ in range(NUM_POLLED)]
        for index, id in enumerate(ids):
            if id is not None and not stop.is_set():
                pollers[index % len(pollers)].call("GET", f"/v1/futures/{id}?wait_s=1")


def _flood(target: Target, stop: Event, path: str, body: object) -> None:
    caller = Caller(target)
    while not stop.is_set():
        caller.post(path, body)
