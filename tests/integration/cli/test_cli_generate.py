"""`mii_serve generate`, on a scripted server and on a scripted model in process."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from commands import Run
from patience import PATIENCE_S
from scripted_server import (
    RunningServer,
    all_events,
    done,
    effective,
    encoded,
    image,
    queued,
    refusal,
)

from mii_serve.errors import InvalidRequestError, QueueFullError
from mii_serve.types import PARAMETERS, Event, GenerationRequest, ImageFormat, OutputOptions, RequestedParams


@pytest.mark.parametrize(
    ("name", "image_format"),
    [
        ("a.png", ImageFormat.PNG),
        ("a.jpg", ImageFormat.JPEG),
        ("a.jpeg", ImageFormat.JPEG),
        ("A.WEBP", ImageFormat.WEBP),
    ],
)
def test_the_suffix_is_the_format(
    run: Run, server: RunningServer, tmp_path: Path, name: str, image_format: ImageFormat
) -> None:
    ran = run("generate", "a cat", "--target", server.target, "-o", name)
    assert (ran.code, ran.out) == (0, f"{name}\n")
    assert (tmp_path / name).read_bytes() == encoded(image_format)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    (request,) = server.servicer.requests
    assert request.output.embed_metadata is (image_format is ImageFormat.PNG)


def test_every_flag_reaches_the_server(run: Run, server: RunningServer, tmp_path: Path) -> None:
    flags = "--num-inference-steps 4 --guidance-scale 7.3 --seed 9 --height 64 --width 72 --scheduler ddim --timeout 30"
    more = ("--negative-prompt", "a dog", "--num-images-per-prompt", "2", "--no-embed-metadata")
    ran = run("generate", "a cat", "--target", server.target, *flags.split(), *more)
    assert (ran.code, ran.out) == (0, "out-0.png\nout-1.png\n")
    assert ran.err == "seed 9, ddim, 3 steps, guidance 7.3, 16x8, reference fp32 on cpu, 1.5 s\n"
    assert [(tmp_path / f"out-{index}.png").read_bytes() for index in (0, 1)] == [
        encoded(ImageFormat.PNG, 0),
        encoded(ImageFormat.PNG, 1),
    ]
    asked = RequestedParams(
        prompt="a cat",
        negative_prompt="a dog",
        num_inference_steps=4,
        guidance_scale=7.3,
        seed=9,
        height=64,
        width=72,
        num_images_per_prompt=2,
        scheduler="ddim",
    )
    assert server.servicer.requests == [GenerationRequest(params=asked)]


def test_an_image_to_start_from_is_sent_as_its_file_is(run: Run, server: RunningServer, tmp_path: Path) -> None:
    (tmp_path / "sketch.png").write_bytes(b"its content")
    flags = ["--image", "sketch.png", "--mask-image", "sketch.png", "--strength", "0.4"]
    assert run("generate", "a cat", "--target", server.target, *flags).code == 0
    (request,) = server.servicer.requests
    asked = RequestedParams(prompt="a cat", image=b"its content", mask_image=b"its content", strength=0.4)
    assert request.params == asked
    ran = run("generate", "a cat", "--target", server.target, "--image", "none.png")
    assert (ran.code, len(server.servicer.requests)) == (2, 1)
    assert "--image: must be a file that can be read" in ran.err


def test_what_is_left_out_is_the_servers_to_choose(run: Run, server: RunningServer) -> None:
    run("generate", "a cat", "--target", server.target)
    output = OutputOptions(embed_metadata=True)
    assert server.servicer.requests == [GenerationRequest(params=RequestedParams(prompt="a cat"), output=output)]


def test_every_parameter_has_its_flag(run: Run) -> None:
    shown = " ".join(run("generate", "--help").out.split())
    for parameter in PARAMETERS:
        flag = "PROMPT" if parameter.name == "prompt" else f"--{parameter.name.replace('_', '-')} "
        assert flag in shown
        assert parameter.help in shown


def test_json_is_one_object_and_stderr_is_quiet(run: Run, server: RunningServer) -> None:
    ran = run("generate", "a", "--target", server.target, "--json", "--seed", "3")
    answer = json.loads(ran.out)
    assert (answer["paths"], answer["seeds"], answer["nsfw_content_detected"]) == (["out.png"], [3], [False])
    assert answer["moderation_blocked"] is None
    assert answer["parameters"]["guidance_scale"] == 7.3
    assert answer["timings"] == {"queued_s": 0.25, "total_s": 1.5}
    assert ran.err == ""


def test_a_picture_that_content_safety_blocked_is_said(run: Run, server: RunningServer) -> None:
    def script(request: GenerationRequest) -> Iterator[Event]:
        for index in range(2):
            yield replace(image(request, index), moderation_blocked=index == 1)
        yield done(effective(request))

    server.servicer.script = script
    ran = run("generate", "a", "--target", server.target, "--num-images-per-prompt", "2", "--json")
    answer = json.loads(ran.out)
    assert answer["moderation_blocked"] == [False, True]
    assert ran.err == f"warning: {answer['paths'][1]} is entirely black because content safety blocked it\n"


@pytest.mark.parametrize("more", [(), ("--json",)])
def test_a_black_picture_and_a_cut_prompt_are_said(run: Run, server: RunningServer, more: tuple[str, ...]) -> None:
    def script(request: GenerationRequest) -> Iterator[Event]:
        yield image(request, 0, flag=True)
        yield done(replace(effective(request), dropped_prompt="and a tail"))

    server.servicer.script = script
    ran = run("generate", "a", "--target", server.target, *more)
    assert ran.code == 0
    assert ran.err.splitlines()[:2] == [
        "warning: out.png is entirely black because the safety checker flagged it",
        "warning: the prompt is too long for the text encoder; not used: 'and a tail'",
    ]


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (("-o", "a.bmp"), "error: output: must end in .png, .jpg, .jpeg, .webp, got a.bmp"),
        (("-o", "a"), "error: output: must end in"),
        (("-o", "missing/a.png"), "error: output: must be in an existing folder"),
        (("-o", "folder.png"), "error: output: must be a file"),
        (("-o", "a.jpg", "--embed-metadata"), "error: output.embed_metadata: is for PNG only"),
        (("--engine", "native"), "error: --engine: cannot be combined with --target"),
        (("--seed", "-1"), "error: seed: must fit"),
        (("--timeout", "nan"), "error: timeout: must be a finite number"),
    ],
)
def test_a_mistake_costs_no_work(
    run: Run, server: RunningServer, tmp_path: Path, argv: tuple[str, ...], complaint: str
) -> None:
    (tmp_path / "folder.png").mkdir()
    ran = run("generate", "a", "--target", server.target, *argv)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith(complaint)
    assert server.servicer.requests == []


def test_failures_have_their_exit_codes_and_leave_no_file(run: Run, server: RunningServer, tmp_path: Path) -> None:
    server.servicer.script = refusal(InvalidRequestError("height", "must be a multiple of 8", "7"))
    ran = run("generate", "a", "--target", server.target, "--height", "7")
    assert (ran.code, ran.err) == (2, "error: height: must be a multiple of 8, got 7\n")
    server.servicer.script = refusal(QueueFullError("the queue is full"))
    assert run("generate", "a", "--target", server.target).code == 1
    server.servicer.script = server.servicer.endless
    assert run("generate", "a", "--target", server.target, "--timeout", "0.2").code == 4
    assert run("generate", "a", "--target", "127.0.0.1:1").code == 3
    assert list(tmp_path.iterdir()) == []


def test_an_old_file_is_replaced_only_by_a_whole_one(
    run: Run, server: RunningServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out.png").write_bytes(b"old")

    def fails(self: Path, target: Path) -> Path:
        raise OSError("no space left")

    monkeypatch.setattr(Path, "replace", fails)
    ran = run("generate", "a", "--target", server.target)
    assert (ran.code, ran.err.startswith("error: no space left")) == (1, True)
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"out.png": b"old"}


def test_a_terminal_sees_a_bar_for_each_image(run: Run, server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    ran = run("generate", "a", "--target", server.target, "--num-images-per-prompt", "2")
    assert "image 1" in ran.err
    assert "3/3" in ran.err
    assert "\x1b[3" not in ran.err.replace("\x1b[2K", "")  # no colours
    assert ran.out == "out-0.png\nout-1.png\n"


def test_ctrl_c_cancels_the_request_and_exits_130(server: RunningServer, tmp_path: Path) -> None:
    server.servicer.script = server.servicer.endless
    command = [sys.executable, "-m", "mii_serve", "generate", "a", "--target", server.target]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert server.servicer.asked.wait(30)
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=PATIENCE_S)
        finally:
            process.kill()
    assert (process.returncode, said) == (130, "interrupted\n")
    assert server.servicer.ended.wait(PATIENCE_S)
    assert os.listdir(tmp_path) == []  # noqa: PTH208


# ---- in process ----------------------------------------------------------------------------------------------------


class FakeLocal:
    """What `open_local` gives, with the server's script in place of a model."""

    def __init__(self) -> None:
        self.script: Any = all_events
        self.configs: list[Any] = []
        self.requests: list[GenerationRequest] = []
        self.closed: list[str] = []

    @contextlib.contextmanager
    def open_local(self, config: Any) -> Iterator[FakeLocal]:
        self.configs.append(config)
        try:
            yield self
        finally:
            self.closed.append("model")

    def stream(self, request: GenerationRequest) -> Iterator[Event]:
        self.requests.append(request)
        try:
            yield from self.script(request)
        finally:
            self.closed.append("request")


