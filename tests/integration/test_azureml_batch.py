"""The worker of the Azure ML batch script and a whole server, with and without content safety: what is written, what is not."""

from __future__ import annotations

import asyncio
import contextlib
import io
import itertools
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from azureml_batch import NOTEBOOK_PROMPTS, SAFE_NOTEBOOK_PROMPTS, VIOLENT, prepared, script, write_csv
from content_safety_double import FAILURES, KEY, ContentSafetyDouble, content_safety_double
from fake_engine import FakeEngine
from PIL import Image
from servers import running_server

from mii_serve.batch.generate import by_client
from mii_serve.batch.settings import JobSettings
from mii_serve.client import AsyncClient
from mii_serve.config import ContentSafetyConfig
from mii_serve.errors import ConfigError
from mii_serve.safety.azure import open_moderator

worker = script("batch_worker")
SETTINGS = JobSettings(defaults={"num_inference_steps": 2, "height": 64, "width": 64}, seed=7)


class Job:
    """A folder for the output, one for pictures that wait, and the mini-batches between them."""

    def __init__(self, folder: Path, client: AsyncClient, stall_s: float) -> None:
        self.output, self.staging = folder / "output", folder / "staging"
        self.staging.mkdir()
        self._batches = worker.MiniBatches(by_client(client), self.staging, SETTINGS, stall_s=stall_s)

    async def run(self, *files: Path) -> list[dict]:
        return await self._batches.run(list(files), self.output)

    def files(self) -> dict[str, bytes]:
        """All that lies there, of finished and unfinished mini-batches."""
        folders = [self.output, self.staging]
        return {path.name: path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file()}

    def pictures(self) -> dict[str, bytes]:
        return {name: content for name, content in self.files().items() if name.endswith(".png")}


@contextlib.asynccontextmanager
async def job(folder: Path, double: ContentSafetyDouble | None = None, *, stall_s: float = 0.0) -> AsyncIterator[Job]:
    asked = ContentSafetyConfig()
    if double is not None:
        asked = ContentSafetyConfig(endpoint=double.url, key=KEY, timeout_s=4.0, threshold=1)
    async with (
        open_moderator(asked) as moderator,
        running_server(folder, FakeEngine(max_slots=4), max_waiting_samples=64, moderator=moderator) as server,
        AsyncClient(server.target, max_retries=0) as client,
    ):
        yield Job(folder, client, stall_s)


def lines_of(content: bytes) -> list[dict]:
    return [json.loads(line) for line in content.decode().splitlines()]


async def test_the_notebooks_files_become_rows_and_pictures_and_again_the_same(tmp_path):
    prompts = [*NOTEBOOK_PROMPTS, 'a comma, a "quote"\nand a line', "a skull"]
    files = prepared(tmp_path / "input", prompts)
    async with job(tmp_path) as azure:
        rows = await azure.run(*files)
        assert [(row["_azureml_filename"], row["row"], row["prompt"]) for row in rows] == [
            (f"{2 * (n // 2)}batch_input.csv", n % 2, prompt) for n, prompt in enumerate(prompts)
        ]
        assert [row["nsfw_content_detected"] for row in rows] == [False] * 4 + [True]
        before = azure.files()
        assert {row["generated_image"] for row in rows} == set(azure.pictures()) and len(azure.pictures()) == 5
        for content in azure.pictures().values():
            with Image.open(io.BytesIO(content)) as image:
                assert (image.format, image.mode, image.size) == ("PNG", "RGB", (64, 64))
        assert await azure.run(*files) == rows and azure.files() == before, "what is tried again overwrites"
    told = [line for file in files for line in lines_of(before[f"parameters_{file.name}.jsonl"])]
    assert [line["generated_image"] for line in told] == [row["generated_image"] for row in rows]
    assert len({line["seed"] for line in told}) == 5 and {line["num_inference_steps"] for line in told} == {2}


async def test_all_rows_of_a_mini_batch_are_in_flight_at_once(tmp_path):
    in_flight = most = 0

    async def generate(asked, image_format):
        nonlocal in_flight, most
        in_flight += 1
        most = max(most, in_flight)
        await asyncio.sleep(0)
        in_flight -= 1
        return await asked_for(asked, image_format)

    files = prepared(tmp_path / "input", [f"number {n}" for n in range(12)])
    async with job(tmp_path) as azure:
        asked_for, azure._batches._generate = azure._batches._generate, generate
        assert len(await azure.run(*files)) == 12
    assert most == 12


async def test_columns_are_parameters_and_several_pictures_of_a_row_are_several_lines(tmp_path):
    columns = {"seed": 5, "num_images_per_prompt": 2, "negative_prompt": "blurry", "note": "kept out"}
    file = write_csv(tmp_path / "a.csv", ["one"], **columns)
    async with job(tmp_path) as azure:
        rows = await azure.run(file)
        told = lines_of(azure.files()["parameters_a.csv.jsonl"])
    assert [row["row"] for row in rows] == [0, 0] and len({row["generated_image"] for row in rows}) == 2
    assert [(line["image"], line["seed"]) for line in told] == [(0, 5), (1, 6)]


