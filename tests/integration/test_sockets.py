"""Where a replica's socket may lie."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from mii_serve.errors import ConfigError
from mii_serve.server import sockets
from mii_serve.server.sockets import new_socket_folder

NAME = "replica-0.sock"


@pytest.fixture
def tmp_path(tmp_path_factory) -> Path:
    """With a short name, which pytest's own is not."""
    return tmp_path_factory.mktemp("s")


@pytest.fixture(autouse=True)
def no_other_variables(monkeypatch):
    for name in ("TMPDIR", "TEMP", "TMP", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(name, raising=False)


def test_it_lies_below_the_operators_choice_and_is_private(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with new_socket_folder(NAME) as folder:
        assert Path(folder).parent == tmp_path
        assert Path(folder).stat().st_mode & 0o777 == 0o700
    assert not Path(folder).exists()


@pytest.mark.parametrize("length", range(40, 130, 6))
def test_a_socket_can_be_bound_there_however_long_the_operators_choice_is(tmp_path, monkeypatch, length):
    chosen = tmp_path / ("x" * length)
    chosen.mkdir()
    monkeypatch.setenv("TMPDIR", str(chosen))
    with new_socket_folder(NAME) as folder, socket.socket(socket.AF_UNIX) as bound:
        bound.bind(f"{folder}/{NAME}")


@pytest.mark.parametrize("choice", ["missing", "file", "file/below"])
def test_a_choice_that_is_no_folder_is_passed_over(tmp_path, monkeypatch, choice):
    (tmp_path / "file").touch()
    (tmp_path / "other").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / choice))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "other"))
    with new_socket_folder(NAME) as folder:
        assert Path(folder).parent == tmp_path / "other"


def test_no_place_at_all_is_an_error_that_names_the_setting_and_what_was_tried(tmp_path, monkeypatch):
    long = tmp_path / ("x" * 120)
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    monkeypatch.setattr(sockets, "OTHERS", (str(tmp_path / "missing"),))
    with pytest.raises(ConfigError, match=r"^TMPDIR: .*too long for a socket; .*missing: No such file") as caught:
        new_socket_folder(NAME)
    assert caught.value.setting == "TMPDIR"


def test_a_folder_that_was_cleaned_away_is_no_trouble_at_the_end(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    folder = new_socket_folder(NAME)
    Path(folder.name).rmdir()
    folder.cleanup()
