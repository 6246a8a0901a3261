"""Flags, help and exit codes; nothing here reaches a model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from commands import Run

import mii_serve.cli.deploy
from mii_serve.cli.exits import exit_code_of
from mii_serve.errors import (
    ConfigError,
    DeadlineExceededError,
    InvalidRequestError,
    MiiServeError,
    ModelError,
    QueueFullError,
    UnavailableError,
)


def test_version_and_help_exit_well(run: Run) -> None:
    assert run("--version").out == f"mii_serve {mii_serve.__version__}\n"
    for command in ((), ("deploy",), ("generate",), ("status",)):
        shown = run(*command, "-h")
        assert shown.code == 0
        assert "exit codes:" in shown.out
        assert run(*command, "--help") == shown


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (("generate",), "error: the following arguments are required: PROMPT"),
        (("generate", "a", "--seed", "x"), "error: --seed: invalid int value: 'x'"),
        (("generate", "a", "--see", "1"), "error: unrecognized arguments: --see 1"),
        (("paint",), "error: COMMAND: invalid choice: 'paint'"),
        (("deploy", "--log-level", "x"), "error: --log-level: invalid choice"),
        (("status", "--target", "http://a"), "error: target: must be HOST:PORT"),
        (("status", "--timeout", "0"), "error: timeout: must be a finite number"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_two(run: Run, argv: tuple[str, ...], complaint: str) -> None:
    ran = run(*argv)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith(complaint)
    assert ran.err.count("\n") == 1


def test_no_command_shows_the_help(run: Run) -> None:
    ran = run()
    assert ran.code == 2
    assert "deploy" in ran.err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (MiiServeError("x"), 1),
        (QueueFullError("x"), 1),
        (ModelError("x"), 1),
        (InvalidRequestError("a", "b"), 2),
        (ConfigError("a", "b"), 2),
        (UnavailableError("x"), 3),
        (DeadlineExceededError("x"), 4),
    ],
)
def test_every_error_has_its_exit_code(error: MiiServeError, code: int) -> None:
    assert exit_code_of(error) == code


# ---- deploy ------------------------------------------------------------------------------------------------------


@pytest.fixture
def deployed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What `run_deployment` was given, instead of a server."""
    seen: list[Any] = []

    def fake(config: Any, listener: Any) -> int:
        seen.append(config)
        return 0

    monkeypatch.setattr("mii_serve.server.deploy.run_deployment", fake)
    monkeypatch.setattr("logging.basicConfig", lambda **settings: None)
    return seen


