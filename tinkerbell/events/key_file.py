"""The key file: what wraps the tenants' data keys, and what the log is authenticated with.

One line of 64 hex digits, as `openssl rand -hex 32` prints it, is the wrapping key; the other follows from it. When a
tenant is erased the wrapping key is replaced, and the file gets a second line with the other key, which stays: it opens
nothing, and says of every event for ever who wrote it.
"""

import contextlib
import hashlib
import hmac
import os
import secrets
import tempfile
from pathlib import Path

import msgspec

from tinkerbell.errors import KeyUnavailable, Unavailable
from tinkerbell.events import envelope
from tinkerbell.files import is_loose, make_directory


class Keys(msgspec.Struct, frozen=True, kw_only=True):
    """Content of a key file."""

    wrapping: bytes
    """[32]"""
    authentication: bytes
    """[32]"""

    @property
    def name(self) -> str:
        """Tells wrapping keys apart without saying anything of them."""
        return hashlib.sha256(b"tinkerbell key file" + self.wrapping).hexdigest()[:16]

    def authenticate(self, data: bytes) -> bytes:
        """[32] HMAC-SHA256."""
        return hmac.digest(self.authentication, data, "sha256")


class KeyFile:
    """The file at a path; any number of processes may use it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.next = path.with_name(path.name + ".next")
        """The one that takes its place, while data keys are being wrapped anew."""

    def load(self) -> Keys | None:
        """None where there is no file. Raises KeyUnavailable for one that others can read, and for what is no key."""
        return _read(self.path)

    def load_next(self) -> Keys | None:
        """Of the file that is to take this one's place; None where there is none."""
        return _read(self.next)

    def create(self) -> Keys:
        """Make the file; where another process was first, its keys are the ones."""
        temporary = self._written(secrets.token_hex(envelope.KEY_BYTES) + "\n")
        try:
            with contextlib.suppress(FileExistsError):
                self.path.hardlink_to(temporary)
        finally:
            temporary.unlink()
        _sync(self.path.parent)
        keys = self.load()
        assert keys is not None
        return keys

    def stage(self, keys: Keys) -> Keys:
        """Write the file that takes this one's place: another wrapping key, the same authentication."""
        fresh = secrets.token_hex(envelope.KEY_BYTES)
        self._written(f"{fresh}\n{keys.authentication.hex()}\n").replace(self.next)
        _sync(self.path.parent)
        staged = self.load_next()
        assert staged is not None
        return staged

    def promote(self) -> None:
        """Put the staged file in this one's place; what was here is written over before."""
        with contextlib.suppress(FileNotFoundError), self.path.open("r+b") as file:
            file.write(b"0" * self.path.stat().st_size)
            file.flush()
            os.fsync(file.fileno())
        self.next.replace(self.path)
        _sync(self.path.parent)

    def _written(self, text: str) -> Path:
        """A new file beside it, durable, readable by its owner only."""
        make_directory(self.path.parent)
        descriptor, name = tempfile.mkstemp(prefix="tmp-key-", dir=self.path.parent)
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        return Path(name)


def _read(path: Path) -> Keys | None:
    try:
        if is_loose(path):
            raise KeyUnavailable(
                f"the key file {path} can be read by others than its owner, and is not used like that: chmod 600 {path}"
            )
        text = path.read_text()
    except FileNotFoundError:
        return None
    except (PermissionError, IsADirectoryError, UnicodeDecodeError) as exc:
        raise KeyUnavailable(f"the key file {path} cannot be read: {exc}") from exc
    except OSError as exc:
        raise Unavailable(f"the key file {path} cannot be read now: {exc}") from exc
    try:
        found = [bytes.fromhex(line) for line in text.split()]
    except ValueError:
        found = []
    if len(found) not in (1, 2) or any(len(key) != envelope.KEY_BYTES for key in found):
        raise KeyUnavailable(f"the key file {path} must have 64 hex digits, as `openssl rand -hex 32`")
    derived = hmac.digest(found[0], b"tinkerbell authentication", "sha256")
    return Keys(wrapping=found[0], authentication=found[1] if len(found) == 2 else derived)


def _sync(directory: Path) -> None:
    held = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(held)
    finally:
        os.close(held)
