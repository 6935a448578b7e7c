"""Random numbers that are a function of their place: request seed, sample, token.

No generator carries state, so a token's randomness cannot depend on what is sampled beside it.
"""

import hashlib
import struct

SAMPLE = b"tb-sample"
"""Of sampled tokens."""
PROMPT = b"tb-prompt"
"""Of draws at the positions of a prompt."""


def uniform(seed: int, sample: int, token: int, use: bytes = SAMPLE) -> float:
    """A number in [0, 1) with 53 random bits for token `token` of sample `sample`; 0 <= seed < 2**64.

    BLAKE2b of the three counters: the same on every machine, independent between any two places and uses.
    """
    digest = hashlib.blake2b(struct.pack("<QQQ", seed, sample, token), digest_size=8, person=use).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53
