"""`mii_serve batch` with a server that answers at once: what it leaves, what it refuses, how it goes on."""

from __future__ import annotations

import contextlib
import itertools
import json
import tarfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import scripted_server
from batch_jobs import assert_whole, jsonl, lines_of, manifest_of, picture, pictures
from commands import Run
from scripted_server import RunningServer, running

from mii_serve.batch.journal import Journal
from mii_serve.batch.output import OutputFolder
from mii_serve.batch.seeds import seed_of_row
from mii_serve.batch.shards import Shards
from mii_serve.errors import (
    EngineError,
    InvalidRequestError,
    MiiServeError,
    ModerationFailedError,
    PoisonedRequestError,
    QueueFullError,
    UnauthenticatedError,
)
from mii_serve.types import Event, GenerationRequest, ImageFormat, Priority

OUT = Path("out")


def job(run: Run, server: RunningServer | None, *more: object, given: Path = Path("in.jsonl")):
    target = ("--target", server.target) if server is not None else ()
    return run("batch", str(given), "-o", str(OUT), *target, *map(str, more))


def refused(prompt: str, error: MiiServeError, times: int = 10**9):
    """Refuses this prompt so many times."""
    left = {"times": times}

    def script(request: GenerationRequest) -> Iterator[Event]:
        if request.params.prompt == prompt and left["times"]:
            left["times"] -= 1
            raise error
        yield from pictures(request)

    return script


# ---- what a job leaves -------------------------------------------------------------------------------------------


def test_every_row_gets_its_pictures_its_line_in_the_index_and_the_priority_batch(run: Run, server: RunningServer):
    rows = [
        {"prompt": "a", "id": "first", "seed": 7, "num_images_per_prompt": 2, "category": "x"},
        {"prompt": "b"},
        {"prompt": "c", "id": "../../etc/passwd", "negative_prompt": "d"},
    ]
    jsonl(Path("in.jsonl"), rows)
    ran = job(run, server, "--seed", "5")
    assert (ran.code, ran.out) == (0, "out: 4 pictures of 3 rows\n")
    index = assert_whole(OUT, 3)
    assert [line["file"] for line in index] == [
        "pictures/000/000000-0.png",
        "pictures/000/000000-1.png",
        "pictures/000/000001.png",
        "pictures/000/000002.png",
    ]
    assert [line["seed"] for line in index] == [7, 8, seed_of_row(5, "1"), seed_of_row(5, "../../etc/passwd")]
    assert (index[0]["id"], index[0]["extra"], index[0]["line"]) == ("first", {"category": "x"}, 1)
    assert index[3]["negative_prompt"] == "d"
    assert (index[0]["scheduler"], index[0]["model_revision"], index[0]["nsfw_content_detected"]) == ("ddim", "r1", False)
    assert not lines_of(OUT / "errors.jsonl")
    manifest = manifest_of(OUT)
    assert (manifest["state"], manifest["rows"], manifest["pictures"]) == ("complete", 3, 4)
    assert {request.priority for request in server.servicer.requests} == {Priority.BATCH}


def test_a_folder_of_files_of_several_kinds_is_one_input(run: Run, server: RunningServer):
    folder = Path("rows")
    folder.mkdir()
    jsonl(folder / "b.jsonl", [{"prompt": "b"}])
    (folder / "a.csv").write_text("prompt,seed\na,7\n")
    body = {"prompt": "c", "n": 1, "model": "x"}
    openai = {"custom_id": "c", "method": "POST", "url": "/v1/images/generations", "body": body}
    (folder / "c.jsonl").write_text(json.dumps(openai) + "\n")
    (folder / "notes.txt").write_text("not read")
    assert job(run, server, "--format", "webp", given=folder).code == 0
    index = lines_of(OUT / "index.jsonl")
    assert [(line["input"], line["prompt"], line["id"]) for line in index] == [
        ("a.csv", "a", None),
        ("b.jsonl", "b", None),
        ("c.jsonl", "c", "c"),
    ]
    assert (OUT / "pictures" / "000" / "000000.webp").read_bytes() == picture("a", 7, ImageFormat.WEBP.name)


def test_defaults_are_for_rows_that_say_nothing_else(run: Run, server: RunningServer):
    jsonl(Path("in.jsonl"), [{"prompt": "a"}, {"prompt": "b", "num_inference_steps": 3}])
    assert job(run, server, "--num-inference-steps", "9").code == 0
    assert sorted(one.params.num_inference_steps for one in server.servicer.requests) == [3, 9]


