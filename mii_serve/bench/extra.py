"""Packages that only a part of the load generator needs: they are imported where that part begins."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mii_serve.errors import ConfigError


@contextmanager
def needs_extra(what: str, extra: str = "bench") -> Iterator[None]:
    """Import optional packages in this block; `what` is the flag or setting that needs them.

    Raises:
        ConfigError: one of them is not installed; it names the extra that brings it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "mii_serve":
            raise
        package = error.name.partition(".")[0]
        raise ConfigError(what, f"needs the package {package}; install mii_serve with the extra {extra!r}") from None
