"""C2PA Content Credentials: a signed manifest in the file that says what made it, and the check of one by the library's reader.

Needs the extra `provenance`. Nothing here goes over the network: no time stamp is asked for, and no remote manifest is fetched.
"""

from __future__ import annotations

import io
import json
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mii_serve import __version__
from mii_serve.errors import ConfigError, ProvenanceError
from mii_serve.extras import require
from mii_serve.provenance.xmp import DIGITAL_SOURCE_TYPE
from mii_serve.types import ImageFormat

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes

EXTRA = "provenance"
CERTIFICATE, KEY = "provenance.certificate", "provenance.key"
MIME_TYPES = {ImageFormat.PNG: "image/png", ImageFormat.JPEG: "image/jpeg", ImageFormat.WEBP: "image/webp"}
MODEL, MODEL_REVISION = "org.mii_serve.model", "org.mii_serve.model_revision"
UNTRUSTED = "signingCredential.untrusted"
"""The one failure of a valid manifest whose signer the reader has no reason to trust."""
MANIFEST_STORE = bytes.fromhex("6332706100110010800000aa00389b71")
"""The identifier of the box that holds the manifests in a file of any format."""
_SETTINGS = {
    "builder": {"thumbnail": {"enabled": False}},
    "verify": {"verify_after_sign": False, "remote_manifest_fetch": False, "ocsp_fetch": False},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """What the library's reader says of the manifest in a file.

    `state` is "Trusted", "Valid" (its signer is not among those that the reader trusts) or "Invalid"; `failures` are the
    reader's codes for what is wrong. `actions` have what the manifest says was done.
    """

    state: str
    failures: tuple[str, ...]
    signer: str | None
    actions: tuple[str, ...]
    digital_source_type: str | None
    model: str | None
    model_revision: str | None

    @property
    def is_valid(self) -> bool:
        return self.state in ("Valid", "Trusted")


class Signer:
    """Signs files with a certificate and its key. Threads may share it."""

    def __init__(self, certificate: Path, key: Path) -> None:
        """Read the files and sign once, to see that it works.

        Raises:
            ConfigError: naming the setting whose file cannot be used.
            MissingExtraError: the library is not installed.
        """
        require(EXTRA)
        import c2pa

        algorithm, chain, secret, self.expires_at = _material(certificate, key)
        self._context = c2pa.Context(settings=c2pa.Settings.from_dict(_SETTINGS))
        # The library refuses some calls on an object that another thread uses. A signature takes a millisecond or two.
        self._lock = threading.Lock()
        try:
            self._signer = c2pa.Signer.from_info(c2pa.C2paSignerInfo(algorithm, chain, secret, None))
            signed = self.sign(_probe(), ImageFormat.PNG, "", "")
        except (c2pa.C2paError, ProvenanceError, ValueError) as error:
            raise ConfigError(
                CERTIFICATE, f"{certificate} and {key} cannot sign Content Credentials: {error.__cause__ or error}"
            ) from None
        found = read_credentials(signed, MIME_TYPES[ImageFormat.PNG])
        if found is None or not found.is_valid:
            problems = ", ".join(found.failures) if found else "nothing was signed"
            raise ConfigError(CERTIFICATE, f"what {certificate} signs is not valid for C2PA: {problems}")

    def sign(
        self,
        file: bytes,
        image_format: ImageFormat,
        model: str,
        model_revision: str,
        source_type: str = DIGITAL_SOURCE_TYPE,
    ) -> bytes:
        """The same file with a manifest.

        Raises:
            ProvenanceError: it could not be signed.
        """
        import c2pa

        signed = io.BytesIO()
        try:
            with self._lock, c2pa.Builder(_manifest(model, model_revision, source_type), self._context) as builder:
                builder.sign(self._signer, MIME_TYPES[image_format], io.BytesIO(file), signed)
        except Exception as error:
            raise ProvenanceError(f"the picture could not be signed: {type(error).__name__}") from error
        return signed.getvalue()


def read_credentials(file: bytes, mime_type: str, trusted: str | None = None) -> Credentials | None:
    """What the reader says of the file's active manifest; None where there is none. `trusted` are certificates in PEM.

    Raises:
        MissingExtraError: the library is not installed.
        ProvenanceError: there is something that the reader cannot read.
    """
    require(EXTRA)
    import c2pa

    settings: dict[str, Any] = dict(_SETTINGS)
    if trusted is not None:
        settings["trust"] = {"trust_anchors": trusted}
    try:
        context = c2pa.Context(settings=c2pa.Settings.from_dict(settings))
        reader = c2pa.Reader.try_create(mime_type, io.BytesIO(file), context=context)
        if reader is None:
            return None
        with reader:
            manifest = reader.get_active_manifest() or {}
            results = reader.get_validation_results() or {}
            state = reader.get_validation_state() or "Invalid"
    except (c2pa.C2paError, ValueError) as error:
        raise ProvenanceError(f"the Content Credentials cannot be read: {error}") from error
    failures = [str(one.get("code")) for one in results.get("activeManifest", {}).get("failure", ())]
    actions = [action for one in manifest.get("assertions", ()) for action in _actions(one)]
    created = next((one for one in actions if one.get("action") == "c2pa.created"), {})
    parameters = created.get("parameters") or {}
    signature = manifest.get("signature_info") or {}
    names = [signature.get("common_name"), signature.get("issuer")]
    return Credentials(
        state=state,
        failures=tuple(code for code in failures if code != UNTRUSTED or trusted is not None),
        signer=", ".join(name for name in names if name) or None,
        actions=tuple(str(one.get("action")) for one in actions),
        digital_source_type=created.get("digitalSourceType"),
        model=parameters.get(MODEL),
        model_revision=parameters.get(MODEL_REVISION),
    )


def has_manifest(file: bytes) -> bool:
    """Whether the file seems to hold a manifest; needs no library, and says nothing of its validity."""
    return MANIFEST_STORE in file


def _actions(assertion: dict[str, Any]) -> list[dict[str, Any]]:
    if not str(assertion.get("label")).startswith("c2pa.actions"):
        return []
    return list((assertion.get("data") or {}).get("actions") or ())


def _manifest(model: str, model_revision: str, source_type: str) -> str:
    software = {"name": "mii_serve", "version": __version__}
    created = {
        "action": "c2pa.created",
        "digitalSourceType": source_type,
        "softwareAgent": software,
        "parameters": {MODEL: model, MODEL_REVISION: model_revision},
    }
    actions = {"label": "c2pa.actions.v2", "data": {"actions": [created]}}
    return json.dumps({"claim_generator_info": [software], "assertions": [actions]})


def _material(certificate: Path, key: Path) -> tuple[str, bytes, bytes, float]:
    """The algorithm, the chain and the key, as the library takes them; when the first of the chain expires, since 1970."""
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization

    chain, secret = _bytes(CERTIFICATE, certificate), _bytes(KEY, key)
    try:
        certificates = x509.load_pem_x509_certificates(chain)
    except ValueError as error:
        raise ConfigError(CERTIFICATE, f"{certificate} holds no certificates in PEM: {error}") from None
    try:
        private = serialization.load_pem_private_key(secret, password=None)
    except TypeError:
        raise ConfigError(KEY, "must not be encrypted: a server cannot ask for the password") from None
    except ValueError as error:
        raise ConfigError(KEY, f"{key} holds no private key in PEM: {error}") from None
    if certificates[0].public_key() != private.public_key():
        raise ConfigError(KEY, f"{key} is not the key of the first certificate in {certificate}")
    # The library reads PKCS #8 alone.
    plain = private.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    expires_at = min(one.not_valid_after_utc.timestamp() for one in certificates)
    return _algorithm(private), chain, plain, expires_at


def _algorithm(key: PrivateKeyTypes) -> str:
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    if isinstance(key, ed25519.Ed25519PrivateKey):
        return "ed25519"
    if isinstance(key, rsa.RSAPrivateKey):
        return "ps256"
    if isinstance(key, ec.EllipticCurvePrivateKey):
        curves = {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}
        if (found := curves.get(key.curve.name)) is not None:
            return found
    raise ConfigError(KEY, "must be an EC key (P-256, P-384 or P-521), an Ed25519 key or an RSA key")


def _bytes(setting: str, file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ConfigError(setting, f"cannot read {file}: {error.strerror}") from None


def _probe() -> bytes:
    """A small file, to be signed to see whether it can be."""
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "png")
    return file.getvalue()