def test_parquet_is_read_where_its_extra_is_installed(run: Run, server: RunningServer):
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = {"prompt": ["a", "b"], "seed": [7, None], "note": ["x", None]}
    parquet.write_table(pytest.importorskip("pyarrow").table(columns), "in.parquet")
    assert job(run, server, given=Path("in.parquet")).code == 0
    assert [line["seed"] for line in assert_whole(OUT, 2)] == [7, seed_of_row(0, "1")]


def shard(number: int) -> dict[str, bytes]:
    with tarfile.open(OUT / "shards" / f"{number:05d}.tar") as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


@pytest.fixture
def small_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OutputFolder, "ROWS_PER_FOLDER", 100)


@pytest.mark.usefixtures("small_folders")
def test_pictures_are_packed_for_webdataset_and_taken_out_again_where_rows_are_left(run: Run, server: RunningServer):
    server.servicer.script = refused("a circle, number 1", PoisonedRequestError("crashed"))
    jsonl(Path("in.jsonl"), 110)
    assert job(run, server, "--shards", "webdataset").code == 3
    assert [len(shard(number)) for number in (0, 1)] == [3 * 99, 3 * 10]
    assert not list((OUT / "pictures").rglob("*.png"))
    before = shard(1)
    (OUT / "parts" / "00000.tar").write_bytes(b"torn")
    server.servicer.script = pictures
    assert job(run, server, "--shards", "webdataset", "--retry-failed").code == 0
    members = shard(0)
    assert list(members)[:6] == ["000000.png", "000000.json", "000000.txt", "000001.png", "000001.json", "000001.txt"]
    assert len(members) == 300 and shard(1) == before
    line = lines_of(OUT / "index.jsonl")[1]
    assert (line["file"], line["member"]) == ("shards/00000.tar", "000001.png")
    assert members["000001.png"] == picture(line["prompt"], line["seed"])
    assert json.loads(members["000001.json"])["sha256"] == line["sha256"]
    assert members["000001.txt"].decode() == line["prompt"] == "a circle, number 1"
    assert len(server.servicer.requests) == 111, "what was packed is not made again"


@pytest.mark.usefixtures("small_folders")
def test_a_failure_while_shards_are_packed_costs_no_picture(run: Run, server: RunningServer, monkeypatch: pytest.MonkeyPatch):
    jsonl(Path("in.jsonl"), 110)

    def fail(self: Shards, number: int) -> None:
        raise OSError("the disk is gone")

    with monkeypatch.context() as broken:
        broken.setattr(Shards, "_remove_pictures", fail)
        assert job(run, server, "--shards", "webdataset").code == 1
    assert job(run, server, "--shards", "webdataset").code == 0
    assert [len(shard(number)) for number in (0, 1)] == [300, 30]
    assert len(server.servicer.requests) == 110


def test_the_index_is_a_parquet_file_where_it_is_asked_for(run: Run, server: RunningServer):
    parquet = pytest.importorskip("pyarrow.parquet")
    jsonl(Path("in.jsonl"), [{"prompt": "a", "id": "x", "seed": 2**64 - 1, "note": [1]}, {"prompt": "b"}])
    assert job(run, server).code == 0
    lines = lines_of(OUT / "index.jsonl")
    assert job(run, server, "--index", "parquet").code == 0
    table = parquet.read_table(OUT / "index.parquet")
    assert not (OUT / "index.jsonl").exists()
    for line, found in zip(lines, table.to_pylist(), strict=True):
        for name in ("scheduler_options", "extra"):
            if name in line:
                assert json.loads(found.pop(name)) == line.pop(name)
        assert {name: value for name, value in found.items() if value is not None} == {
            name: value for name, value in line.items() if value is not None
        }


# ---- what is refused before anything is made ---------------------------------------------------------------------


def test_the_whole_input_is_checked_first_and_each_error_is_named(run: Run, server: RunningServer):
    rows = [{"prompt": "a"}, {"prompt": ""}, {"prompt": "b", "height": 65}, {"prompt": "c", "scheduler": "none such"}]
    jsonl(Path("in.jsonl"), rows)
    ran = job(run, server)
    assert ran.code == 2
    assert "error: in.jsonl:2:prompt: must not be empty\n" in ran.err
    assert "error: in.jsonl:3:height: must be a multiple of 8" in ran.err
    assert "error: in.jsonl:4:scheduler: must be one of" in ran.err
    assert "3 rows cannot be used; nothing was made" in ran.err
    assert not server.servicer.requests and not OUT.exists()


