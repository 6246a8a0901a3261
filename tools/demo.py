#!/usr/bin/env python3
"""`make demo`: deploy the built-in model, ask it for a picture from this process through the gRPC SDK, say where it is."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

from mii_serve.client import Client

PROMPT = "a red circle on a blue background"
OUTPUT = Path("out") / "demo.png"
STOP_TIMEOUT_S = 60.0


def main() -> int:
    command = [sys.executable, "-m", "mii_serve", "deploy", "demo", "--grpc-port", "0", "--http-port", "0"]
    print(f"$ mii_serve {' '.join(command[3:])}", flush=True)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            target = _target(server)
            print(f'>>> Client("{target}").generate("{PROMPT}", seed=7)', flush=True)
            with Client(target) as client:
                result = client.generate(PROMPT, seed=7, timeout=120)
            OUTPUT.parent.mkdir(exist_ok=True)
            result.images[0].save(OUTPUT)
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(STOP_TIMEOUT_S)
    done = result.parameters
    print(f"{done.scheduler}, {done.num_inference_steps} steps, {result.total_s:.2f} s on {done.device}")
    print(f"the picture is in {OUTPUT.resolve()}")
    return 0


def _target(server: subprocess.Popen[str]) -> str:
    """HOST:PORT from the ready line.

    Raises:
        SystemExit: the server ended without one; it has said why on stderr.
    """
    assert server.stdout is not None
    for line in server.stdout:
        print(line, end="", flush=True)
        if match := re.match(r"ready grpc=(\S+)", line):
            return match[1]
    sys.exit("the deployment did not start")


if __name__ == "__main__":
    sys.exit(main())
