"""How the commands connect to a server with API keys or TLS."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mii_serve.errors import ConfigError

if TYPE_CHECKING:
    import grpc

    from mii_serve.client import AsyncClient, Client

API_KEY_VARIABLE = "MII_SERVE_API_KEY"
"""Not a flag: every user of a machine can read its command lines."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """A target, and the files for TLS to it: whom to trust, and who we are where the server asks."""

    target: str
    tls_ca: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None

    def open(self) -> Client:
        """A client for this server, with the API key of the environment.

        Raises:
            ConfigError: naming the flag whose file cannot be used.
        """
        from mii_serve.client import Client

        return Client(self.target, credentials=self.credentials(), api_key=os.environ.get(API_KEY_VARIABLE) or None)

    def open_async(self) -> AsyncClient:
        """The same for asyncio, without retries: who uses it decides what is worth asking for again.

        Raises:
            ConfigError: naming the flag whose file cannot be used.
        """
        from mii_serve.client import AsyncClient

        api_key = os.environ.get(API_KEY_VARIABLE) or None
        return AsyncClient(self.target, credentials=self.credentials(), api_key=api_key, max_retries=0)

    def credentials(self) -> grpc.ChannelCredentials | None:
        """For a channel to this server; None is plain text.

        Raises:
            ConfigError: naming the flag whose file cannot be used.
        """
        import grpc

        if (self.tls_cert is None) is not (self.tls_key is None):
            raise ConfigError("--tls-cert", "and --tls-key must be given together")
        if self.tls_cert is not None and self.tls_ca is None:
            raise ConfigError("--tls-ca", "is needed for TLS: the CA that signed the server's certificate")
        if self.tls_ca is None:
            return None
        roots, key, chain = (_bytes(*file) for file in self._files())
        return grpc.ssl_channel_credentials(roots, key, chain)

    def _files(self) -> tuple[tuple[str, Path | None], ...]:
        return ("--tls-ca", self.tls_ca), ("--tls-key", self.tls_key), ("--tls-cert", self.tls_cert)


def _bytes(flag: str, file: Path | None) -> bytes | None:
    if file is None:
        return None
    try:
        return file.read_bytes()
    except OSError as error:
        raise ConfigError(flag, f"cannot read {file}: {error.strerror}") from None