async def test_one_bad_file_or_row_sinks_nobody(tmp_path, capsys):
    good = write_csv(tmp_path / "good.csv", ["a", "b"])
    half = tmp_path / "half.csv"
    half.write_text("prompt,seed\nfine,1\nwrong,x\nfine too,-1\n")
    bad = [tmp_path / name for name in ("a.avro", "missing.csv", "no_column.csv", "misspelt.csv")]
    bad[0].write_bytes(b"Obj")
    bad[2].write_text("text\nhello\n")
    bad[3].write_text("prompt,guidance_scal\na,3\n")
    async with job(tmp_path) as azure:
        rows = await azure.run(good, half, *bad)
        assert [(row["_azureml_filename"], row["row"]) for row in rows] == [("good.csv", 0), ("good.csv", 1), ("half.csv", 0)]
        errors = lines_of(azure.files()["errors_half.csv.jsonl"])
        assert [(error["row"], error["error"]) for error in errors] == [(1, "InvalidRequestError"), (2, "InvalidRequestError")]
        assert "File type '.avro' is not supported" in lines_of(azure.files()["errors_a.avro.jsonl"])[0]["message"]
        assert "half.csv, row 1: line 3: seed: must be a whole number" in capsys.readouterr().err
        before = azure.files()
        with pytest.raises(worker.MiniBatchError, match=r"no_column\.csv:\nline 1: there is no column prompt"):
            await azure.run(bad[1], bad[2])
        assert azure.files() == before, "where every file is bad, nothing is written"


async def test_what_content_safety_blocks_has_its_words_and_no_picture(tmp_path):
    file = write_csv(tmp_path / "input1.csv", SAFE_NOTEBOOK_PROMPTS)
    async with content_safety_double() as double, job(tmp_path, double) as azure:
        assert len(await azure.run(file)) == 4 and len(azure.pictures()) == 4
        num_drawn = len(double.images)
        double.words = {VIOLENT: ("Violence", 2)}
        rows = await azure.run(file)
        assert rows[2] == {
            "row": 2,
            "prompt": VIOLENT,
            "generated_image": "Blocked By Azure AI Content Safety",
            "nsfw_content_detected": None,
            "_azureml_filename": "input1.csv",
        }
        assert len(double.images) == num_drawn + 3, "a blocked prompt is not drawn"
        assert set(azure.pictures()) == {row["generated_image"] for row in rows} - {worker.BLOCKED}, "nor left from before"
        double.words, double.judge_image = {}, lambda image: {"Sexual": 2}
        rows = await azure.run(file)
        assert {row["generated_image"] for row in rows} == {worker.BLOCKED} and not azure.pictures()
        assert [row["nsfw_content_detected"] for row in rows] == [False] * 4, "these were made and looked at"
        assert {line["moderation_blocked"] for line in lines_of(azure.files()["parameters_input1.csv.jsonl"])} == {True}


@pytest.mark.slow
async def test_no_unchecked_picture_is_on_the_disk_in_any_mode_of_failing(tmp_path):
    async def fails(number: int, stage: str, mode: str) -> None:
        folder = tmp_path / str(number)  # short: a socket's path has a limit
        folder.mkdir()
        file = write_csv(folder / "input1.csv", SAFE_NOTEBOOK_PROMPTS)
        async with content_safety_double() as double, job(folder, double) as azure:
            seen = []

            def judge(image: Image.Image) -> dict[str, int]:
                seen.append(double.images[-1] in azure.files().values())
                return {}

            double.judge_image = judge
            setattr(double, f"{stage}_mode", mode)
            with pytest.raises(worker.MiniBatchError, match="content safety"):
                await azure.run(file)
            assert azure.files() == {}, f"{stage}, {mode}"
            assert bool(seen) is (stage == "image") and not any(seen)
            setattr(double, f"{stage}_mode", "ok")
            rows = await azure.run(file)
            assert not any(seen) and {row["generated_image"] for row in rows} == set(azure.pictures())
            assert set(azure.pictures().values()) <= set(double.images), "each as it was looked at"

    few = asyncio.Semaphore(4)  # all at once they would be too slow for each other's time limits

    async def one_of_few(number: int, stage: str, mode: str) -> None:
        async with few:
            await fails(number, stage, mode)

    async with asyncio.TaskGroup() as tasks:
        for number, (stage, mode) in enumerate(itertools.product(("text", "image"), FAILURES)):
            tasks.create_task(one_of_few(number, stage, mode))


async def test_a_row_waits_for_a_verdict_and_its_neighbours_are_made_once(tmp_path):
    file = write_csv(tmp_path / "input1.csv", SAFE_NOTEBOOK_PROMPTS)
    async with content_safety_double() as double, job(tmp_path, double, stall_s=60.0) as azure:
        double.image_mode = "no json"
        working = asyncio.create_task(azure.run(file))
        while len(double.images) < 4:  # noqa: ASYNC110 - the double has no event for it
            await asyncio.sleep(0.005)
        double.image_mode = "ok"
        assert len(await working) == 4 and len(azure.pictures()) == 4