@pytest.fixture
def local(monkeypatch: pytest.MonkeyPatch) -> FakeLocal:
    fake = FakeLocal()
    monkeypatch.setattr("mii_serve.replica.local.open_local", fake.open_local)
    return fake


def test_without_a_target_the_model_is_loaded_here(run: Run, local: FakeLocal, tmp_path: Path) -> None:
    ran = run("generate", "a", "--model", "some/model", "--engine", "reference", "--dtype", "fp32", "--seed", "4")
    assert (ran.code, ran.out) == (0, "out.png\n")
    assert ran.err.splitlines()[0].endswith("loading some/model")
    (config,) = local.configs
    assert (config.model, config.engine, config.dtype, config.device) == ("some/model", "reference", "fp32", "auto")
    assert (tmp_path / "out.png").read_bytes() == encoded(ImageFormat.PNG)
    asked = RequestedParams(prompt="a", seed=4)
    assert local.requests == [GenerationRequest(params=asked, output=OutputOptions(embed_metadata=True))]
    assert local.closed == ["request", "model"]


def test_nothing_passes_through_protobuf_without_a_target(run: Run, local: FakeLocal, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("encode_request", "decode_event", "decode_answer"):
        monkeypatch.setattr(f"mii_serve.client.calls.{name}", None)
    ran = run("generate", "a", "--json", "--num-images-per-prompt", "2", "--seed", "8")
    answer = json.loads(ran.out)
    assert (answer["seeds"], len(answer["request_id"])) == ([8, 9], 32)


def test_a_mistake_loads_no_model(run: Run, local: FakeLocal) -> None:
    assert run("generate", "a", "-o", "a.gif").code == 2
    assert run("generate", "a", "--timeout", "0").code == 2
    assert local.configs == []


def test_a_local_request_ends_at_its_timeout(run: Run, local: FakeLocal, tmp_path: Path) -> None:
    def slow(request: GenerationRequest) -> Iterator[Event]:
        while True:
            yield queued()

    local.script = slow
    ran = run("generate", "a", "--timeout", "0.05")
    assert ran.code == 4
    assert "not ready within 0.05 s" in ran.err
    assert local.closed == ["request", "model"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (InvalidRequestError("prompt", "bad"), 2)])
def test_a_local_failure_frees_the_model(run: Run, local: FakeLocal, error: BaseException, code: int) -> None:
    def fails(request: GenerationRequest) -> Iterator[Event]:
        yield queued()
        raise error

    local.script = fails
    assert run("generate", "a").code == code
    assert local.closed == ["request", "model"]


def test_no_checker_is_told_as_null(run: Run, local: FakeLocal) -> None:
    local.script = partial(all_events, flag=None)
    ran = run("generate", "a", "--json")
    assert json.loads(ran.out)["nsfw_content_detected"] is None
    assert ran.err == ""
