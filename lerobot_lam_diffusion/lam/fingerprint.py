"""Which LAM made a token: a hash of everything that determines one, and of nothing else."""

import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any

from .weights import Weights

_KNOWN: dict[tuple, str] = {}
_MOST_KNOWN = 64


def fingerprint_of_weights(weights: Weights, token_fields: dict[str, Any], token_parts: Sequence[str]) -> str:
    """SHA-256 (hex) of the dimensions and tensors that decide a token.

    Computed once in a process for each state of the file.

    Args:
        weights: The opened file.
        token_fields: Of the config, see `TokenConfig.token_fields`.
        token_parts: Modules whose tensors count.
    """
    dimensions = json.dumps(token_fields, sort_keys=True)
    status = os.fstat(weights.file.fileno())
    # The inode and its last change tell a file that was replaced by one of the same size and time.
    state = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    known = (dimensions, *token_parts, *state)
    if known not in _KNOWN:
        while len(_KNOWN) >= _MOST_KNOWN:
            _KNOWN.pop(next(iter(_KNOWN)))
        _KNOWN[known] = _hash(weights, dimensions, token_parts)
    return _KNOWN[known]


def _hash(weights: Weights, dimensions: str, token_parts: Sequence[str]) -> str:
    digest = hashlib.sha256(dimensions.encode())
    prefixes = tuple(f"{part}." for part in token_parts)
    for key in sorted(key for key in weights.entries if key.startswith(prefixes)):
        entry = weights.entries[key]
        digest.update(f"{key} {entry.dtype} {list(entry.shape)}".encode())
        for block in weights.blocks(key):
            digest.update(block)
    return digest.hexdigest()