async def test_a_disk_that_is_full_leaves_nothing_of_the_mini_batch(tmp_path, monkeypatch):
    file = write_csv(tmp_path / "a.csv", ["one", "two", "three"])
    copied = worker._copy
    num_left = 2

    def copy(staged: Path, target: Path) -> None:
        nonlocal num_left
        if (num_left := num_left - 1) < 0:
            raise OSError(28, "No space left on device")
        copied(staged, target)

    async with job(tmp_path) as azure:
        monkeypatch.setattr(worker, "_copy", copy)
        with pytest.raises(OSError, match="No space left"):
            await azure.run(file)
        assert azure.files() == {}


def test_pictures_of_a_worker_that_was_killed_are_gone(tmp_path, monkeypatch):
    monkeypatch.setattr(worker.tempfile, "gettempdir", lambda: str(tmp_path))
    with worker.staging_folder() as staging:
        (staging / "left").mkdir()
        (staging / "left" / "0.png").write_bytes(b"")
        monkeypatch.setattr(worker, "LOCK_TIMEOUT_S", 0.0)
        with pytest.raises(ConfigError, match="max_concurrency_per_instance"), worker.staging_folder():
            pass
        monkeypatch.setattr(worker.shutil, "rmtree", lambda *_, **__: None)  # as if it had been killed
    monkeypatch.undo()
    monkeypatch.setattr(worker.tempfile, "gettempdir", lambda: str(tmp_path))
    with worker.staging_folder() as staging:
        assert list(staging.iterdir()) == []


WORKER_DOUBLE = """
import json, os, sys
said = "{folder}/said"
if not os.path.exists("{folder}/can start"):
    print(json.dumps({{"error": "ConfigError: no such model"}}), flush=True)
    sys.exit(1)
print(json.dumps({{"ready": True}}), flush=True)
for line in sys.stdin:
    if not os.path.exists(said):
        open(said, "w").close()
        os._exit(9)
    print(json.dumps({{"rows": [], "asked": json.loads(line)}}), flush=True)
open("{folder}/left", "w").close()
"""


def test_a_worker_that_ends_is_started_again_and_one_that_cannot_start_says_why(tmp_path, monkeypatch):
    score = script("batch_score")
    (tmp_path / "worker.py").write_text(WORKER_DOUBLE.format(folder=tmp_path))
    monkeypatch.setattr(score, "WORKER", tmp_path / "worker.py")
    with pytest.raises(RuntimeError, match="did not start: ConfigError: no such model"):
        score.init()
    (tmp_path / "can start").touch()
    score.init()
    with pytest.raises(RuntimeError, match=r"has ended, exit code .*; the next mini-batch starts another"):
        score._ask({"files": []})
    assert score._ask({"files": ["ü"]}) == {"rows": [], "asked": {"files": ["ü"]}}
    score.shutdown()
    assert (tmp_path / "left").exists(), "it was let end by itself"


def test_content_safety_is_stricter_in_batch_jobs(monkeypatch):
    for name, value, threshold in (
        ("CONTENT_SAFETY_ENDPOINT", "https://x", "1"),
        ("MII_SERVE_CONTENT_SAFETY__KEY", "k", "1"),
        ("MII_SERVE_CONTENT_SAFETY__THRESHOLD", "4", None),
        ("CONTENT_SAFETY_SERVICE_HOST", "10.0.0.1", None),
        ("CONTENT_SAFETY_THRESHOLD", "2", "2"),
    ):
        with monkeypatch.context() as patched:
            patched.setenv("CONTENT_SAFETY_THRESHOLD", "")
            patched.delenv("CONTENT_SAFETY_THRESHOLD")  # whatever is set is gone afterwards
            patched.setenv(name, value)
            assert worker.prepare_environment() == []
            assert worker.os.environ.get("CONTENT_SAFETY_THRESHOLD") == threshold, name


def test_parameters_for_all_rows_are_checked_before_any_work():
    capabilities = FakeEngine().capabilities
    given = {"MII_SERVE_BATCH_PARAMETERS": '{"num_inference_steps": 3, "seed": 9}'}
    assert worker.settings_of(given, capabilities) == JobSettings(defaults={"num_inference_steps": 3}, seed=9)
    assert worker.settings_of({}, capabilities) == JobSettings()
    for text in ("[1]", "{", '{"steps": 3}', '{"num_inference_steps": 0}', '{"seed": "x"}'):
        with pytest.raises(ConfigError, match="MII_SERVE_BATCH_PARAMETERS"):
            worker.settings_of({"MII_SERVE_BATCH_PARAMETERS": text}, capabilities)


def test_the_model_is_found_in_the_folder_that_a_job_mounts(tmp_path):
    inner = tmp_path / "mount" / "model" / "mlflow_model_folder"
    inner.mkdir(parents=True)
    assert worker.model_folder(tmp_path) == tmp_path / "mount" / "model"
    (tmp_path / "mount" / "model_index.json").touch()
    assert worker.model_folder(tmp_path) == tmp_path / "mount"