def test_what_a_file_says_in_miis_words_stands_where_a_file_stands(
    run: Run, deployed: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setenv("MII_SERVE_REPLICAS", "3")
    words = "deployment_name: sd\nmodel: demo\ntask: text-to-image\nport_number: 1\nreplica_num: 2\nhf_auth_token: hf_secret\n"
    (tmp_path / "mii.yaml").write_text(words)
    ran = run("deploy", "--mii-config", "mii.yaml", "--grpc-port", "0")
    assert ran.code == 0 and "hf_secret" not in ran.err
    (config,) = deployed
    assert (config.deployment_name, config.grpc_port, config.replicas, config.http_port) == ("sd", 0, 3, 0)
    assert os.environ["HF_TOKEN"] == "hf_secret"

    (tmp_path / "other.yaml").write_text("replicas: 4\n")
    ran = run("deploy", "--mii-config", "mii.yaml", "--config", "other.yaml")
    assert (ran.code, len(deployed)) == (2, 1) and "cannot be combined with --config" in ran.err
    (tmp_path / "mii.yaml").write_text(words + "replica_nun: 2\n")
    ran = run("deploy", "--mii-config", "mii.yaml")
    assert ran.code == 2 and "replica_nun: MII has no such setting; did you mean replica_num?" in ran.err


def test_deploy_passes_on_only_what_was_said(
    run: Run, deployed: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("MII_SERVE_REPLICAS", "3")
    monkeypatch.setenv("MII_SERVE_GRPC_PORT", "1234")
    (tmp_path / "settings.yaml").write_text("replicas: 4\nmax_slots: 6\n")
    ran = run("deploy", "--grpc-port", "0", "--config", "settings.yaml", "--engine", "reference")
    assert ran.code == 0
    (config,) = deployed
    assert (config.grpc_port, config.replicas, config.max_slots) == (0, 3, 6)
    assert (config.model, config.engine, config.enable_safety_checker, config.allow_pickle) == (
        "demo",
        "reference",
        True,
        False,
    )


def test_deploy_takes_every_flag(run: Run, deployed: list[Any]) -> None:
    flags = (
        "some/model --engine native --replicas 2 --tensor-parallel 2 --dtype fp16 --device cuda --host 0.0.0.0 "
        "--grpc-port 1 --http-port 2 --deployment-name n --max-slots 3 --revision r --allow-pickle "
        "--disable-safety-checker --log-level debug --served-model-name org/sd --served-model-name dall-e-3 --tokenizer words "
        "--vae vae --embedding <a>=a.pt --embedding b=b.pt"
    )
    ran = run("deploy", *flags.split())
    assert (ran.code, ran.out) == (0, "")
    assert ran.err == f"mii_serve {mii_serve.__version__}: deploying some/model\n"
    config = deployed[0]
    assert (config.model, config.replicas, config.tensor_parallel, config.dtype) == ("some/model", 2, 2, "fp16")
    assert (config.device, config.host, config.http_port, config.deployment_name) == ("cuda", "0.0.0.0", 2, "n")
    assert config.served_model_name == ("org/sd", "dall-e-3")
    assert (config.tokenizer, config.vae) == (Path("words"), Path("vae"))
    assert config.embedding == {"<a>": Path("a.pt"), "b": Path("b.pt")}
    assert (config.max_slots, config.revision, config.allow_pickle, config.enable_safety_checker) == (3, "r", True, False)


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (("--engine", "steam"), "error: engine: "),
        (("--replicas", "0"), "error: replicas: "),
        (("--config", "missing.yaml"), "error: config: no such file: missing.yaml"),
    ],
)
def test_a_broken_setting_is_named(run: Run, deployed: list[Any], argv: tuple[str, ...], complaint: str) -> None:
    ran = run("deploy", *argv)
    assert (ran.code, ran.out, deployed) == (2, "", [])
    assert ran.err.startswith(complaint)


@pytest.mark.parametrize(("error", "code"), [(ModelError("no such model: x"), 1), (KeyboardInterrupt(), 130)])
def test_what_ends_a_deployment_becomes_its_exit_code(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int
) -> None:
    def fails(*_: object) -> int:
        raise error

    monkeypatch.setattr(mii_serve.cli.deploy, "run", fails)
    ran = run("deploy", "x")
    assert ran.code == code
    assert ran.err.splitlines()[-1] in ("error: no such model: x", "interrupted")


def test_a_traceback_is_for_those_who_ask(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> int:
        raise ZeroDivisionError("odd")

    monkeypatch.setattr(mii_serve.cli.deploy, "run", fails)
    ran = run("deploy")
    assert (ran.code, ran.err) == (1, "error: ZeroDivisionError: odd (MII_SERVE_DEBUG=1 shows the traceback)\n")
    monkeypatch.setenv("MII_SERVE_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        mii_serve.cli.main(["deploy"])


def test_the_ready_line_is_the_only_one_on_stdout(
    capsys: pytest.CaptureFixture[str], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mii_serve.proto.v1 import image_generation_pb2 as pb
    from mii_serve.server.deploy import Ready

    def fake(config: Any, listener: Any) -> int:
        listener.on_listening("127.0.0.1:5")
        info = pb.GetServerInfoResponse(model="demo", engine="native", dtype="fp32", device="cpu")
        listener.on_ready(Ready(grpc="127.0.0.1:5", http="off", info=info))
        return 0

    monkeypatch.setattr("mii_serve.server.deploy.run_deployment", fake)
    monkeypatch.setattr("logging.basicConfig", lambda **settings: None)
    ran = run("deploy")
    assert ran.out == "ready grpc=127.0.0.1:5 http=off\n"
    assert "WITHOUT a safety checker" in ran.err
