"""`mii_serve evaluate` with a server that answers at once: its rows, its figures, what it refuses, how it goes on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from batch_jobs import jsonl, lines_of, picture, pictures
from commands import Run
from scripted_server import RunningServer

from mii_serve.errors import PoisonedRequestError, UnauthenticatedError
from mii_serve.evaluate import measure, networks
from mii_serve.models.source import DEMO_FOLDER
from mii_serve.types import ImageReady

OUT = Path("out")
GRADER = """
def grade(line, picture):
    return {"right": line["answer"] == "yes", "scale": line["guidance_scale"], "wide": picture.width > picture.height}
"""


def evaluate(run: Run, server: RunningServer, *more: object, guidance: str = "1.5,3"):
    return run("evaluate", "in.jsonl", "-o", str(OUT), "--target", server.target, "--guidance", guidance, *map(str, more))


def prompts(count: int) -> Path:
    return jsonl(Path("in.jsonl"), [{"prompt": f"prompt {n}", "answer": "yes" if n % 2 else "no"} for n in range(count)])


def report() -> dict[str, Any]:
    return json.loads((OUT / "report.json").read_text())


@pytest.fixture
def reference() -> Path:
    folder = Path("true")
    folder.mkdir()
    for number in range(6):
        (folder / f"{number}.png").write_bytes(picture(f"true {number}", number))
    return folder


@pytest.fixture
def grader() -> str:
    Path("mine.py").write_text(GRADER)
    return "mine.py:grade"


@pytest.mark.slow
def test_each_prompt_is_made_at_each_scale_with_one_seed_and_measured(
    run: Run, server: RunningServer, reference: Path, grader: str
):
    prompts(6)
    ran = evaluate(run, server, "--reference", reference, "--checker", "demo", "--grader", grader, "--num-inference-steps", 7)
    assert (ran.code, ran.out.splitlines()[-1]) == (0, "out/report.md"), ran.err
    asked = [request.params for request in server.servicer.requests]
    assert sorted((one.prompt, one.guidance_scale) for one in asked) == [
        (f"prompt {n}", scale) for n in range(6) for scale in (1.5, 3.0)
    ]
    assert all(len({one.seed for one in asked if one.prompt == f"prompt {n}"}) == 1 for n in range(6))
    assert {one.num_inference_steps for one in asked} == {7}
    found = report()
    assert [metric["name"] for metric in found["metrics"]] == ["flagged", "right", "scale", "wide", "fd_safety_clip"]
    assert "not FID" in found["metrics"][-1]["text"] and found["metrics"][-1]["floor_pictures"] == 3
    assert [row["guidance_scale"] for row in found["rows"]] == [1.5, 3.0]
    first, second = (row["estimates"] for row in found["rows"])
    assert first["right"] == second["right"] and first["right"]["value"] == 0.5
    assert (first["scale"]["value"], second["scale"]["value"], first["wide"]["value"]) == (7.3, 7.3, 1.0)
    assert first["fd_safety_clip"] == second["fd_safety_clip"], "the script's pictures do not depend on the scale"
    assert first["fd_safety_clip"]["num_pictures"] == 6 and first["fd_safety_clip"]["value"] > 0
    assert (found["model"], found["settings"]["num_inference_steps"], found["num_prompts"]) == ("scripted", 3, 6)
    text = (OUT / "report.md").read_text()
    assert "Compare distances only with those of as many pictures" in text and "| 1.5 | 6 | 0 | 6 |" in text
    assert "<svg" in (OUT / "pareto.svg").read_text() and (OUT / "sheet.png").exists()


def test_it_goes_on_where_it_stopped_and_takes_prompts_that_were_appended(
    run: Run, server: RunningServer, reference: Path, monkeypatch: pytest.MonkeyPatch
):
    given, num_asked = prompts(3), 0

    def script(request):
        nonlocal num_asked
        num_asked += 1
        if num_asked > 4:
            raise UnauthenticatedError("unknown API key")
        yield from pictures(request)

    server.servicer.script = script
    options = "--reference", reference, "--checker", "demo", "--max-in-flight", 1
    assert evaluate(run, server, *options).code == 4 and not (OUT / "report.json").exists()
    server.servicer.script = pictures
    server.servicer.requests.clear()
    assert evaluate(run, server, *options).code == 0 and len(server.servicer.requests) == 2
    with given.open("a") as file:
        file.write('{"prompt": "new"}\n')
    assert evaluate(run, server, *options).code == 0 and len(server.servicer.requests) == 4
    assert [row["num_measured"] for row in report()["rows"]] == [4, 4]

    def never(*_: object) -> None:
        raise AssertionError("what was seen before is kept")

    monkeypatch.setattr(measure.SafetyCheckerSpace, "features", never)
    before = report()
    assert evaluate(run, server, *options).code == 0
    assert {**report(), "written": None} == {**before, "written": None}
    ran = evaluate(run, server, *options, guidance="1.5,4")
    assert ran.code == 2 and "guidance: this job was begun with [1.5, 3.0], and it is [1.5, 4.0] now" in ran.err


def test_prompts_that_failed_or_were_blacked_out_are_left_out_at_all_scales(run: Run, server: RunningServer, grader: str):
    prompts(5)

    def script(request):
        asked = request.params.prompt, request.params.guidance_scale
        if asked == ("prompt 0", 3.0):
            raise PoisonedRequestError("crashed")
        for event in pictures(request):
            is_black = asked == ("prompt 1", 1.5) and isinstance(event, ImageReady)
            yield replace(event, nsfw_content_detected=True) if is_black else event

    server.servicer.script = script
    assert evaluate(run, server, "--grader", grader).code == 3
    found = report()
    numbers = ("num_pictures", "num_failed", "num_flagged", "num_measured")
    assert [[row[name] for name in numbers] for row in found["rows"]] == [[5, 0, 1, 3], [4, 1, 0, 3]]
    assert found["num_prompts_measured"] == 3
    assert [row["estimates"]["right"]["value"] for row in found["rows"]] == [pytest.approx(1 / 3, abs=1e-4)] * 2
    assert [row["estimates"]["flagged"]["value"] for row in found["rows"]] == [0.2, 0.0]


@pytest.fixture
def inception() -> Path:
    """A TorchScript file that is called like FID's network and gives as many features."""
    torch = pytest.importorskip("torch")

    class Double(torch.nn.Module):
        def forward(self, pictures: torch.Tensor, return_features: bool = False) -> torch.Tensor:
            return pictures.float().mean([2, 3]).repeat(1, 683)[:, :2048]

    with networks.quiet_libraries():
        torch.jit.script(Double()).save("inception.pt")
    return Path("inception.pt")