def test_with_max_errors_wrong_rows_count_as_failed(run: Run, server: RunningServer):
    jsonl(Path("in.jsonl"), [{"prompt": "a"}, {"prompt": ""}, {"prompt": "c"}])
    ran = job(run, server, "--max-errors", "1")
    assert ran.code == 3 and "1 of 3 rows failed" in ran.err
    assert [line["row"] for line in lines_of(OUT / "index.jsonl")] == [0, 2]
    [error] = lines_of(OUT / "errors.jsonl")
    assert (error["row"], error["line"], error["error"]) == (1, 2, "InvalidRequestError")
    assert job(run, server, "--max-errors", "1", "--retry-failed").code == 3, "it stays wrong"


def test_two_rows_with_one_id_are_refused_and_both_named(run: Run, server: RunningServer):
    jsonl(Path("in.jsonl"), [{"prompt": "a", "id": "x"}, {"prompt": "b"}, {"prompt": "c", "id": "x"}])
    ran = job(run, server)
    assert ran.code == 2 and "in.jsonl:3: id: 'x' is the id of in.jsonl:1 already" in ran.err
    assert not server.servicer.requests


def test_only_check_needs_no_server_and_leaves_nothing(run: Run):
    jsonl(Path("in.jsonl"), [{"prompt": "a"}, {"prompt": "b", "num_inference_steps": 0}])
    ran = run("batch", "in.jsonl", "--only-check", "--json")
    assert ran.code == 2
    assert json.loads(ran.out)["problems"] == 1 and "in.jsonl:2:num_inference_steps: must be in [1, 1000]" in ran.err
    jsonl(Path("in.jsonl"), 3)
    assert (run("batch", "in.jsonl", "--only-check").code, sorted(Path().iterdir())) == (0, [Path("in.jsonl")])


@pytest.mark.parametrize("made", ["file", "link", "occupied", "inside", "around"])
def test_an_output_folder_that_is_something_else_is_refused(run: Run, server: RunningServer, made: str):
    given = jsonl(Path("in.jsonl"), 1)
    match made:
        case "file":
            OUT.write_text("x")
        case "link":
            Path("elsewhere").mkdir()
            OUT.symlink_to("elsewhere")
        case "occupied":
            OUT.mkdir()
            (OUT / "mine.txt").write_text("x")
        case "inside":
            given = Path()
        case "around":
            OUT.mkdir()
            given = jsonl(OUT / "in.jsonl", 1)
    ran = job(run, server, given=given)
    assert ran.code == 2 and ran.err.startswith("error: -o: ")
    assert not server.servicer.requests


# ---- rows that fail, and a server that does ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [PoisonedRequestError("2 replicas crashed"), InvalidRequestError("prompt", "refused by content safety"), EngineError("no")],
    ids=lambda error: type(error).__name__,
)
def test_a_row_that_fails_by_itself_takes_no_other_with_it(run: Run, server: RunningServer, error: MiiServeError):
    server.servicer.script = refused("a circle, number 1", error)
    jsonl(Path("in.jsonl"), 5)
    assert job(run, server).code == 3
    [failed] = lines_of(OUT / "errors.jsonl")
    assert (failed["row"], failed["error"]) == (1, type(error).__name__)
    assert [line["row"] for line in lines_of(OUT / "index.jsonl")] == [0, 2, 3, 4]
    server.servicer.script = pictures
    assert job(run, server).code == 3, "the same command does not try it again"
    assert job(run, server, "--retry-failed").code == 0
    assert_whole(OUT, 5)


def test_more_failed_rows_than_allowed_stop_the_job(run: Run, server: RunningServer):
    server.servicer.script = scripted_server.refusal(PoisonedRequestError("crashed"))
    jsonl(Path("in.jsonl"), 50)
    ran = job(run, server, "--max-errors", "3", "--max-in-flight", "2")
    assert ran.code == 4 and "rows have failed, at most 3 may" in ran.err
    assert manifest_of(OUT)["open"] >= 40


@pytest.mark.parametrize(
    "error",
    [QueueFullError("full", 0.01), ModerationFailedError("content safety gave no verdict")],
    ids=lambda error: type(error).__name__,
)
def test_what_is_the_servers_leaves_rows_open_and_is_tried_again(run: Run, server: RunningServer, error: MiiServeError):
    server.servicer.script = refused("a circle, number 1", error, times=2)
    jsonl(Path("in.jsonl"), 3)
    assert job(run, server).code == 0
    assert_whole(OUT, 3)


