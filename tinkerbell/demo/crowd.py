"""Runs the users' scripts at the same time, each in a thread with its own key."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence

from tinkerbell.demo.byte_tokenizer import ByteTokenizer
from tinkerbell.demo.track import Track
from tinkerbell.demo.users import User
from tinkerbell.errors import ServerError
from tinkerbell.sdk import Client, Tokenizer

LOOK_S = 0.2


def tracks_of(users: Sequence[User], steps: int | None) -> list[Track]:
    """A fresh track for each user; `steps` overrides how many each takes."""
    return [
        Track(user=user.name, task=user.task, lora=user.lora, measure=user.measure, num_steps=steps or user.steps)
        for user in users
    ]


def train(
    url: str,
    keys: Mapping[str, str],
    users: Sequence[User],
    tracks: Sequence[Track],
    look: Callable[[], None],
) -> None:
    """Run every script to its end; `look` is called a few times a second and may raise to give up.

    What goes wrong in a script is in its track; the others go on.
    """
    clients = {user.name: Client(url, keys[user.name]) for user in users}
    tokenizer = tokenizer_of(clients[users[0].name])
    threads = [
        # Daemons: giving up must not wait for a server that is gone.
        threading.Thread(target=_run, args=(user, clients[user.name], tokenizer, track), name=user.name, daemon=True)
        for user, track in zip(users, tracks, strict=True)
    ]
    started_at = time.monotonic()
    for track in tracks:
        track.started_at = started_at
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        look()
        time.sleep(LOOK_S)
    look()
    for client in clients.values():
        client.close()


def tokenizer_of(client: Client) -> Tokenizer:
    """The served model's, or one token a byte for a model that is all bytes."""
    (model,) = client.models()
    if model.tokenizer:
        return client.tokenizer()
    if model.vocab_size < 256:
        raise ServerError(f"the model {model.name} has no tokenizer and only {model.vocab_size} tokens")
    return ByteTokenizer()


def _run(user: User, client: Client, tokenizer: Tokenizer, track: Track) -> None:
    track.state = "training"
    try:
        user.script(client, tokenizer, track)
    except Exception as exc:  # noqa: BLE001 - a script may fail in any way; the report says how
        track.state, track.error = "failed", f"{type(exc).__name__}: {exc}"
    else:
        track.state = "done"
