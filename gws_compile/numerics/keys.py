"""The key of a weight: which random stream it draws from."""

from __future__ import annotations

import hashlib

from .primitives import wrap_int32


def key_words(seed: int, name: str) -> tuple[int, int]:
    """The two int32 key words of a weight: BLAKE2b of its name, keyed with the seed.

    Stable across processes, ranks and machines.
    """
    digest = hashlib.blake2b(name.encode(), digest_size=8, key=seed.to_bytes(8, "little")).digest()
    return wrap_int32(int.from_bytes(digest[:4], "little")), wrap_int32(int.from_bytes(digest[4:], "little"))