def test_content_safety_that_stays_away_stops_the_job_and_no_row_has_failed(run: Run, server: RunningServer):
    server.servicer.script = scripted_server.refusal(ModerationFailedError("content safety gave no verdict"))
    jsonl(Path("in.jsonl"), 3)
    ran = job(run, server, "--max-stall", "0.5")
    assert ran.code == 4 and "content safety gave no verdict; 3 of 3 rows are left" in ran.err
    assert not list((OUT / "pictures").rglob("*.png")) if (OUT / "pictures").exists() else True
    manifest = manifest_of(OUT)
    assert (manifest["state"], manifest["failed"], manifest["open"]) == ("stopped", 0, 3)
    server.servicer.script = pictures
    assert job(run, server).code == 0
    assert_whole(OUT, 3)


def test_a_key_that_is_not_known_stops_the_job_at_once(run: Run, server: RunningServer):
    server.servicer.script = scripted_server.refusal(UnauthenticatedError("unknown API key"))
    jsonl(Path("in.jsonl"), 3)
    ran = job(run, server)
    assert ran.code == 4 and "unknown API key" in ran.err and manifest_of(OUT)["failed"] == 0


def test_a_target_that_goes_away_and_comes_back_is_waited_for(run: Run):
    jsonl(Path("in.jsonl"), 30)
    with contextlib.ExitStack() as first_life, contextlib.ExitStack() as second_life:
        server = first_life.enter_context(running())
        port, num_asked, is_gone = int(server.target.rpartition(":")[2]), 0, threading.Event()

        def leave() -> None:
            first_life.close()
            is_gone.set()

        def script(request: GenerationRequest) -> Iterator[Event]:
            nonlocal num_asked
            num_asked += 1
            if num_asked == 10:
                threading.Thread(target=leave).start()
            if num_asked >= 10:
                raise QueueFullError("leaving", 0.01)
            yield from pictures(request)

        def come_back() -> None:
            is_gone.wait()
            second_life.enter_context(running(port)).servicer.script = pictures

        server.servicer.script = script
        thread = threading.Thread(target=come_back)
        thread.start()
        assert job(run, server).code == 0
        thread.join()
    assert_whole(OUT, 30)


# ---- going on ----------------------------------------------------------------------------------------------------


def test_a_finished_job_makes_nothing_again_and_appended_rows_are_made(run: Run, server: RunningServer):
    given = jsonl(Path("in.jsonl"), 3)
    assert job(run, server).code == 0
    num_asked = len(server.servicer.requests)
    assert job(run, server).code == 0 and len(server.servicer.requests) == num_asked
    with given.open("a") as file:
        file.write('{"prompt": "new"}\n')
    assert job(run, server).code == 0 and len(server.servicer.requests) == num_asked + 1
    assert assert_whole(OUT, 4)[3]["prompt"] == "new"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda text: text.replace("number 1", "number x"), "in.jsonl has changed since this job began"),
        (lambda text: text[:-30], "in.jsonl has changed since this job began"),
        (lambda text: text + "{}", "1 row cannot be used"),
    ],
    ids=["changed", "shorter", "wrong row appended"],
)
def test_an_input_that_is_another_one_is_refused(run: Run, server: RunningServer, change, complaint: str):
    given = jsonl(Path("in.jsonl"), 3)
    assert job(run, server).code == 0
    given.write_text(change(given.read_text()))
    ran = job(run, server)
    assert ran.code == 2 and complaint in ran.err
    assert_whole(OUT, 3)


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        (("--num-inference-steps", "9"), "num_inference_steps: this job was begun with None, and it is 9 now"),
        (("--seed", "1"), "seed: this job was begun with 0, and it is 1 now"),
        (("--format", "jpeg"), "format: this job was begun with 'png', and it is 'jpeg' now"),
    ],
)
def test_other_options_are_refused_and_named(run: Run, server: RunningServer, changed, complaint: str):
    jsonl(Path("in.jsonl"), 1)
    assert job(run, server).code == 0
    ran = job(run, server, *changed)
    assert ran.code == 2 and complaint in ran.err


def test_restart_begins_anew_and_leaves_nothing_of_the_job_before(run: Run, server: RunningServer):
    given = jsonl(Path("in.jsonl"), 3)
    assert job(run, server).code == 0
    jsonl(given, [{"prompt": "a"}, {"prompt": "b", "height": 65}])
    ran = job(run, server, "--restart", "--seed", 1)
    assert ran.code == 2 and "in.jsonl:2:height" in ran.err and len(lines_of(OUT / "index.jsonl")) == 3, "nothing was removed"
    jsonl(given, [{"prompt": "a"}])
    assert job(run, server, "--restart", "--seed", 1).code == 0
    assert [(line["prompt"], line["seed"]) for line in assert_whole(OUT, 1)] == [("a", seed_of_row(1, "0"))]
    assert job(run, server, "--restart", "--seed", 1, given=Path("in.jsonl")).code == 0 and len(server.servicer.requests) == 5


