"""The command run in this process: what it prints, its exit code, and nothing of it left behind."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from mii_serve.cli import main
from mii_serve.safe_path import SAFE_PATH


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str


Run = Callable[..., Ran]


@pytest.fixture(autouse=True)
def process_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The command has a process of its own; here it leaves signals and environment as it found them."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setenv(SAFE_PATH, os.environ.get(SAFE_PATH, ""))
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MII_SERVE_DEBUG", raising=False)

    def run(*argv: str) -> Ran:
        with pytest.raises(SystemExit) as left:
            main(argv)
        said = capsys.readouterr()
        return Ran(code=int(left.value.code or 0), out=said.out, err=said.err)

    return run
