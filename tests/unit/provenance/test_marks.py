"""Every file says that a model made it; what is signed is read by the C2PA library's own reader."""

from __future__ import annotations

import io
import json
import zlib
from dataclasses import replace
from pathlib import Path

import c2pa
import pytest
from commands import Run
from PIL import Image
from signing import SigningFiles, write_signing_files

from mii_serve.errors import ConfigError, ProvenanceError
from mii_serve.provenance import Origin, Provenance
from mii_serve.provenance.credentials import MIME_TYPES, MODEL, MODEL_REVISION
from mii_serve.provenance.report import report_on
from mii_serve.provenance.xmp import COMPOSITE_SOURCE_TYPE, DIGITAL_SOURCE_TYPE, packet, read_packet
from mii_serve.types import ImageFormat

FILES = tuple(MIME_TYPES)
ORIGIN = Origin(model='a/"b" & <c>', model_revision="133a221b")
IMAGE = Image.effect_mandelbrot((64, 48), (-2, -1, 1, 1), 20).convert("RGB")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> SigningFiles:
    return write_signing_files(tmp_path_factory.mktemp("signing"))


@pytest.fixture(scope="module")
def signing(files: SigningFiles) -> Provenance:
    return Provenance(**files.settings)


@pytest.mark.parametrize("image_format", FILES)
def test_a_file_of_any_format_says_that_a_model_made_it(image_format: ImageFormat) -> None:
    marked = Provenance().write(IMAGE, image_format, ORIGIN, quality=80)
    report = report_on(marked, "file")
    assert report.is_marked and not report.is_invalid and report.credentials is None
    assert report.xmp is not None and report.xmp.digital_source_type == DIGITAL_SOURCE_TYPE
    assert (report.xmp.model, report.xmp.model_revision) == (ORIGIN.model, ORIGIN.model_revision)
    plain = Provenance(has_metadata=False).write(IMAGE, image_format, ORIGIN, quality=80)
    assert not report_on(plain, "file").is_marked
    assert Image.open(io.BytesIO(marked)).tobytes() == Image.open(io.BytesIO(plain)).tobytes()


def test_a_picture_that_was_repainted_inside_of_a_mask_is_a_composite(signing: Provenance) -> None:
    report = report_on(signing.write(IMAGE, ImageFormat.PNG, replace(ORIGIN, is_composite=True)), "file")
    assert report.is_marked and report.xmp is not None and report.credentials is not None
    assert report.xmp.digital_source_type == report.credentials.digital_source_type == COMPOSITE_SOURCE_TYPE


def test_raw_pixels_carry_nothing_and_say_so(signing: Provenance) -> None:
    assert signing.write(IMAGE, ImageFormat.RAW_RGB, ORIGIN) == IMAGE.tobytes()
    assert signing.marks(ImageFormat.RAW_RGB, 512, 512) == ()
    assert signing.marks(ImageFormat.PNG, 512, 512) == ("xmp", "c2pa")
    assert Provenance(has_watermark=True).marks(ImageFormat.RAW_RGB, 512, 512) == ("watermark",)
    assert Provenance(has_watermark=True, has_metadata=False).marks(ImageFormat.PNG, 64, 64) == ()


@pytest.mark.parametrize("image_format", FILES)
def test_the_librarys_reader_takes_a_signed_file_and_refuses_a_changed_one(
    signing: Provenance, files: SigningFiles, image_format: ImageFormat
) -> None:
    signed = signing.write(IMAGE, image_format, ORIGIN, texts={"mii_serve": "a secret prompt"})
    mime = MIME_TYPES[image_format]
    manifest = json.loads(c2pa.Reader(mime, io.BytesIO(signed)).json())
    active = manifest["manifests"][manifest["active_manifest"]]
    assert manifest["validation_state"] == "Valid" and active["signature_info"]["common_name"] == "Studio"
    [action] = next(one["data"]["actions"] for one in active["assertions"] if one["label"].startswith("c2pa.actions"))
    assert (action["action"], action["digitalSourceType"]) == ("c2pa.created", DIGITAL_SOURCE_TYPE)
    assert action["parameters"] == {MODEL: ORIGIN.model, MODEL_REVISION: ORIGIN.model_revision}
    assert "prompt" not in json.dumps(manifest)
    trusted = report_on(signed, "file", files.ca.read_text())
    assert trusted.credentials is not None and trusted.credentials.state == "Trusted" and not trusted.is_invalid
    assert Image.open(io.BytesIO(signed)).tobytes() == Image.open(io.BytesIO(_plain(image_format))).tobytes()

    changed = _with_other_pixels(signed, image_format)
    refused = report_on(changed, "file")
    assert refused.is_invalid and refused.credentials is not None
    assert refused.credentials.failures == ("assertion.dataHash.mismatch",)


def _plain(image_format: ImageFormat) -> bytes:
    return Provenance().write(IMAGE, image_format, ORIGIN)


def _with_other_pixels(signed: bytes, image_format: ImageFormat) -> bytes:
    """The same file, its manifest as it is, with another pixel or more."""
    if image_format is not ImageFormat.PNG:
        start = signed.rindex({ImageFormat.JPEG: b"\xff\xda", ImageFormat.WEBP: b"VP8 "}[image_format])
        changed = bytearray(signed)
        changed[start + 60] ^= 1
        return bytes(changed)
    start = signed.rindex(b"IDAT")  # its checksum must be right, or no program would open the file
    end = start + 4 + int.from_bytes(signed[start - 4 : start], "big")
    pixels = bytearray(zlib.decompress(signed[start + 4 : end]))
    pixels[100] ^= 1
    chunk = b"IDAT" + zlib.compress(bytes(pixels))
    framed = (len(chunk) - 4).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
    return signed[: start - 4] + framed + signed[end + 4 :]


