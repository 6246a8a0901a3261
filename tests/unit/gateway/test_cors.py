"""Which origins' pages get leave to use the server, and what an answer says of it."""

from __future__ import annotations

import pytest
from starlette.testclient import TestClient

from mii_serve.config import DeployConfig
from mii_serve.errors import ConfigError
from mii_serve.gateway.app import build_app
from mii_serve.gateway.hosts import AllowedHosts
from mii_serve.server.dispatcher import Dispatcher
from mii_serve.server.keys import KeyRing

APP, OTHER = "https://app.example.com", "https://other.example.com"
PATH = "/v1/images/generations"
ASK = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
ALLOW = "access-control-allow-origin"


def client(*origins: str, keys: KeyRing | None = None) -> TestClient:
    config = DeployConfig.load({"http": {"cors_origins": list(origins)}})
    app = build_app(Dispatcher(), keys or KeyRing(), config.http, hosts=AllowedHosts.of(config))
    return TestClient(app, base_url="http://localhost:5001")


def cors_headers(answer) -> list[str]:
    return [name for name in answer.headers if name.startswith("access-control")]


def test_without_the_setting_there_is_no_header():
    for origin in (APP, "http://localhost:5001"):
        answer = client().get("/livez", headers={"origin": origin})
        assert answer.status_code == 200 and not cors_headers(answer) and "vary" not in answer.headers
        answer = client().options(PATH, headers={"origin": origin, **ASK})
        assert answer.status_code == 405 and not cors_headers(answer)
    assert client().post(PATH, json={}, headers={"origin": APP}).status_code == 403


def test_a_named_origin_is_answered_and_another_is_not(tmp_path):
    (tmp_path / "keys").write_text("0123456789abcdefgh\n")
    (tmp_path / "keys").chmod(0o600)
    web = client(APP, keys=KeyRing(tmp_path / "keys"))
    before = web.options(PATH, headers={"origin": APP, **ASK})
    assert (before.status_code, before.headers[ALLOW]) == (204, APP), "without a key"
    assert before.headers["access-control-allow-headers"] == "authorization,content-type"
    assert "POST" in before.headers["access-control-allow-methods"] and "origin" in before.headers["vary"]
    answer = web.post(PATH, json={"prompt": "a"}, headers={"origin": APP})
    assert (answer.status_code, answer.headers[ALLOW]) == (401, APP), "what is refused can be read"
    assert "x-request-id" in answer.headers["access-control-expose-headers"]
    assert "access-control-allow-credentials" not in answer.headers
    for origin in (OTHER, "null", APP + ".evil.example", APP + ":444", "http://app.example.com", "*"):
        refused = web.options(PATH, headers={"origin": origin, **ASK})
        assert (refused.status_code, cors_headers(refused), refused.headers["vary"]) == (403, [], "origin"), origin
        assert web.post(PATH, json={}, headers={"origin": origin}).status_code == 403, origin
        assert not cors_headers(web.get("/livez", headers={"origin": origin})), origin
    assert web.get("/livez").headers["vary"] == "origin", "a cache must not give this answer to a page"


def test_a_named_origin_does_not_make_other_hosts_names_of_this_server():
    for origins in ((APP,), ("*",)):
        web = client(*origins)
        for headers in ({"host": "app.example.com"}, {"host": "evil.example:5001"}):
            assert web.options(PATH, headers={"origin": APP, **ASK, **headers}).status_code == 421
            assert web.post(PATH, json={"prompt": "a"}, headers={"origin": APP, **headers}).status_code == 421


def test_any_origin_is_any_and_has_no_credentials():
    web = client("*")
    for origin in (APP, "null"):
        answer = web.post(PATH, json={"prompt": "a"}, headers={"origin": origin})
        assert (answer.status_code, answer.headers[ALLOW]) == (503, "*")
        assert "access-control-allow-credentials" not in answer.headers and "vary" not in answer.headers


@pytest.mark.parametrize("bad", ["app.example.com", "https://app.example.com/", "https://*.example.com", "null", "https://a b"])
def test_an_origin_is_what_browsers_send(bad):
    with pytest.raises(ConfigError, match="cors_origins"):
        DeployConfig.load({"http": {"cors_origins": [bad]}})
