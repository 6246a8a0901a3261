"""Where a setting comes from, and what is refused."""

from __future__ import annotations

import pytest

from mii_serve.config import DeployConfig
from mii_serve.errors import ConfigError


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "deploy.yaml"
    path.write_text("grpc_port: 1\ndeployment_name: file\nlimits: {max_prompt_chars: 10}\n")
    return path


def test_flags_beat_environment_beats_file_beats_default(file, monkeypatch):
    monkeypatch.setenv("MII_SERVE_GRPC_PORT", "2")
    monkeypatch.setenv("MII_SERVE_DEPLOYMENT_NAME", "environment")
    config = DeployConfig.load({"grpc_port": 3}, file)
    assert (config.grpc_port, config.deployment_name, config.limits.max_prompt_chars) == (3, "environment", 10)
    assert (config.http_port, config.host, config.model) == (5001, "127.0.0.1", "demo")


def test_nested_settings_merge_key_by_key(file, monkeypatch):
    monkeypatch.setenv("MII_SERVE_LIMITS__MAX_IMAGES_PER_PROMPT", "2")
    limits = DeployConfig.load({}, file).limits
    assert (limits.max_prompt_chars, limits.max_images_per_prompt) == (10, 2)


def test_a_replica_reads_what_the_front_wrote_whatever_the_environment(file, monkeypatch):
    config = DeployConfig.load({"grpc_port": 3}, file)
    monkeypatch.setenv("MII_SERVE_GRPC_PORT", "9")
    monkeypatch.setenv("MII_SERVE_LIMITS__MAX_PROMPT_CHARS", "99")
    assert DeployConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("flags", "setting"),
    [
        ({"grpc_prot": 1}, "grpc_prot"),
        ({"grpc_port": 65536}, "grpc_port"),
        ({"grpc_port": "many"}, "grpc_port"),
        ({"replicas": 0}, "replicas"),
        ({"engine": "fast"}, "engine"),
        ({"device": "tpu"}, "device"),
        ({"model": ""}, "model"),
        ({"limits": {"max_seps": 1}}, "limits.max_seps"),
        ({"limits": {"max_guidance_scale": float("nan")}}, "limits.max_guidance_scale"),
        ({"limits": {"max_size_px": 100}}, "limits.max_size_px"),
    ],
)
def test_a_bad_setting_is_refused_by_name(flags, setting):
    with pytest.raises(ConfigError) as caught:
        DeployConfig.load(flags)
    assert caught.value.setting == setting


def test_a_bad_environment_variable_is_refused_by_name(monkeypatch):
    monkeypatch.setenv("MII_SERVE_HTTP_PORT", "no")
    with pytest.raises(ConfigError, match="http_port"):
        DeployConfig.load({})


@pytest.mark.parametrize(
    ("name", "text"), [("a.yaml", "{: bad"), ("a.toml", "= bad"), ("a.yaml", "- a list"), ("a.yaml", "colour: red")]
)
def test_a_bad_file_is_a_config_error(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ConfigError):
        DeployConfig.load({}, path)


def test_a_missing_file_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        DeployConfig.load({}, tmp_path / "none.yaml")