def test_what_cannot_sign_is_refused_at_the_start(files: SigningFiles, tmp_path: Path) -> None:
    other = write_signing_files(tmp_path / "other")
    old = write_signing_files(tmp_path / "old", days=-1)
    no_pem = tmp_path / "no.pem"
    no_pem.write_text("no certificate")
    for certificate, key, setting, rule in (
        (files.certificate, None, "provenance.key", "needs it too"),
        (None, files.key, "provenance.certificate", "needs it too"),
        (files.certificate, other.key, "provenance.key", "is not the key of the first certificate"),
        (no_pem, files.key, "provenance.certificate", "holds no certificates in PEM"),
        (files.certificate, no_pem, "provenance.key", "holds no private key in PEM"),
        (files.certificate, no_pem.parent / "none", "provenance.key", "cannot read"),
        (old.certificate, old.key, "provenance.certificate", "was not valid at time of signing"),
    ):
        with pytest.raises(ConfigError, match=rule) as refused:
            Provenance(certificate=certificate, key=key)
        assert refused.value.setting == setting


def test_new_files_are_used_when_asked_and_bad_ones_change_nothing(tmp_path: Path) -> None:
    def signer(provenance: Provenance) -> str | None:
        found = report_on(provenance.write(IMAGE, ImageFormat.JPEG, ORIGIN), "file").credentials
        return None if found is None else found.signer

    provenance = Provenance(**write_signing_files(tmp_path, "First").settings)
    files = write_signing_files(tmp_path, "Second")
    assert (signer(provenance) or "").startswith("First")
    provenance.reload()
    assert (signer(provenance) or "").startswith("Second")
    files.key.write_text("broken")
    provenance.reload()
    assert (signer(provenance) or "").startswith("Second")


def test_no_picture_leaves_unsigned(signing: Provenance, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def __init__(self, *_: object) -> None:
            raise c2pa.C2paError("no")

    monkeypatch.setattr(c2pa, "Builder", Broken)
    with pytest.raises(ProvenanceError, match="could not be signed"):
        signing.write(IMAGE, ImageFormat.PNG, ORIGIN)


def test_a_packet_of_others_is_read_too_and_what_is_none_is_not() -> None:
    attributes = packet("m", "r").decode().replace("Iptc4xmpExt:DigitalSourceType>", "x:Other>")
    attributes = attributes.replace('rdf:about=""', f'rdf:about="" Iptc4xmpExt:DigitalSourceType="{DIGITAL_SOURCE_TYPE}"')
    found = read_packet(attributes.encode())
    assert found is not None and found.digital_source_type == DIGITAL_SOURCE_TYPE and found.model == "m"
    for content in (b"", b"<x", b"<!DOCTYPE a [<!ENTITY b 'c'>]><a>&b;</a>", b"\xff\xfe"):
        assert read_packet(content) is None


def test_inspect_tells_what_each_file_carries(run: Run, tmp_path: Path, signing: Provenance, files: SigningFiles) -> None:
    names = ("signed.webp", "plain.jpg", "none.png", "changed.png", "text.png")
    signed, plain, none, changed, text = (tmp_path / name for name in names)
    signed.write_bytes(signing.write(IMAGE, ImageFormat.WEBP, ORIGIN))
    plain.write_bytes(Provenance().write(IMAGE, ImageFormat.JPEG, ORIGIN))
    none.write_bytes(Provenance(has_metadata=False).write(IMAGE, ImageFormat.PNG, ORIGIN))
    changed.write_bytes(_with_other_pixels(signing.write(IMAGE, ImageFormat.PNG, ORIGIN), ImageFormat.PNG))
    text.write_text("no image")

    ran = run("inspect", str(signed), str(plain))
    assert ran.code == 0, ran.err
    assert "signed by Studio" in ran.out and "trainedAlgorithmicMedia" in ran.out and "133a221b" in ran.out
    told = json.loads(run("inspect", "--json", "--trust", str(files.ca), str(signed)).out)
    assert told[0]["credentials"]["state"] == "Trusted" and told[0]["is_marked"] and not told[0]["is_invalid"]
    stranger = write_signing_files(tmp_path / "stranger").ca
    codes = {
        (str(none),): 1,
        (str(changed),): 1,
        (str(signed), str(changed)): 1,
        (str(text),): 2,
        (str(tmp_path / "missing.png"),): 2,
        ("--trust", str(stranger), str(signed)): 1,
    }
    assert {given: run("inspect", *given).code for given in codes} == codes


def test_inspect_without_the_library_says_that_it_did_not_check(
    run: Run,
    tmp_path: Path,
    signing: Provenance,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mii_serve.extras.is_installed", lambda module: module != "c2pa")
    for signer, code in ((signing, 6), (Provenance(), 0)):
        file = tmp_path / "file.png"
        file.write_bytes(signer.write(IMAGE, ImageFormat.PNG, ORIGIN))
        assert run("inspect", str(file)).code == code
