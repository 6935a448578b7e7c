"""How a body or a blob is encrypted: AES-256-GCM under a key of its own, derived from the tenant's data key.

    bytes   0  8   magic
            8 24   id of the data key
           24 40   salt
           40 52   nonce
           52  n   ciphertext and the 16 bytes of its tag; the first 24 bytes above are authenticated with it

The key of one envelope is HMAC-SHA256(data key, "tinkerbell envelope 1" || salt). So no number of envelopes wears a
data key out (salt and nonce are 224 random bits, where the nonce alone would allow 2^32 of them: NIST SP 800-38D
section 8.3), and one envelope can be opened by somebody who cannot open any other: an exported run takes the keys of
its own envelopes along and not its tenant's.
"""

import hashlib
import hmac
import os

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from tinkerbell.errors import Corrupt

MAGIC = b"\xc1TBSEAL\1"
"""Nothing that is stored begins like this: 0xc1 begins no MessagePack and no JSON, and a safetensors file would have to
have a header of 2^56 bytes."""
KEY_BYTES = 32
ID_BYTES = 16
_SALT_BYTES = 16
_NONCE_BYTES = 12
_BOUND = len(MAGIC) + ID_BYTES
_SALTED = _BOUND + _SALT_BYTES
_HEADER = _SALTED + _NONCE_BYTES
OVERHEAD = _HEADER + 16
"""Bytes that an envelope is longer than what is in it."""


def is_envelope(stored: bytes) -> bool:
    """Whether these bytes are encrypted."""
    return stored.startswith(MAGIC)


def seal(key_id: bytes, data_key: bytes, data: bytes) -> bytes:
    """`data` in an envelope; other bytes every time."""
    bound = MAGIC + key_id
    salt, nonce = os.urandom(_SALT_BYTES), os.urandom(_NONCE_BYTES)
    return b"".join((bound, salt, nonce, AESGCM(_derive(data_key, salt)).encrypt(nonce, data, bound)))


def key_id_of(envelope: bytes) -> bytes:
    """Id of the data key. Raises Corrupt for what is too short for an envelope."""
    if len(envelope) < OVERHEAD:
        raise Corrupt(f"an encrypted body or blob has {len(envelope)} bytes: a part of it is missing")
    return envelope[len(MAGIC) : _BOUND]


def key_of(envelope: bytes, data_key: bytes) -> bytes:
    """The key that opens this envelope and no other."""
    return _derive(data_key, envelope[_BOUND:_SALTED])


def unseal(envelope: bytes, key: bytes) -> bytes:
    """What is in it; `key` is that of `key_of`. Raises Corrupt with a wrong key or changed bytes."""
    try:
        return AESGCM(key).decrypt(envelope[_SALTED:_HEADER], envelope[_HEADER:], envelope[:_BOUND])
    except InvalidTag as exc:
        raise Corrupt("an encrypted body or blob does not open with its key") from exc


def _derive(data_key: bytes, salt: bytes) -> bytes:
    return hmac.digest(data_key, b"tinkerbell envelope 1" + salt, hashlib.sha256)
