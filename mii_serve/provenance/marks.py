"""Which marks a deployment puts on its pictures; the one place where pictures become files.

The marks leave the pixels alone, but for the watermark, which is off unless the operator turns it on.
"""

from __future__ import annotations

import io
import logging
import math
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mii_serve.errors import ConfigError
from mii_serve.provenance import watermark
from mii_serve.provenance.credentials import CERTIFICATE, KEY, Signer
from mii_serve.provenance.xmp import COMPOSITE_SOURCE_TYPE, DIGITAL_SOURCE_TYPE, packet
from mii_serve.types import ImageFormat

if TYPE_CHECKING:
    from PIL import Image

    from mii_serve.config import ProvenanceConfig

logger = logging.getLogger(__name__)

PNG_COMPRESS_LEVEL = 1
"""A quarter of the default level's time for files a tenth larger."""
DEFAULT_QUALITY = 90
LOSSLESS = (ImageFormat.PNG, ImageFormat.RAW_RGB)
"""The formats that keep the watermark."""
PNG_XMP = "XML:com.adobe.xmp"
"""The keyword under which a PNG holds its XMP packet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """The model that a picture comes from, as answers name it. It made a part of a composite; the rest is a caller's."""

    model: str
    model_revision: str
    is_composite: bool = False

    @property
    def source_type(self) -> str:
        return COMPOSITE_SOURCE_TYPE if self.is_composite else DIGITAL_SOURCE_TYPE


class Provenance:
    """Writes pictures as files, with the marks of this deployment. Threads may share it."""

    def __init__(
        self,
        *,
        has_metadata: bool = True,
        has_watermark: bool = False,
        certificate: Path | None = None,
        key: Path | None = None,
    ) -> None:
        """`has_metadata` is about XMP. With `certificate` and `key` every file is signed.

        Raises:
            ConfigError: a file cannot be used, or one of the pair is missing.
            MissingExtraError: signing needs the extra `provenance`.
        """
        self._has_metadata, self._has_watermark = has_metadata, has_watermark
        self._files = _pair(certificate, key)
        self._signer = None if self._files is None else self._new_signer(self._files)

    @classmethod
    def of(cls, settings: ProvenanceConfig) -> Provenance:
        return cls(
            has_metadata=settings.enable_metadata,
            has_watermark=settings.enable_watermark,
            certificate=settings.certificate,
            key=settings.key,
        )

    @property
    def is_signing(self) -> bool:
        return self._signer is not None

    @property
    def expires_at(self) -> float:
        """When a certificate of the chain expires and signing ends, in seconds since 1970; infinite without signing."""
        return math.inf if self._signer is None else self._signer.expires_at

    def reload(self) -> None:
        """Read certificate and key again. Ones that cannot be used change nothing."""
        if self._files is None:
            return
        try:
            self._signer = self._new_signer(self._files)
        except ConfigError as error:
            logger.error("the certificate of Content Credentials stays as it was: %s", error)
        else:
            logger.info("the certificate of Content Credentials was read again")

    def marks(self, image_format: ImageFormat, width: int, height: int) -> tuple[str, ...]:
        """What a picture of this format and size carries, of "xmp", "c2pa" and "watermark".

        Raw pixels have no room for the first two, and a picture that was made black has no watermark.
        """
        is_file = image_format is not ImageFormat.RAW_RGB
        has_watermark = self._has_watermark and image_format in LOSSLESS and watermark.can_carry(width, height)
        carried = {"xmp": is_file and self._has_metadata, "c2pa": is_file and self.is_signing, "watermark": has_watermark}
        return tuple(name for name, is_there in carried.items() if is_there)

    def marked_pixels(self, rgb: bytes, width: int, height: int, image_format: ImageFormat) -> bytes:
        """The pixels as they leave: with the watermark, where it is on and the format keeps it."""
        return watermark.embed(rgb, width, height) if "watermark" in self.marks(image_format, width, height) else rgb

    def write(
        self,
        image: Image.Image,
        image_format: ImageFormat,
        origin: Origin,
        *,
        quality: int | None = None,
        is_lossless: bool = False,
        texts: Mapping[str, str] | None = None,
    ) -> bytes:
        """The picture as the bytes of a file of this format, with its marks. `texts` go into a PNG beside them.

        Raises:
            ProvenanceError: it could not be signed.
        """
        from PIL.PngImagePlugin import PngInfo

        xmp = packet(origin.model, origin.model_revision, origin.source_type) if self._has_metadata else b""
        file = io.BytesIO()
        match image_format:
            case ImageFormat.RAW_RGB:
                return image.tobytes()
            case ImageFormat.PNG:
                info = PngInfo()
                for name, text in (texts or {}).items():
                    info.add_itxt(name, text)
                if xmp:
                    info.add_itxt(PNG_XMP, xmp.decode())
                image.save(file, "png", compress_level=PNG_COMPRESS_LEVEL, pnginfo=info)
            case ImageFormat.JPEG:
                image.save(file, "jpeg", quality=quality or DEFAULT_QUALITY, xmp=xmp)
            case ImageFormat.WEBP:
                image.save(file, "webp", quality=quality or DEFAULT_QUALITY, method=0, lossless=is_lossless, xmp=xmp)
        if (signer := self._signer) is None:
            return file.getvalue()
        return signer.sign(file.getvalue(), image_format, origin.model, origin.model_revision, origin.source_type)

    @staticmethod
    def _new_signer(files: tuple[Path, Path]) -> Signer:
        certificate, key = files
        signer = Signer(certificate, key)
        if key.stat().st_mode & stat.S_IROTH:
            logger.warning("every user of this machine can read %s; chmod 600 is better", key)
        return signer


def _pair(certificate: Path | None, key: Path | None) -> tuple[Path, Path] | None:
    if certificate is None and key is None:
        return None
    if certificate is None:
        raise ConfigError(CERTIFICATE, f"{KEY} needs it too")
    if key is None:
        raise ConfigError(KEY, f"{CERTIFICATE} needs it too")
    return certificate, key
