"""Seeds derived from names and numbers, so that no draw depends on which thread or process came first.

Every random choice of a run (initial adapters, batches, dropout masks, sampled clients) starts from a seed made
here out of the run's seed and the coordinates of the draw, such as round and client. A run resumed from the
checkpoint of round r therefore draws what the uninterrupted run drew.
"""

import hashlib


def derive_seed(*coordinates: int | str) -> int:
    """Return a 63-bit seed that depends on every coordinate, and on nothing else.

    Args:
        coordinates: the run's seed and the place of the draw, for example ``(seed, "batch", round, client)``.

    Example:
        >>> derive_seed(0, "batch", 3, "client-1") == derive_seed(0, "batch", 3, "client-1")
        True
        >>> derive_seed(0, "batch", 31, "x") == derive_seed(0, "batch", 3, "1x")
        False
    """
    digest = hashlib.sha256(repr(coordinates).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
