"""`mii_serve batch` as a process: killed, interrupted, out of disk, and always taken up again."""

from __future__ import annotations

import random
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from batch_jobs import assert_whole, command, jsonl, manifest_of, pictures, ran
from patience import PATIENCE_S
from scripted_server import RunningServer

from mii_serve.types import Event, GenerationRequest


class Gate:
    """Answers so many requests; the others wait until it is opened."""

    def __init__(self, num_answers: int) -> None:
        self._passes = threading.Semaphore(num_answers)
        self.is_shut = threading.Event()

    def __call__(self, request: GenerationRequest) -> Iterator[Event]:
        if not self._passes.acquire(blocking=False):
            self.is_shut.set()
            self._passes.acquire(timeout=PATIENCE_S)
        yield from pictures(request)

    def open(self) -> None:
        self._passes.release(10_000)


def started(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_job_that_is_killed_again_and_again_makes_every_picture_and_none_twice(tmp_path: Path, server: RunningServer):
    num_rows, num_killed, kills, moments = 300, 0, 4, random.Random(0)
    given, out = jsonl(tmp_path / "in.jsonl", num_rows), tmp_path / "out"
    while True:
        answered, enough = 0, threading.Event()
        kill_after = moments.randrange(20, 60)

        def script(request: GenerationRequest, enough=enough, kill_after=kill_after) -> Iterator[Event]:
            nonlocal answered
            answered += 1
            if answered == kill_after:
                enough.set()
            yield from pictures(request)

        server.servicer.script = script
        with started(given, "-o", out, "--target", server.target) as job:
            if num_killed < kills:
                assert enough.wait(PATIENCE_S)
                job.kill()
                num_killed += 1
                continue
            assert job.wait(PATIENCE_S) == 0, job.communicate()
            break
    assert_whole(out, num_rows)
    assert len(server.servicer.requests) <= num_rows + kills * 3 * 16, "about as many again as were in flight"


def test_ctrl_c_takes_no_more_rows_lets_those_in_flight_end_and_says_how_to_go_on(tmp_path: Path, server: RunningServer):
    gate = server.servicer.script = Gate(5)
    given, out = jsonl(tmp_path / "in.jsonl", 40), tmp_path / "out"
    with started(given, "-o", out, "--target", server.target, "--max-in-flight", 4) as job:
        assert gate.is_shut.wait(PATIENCE_S)
        job.send_signal(signal.SIGINT)
        threading.Timer(0.5, gate.open).start()
        _, said = job.communicate(timeout=PATIENCE_S)
    assert job.returncode == 130
    assert "rows are left; run the same command again to go on" in said
    manifest = manifest_of(out)
    assert manifest["state"] == "interrupted" and 5 <= manifest["done"] <= 15
    num_asked = len(server.servicer.requests)
    again = ran(given, "-o", out, "--target", server.target)
    assert again.returncode == 0, again.stderr
    assert len(server.servicer.requests) == num_asked + 40 - manifest["done"], "nothing is made twice"
    assert_whole(out, 40)


def test_a_second_ctrl_c_does_not_wait_and_sigterm_is_a_stop(tmp_path: Path, server: RunningServer):
    given, out = jsonl(tmp_path / "in.jsonl", 10), tmp_path / "out"
    for signals, code in ((2 * [signal.SIGINT], 130), (2 * [signal.SIGTERM], 4)):
        gate = server.servicer.script = Gate(0)
        with started(given, "-o", out, "--target", server.target) as job:
            assert gate.is_shut.wait(PATIENCE_S)
            for number in signals:
                job.send_signal(number)
                try:
                    job.wait(0.5)
                except subprocess.TimeoutExpired:
                    continue
            assert job.wait(PATIENCE_S) == code
        gate.open()
    assert manifest_of(out)["open"] == 10


def test_two_processes_do_not_work_on_one_folder(tmp_path: Path, server: RunningServer):
    gate = server.servicer.script = Gate(0)
    given, out = jsonl(tmp_path / "in.jsonl", 10), tmp_path / "out"
    with started(given, "-o", out, "--target", server.target, "--max-in-flight", 2) as job:
        assert gate.is_shut.wait(PATIENCE_S)
        second = ran(given, "-o", out, "--target", server.target)
        assert second.returncode == 2 and f"another process works on {out}" in second.stderr
        gate.open()
        assert job.wait(PATIENCE_S) == 0
    assert_whole(out, 10)


FULL_DISK = """
mount -t tmpfs -o size=1m none "$OUT" && shift 0 || exit 99
"$@" ; echo "first $?"
mount -o remount,size=64m "$OUT"
"$@" ; echo "second $?"
cp -r "$OUT" "$COPY"
"""


def test_a_full_disk_stops_the_job_and_with_room_it_goes_on(tmp_path: Path, server: RunningServer):
    num_rows = 400  # a page of memory each at least, and the disk has 256
    given, out, copy = jsonl(tmp_path / "in.jsonl", num_rows), tmp_path / "out", tmp_path / "copy"
    out.mkdir()
    asked = command(given, "-o", out, "--target", server.target)
    script = f'OUT="{out}"; COPY="{copy}"; {FULL_DISK}'
    for isolated in (["unshare", "--mount"], ["unshare", "--user", "--map-root-user", "--mount"]):
        done = subprocess.run([*isolated, "sh", "-c", script, "sh", *asked], capture_output=True, text=True, check=False)
        if "first" in done.stdout:
            break
    else:
        pytest.skip("a small disk cannot be mounted on this machine")
    assert "first 4" in done.stdout and "second 0" in done.stdout, (done.stdout, done.stderr)
    assert f"the disk is full at {out}; " in done.stderr
    assert "rows are left; run the same command again to go on" in done.stderr
    assert_whole(copy, num_rows)


def test_rows_on_standard_input_are_kept_for_the_next_time(tmp_path: Path, server: RunningServer):
    out = tmp_path / "out"
    rows = '{"prompt": "a"}\n{"prompt": "b"}\n'
    for _ in range(2):
        asked = command("-", "-o", out, "--target", server.target)
        done = subprocess.run(asked, input=rows, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert (out / "input.jsonl").read_text() == rows
    assert len(server.servicer.requests) == 2
