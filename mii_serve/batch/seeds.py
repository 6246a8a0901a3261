"""The seeds of rows that name none."""

from __future__ import annotations

import hashlib


def seed_of_row(job_seed: int, key: str) -> int:
    """32 bits that depend on the job's seed and the row's key, and on nothing else: the same on any machine."""
    return int.from_bytes(hashlib.sha256(f"{job_seed}:{key}".encode(errors="surrogatepass")).digest()[:4], "big")
