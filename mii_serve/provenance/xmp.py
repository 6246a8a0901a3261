"""An XMP packet that says that a model made the picture, and the reading of one.

The properties are those of the IPTC Photo Metadata Standard 2025.1: https://iptc.org/std/photometadata/specification/.
"""

from __future__ import annotations

from dataclasses import dataclass
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from mii_serve import __version__

_CODES = "http://cv.iptc.org/newscodes/digitalsourcetype/"
DIGITAL_SOURCE_TYPE = f"{_CODES}trainedAlgorithmicMedia"
COMPOSITE_SOURCE_TYPE = f"{_CODES}compositeWithTrainedAlgorithmicMedia"
"""Of a picture that was repainted inside of a mask: the rest is a caller's image."""
CREATOR_TOOL = f"mii_serve {__version__}"
MAX_PACKET_BYTES = 1024 * 1024
"""Of a packet that is read; ours have less than a kilobyte."""

_IPTC = "http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
_XMP = "http://ns.adobe.com/xap/1.0/"
_RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
_START = "\ufeff"
_PACKET_ID = "W5M0MpCehiHzreSzNTczkc9d"
"""The XMP specification's own, the same in every packet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class XmpFacts:
    """What a packet says about the origin of its picture; None where it does not say it."""

    digital_source_type: str | None
    model: str | None
    model_revision: str | None
    creator_tool: str | None


def packet(model: str, model_revision: str, source_type: str = DIGITAL_SOURCE_TYPE) -> bytes:
    """The packet for a picture that this model made."""
    return (
        f'<?xpacket begin="{_START}" id="{_PACKET_ID}"?>'
        f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="{_RDF}">'
        f'<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="{_IPTC}" xmlns:xmp="{_XMP}">'
        f"<Iptc4xmpExt:DigitalSourceType>{source_type}</Iptc4xmpExt:DigitalSourceType>"
        f"<Iptc4xmpExt:AISystemUsed>{_text(model)}</Iptc4xmpExt:AISystemUsed>"
        f"<Iptc4xmpExt:AISystemVersionUsed>{_text(model_revision)}</Iptc4xmpExt:AISystemVersionUsed>"
        f"<xmp:CreatorTool>{_text(CREATOR_TOOL)}</xmp:CreatorTool>"
        '</rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="r"?>'
    ).encode()


def read_packet(content: bytes) -> XmpFacts | None:
    """What the packet says; None where it is no XMP. A property may be an element or an attribute."""
    if len(content) > MAX_PACKET_BYTES or b"<!DOCTYPE" in content:
        return None
    try:
        root = ElementTree.fromstring(content.decode("utf-8", "replace").strip("\0 \n\r\t" + _START))
    except (ElementTree.ParseError, ValueError):
        return None
    descriptions = list(root.iter(f"{{{_RDF}}}Description"))

    def said(namespace: str, name: str) -> str | None:
        tag = f"{{{namespace}}}{name}"
        for description in descriptions:
            if (value := description.get(tag) or description.findtext(tag)) is not None:
                return value.strip()
        return None

    return XmpFacts(
        digital_source_type=said(_IPTC, "DigitalSourceType"),
        model=said(_IPTC, "AISystemUsed"),
        model_revision=said(_IPTC, "AISystemVersionUsed"),
        creator_tool=said(_XMP, "CreatorTool"),
    )


def _text(value: str) -> str:
    """The value as XML text, without the characters that XML cannot hold."""
    return escape("".join(char for char in value if char.isprintable()))
