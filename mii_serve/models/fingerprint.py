"""Name a folder's content where no hub commit does: `sha256:` and twelve hex digits.

The hash covers, for every file the pipeline is loaded from (weights, configurations, tokenizer; sorted by path within the
folder), its path, its size and its content. Where the files are more than `WHOLE_LIMIT_BYTES` together, only the first and
the last `EDGE_BYTES` of each stand for its content: reading gigabytes at every start would cost more than it tells. Two
such models that differ only in the middle of a file of equal size have the same fingerprint.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

WHOLE_LIMIT_BYTES = 64 * 2**20
EDGE_BYTES = 2**20


def fingerprint(folder: Path, files: Iterable[Path]) -> str:
    """The same files give the same name, wherever the folder lies."""
    by_name = {file.relative_to(folder).as_posix(): file for file in files}
    sizes = {name: file.stat().st_size for name, file in by_name.items()}
    hash_whole = sum(sizes.values()) <= WHOLE_LIMIT_BYTES
    digest = hashlib.sha256()
    for name in sorted(by_name):
        digest.update(f"{name}\0{sizes[name]}\0".encode())
        with by_name[name].open("rb") as stream:
            if hash_whole or sizes[name] <= 2 * EDGE_BYTES:
                digest.update(stream.read())
            else:
                digest.update(stream.read(EDGE_BYTES))
                stream.seek(-EDGE_BYTES, 2)
                digest.update(stream.read())
    return short_digest(digest.hexdigest())


def short_digest(hex_digest: str) -> str:
    return f"sha256:{hex_digest[:12]}"
