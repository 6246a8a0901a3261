"""A deployment under content safety, and one that asks for it and cannot have it."""

from __future__ import annotations

import contextlib
import os
import ssl
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import trustme
from content_safety_double import KEY, ContentSafetyDouble, double_in_a_thread
from deployments import Deployment, deployed, finished, start, until
from patience import PATIENCE_S

from mii_serve.client import Client
from mii_serve.errors import ContentBlockedError, ModerationFailedError, RequestCancelledError

PROMPT = "a red circle on a blue background"


@pytest.fixture(scope="module")
def double() -> Iterator[ContentSafetyDouble]:
    with double_in_a_thread() as running:
        yield running


@pytest.fixture(scope="module")
def deployment(double) -> Iterator[Deployment]:
    asked = {"CONTENT_SAFETY_ENDPOINT": double.url, "CONTENT_SAFETY_KEY": KEY, "MII_SERVE_CONTENT_SAFETY__TIMEOUT_S": "60"}
    with deployed("demo", env=asked) as running:
        yield running


@pytest.fixture
def client(deployment, double) -> Iterator[Client]:
    double.words, double.judge_image = {}, lambda image: {}
    double.text_mode = double.image_mode = "ok"
    with Client(deployment.grpc) as client:
        yield client


def test_a_harmless_picture_comes_as_it_was_looked_at(client, double):
    result = client.generate(PROMPT, num_inference_steps=2)
    assert result.moderation_blocked == [False]
    assert result.encoded[0] == double.images[-1] and double.texts[-1] == PROMPT
    assert result.images[0].getextrema() != ((0, 0),) * 3


def test_a_harmful_prompt_and_a_harmful_picture(client, double):
    double.words = {"circle": ("Violence", 6)}
    with pytest.raises(ContentBlockedError) as caught:
        client.generate(PROMPT)
    assert caught.value.categories == {"Violence": 6}
    double.words, double.judge_image = {}, lambda image: {"Sexual": 4}
    result = client.generate(PROMPT, num_inference_steps=2)
    assert result.moderation_blocked == [True] and result.images[0].getextrema() == ((0, 0),) * 3


def test_probes_answer_while_the_service_hangs_and_nothing_leaves(client, deployment, double):
    double.image_mode = "hang"
    stream, kinds = client.stream(PROMPT, num_inference_steps=4, preview_every=1), []

    def read() -> None:
        with contextlib.suppress(RequestCancelledError):
            kinds.extend(type(event).__name__ for event in stream)

    reading = threading.Thread(target=read)
    reading.start()
    until(lambda: double.num_hanging, "the picture is being looked at")
    for path in ("readyz", "livez", "metrics"):
        with urllib.request.urlopen(f"http://{deployment.http}/{path}", timeout=PATIENCE_S) as answer:
            text = answer.read().decode()
    assert double.num_hanging, "it hung all the while"
    stream.cancel()
    reading.join(PATIENCE_S)
    assert kinds and not {"PictureReady", "PreviewReady", "Done"} & set(kinds)
    assert 'mii_serve_moderation_checks_total{outcome="passed",stage="input"}' in text
    until(lambda: not double.num_hanging, "who hangs up takes the question back")
    double.image_mode = "no json"
    with pytest.raises(ModerationFailedError):
        client.generate(PROMPT, num_inference_steps=2)


def test_a_replica_does_not_know_the_key(deployment):
    front = psutil.Process(deployment.process.pid)
    assert front.environ()["CONTENT_SAFETY_KEY"] == KEY
    for pid in deployment.replica_pids():
        replica = psutil.Process(pid)
        assert not [name for name, value in replica.environ().items() if "CONTENT_SAFETY" in name or KEY in value]
        assert KEY not in " ".join(replica.cmdline())


def test_without_a_key_nothing_starts():
    with start("demo", env={"CONTENT_SAFETY_ENDPOINT": "https://x"}) as process:
        out, err = finished(process)
    assert process.returncode == 2 and "ready" not in out
    assert "CONTENT_SAFETY_KEY: content safety needs this key, or a managed identity in UAI_CLIENT_ID" in err


ASK_AS_IDENTITY = """
import asyncio
from mii_serve.config import DeployConfig
from mii_serve.errors import ContentBlockedError
from mii_serve.safety.azure import open_moderator

async def ask():
    async with open_moderator(DeployConfig.load({}).content_safety) as moderator:
        await moderator.check_texts("a red circle", "")
        try:
            await moderator.check_texts("gore", "")
        except ContentBlockedError as error:
            print(error)

asyncio.run(ask())
"""


IDENTITIES = {
    "online endpoint": {"IDENTITY_ENDPOINT": "{url}/msi/token", "IDENTITY_HEADER": KEY},
    "compute": {"MSI_ENDPOINT": "{url}/msi/compute", "MSI_SECRET": KEY},
    "workload": {"AZURE_AUTHORITY_HOST": "{url}", "AZURE_TENANT_ID": "tenant", "AZURE_FEDERATED_TOKEN_FILE": "{folder}/token"},
}
"""How Azure tells a process of its identity; a workload has an OIDC token in a file, as in Kubernetes."""


@pytest.mark.parametrize("where", IDENTITIES)
def test_a_managed_identity_serves_as_well_as_a_key(tmp_path: Path, where: str):
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(tls)
    with double_in_a_thread(tls) as double:
        double.token, double.client_id, double.words = "a-token", "1-2-3", {"gore": ("Hate", 4)}
        asked = {"CONTENT_SAFETY_ENDPOINT": double.url, "UAI_CLIENT_ID": "1-2-3", "SSL_CERT_FILE": str(tmp_path / "ca.pem")}
        (tmp_path / "token").write_text(KEY)
        identity = {name: value.format(url=double.url, folder=tmp_path) for name, value in IDENTITIES[where].items()}
        command = [sys.executable, "-W", "error", "-c", ASK_AS_IDENTITY]
        environment = {**os.environ, **asked, **identity}
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE_S)
        assert ran.returncode == 0, ran.stderr
        assert ran.stdout == "prompt: refused by content safety: Hate 4\n"
        assert double.num_tokens == 1 and double.refused == [] and double.texts == ["a red circle", "gore"]
