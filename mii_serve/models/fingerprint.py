"""The revision of a model's files: the hub's commit where it is proven, otherwise `sha256:` and twelve hex digits.

The fingerprint covers, for every file the pipeline is loaded from (weights, configurations, tokenizer, declared defaults;
sorted by path within the folder), its path, its size and every byte of it. Two folders of one name draw the same pictures.

A folder of the hub's cache is named after its commit, but may have been edited since. The files prove it: the cache keeps each
as a link to a blob, named by the hash that the hub gave it. Where a file is no such link, or its content has another hash, the
name is the commit, a `+` and the fingerprint. That a file has been taken away from such a folder is not seen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

NUM_READERS = 4
"""Threads; a gigabyte takes one of them about a second."""


@dataclass(frozen=True, slots=True)
class _Digest:
    size: int
    sha256: str


def revision_of(folder: Path, files: Iterable[Path], commit: str | None) -> str:
    """The name of the files' content. `commit` is the one in the folder's path, None where there is none."""
    digests = _digests(folder, files)
    if commit is None:
        return _named(digests)
    if all(_is_the_hubs(folder / name, digest) for name, digest in digests.items()):
        return commit
    return f"{commit}+{_named(digests)}"


def fingerprint(folder: Path, files: Iterable[Path]) -> str:
    """The same files give the same name, wherever the folder lies."""
    return _named(_digests(folder, files))


def fingerprint_of_named(files: Mapping[str, Path]) -> str:
    """The same content under the same names gives the same fingerprint, wherever the files are."""
    return _named(_digests_of(files))


def short_digest(hex_digest: str) -> str:
    return f"sha256:{hex_digest[:12]}"


def _digests(folder: Path, files: Iterable[Path]) -> dict[str, _Digest]:
    return _digests_of({file.relative_to(folder).as_posix(): file for file in files})


def _digests_of(by_name: Mapping[str, Path]) -> dict[str, _Digest]:
    with ThreadPoolExecutor(NUM_READERS, thread_name_prefix="fingerprint") as pool:
        return dict(zip(by_name, pool.map(_digest, by_name.values()), strict=True))


def _digest(file: Path) -> _Digest:
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256")
        return _Digest(stream.tell(), digest.hexdigest())


def _named(digests: Mapping[str, _Digest]) -> str:
    whole = hashlib.sha256()
    for name in sorted(digests):
        whole.update(f"{name}\0{digests[name].size}\0{digests[name].sha256}\0".encode())
    return short_digest(whole.hexdigest())


def _is_the_hubs(file: Path, digest: _Digest) -> bool:
    """Blobs are named by the SHA-256 of large files, and of small ones by what git calls them."""
    blob = file.resolve()
    if not file.is_symlink() or blob.parent.name != "blobs":
        return False
    return blob.name in (digest.sha256, _git_name(blob, digest.size))


def _git_name(file: Path, size: int) -> str:
    if size > 100 * 2**20:
        return ""  # the hub keeps no file of such a size in git
    return hashlib.sha1(f"blob {size}\0".encode() + file.read_bytes(), usedforsecurity=False).hexdigest()
