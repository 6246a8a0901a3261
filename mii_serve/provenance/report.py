"""What a file carries of the marks, from any program."""

from __future__ import annotations

import io
import warnings
from dataclasses import asdict, dataclass
from typing import Any

from PIL import Image

from mii_serve.errors import InvalidRequestError, ProvenanceError
from mii_serve.extras import MissingExtraError
from mii_serve.provenance import watermark
from mii_serve.provenance.credentials import Credentials, has_manifest, read_credentials
from mii_serve.provenance.watermark import WatermarkReading
from mii_serve.provenance.xmp import COMPOSITE_SOURCE_TYPE, DIGITAL_SOURCE_TYPE, XmpFacts, read_packet

FORMATS = ("PNG", "JPEG", "WEBP")
NOT_INSTALLED = "not installed"


@dataclass(frozen=True, slots=True, kw_only=True)
class FileReport:
    """The marks of one file; None where it has none of a kind.

    `credentials_problem` says why the Content Credentials that are there could not be read: `NOT_INSTALLED`, or what the reader
    said. `watermark_note` says why the watermark was not looked for.
    """

    format: str
    width: int
    height: int
    xmp: XmpFacts | None
    credentials: Credentials | None
    credentials_problem: str | None
    watermark: WatermarkReading | None
    watermark_note: str | None
    must_be_trusted: bool = False

    @property
    def is_marked(self) -> bool:
        """Whether some mark says that the picture was generated."""
        types = {one.digital_source_type for one in (self.xmp, self.credentials) if one is not None}
        return bool(types & {DIGITAL_SOURCE_TYPE, COMPOSITE_SOURCE_TYPE}) or (
            self.watermark is not None and self.watermark.is_found
        )

    @property
    def is_unchecked(self) -> bool:
        """There are credentials, and the library that checks them is missing."""
        return self.credentials_problem == NOT_INSTALLED

    @property
    def is_invalid(self) -> bool:
        """Whether the Content Credentials say that the file is not as it was signed, or not by whom it should be."""
        if self.credentials is None:
            return self.credentials_problem is not None and not self.is_unchecked
        return not self.credentials.is_valid or (self.must_be_trusted and self.credentials.state != "Trusted")

    def to_json(self) -> dict[str, Any]:
        found = asdict(self)
        del found["must_be_trusted"]
        if self.watermark is not None:
            found["watermark"] = {"text": watermark.TEXT, "is_found": self.watermark.is_found, **asdict(self.watermark)}
        return {**found, "is_marked": self.is_marked, "is_invalid": self.is_invalid}


def report_on(content: bytes, name: str, trusted: str | None = None) -> FileReport:
    """Look for every kind of mark in a file. With `trusted`, certificates in PEM, one of them must vouch for the signer.

    Raises:
        InvalidRequestError: it is no image that can be read.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(content), formats=FORMATS)
            image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise InvalidRequestError("file", f"{name} is no PNG, JPEG or WebP image that can be read") from error
    image_format = image.format or ""
    credentials, problem = _credentials(content, f"image/{image_format.lower()}", trusted)
    reading, note = _watermark(image)
    return FileReport(
        format=image_format,
        width=image.width,
        height=image.height,
        xmp=_xmp(image),
        credentials=credentials,
        credentials_problem=problem,
        watermark=reading,
        watermark_note=note,
        must_be_trusted=trusted is not None,
    )


def _xmp(image: Image.Image) -> XmpFacts | None:
    content = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp")
    if isinstance(content, str):
        content = content.encode()
    return read_packet(content) if isinstance(content, bytes) else None


def _credentials(content: bytes, mime_type: str, trusted: str | None) -> tuple[Credentials | None, str | None]:
    try:
        return read_credentials(content, mime_type, trusted), None
    except MissingExtraError:
        return None, NOT_INSTALLED if has_manifest(content) else None
    except ProvenanceError as error:
        return None, str(error)


def _watermark(image: Image.Image) -> tuple[WatermarkReading | None, str | None]:
    try:
        reading = watermark.read(image)
    except ModuleNotFoundError as error:
        return None, f"{error.name} is not installed"
    return reading, "the picture is too small for one" if reading is None else None
