"""Marks that say that a picture was generated: put on every picture that leaves as a file, and read again from any file.

- `xmp`: the IPTC digital source type, model and revision as XMP, which every format but raw pixels can hold;
- `credentials`: C2PA Content Credentials, signed with the operator's certificate (extra `provenance`);
- `watermark`: the DWT-DCT watermark of Stable Diffusion's own script, in the pixels;
- `marks`: which of them a deployment puts on its pictures, and the one place where pictures become files;
- `report`: what a file carries.

No prompt is in any of them.
"""

from mii_serve.provenance.marks import Origin, Provenance

__all__ = ["Origin", "Provenance"]
