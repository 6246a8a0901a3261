"""TLS from files, for both ports, and read again when asked."""

from __future__ import annotations

import logging
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import grpc

from mii_serve.config import DeployConfig
from mii_serve.errors import ConfigError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Material:
    cert: bytes
    key: bytes
    client_ca: bytes | None


class Tls:
    """A server's certificate and, for mutual TLS, whose clients it trusts. `reload` serves new connections with new files."""

    def __init__(self, cert: Path, key: Path, client_ca: Path | None) -> None:
        """Read and check the files.

        Raises:
            ConfigError: naming the setting whose file cannot be used.
        """
        self.cert, self.key, self.client_ca = cert, key, client_ca
        self._material = self._read()
        self._is_new = False
        self._contexts: list[ssl.SSLContext] = []

    @classmethod
    def of(cls, config: DeployConfig) -> Tls | None:
        """What the configuration asks for; None for plain text.

        Raises:
            ConfigError: a file cannot be used, or one of the pair is missing.
        """
        if config.tls_cert is None and config.tls_key is None:
            if config.tls_client_ca is not None:
                raise ConfigError("tls_client_ca", "needs tls_cert and tls_key too")
            return None
        if config.tls_cert is None:
            raise ConfigError("tls_cert", "tls_key needs it too")
        if config.tls_key is None:
            raise ConfigError("tls_key", "tls_cert needs it too")
        return cls(config.tls_cert, config.tls_key, config.tls_client_ca)

    def reload(self) -> None:
        """Read the files again. Ones that cannot be used change nothing."""
        try:
            self._material = self._read()
        except ConfigError as error:
            logger.error("the certificate stays as it was: %s", error)
        else:
            self._is_new = True
            for context in self._contexts:
                context.load_cert_chain(self.cert, self.key)
            logger.info("the certificate was read again")

    def keep_fresh(self, context: ssl.SSLContext) -> None:
        """Let `reload` renew this context's certificate too."""
        self._contexts.append(context)

    def grpc_credentials(self) -> grpc.ServerCredentials:
        """For one gRPC server, which asks at each handshake whether there is something new."""

        def fetch() -> grpc.ServerCertificateConfiguration | None:
            is_new, self._is_new = self._is_new, False
            return self._configuration() if is_new else None

        # The stubs forget that None means "as before".
        fetching = cast("Callable[[], grpc.ServerCertificateConfiguration]", fetch)
        needs_client = self.client_ca is not None
        return grpc.dynamic_ssl_server_credentials(self._configuration(), fetching, require_client_authentication=needs_client)

    def _configuration(self) -> grpc.ServerCertificateConfiguration:
        material = self._material
        return grpc.ssl_server_certificate_configuration([(material.key, material.cert)], material.client_ca)

    def _read(self) -> _Material:
        material = _Material(
            cert=_bytes("tls_cert", self.cert),
            key=_bytes("tls_key", self.key),
            client_ca=None if self.client_ca is None else _bytes("tls_client_ca", self.client_ca),
        )
        # gRPC takes any bytes and fails at each handshake; OpenSSL says at once what is wrong.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(self.cert, self.key, password=_no_password)
        except (ssl.SSLError, OSError) as error:
            raise ConfigError("tls_key", f"{self.key} and {self.cert} are no pair in PEM: {error}") from None
        if self.client_ca is not None:
            try:
                context.load_verify_locations(self.client_ca)
            except (ssl.SSLError, OSError) as error:
                raise ConfigError("tls_client_ca", f"{self.client_ca} holds no certificate in PEM: {error}") from None
        return material


def _no_password() -> str:
    raise ConfigError("tls_key", "must not be encrypted: a server cannot ask for the password")


def _bytes(setting: str, file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ConfigError(setting, f"cannot read {file}: {error.strerror}") from None
