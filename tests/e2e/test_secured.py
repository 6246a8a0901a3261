"""A deployment with TLS, API keys and signed pictures, used as its operator would."""

from __future__ import annotations

import json
import os
import signal
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import trustme
from deployments import Deployment, deployed, until
from patience import PATIENCE_S
from signing import write_signing_files

from mii_serve.provenance.report import report_on

KEY, NEW_KEY = "studio-key-0123456789", "second-key-0123456789"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("secured")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    for name in ("localhost", "client"):
        issued = authority.issue_cert(name)
        issued.private_key_and_cert_chain_pem.write_to_path(str(folder / f"{name}.pem"))
    (folder / "keys").write_text(f"{KEY} name=studio\n")
    write_signing_files(folder / "signing", "First")
    return folder


@pytest.fixture(scope="module")
def secured(folder):
    pair = folder / "localhost.pem"
    flags = ("--api-key-file", folder / "keys", "--tls-cert", pair, "--tls-key", pair, "--tls-client-ca", folder / "ca.pem")
    signing = {"CERTIFICATE": folder / "signing" / "chain.pem", "KEY": folder / "signing" / "key.pem"}
    environment = {"MII_SERVE_LOG_FORMAT": "json"} | {
        f"MII_SERVE_PROVENANCE__{name}": str(file) for name, file in signing.items()
    }
    with deployed("demo", "--host", "localhost", *map(str, flags), env=environment, has_model=False) as running:
        yield running


def draw(secured: Deployment, folder: Path, key: str | None, *flags: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "MII_SERVE_API_KEY"}
    if key is not None:
        environment["MII_SERVE_API_KEY"] = key
    target = f"localhost:{secured.grpc.rpartition(':')[2]}"
    command = (sys.executable, "-m", "mii_serve", "generate", "a red circle", "--num-inference-steps", "2")
    output = ("--output", str(folder / "out.png"), "--target", target, "--timeout", str(PATIENCE_S))
    return subprocess.run([*command, *output, *flags], env=environment, capture_output=True, text=True, timeout=PATIENCE_S)


def tls_flags(folder: Path) -> tuple[str, ...]:
    pair = str(folder / "client.pem")
    return "--tls-ca", str(folder / "ca.pem"), "--tls-cert", pair, "--tls-key", pair


def test_key_and_certificate_open(secured, folder):
    ran = draw(secured, folder, KEY, *tls_flags(folder))
    assert ran.returncode == 0, ran.stderr
    assert signer_of(folder / "out.png").startswith("First")


def signer_of(file: Path) -> str:
    """Who signed the picture, and vouches for what it says."""
    report = report_on(file.read_bytes(), file.name)
    assert report.is_marked and not report.is_invalid and report.credentials.model == "demo"
    return report.credentials.signer


def test_anything_less_does_not(secured, folder):
    for key, flags, text in (
        (None, tls_flags(folder), "this server wants an API key"),
        ("wrong-key-0123456789", tls_flags(folder), "does not know that API key"),
        (KEY, tls_flags(folder)[:2], "no answer from"),
        (KEY, (), "no answer from"),
        (KEY, ("--tls-ca", str(folder / "missing.pem")), "--tls-ca: cannot read"),
    ):
        ran = draw(secured, folder, key, *flags)
        assert ran.returncode != 0
        assert text in ran.stderr and KEY not in ran.stderr, ran.stderr


def test_keys_and_certificates_are_read_again_on_sighup(secured, folder):
    replicas = secured.replica_pids()
    assert draw(secured, folder, NEW_KEY, *tls_flags(folder)).returncode != 0
    (folder / "keys").write_text(f"{NEW_KEY}\n{KEY}\n")
    write_signing_files(folder / "signing", "Second")
    secured.process.send_signal(signal.SIGHUP)
    until(lambda: draw(secured, folder, NEW_KEY, *tls_flags(folder)).returncode == 0, "the new key opens")
    until(
        lambda: draw(secured, folder, KEY, *tls_flags(folder)) and signer_of(folder / "out.png").startswith("Second"), "signs"
    )
    assert secured.replica_pids() == replicas


def test_every_line_of_its_log_is_json_and_names_the_key(secured):
    secured.log.seek(0)
    lines = [json.loads(line) for line in secured.log]
    messages = " ".join(line["message"] for line in lines)
    for text in ("deploying demo", "listening on localhost", "serving demo", "API keys read", "certificate was read again"):
        assert text in messages
    assert {"studio", "key-1", "key-2"} & {line["request"].get("key") for line in lines if "request" in line}
    assert KEY not in messages and NEW_KEY not in messages


def test_http_speaks_tls_too(secured, folder):
    port = secured.http.rpartition(":")[2]
    context = ssl.create_default_context(cafile=folder / "ca.pem")
    context.load_cert_chain(folder / "client.pem")
    with urllib.request.urlopen(f"https://localhost:{port}/livez", timeout=PATIENCE_S, context=context) as answer:
        assert answer.status == 200
    with pytest.raises((urllib.error.URLError, ConnectionError)):
        urllib.request.urlopen(f"http://localhost:{port}/livez", timeout=PATIENCE_S)
    with pytest.raises((urllib.error.URLError, ConnectionError)):  # no certificate of its own
        urllib.request.urlopen(
            f"https://localhost:{port}/livez", timeout=PATIENCE_S, context=ssl.create_default_context(cafile=folder / "ca.pem")
        )
