"""Who is running under a name: never a process that has only inherited a number, never a folder that others can write to."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from patience import PATIENCE_S

from mii_serve.compat.registry import Entry, Process
from mii_serve.errors import ConfigError, UnavailableError

DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(3600)"


@pytest.fixture
def child():
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"]) as process:
        yield process
        process.kill()


def noted(pid: int, drain_timeout_s: float = 10.0) -> Process:
    return Process.of(pid, is_tls=False, drain_timeout_s=drain_timeout_s)


def test_a_process_is_alive_until_it_is_stopped(child):
    process = noted(child.pid)
    assert process.is_alive()
    assert process.stop()
    assert not process.is_alive(), "although nobody has collected it yet"
    assert not process.stop()
    assert child.wait() == -15


def test_a_deaf_process_is_killed(monkeypatch):
    monkeypatch.setattr("mii_serve.compat.registry._KILL_TIMEOUT_S", 0.2)
    with subprocess.Popen([sys.executable, "-c", DEAF], stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        assert noted(child.pid, 0.1).stop()
        assert child.wait(PATIENCE_S) == -9


def test_another_process_with_the_same_number_is_left_alone(child):
    process = Process(pid=child.pid, birth="another boot 1", is_tls=False, drain_timeout_s=1.0)
    assert not process.is_alive()
    assert not process.stop()
    assert child.poll() is None


def test_a_name_is_one_entry_whatever_it_looks_like(tmp_path):
    run = tmp_path / "run"
    names = ("sd", "SD", "../up", "a/b", "..", ".", "a b", "ü", "x" * 64, "ü" * 20)
    folders = [Entry(name, run).folder for name in names]
    assert len(set(folders)) == len(names)
    assert {folder.resolve().parent for folder in folders} == {run.resolve()}
    assert not list(run.iterdir()), "looking at a name leaves nothing"


def test_what_is_written_is_read(tmp_path, child):
    entry = Entry("sd", tmp_path / "run")
    with entry.starting():
        pass
    for text in ("no deployment 'sd'", "is still starting"):
        with pytest.raises(UnavailableError, match=text):
            entry.running()
        process = noted(child.pid)
        entry.note(process)
    entry.stdout.write_text("ready grpc=127.0.0.1:1 ht")
    with pytest.raises(UnavailableError, match="is still starting"):
        entry.running()
    entry.stdout.write_text("ready grpc=127.0.0.1:1 http=off\n")
    assert Entry("sd", tmp_path / "run").running() == (process, "127.0.0.1:1")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 1}', "null"])
def test_a_damaged_entry_is_no_process(tmp_path, text):
    entry = Entry("sd", tmp_path / "run")
    with entry.starting():
        (entry.folder / "process.json").write_text(text)
    assert entry.process() is None


def test_a_name_can_be_started_once(tmp_path, child):
    run = tmp_path / "run"
    with Entry("sd", run).starting():
        with pytest.raises(ConfigError, match="is being started"), Entry("sd", run).starting():
            pass
        with Entry("other", run).starting():
            pass
        Entry("sd", run).note(noted(child.pid))
    with pytest.raises(ConfigError, match="runs already"), Entry("sd", run).starting():
        pass
    child.kill()
    child.wait()
    with Entry("sd", run).starting():
        assert Entry("sd", run).process() is None


def test_a_folder_others_can_enter_is_refused(tmp_path):
    for mode in (0o755, 0o770, 0o701):
        run = tmp_path / oct(mode)
        run.mkdir()
        run.chmod(mode)
        with pytest.raises(ConfigError, match="MII_SERVE_RUNTIME_DIR"):
            Entry("sd", run)
    (tmp_path / "safe").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "safe")
    with pytest.raises(ConfigError, match="no other user can enter"):
        Entry("sd", tmp_path / "link")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot use"):
        Entry("sd", tmp_path / "file")


def test_the_folder_is_the_one_named_else_the_sessions_else_a_temporary_one(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "session"))
    assert Entry("sd").folder.parent == tmp_path / "session" / "mii_serve"
    monkeypatch.setenv("MII_SERVE_RUNTIME_DIR", str(tmp_path / "named"))
    assert Entry("sd").folder.parent == tmp_path / "named"
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    monkeypatch.delenv("MII_SERVE_RUNTIME_DIR")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert Entry("sd").folder.parent == tmp_path / f"mii_serve-{os.getuid()}"
    assert Entry("sd").folder.parent.stat().st_mode & 0o777 == 0o700
