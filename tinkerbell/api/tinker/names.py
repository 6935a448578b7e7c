"""Names of the tinker protocol: sessions, what is made within them, and `tinker://` paths.

A model is an adapter, and its id is the adapter's; a sampler with a checkpoint is an adapter too, frozen.
"""

import base64
import hashlib
import re
import secrets
from typing import NamedTuple

from tinkerbell.api.paging import MAX_POSITION
from tinkerbell.errors import InvalidRequest, NotFound, shown
from tinkerbell.types import AdapterId, CheckpointId, CheckpointUse, SamplerId, SessionId

_SESSION = re.compile(r"se_[a-z2-7]{20}")
_PATH = re.compile(r"tinker://([^/]+)/([^/]+)/([^/]+)")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SEQ_LIMIT = 10**18

USES: dict[str, CheckpointUse] = {
    "weights": "state",
    "sampler_weights": "sampler",
    "external_weights": "external",
}
"""Second part of a path -> what the checkpoint was made for."""
KINDS = {use: kind for kind, use in USES.items()}
CHECKPOINT_TYPES = {"state": "training", "sampler": "sampler", "external": "external"}


class Path(NamedTuple):
    """`tinker://<model>/<kind>/<name>`."""

    model: AdapterId
    use: CheckpointUse
    name: str

    def __str__(self) -> str:
        return f"tinker://{self.model}/{KINDS[self.use]}/{self.name}"

    @property
    def checkpoint_id(self) -> str:
        """`weights/<name>`."""
        return f"{KINDS[self.use]}/{self.name}"


def new_session() -> SessionId:
    """`se_` and 100 random bits in lower-case base32."""
    return f"se_{base64.b32encode(secrets.token_bytes(13)).decode().lower()[:20]}"


def session_id(text: str) -> SessionId:
    """`text` if it can be a session's id. Raises NotFound in the words used for one that does not exist."""
    if not _SESSION.fullmatch(text):
        raise no_session(text)
    return text


def session_of(id: str) -> SessionId:
    """Of a model or sampler."""
    return id.partition(":")[0]


def model_id(session: SessionId, seq: int) -> AdapterId:
    """Raises InvalidRequest for a number out of range."""
    return f"{session}:train:{_number('model_seq_id', seq)}"


def sampler_id(session: SessionId, seq: int) -> SamplerId:
    """Raises InvalidRequest for a number out of range."""
    return f"{session}:sample:{_number('sampling_session_seq_id', seq)}"


def checkpoint_id(model: AdapterId, seq: int) -> CheckpointId:
    """The checkpoint that request `seq` of a model makes: asked again, it makes the same. As hard to guess as the
    session."""
    digest = hashlib.sha256(f"{model}:{seq}".encode()).digest()
    return f"ck_{base64.b32encode(digest).decode().lower()[:20]}"


def parse_path(text: str) -> Path:
    """Raises InvalidRequest."""
    match = _PATH.fullmatch(text)
    if match is None or match[2] not in USES:
        raise InvalidRequest(
            f"{shown(text)} is no path of a checkpoint: tinker://<model>/<{'|'.join(USES)}>/<name>, as a save gives it."
        )
    return Path(match[1], USES[match[2]], match[3])


def checkpoint_name(text: str) -> str:
    """Raises InvalidRequest."""
    if not _NAME.fullmatch(text):
        raise InvalidRequest(
            f"path: {shown(text)} is no name of a checkpoint; 1 to 64 letters, digits, dots, dashes and underscores."
        )
    return text


def request_position(text: str) -> int:
    """Of a request that there may be. Raises NotFound in the words used for one that does not exist."""
    number = int(text) if text.isdecimal() and len(text) < 20 else 0
    if not 0 < number <= MAX_POSITION:
        raise no_request(text)
    return number


def no_request(text: str) -> NotFound:
    """One text for missing and foreign requests alike."""
    return NotFound(f"There is no request {shown(text)}.")


def no_session(text: str) -> NotFound:
    """One text for missing and foreign sessions alike."""
    return NotFound(f"There is no session {shown(text)}.")


def no_sampler(text: str) -> NotFound:
    """One text for missing and foreign samplers alike."""
    return NotFound(f"There is no sampling session {shown(text)}.")


def no_path(path: Path) -> NotFound:
    """One text for missing, foreign, deleted and expired checkpoints alike."""
    return NotFound(f"There is no checkpoint {path}.")


def _number(name: str, seq: int) -> int:
    if not 0 <= seq < _SEQ_LIMIT:
        raise InvalidRequest(f"{name} is {seq}; it must be 0 or more, and less than 10^18.")
    return seq