def test_a_restart_that_is_killed_is_finished_by_the_next_run(run: Run, server: RunningServer):
    jsonl(Path("in.jsonl"), 3)
    assert job(run, server).code == 0
    journal = Journal(OUT / "journal.db")
    journal.clear()
    journal.close()
    jsonl(Path("in.jsonl"), 1)
    assert job(run, server).code == 0
    assert_whole(OUT, 1)


@pytest.mark.parametrize("jump_s", [-1e6, 1e6])
def test_a_wall_clock_that_jumps_disturbs_nothing(
    run: Run, server: RunningServer, monkeypatch: pytest.MonkeyPatch, jump_s: float
):
    wall_clock, calls = time.time, itertools.count()
    monkeypatch.setattr(time, "time", lambda: wall_clock() + jump_s * next(calls))
    server.servicer.script = refused("a circle, number 1", QueueFullError("full", 0.01), times=3)
    jsonl(Path("in.jsonl"), 3)
    assert job(run, server, "--max-stall", "60").code == 0
    assert_whole(OUT, 3)


@pytest.mark.parametrize("change", [{"model_revision": "r2"}, {"engine": "native"}, {"dtype": "fp16"}], ids=str)
def test_another_model_engine_or_precision_is_refused_naming_old_and_new(
    run: Run, server: RunningServer, change: dict[str, str], monkeypatch: pytest.MonkeyPatch
):
    jsonl(Path("in.jsonl"), 1)
    assert job(run, server).code == 0
    monkeypatch.setattr(scripted_server, "INFO", replace(scripted_server.INFO, **change))
    ran = job(run, server)
    [(name, new)] = change.items()
    old = getattr(scripted_server.INFO, name) if name not in change else {"model_revision": "r1"}.get(name)
    assert ran.code == 2 and f"{name}: this job was begun with" in ran.err and repr(new) in ran.err
    assert old is None or repr(old) in ran.err


def test_another_model_behind_the_same_target_is_noticed_at_its_first_answer(
    run: Run, server: RunningServer, monkeypatch: pytest.MonkeyPatch
):
    jsonl(Path("in.jsonl"), 3)
    monkeypatch.setattr(scripted_server, "INFO", replace(scripted_server.INFO, model_revision="r0"))
    ran = job(run, server)
    assert ran.code == 4 and "model_revision: this job was begun with 'r0', and it is 'r1' now" in ran.err
    assert manifest_of(OUT)["pictures"] == 0


def test_a_picture_without_its_row_in_the_journal_is_made_again_under_its_name(run: Run, server: RunningServer):
    """As after a kill between the two; a torn file is removed."""
    jsonl(Path("in.jsonl"), 3)
    assert job(run, server).code == 0
    journal = Journal(OUT / "journal.db")
    journal.reopen([1])
    journal.close()
    (OUT / "pictures" / "000" / "000001.png").write_bytes(b"torn")
    (OUT / "parts" / "000001.png").write_bytes(b"half")
    num_asked = len(server.servicer.requests)
    assert job(run, server).code == 0
    assert len(server.servicer.requests) == num_asked + 1
    assert_whole(OUT, 3)


def test_after_a_loss_of_power_the_pictures_since_the_last_safe_moment_are_looked_at(run: Run, server: RunningServer):
    jsonl(Path("in.jsonl"), 4)
    assert job(run, server).code == 0
    num_asked = len(server.servicer.requests)
    (OUT / "pictures" / "000" / "000001.png").write_bytes(b"")
    (OUT / "pictures" / "000" / "000002.png").unlink()
    journal = Journal(OUT / "journal.db")
    journal.mark_safe(0)
    journal.close()
    assert job(run, server).code == 0
    assert len(server.servicer.requests) == num_asked + 2
    assert_whole(OUT, 4)


def test_a_second_process_on_one_folder_is_refused(run: Run, server: RunningServer):
    jsonl(Path("in.jsonl"), 2)
    assert job(run, server).code == 0
    journal = Journal(OUT / "journal.db")
    try:
        ran = job(run, server)
    finally:
        journal.close()
    assert ran.code == 2 and "another process works on out" in ran.err
