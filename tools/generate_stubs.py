#!/usr/bin/env python3
"""Generate the committed gRPC stubs and their type stubs from the .proto files; `--out DIR` writes elsewhere."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parents[1]
PROTO = "mii_serve/proto/v1/image_generation.proto"
REPLICA_PROTO = "mii_serve/proto/replica/replica.proto"
"""Between a front and its replicas."""
MII_PROTO = "mii_serve/proto/mii/pictures.proto"
"""Messages only: what mii calls its service is said where the calls are answered."""
OIP_PROTO = "mii_serve/proto/oip/inference.proto"
"""The same, of the Open Inference Protocol."""


def generate(out: Path) -> None:
    """Write the stubs below `out`, in the folders of their package.

    Raises:
        SystemExit: protoc failed; it has said why.
    """
    messages = ("python", "pyi")
    service = (*messages, "grpc_python", "mypy_grpc")
    for proto, kinds in ((PROTO, service), (REPLICA_PROTO, service), (MII_PROTO, messages), (OIP_PROTO, messages)):
        outputs = [f"--{kind}_out={out}" for kind in kinds]
        if code := protoc.main(["protoc", f"-I{ROOT}", *outputs, str(ROOT / proto)]):
            sys.exit(code)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT)
    generate(parser.parse_args().out)


if __name__ == "__main__":
    main()
