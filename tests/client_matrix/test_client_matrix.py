"""Other people's clients, unmodified and each in an environment of its own, against one deployment of the built-in model.

What each can do is compared with benchmarks/results/clients.json; with --update-goldens the file is written, and
tools/publish_figures.py makes the table of docs/architecture/26-clients.md from it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from deployments import Deployment, deployed
from outside import ROOT
from patience import PATIENCE_S

SCRIPTS = ROOT / "tests" / "clients"
SHARED = ROOT / "tests" / "support" / "clients"
ENVIRONMENTS = ROOT / ".clients"
RESULTS = ROOT / "benchmarks" / "results" / "clients.json"
KEY = "studio-key-0123456789"

QUIET = {
    "ANONYMIZED_TELEMETRY": "False",
    "DISABLE_ADMIN_UI": "True",
    "DO_NOT_TRACK": "1",
    "HAYSTACK_TELEMETRY_ENABLED": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "LANGCHAIN_TRACING_V2": "false",
    "LANGSMITH_TRACING": "false",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LITELLM_TELEMETRY": "False",
    "NO_PROXY": "127.0.0.1,localhost",
    "HTTPS_PROXY": "http://127.0.0.1:9",
    "HTTP_PROXY": "http://127.0.0.1:9",
}
"""No telemetry; for clients that heed these variables, what is not on this machine is behind a proxy that is not there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    """`limits` say why the steps do not work that do not; `lacks` is what the client's own API has no way to ask for."""

    name: str
    environment: str
    script: str
    limits: dict[str, str] = field(default_factory=dict)
    lacks: tuple[str, ...] = ()
    has_grpc: bool = False


NO_PARAMETERS_OF_OTHERS = "the provider for OpenAI passes on no parameters but OpenAI's; the one for servers like it does"
NO_STREAM = "the server refuses ModelStreamInfer and says what to use instead"
NO_PREVIEWS = "has no way to ask for previews"

CLIENTS = [
    Client(name="`openai` (Python)", environment="openai", script="matrix_openai.py"),
    Client(name="`openai` (Node)", environment="node", script="matrix_openai.mjs"),
    Client(name="LiteLLM, SDK", environment="litellm", script="matrix_litellm.py", lacks=(NO_PREVIEWS,)),
    Client(name="LiteLLM, proxy, asked by `openai`", environment="litellm_proxy", script="matrix_litellm_proxy.py"),
    Client(
        name="LangChain (Python), `DallEAPIWrapper` and its tool",
        environment="langchain",
        script="matrix_langchain.py",
        limits={"own parameters": "`run` does not send its `model_kwargs`"},
        lacks=("has links only, not base64",),
    ),
    Client(
        name="LangChain (JS), `DallEAPIWrapper`",
        environment="node",
        script="matrix_langchain.mjs",
        lacks=("has no way to send own parameters",),
    ),
    Client(
        name="Vercel AI SDK, `@ai-sdk/openai`",
        environment="node",
        script="matrix_ai_sdk.mjs",
        limits={"own parameters": NO_PARAMETERS_OF_OTHERS},
        lacks=(NO_PREVIEWS,),
    ),
    Client(
        name="Vercel AI SDK, `@ai-sdk/openai-compatible`",
        environment="node",
        script="matrix_ai_sdk_compatible.mjs",
        lacks=(NO_PREVIEWS,),
    ),
    Client(
        name="Haystack, `OpenAIImageGenerator`",
        environment="haystack",
        script="matrix_haystack.py",
        lacks=("has no way to send own parameters or to ask for several images",),
    ),
    Client(
        name="`huggingface_hub`",
        environment="huggingface",
        script="matrix_huggingface.py",
        lacks=("one image an answer",),
    ),
    Client(
        name="`@huggingface/inference`",
        environment="node",
        script="matrix_huggingface.mjs",
        lacks=("one image an answer",),
    ),
    Client(
        name="`tritonclient`, gRPC and HTTP",
        environment="tritonclient",
        script="matrix_tritonclient.py",
        limits={"previews": NO_STREAM},
        has_grpc=True,
    ),
]

seen: dict[str, dict[str, object]] = {}


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Deployment]:
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text(f"{KEY} name=studio\n")
    file.chmod(0o600)
    with deployed("demo", "--api-key-file", str(file), env={"MII_SERVE_ENABLE_SAFETY_CHECKER": "0"}) as running:
        yield running
    if request.config.getoption("--update-goldens") and len(seen) == len(CLIENTS):
        in_order = {client.name: seen[client.name] for client in CLIENTS}
        RESULTS.write_text(json.dumps(in_order, indent=1, ensure_ascii=False) + "\n")


def command_of(client: Client, folder: Path) -> list[str]:
    """Node finds packages beside the script, so that its scripts are copied to where they are."""
    if client.environment != "node":
        return [str(ENVIRONMENTS / client.environment / "bin" / "python"), str(SCRIPTS / client.script)]
    for script in (*SCRIPTS.glob("*.mjs"), *SHARED.glob("*.mjs")):
        shutil.copy(script, folder)
    (folder / "node_modules").symlink_to(ENVIRONMENTS / "node" / "node_modules")
    return ["node", str(folder / client.script)]


@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.name)
def test_what_it_can_do_and_what_not(client, deployment, tmp_path, request):
    addresses = [f"http://{deployment.http}", *([deployment.grpc] if client.has_grpc else []), KEY]
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")} | QUIET
    environment["PYTHONPATH"] = str(SHARED)  # and nothing of ours
    command = [*command_of(client, tmp_path), *addresses]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, env=environment, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr[-4000:]
    told = json.loads(ran.stdout.splitlines()[-1])
    failed = {what: error for what, error in told["steps"].items() if error is not None}
    assert set(failed) == set(client.limits), failed
    works = [what for what, error in told["steps"].items() if error is None]
    seen[client.name] = {"version": told["version"], "works": works, "limits": client.limits, "lacks": list(client.lacks)}
    if not request.config.getoption("--update-goldens"):
        assert json.loads(RESULTS.read_text())[client.name] == seen[client.name], (
            "run: make client-matrix MATRIX_FLAGS=--update-goldens"
        )
