"""Certificates that may sign Content Credentials, and files of them, made for the test."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

_USAGES = (
    "digital_signature",
    "content_commitment",
    "key_encipherment",
    "data_encipherment",
    "key_agreement",
    "key_cert_sign",
    "crl_sign",
    "encipher_only",
    "decipher_only",
)


@dataclass(frozen=True)
class SigningFiles:
    certificate: Path
    key: Path
    ca: Path

    @property
    def settings(self) -> dict[str, Any]:
        return {"certificate": self.certificate, "key": self.key}


def write_signing_files(folder: Path, signer: str = "Studio", *, days: int = 30) -> SigningFiles:
    """A certificate for this signer, its key, and the CA that vouches for it, as files in the folder; old ones are replaced."""
    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ca = _certificate("A test's CA", ca_key.public_key(), "A test's CA", ca_key, days=abs(days), is_ca=True)
    leaf = _certificate(signer, key.public_key(), "A test's CA", ca_key, days=days, is_ca=False)
    folder.mkdir(exist_ok=True)
    pem = serialization.Encoding.PEM
    files = SigningFiles(folder / "chain.pem", folder / "key.pem", folder / "ca.pem")
    files.certificate.write_bytes(leaf.public_bytes(pem) + ca.public_bytes(pem))
    files.key.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    files.key.chmod(0o600)
    files.ca.write_bytes(ca.public_bytes(pem))
    return files


def _certificate(
    name: str, public_key: Any, issuer: str, issuer_key: ec.EllipticCurvePrivateKey, *, days: int, is_ca: bool
) -> x509.Certificate:
    now = datetime.datetime.now(datetime.UTC)
    used = ("key_cert_sign", "crl_sign") if is_ca else ("digital_signature",)
    builder = (
        x509.CertificateBuilder()
        .subject_name(_named(name))
        .issuer_name(_named(issuer))
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=abs(days) + 1))
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.BasicConstraints(is_ca, 0 if is_ca else None), critical=True)
        .add_extension(x509.KeyUsage(**{usage: usage in used for usage in _USAGES}), critical=True)
    )
    if is_ca:
        builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    else:
        emails = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION])
        authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key())
        builder = builder.add_extension(emails, critical=False).add_extension(authority, critical=False)
    return builder.sign(issuer_key, hashes.SHA256())


def _named(name: str) -> x509.Name:
    return x509.Name(
        [x509.NameAttribute(NameOID.COMMON_NAME, name), x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Tests of mii_serve")]
    )
