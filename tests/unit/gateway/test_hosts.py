"""Which `Host` and `Origin` a server answers to, by where it listens and what it is told."""

from __future__ import annotations

import pytest
from starlette.testclient import TestClient

from mii_serve.config import DeployConfig
from mii_serve.errors import ConfigError
from mii_serve.gateway.app import build_app
from mii_serve.gateway.hosts import AllowedHosts
from mii_serve.server.dispatcher import Dispatcher
from mii_serve.server.keys import KeyRing

OWN = [
    "localhost",
    "LOCALHOST:5001",
    "localhost.",
    "127.0.0.1",
    "127.0.0.1:80",
    "127.9.8.7",
    "[::1]",
    "[::1]:5001",
    "a.localhost",
]
FOREIGN = [
    "evil.example",
    "evil.example:5001",
    "localhost.evil.example",
    "127.0.0.1.evil.example",
    "localhost@evil.example",
    "evil.example#localhost",
    "localhost:80:80",
    "localhost:x",
    "localhost,evil.example",
    "[::1].evil.example",
    "[::1",
    "::1",
    "192.168.0.1",
    "0.0.0.0",
    "xlocalhost",
    "a." * 200 + "localhost",
    "",
    " ",
]


def hosts(*names: str, host: str = "127.0.0.1") -> AllowedHosts:
    return AllowedHosts.of(DeployConfig.load({"host": host, **({"http": {"allowed_hosts": names}} if names else {})}))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.0.0.2"])
def test_on_loopback_only_this_machines_names_are_answered(host):
    rule = hosts(host=host)
    assert [name for name in OWN if not rule.allows(name)] == []
    assert [name for name in FOREIGN if rule.allows(name)] == []


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.5"])
def test_on_other_addresses_any_name_is_answered_unless_some_are_set(host):
    assert all(hosts(host=host).allows(name) for name in (*OWN, *FOREIGN))
    rule = hosts("pictures.example.com", "*.internal", host=host)
    assert rule.allows("pictures.example.com:443") and rule.allows("a.b.internal") and all(rule.allows(name) for name in OWN)
    assert not rule.allows("internal") and not rule.allows("example.com") and not rule.allows("xinternal")


def test_a_star_answers_all():
    assert all(hosts("*").allows(name) for name in FOREIGN)


@pytest.mark.parametrize("bad", ["http://a", "a:80", "a b", "*a", "a.*", "", "a/b"])
def test_what_is_no_name_is_refused_at_the_start(bad):
    with pytest.raises(ConfigError, match=r"http\.allowed_hosts"):
        hosts(bad)


def test_several_are_named_with_commas_in_the_environment(monkeypatch):
    monkeypatch.setenv("MII_SERVE_HTTP__ALLOWED_HOSTS", "a.example, *.b.example")
    assert DeployConfig.load({}).http.allowed_hosts == ("a.example", "*.b.example")


@pytest.fixture(scope="module")
def client():
    return TestClient(build_app(Dispatcher(), KeyRing(), hosts=hosts()), base_url="http://localhost")


PATHS = [
    "/",
    "/livez",
    "/metrics",
    "/score",
    "/v1/images/generations",
    "/v1/models",
    "/ui/generate",
    "/ui/state",
    "/info",
    "/no",
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS", "DELETE"])
def test_another_host_is_refused_on_every_path(client, path, method):
    answer = client.request(method, path, headers={"host": "evil.example"})
    assert answer.status_code == 421 and "host" in answer.text and "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("/score", lambda body: body["error"]["param"]),
        ("/v1/images/generations", lambda body: body["error"]["param"]),
        ("/", lambda body: body["error"].partition(":")[0]),
        ("/ui/generate", lambda body: body["error"]["field"]),
    ],
)
def test_the_refusal_is_in_the_words_of_the_dialect(client, path, told):
    assert told(client.post(path, headers={"host": "evil.example"}).json()) == "host"
    foreign = client.post(path, headers={"origin": "https://evil.example"})
    assert (foreign.status_code, told(foreign.json())) == (403, "origin")


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost.evil.example", "file://", "http://[", ""])
@pytest.mark.parametrize("path", ["/score", "/", "/v1/images/generations", "/ui/generate"])
def test_a_page_of_another_site_cannot_put_the_server_to_work(client, path, origin):
    assert client.post(path, headers={"origin": origin}).status_code == 403


@pytest.mark.parametrize("origin", ["http://localhost:3000", "http://127.0.0.1:5001", "http://[::1]:5001"])
def test_a_page_of_this_machine_can(client, origin):
    assert client.post("/score", json={}, headers={"origin": origin}).status_code not in (403, 421)
