"""Writes what no release ought to write, as older and newer ones did or will."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tinkerbell.events import codec
from tinkerbell.events.kinds import Event


@contextmanager
def poisoned(version: int | None = None) -> Iterator[None]:
    """Meanwhile events are written unread; with `version`, as ones of that schema version."""

    def unread(event: Event) -> str:
        return codec.canonical_json(event)

    class Newer(dict[str, int]):
        def get(self, key: str, default: int | None = None) -> int:  # type: ignore[override]
            assert version is not None
            return version

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(codec, "encode_event", unread)
        if version is not None:
            patched.setattr(codec, "VERSION_OF", Newer())
        yield
