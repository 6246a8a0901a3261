"""How content safety is asked for, and that its key stays where it is."""

from __future__ import annotations

import json

import pytest
from commands import Run
from commands import run as run

from mii_serve.config import DeployConfig
from mii_serve.errors import ConfigError
from mii_serve.server.supervisor import replica_environment

ENDPOINT, KEY = "https://pictures.cognitiveservices.azure.com/", "not-for-every-eye"

WHOLE = {"CONTENT_SAFETY_ENDPOINT": ENDPOINT, "CONTENT_SAFETY_KEY": KEY}


@pytest.fixture
def asked(monkeypatch) -> None:
    monkeypatch.setenv("CONTENT_SAFETY_ENDPOINT", ENDPOINT)
    monkeypatch.setenv("CONTENT_SAFETY_KEY", f"{KEY}\n")


def test_it_is_off_unless_asked_for(monkeypatch):
    for name in (
        "UAI_CLIENT_ID",
        "SUBSCRIPTION_ID",
        "RESOURCE_GROUP_NAME",
        "CONTENT_SAFETY_SERVICE_HOST",
        "CONTENT_SAFETY_PORT",
    ):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("CONTENT_SAFETY_PORT_443_TCP_ADDR", "10.0.0.1")
    assert not DeployConfig.load({}).content_safety.is_on


def test_azures_variables_are_understood(asked, monkeypatch):
    monkeypatch.setenv("CONTENT_SAFETY_THRESHOLD", "0")
    monkeypatch.setenv("CONTENT_SAFETY_BLOCKLISTS", "brands, people")
    monkeypatch.setenv("UAI_CLIENT_ID", "1-2-3")
    found = DeployConfig.load({}).content_safety
    assert found.is_on and found.key is not None
    assert (found.url, found.key.get_secret_value()) == (ENDPOINT.rstrip("/"), KEY)
    assert (found.threshold, found.blocklists, found.client_id) == (0, ("brands", "people"), "1-2-3")


def test_the_environment_of_ours_beats_azures_and_a_file_completes_it(asked, monkeypatch, tmp_path):
    monkeypatch.setenv("MII_SERVE_CONTENT_SAFETY__THRESHOLD", "4")
    monkeypatch.setenv("CONTENT_SAFETY_THRESHOLD", "0")
    file = tmp_path / "deploy.yaml"
    file.write_text("content_safety: {threshold: 6, timeout_s: 3}\n")
    found = DeployConfig.load({}, file).content_safety
    assert (found.threshold, found.timeout_s, found.url) == (4, 3.0, ENDPOINT.rstrip("/"))
    origins = DeployConfig.origins({}, file)
    assert origins["content_safety.key"] == "environment CONTENT_SAFETY_KEY"
    assert origins["content_safety.threshold"] == "environment MII_SERVE_CONTENT_SAFETY__THRESHOLD"
    assert origins["content_safety.timeout_s"] == f"file {file}"


def test_an_account_stands_for_its_endpoint_and_an_identity_for_a_key(monkeypatch):
    monkeypatch.setenv("CONTENT_SAFETY_ACCOUNT_NAME", "pictures")
    monkeypatch.setenv("UAI_CLIENT_ID", "1-2-3")
    found = DeployConfig.load({}).content_safety
    assert found.is_on and found.key is None and found.url == ENDPOINT.rstrip("/")


def test_a_file_that_names_only_an_identity_asks_for_content_safety(tmp_path):
    file = tmp_path / "deploy.yaml"
    file.write_text("content_safety: {client_id: system}\n")
    with pytest.raises(ConfigError, match="CONTENT_SAFETY_ENDPOINT"):
        DeployConfig.load({}, file)


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"CONTENT_SAFETY_ENDPOINT": ENDPOINT}, "CONTENT_SAFETY_KEY"),
        ({"CONTENT_SAFETY_KEY": KEY}, "CONTENT_SAFETY_ENDPOINT"),
        ({"CONTENT_SAFETY_THRESHOLD": "2"}, "CONTENT_SAFETY_ENDPOINT"),
        ({"CONTENT_SAFETY_ACCOUNT_NAME": "pictures"}, "CONTENT_SAFETY_KEY"),
        ({"CONTENT_SAFETY_ENDPOINT": ENDPOINT, "CONTENT_SAFETY_KEY": " "}, "CONTENT_SAFETY_KEY"),
        ({"CONTENT_SAFETY_ENDPOINT": ENDPOINT, "CONTENT_SAFETY_KEY": "two words"}, "CONTENT_SAFETY_KEY"),
        ({"CONTENT_SAFETY_ENDPOINT": "http://x", "UAI_CLIENT_ID": "1-2-3"}, "CONTENT_SAFETY_ENDPOINT"),
        ({"CONTENT_SAFETY_ENABLED": "true"}, "CONTENT_SAFETY_ENABLED"),
        ({"CONTENT_SAFETY_TRESHOLD": "2"}, "CONTENT_SAFETY_TRESHOLD"),
        ({"MII_SERVE_CONTENT_SAFETY__KEY": KEY}, "CONTENT_SAFETY_ENDPOINT"),
        ({"MII_SERVE_CONTENT_SAFETY": f'["{KEY}"]'}, "content_safety"),
        ({"CONTENT_SAFETY_ENDPOINT": "ftp://x", "CONTENT_SAFETY_KEY": KEY}, "content_safety.endpoint"),
        (
            {"CONTENT_SAFETY_ENDPOINT": ENDPOINT, "CONTENT_SAFETY_KEY": KEY, "CONTENT_SAFETY_THRESHOLD": "7"},
            "content_safety.threshold",
        ),
        (
            {"CONTENT_SAFETY_ENDPOINT": ENDPOINT, "CONTENT_SAFETY_KEY": KEY, "CONTENT_SAFETY_BLOCKLISTS": "a,,b"},
            "content_safety.blocklists.1",
        ),
        (
            {"CONTENT_SAFETY_ENDPOINT": ENDPOINT, "CONTENT_SAFETY_KEY": KEY, "MII_SERVE_LIMITS__MAX_PROMPT_CHARS": "10001"},
            "limits.max_prompt_chars",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_what_would_not_moderate_does_not_start(variables, named, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as caught:
        DeployConfig.load({})
    assert caught.value.setting == named and KEY not in str(caught.value)


def test_a_key_that_is_no_text_is_not_shown_either(tmp_path):
    file = tmp_path / "deploy.yaml"
    file.write_text("content_safety: {endpoint: 'https://x', key: 12345678}\n")
    with pytest.raises(ConfigError, match=r"content_safety\.key: Input should be a valid string") as caught:
        DeployConfig.load({}, file)
    assert "12345678" not in str(caught.value)


def test_nobody_is_shown_the_key(asked, run: Run):
    config = DeployConfig.load({})
    for shown in (repr(config), str(config.content_safety), run("config", "show").out, run("config", "show", "--json").out):
        assert KEY not in shown and "****" in shown


def test_a_replica_is_told_nothing_of_it(asked, monkeypatch):
    monkeypatch.setenv("MII_SERVE_CONTENT_SAFETY__KEY", KEY)
    config = DeployConfig.load({})
    order, environment = config.to_json(), replica_environment({"CUDA_VISIBLE_DEVICES": "0"})
    assert "content_safety" not in json.loads(order)
    assert not DeployConfig.from_json(order).content_safety.is_on, "although this process has the variables"
    assert not [name for name, value in environment.items() if "CONTENT_SAFETY" in name or KEY in value]
    assert environment["PATH"] and environment["CUDA_VISIBLE_DEVICES"] == "0"