@pytest.fixture
def clip() -> Path:
    """A small CLIP with random weights, in a local folder."""
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    with networks.quiet_libraries():
        tokenizer = transformers.CLIPTokenizer.from_pretrained(DEMO_FOLDER / "tokenizer")
        config = transformers.CLIPConfig(
            text_config={**small, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id},
            vision_config={**small, "image_size": 64, "patch_size": 32},
            projection_dim=8,
        )
        transformers.CLIPModel(config).save_pretrained("clip")
        processor = transformers.CLIPImageProcessor.from_pretrained(DEMO_FOLDER / "feature_extractor")
        transformers.CLIPProcessor(image_processor=processor, tokenizer=tokenizer).save_pretrained("clip")
    return Path("clip")


def test_fid_and_a_clip_score_are_measured_with_the_networks_that_are_given_and_no_others(
    run: Run, server: RunningServer, reference: Path, inception: Path, clip: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(measure, "MIN_FID_PICTURES", 4)
    prompts(4)
    options = "--reference", reference, "--checker", "demo", "--inception", inception, "--clip", clip
    ran = evaluate(run, server, *options, guidance="2")
    assert ran.code == 0, ran.err
    [row] = report()["rows"]
    assert set(row["estimates"]) == {"flagged", "clip_score", "fid", "fd_safety_clip"}
    assert 0 <= row["estimates"]["clip_score"]["value"] <= 100 and row["estimates"]["fid"]["value"] > 0
    monkeypatch.setattr(measure, "MIN_FID_PICTURES", 2048)
    ran = evaluate(run, server, *options, guidance="2")
    assert ran.code == 2 and "--inception: needs 2048 pictures at least, and the reference has 6" in ran.err


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--guidance", "1,x"), "--guidance: must be numbers with commas between"),
        (("--guidance", "1,1.0"), "--guidance: names a scale twice"),
        (("--guidance", "1,1000"), "--guidance: must be"),
        (("--reference", "nowhere"), "--reference: is not there: nowhere"),
        (("--inception", "in.jsonl"), "--inception: needs --reference"),
        (
            ("--inception", "in.jsonl", "--reference", "true", "--checker", "demo"),
            "--inception: in.jsonl is no TorchScript file",
        ),
        (("--clip", "true"), "--clip: true is no folder of a CLIPModel"),
        (("--reference", "true"), "--checker: names a model whose safety checker cannot be used: there is no folder scripted"),
        (("--grader", "nothing"), "--grader: must be module:function or file.py:function"),
        (("--grader", "no_such_module:grade"), "--grader: no_such_module cannot be imported"),
        (("--grader", "mine.py:other"), "--grader: mine.py has no function other"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_made(
    run: Run, server: RunningServer, reference: Path, grader: str, options: tuple[str, ...], complaint: str
):
    prompts(2)
    ran = evaluate(run, server, *options)
    assert ran.code == 2 and complaint in ran.err, ran.err
    assert not server.servicer.requests and not OUT.exists()


def test_errors_name_the_line_of_the_prompts(run: Run, server: RunningServer):
    jsonl(Path("in.jsonl"), [{"prompt": "a"}, {"prompt": "b", "height": 65}, {"prompt": "c", "guidance_scale": 2}])
    ran = evaluate(run, server)
    assert ran.code == 2 and "in.jsonl:2:height: must be a multiple of 8" in ran.err
    jsonl(Path("in.jsonl"), [{"prompt": "a"}, {"prompt": "c", "guidance_scale": 2}])
    ran = evaluate(run, server)
    assert ran.code == 2 and "in.jsonl:2:guidance_scale: is what the evaluation varies" in ran.err
    assert not server.servicer.requests


def test_the_rows_have_the_members_of_their_prompt(run: Run, server: RunningServer):
    jsonl(Path("in.jsonl"), [{"prompt": "a", "id": "x", "category": "k", "seed": 4}])
    assert evaluate(run, server).code == 0
    rows = lines_of(OUT / "rows.jsonl")
    assert [(row["id"], row["given_id"], row["category"], row["seed"]) for row in rows] == [
        ("0@1.5", "x", "k", 4),
        ("0@3", "x", "k", 4),
    ]
