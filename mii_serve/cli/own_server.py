"""A deployment that a command starts for itself: a child process that ends with it, however it ends."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence

from mii_serve.errors import MiiServeError, UnavailableError
from mii_serve.parent import end_with_parent

STOP_TIMEOUT_S = 60.0


@contextlib.contextmanager
def own_server(arguments: Sequence[str]) -> Iterator[str]:
    """Start `mii_serve deploy` with these arguments on free ports, and wait until it is ready. Yields its gRPC address.

    Raises:
        UnavailableError: it ended instead; its log is on stderr.
    """
    command = [sys.executable, "-m", __name__, "deploy", *arguments, "--grpc-port", "0", "--http-port", "0"]
    # A session of its own: Ctrl-C is for the command, which stops the server when it has no more use for it.
    with subprocess.Popen(
        [*command, "--log-level", "warning"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield _address(process)
        finally:
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()


def _address(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    for line in process.stdout:
        if (found := re.match(r"ready grpc=(\S+)", line)) is not None:
            return found[1]
    raise UnavailableError(f"the server ended with exit code {process.wait()} before it was ready")


def main() -> None:
    """Be the child."""
    end_with_parent()
    from mii_serve.cli import main as command_line

    command_line(sys.argv[1:])


if __name__ == "__main__":
    try:
        main()
    except MiiServeError as error:
        sys.exit(str(error))
