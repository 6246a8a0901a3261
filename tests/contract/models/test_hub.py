"""Models from the hub and its cache, asked by a fresh process: the hub's client reads its settings when it is imported.

The hub is an imitation on this machine; no test leaves it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from patience import PATIENCE_S

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "org/tiny"

ASK = """
import json, sys
from mii_serve.errors import ModelError
from mii_serve.models.source import find_model

for query in json.load(sys.stdin):
    settings = {"revision": None, "dtype": "fp32", "allow_pickle": False, "enable_safety_checker": True, **query}
    try:
        found = find_model(settings.pop("model"), **settings)
        answer = {"name": found.name, "folder": str(found.folder), "commit": found.commit}
    except ModelError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer))
"""

LOAD = """
from mii_serve.config import LimitsConfig
from mii_serve.models import load_model

model = load_model("org/tiny", revision=None, dtype="fp32", device="cpu", limits=LimitsConfig())
print(model.name, model.revision, model.pipeline.unet.dtype)
"""


def run(code: str, home: Path, stdin: str = "", **settings: str) -> str:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    env = {**kept, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1", **settings}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], input=stdin, env=env, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def ask(home: Path, *queries: dict[str, Any], **settings: str) -> list[dict[str, Any]]:
    lines = run(ASK, home, json.dumps(queries), **settings).splitlines()
    return [json.loads(line) for line in lines]


def fill_cache(home: Path, model: Path, repo: str = REPO) -> Path:
    """Lay a model out as the hub's client does: blobs by hash, a snapshot of links, a ref."""
    root = home / "hub" / f"models--{repo.replace('/', '--')}"
    snapshot = root / "snapshots" / COMMIT
    for file in (path for path in model.rglob("*") if path.is_file()):
        blob = root / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        blob.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, blob)
        link = snapshot / file.relative_to(model)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(COMMIT)
    return snapshot


def test_without_network_the_cache_is_the_hub(pristine: Path, tmp_path: Path) -> None:
    snapshot = fill_cache(tmp_path, pristine)
    fill_cache(tmp_path, pristine, "org/partial").joinpath(UNET).unlink()
    cached, pinned, unknown, unknown_revision, partial = ask(
        tmp_path,
        {"model": REPO},
        {"model": f"{REPO}@{COMMIT}"},
        {"model": "org/unknown"},
        {"model": REPO, "revision": "v2"},
        {"model": "org/partial"},
        HF_HUB_OFFLINE="1",
    )
    assert cached == pinned == {"name": REPO, "folder": str(snapshot), "commit": COMMIT}
    for answer, repo in ((unknown, "org/unknown"), (unknown_revision, REPO), (partial, "org/partial")):
        assert repo in answer["error"]
        assert str(tmp_path / "hub") in answer["error"]
        assert "HF_HUB_OFFLINE" in answer["error"]
        assert f"hf download {repo}" in answer["error"]
    assert "revision v2" in unknown_revision["error"]


@pytest.mark.slow
def test_a_cached_model_loads_offline_with_its_commit_and_a_clean_stdout(pristine: Path, tmp_path: Path) -> None:
    fill_cache(tmp_path, pristine)
    assert run(LOAD, tmp_path, HF_HUB_OFFLINE="1") == f"{REPO} {COMMIT} torch.float32\n"


# ---- an imitation of the hub -------------------------------------------------------------------------------------


@dataclass
class Hub:
    """What it has, and what it was asked: (method, path, authorization)."""

    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)
    url: str = ""

    def fetched(self, repo: str) -> set[str]:
        start = f"/{repo}/resolve/{COMMIT}/"
        return {path.removeprefix(start) for method, path, _ in self.asked if method == "GET" and path.startswith(start)}


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            hub.asked.append((self.command, path, self.headers.get("Authorization")))
            api = path.removeprefix("/api/models/") if path.startswith("/api/models/") else None
            org, name, kind, *rest = (api or path[1:]).split("/")
            repo, revision = f"{org}/{name}", rest[0] if rest else "main"
            if repo == "org/gated":
                return self._refuse(403, "GatedRepo")
            if repo not in hub.repos:
                return self._refuse(404, "RepoNotFound")
            if revision not in ("main", COMMIT):
                return self._refuse(404, "RevisionNotFound")
            files = hub.repos[repo]
            if api is None:
                return self._file(files.get("/".join(rest[1:])))
            if kind == "tree":
                return self._json([{"type": "file", "path": n, "size": len(c), "oid": _etag(c)} for n, c in files.items()])
            return self._json({"id": repo, "sha": COMMIT, "siblings": [{"rfilename": n} for n in files]})

        do_HEAD = do_GET  # noqa: N815

        def _file(self, content: bytes | None) -> None:
            if not content:
                return self._refuse(404, "EntryNotFound")
            return self._send(200, content, {"ETag": f'"{_etag(content)}"', "X-Repo-Commit": COMMIT})

        def _json(self, value: object) -> None:
            self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def _refuse(self, status: int, code: str) -> None:
            self._send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code})

        def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    return Handler


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield hub
    server.shutdown()
    thread.join(timeout=PATIENCE_S)
    server.server_close()


def files_of(model: Path) -> dict[str, bytes]:
    return {path.relative_to(model).as_posix(): path.read_bytes() for path in model.rglob("*") if path.is_file()}


UNET = "unet/diffusion_pytorch_model.safetensors"
UNET_FP16 = "unet/diffusion_pytorch_model.fp16.safetensors"
UNET_PICKLE = "unet/diffusion_pytorch_model.bin"


def test_only_the_files_the_pipeline_needs_are_fetched(hub: Hub, pristine: Path, tmp_path: Path) -> None:
    needed = files_of(pristine)
    others = (UNET_FP16, UNET_PICKLE, "unet/diffusion_pytorch_model.non_ema.safetensors", "v1-4.safetensors")
    needless = dict.fromkeys(others, needed[UNET])
    hub.repos[REPO] = {**needed, **needless, "README.md": b"#", "v1-4.ckpt": b"", "code.py": b"raise SystemExit"}
    settings = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_secret"}
    full, again = ask(tmp_path, {"model": REPO}, {"model": REPO}, **settings)
    assert full == again == {"name": REPO, "folder": full["folder"], "commit": COMMIT}
    assert hub.fetched(REPO) == set(needed)
    assert {authorization for _, _, authorization in hub.asked} == {"Bearer hf_secret"}
    (offline,) = ask(tmp_path, {"model": REPO}, HF_HUB_OFFLINE="1")
    assert offline == full


def test_the_kind_of_weights_follows_precision_checker_and_pickle_settings(hub: Hub, pristine: Path, tmp_path: Path) -> None:
    files = files_of(pristine)
    hub.repos["org/half"] = {**files, UNET_FP16: files[UNET]}
    hub.repos["org/only-half"] = {**files, UNET_FP16: files[UNET]}
    del hub.repos["org/only-half"][UNET]
    hub.repos["org/pickled"] = {**files, UNET_PICKLE: b"pickle"}
    del hub.repos["org/pickled"][UNET]
    hub.repos["org/bare"] = {name: content for name, content in files.items() if name != UNET}
    hub.repos["org/broken"] = {**files, UNET: b""}
    checker = "safety_checker/pytorch_model.bin"
    hub.repos["org/checker"] = {**files, checker: b"pickle"}
    del hub.repos["org/checker"]["safety_checker/model.safetensors"]
    hub.repos["org/lora"] = {"pytorch_lora_weights.safetensors": b"x", "README.md": b"#"}
    hub.repos["org/file"] = {"v1-4.safetensors": b"x"}
    half, only_half, refused, allowed, bare, broken, gated, unknown, no_revision, pickled_checker, lora, file = ask(
        tmp_path,
        {"model": "org/half", "dtype": "fp16", "enable_safety_checker": False},
        {"model": "org/only-half"},
        {"model": "org/pickled"},
        {"model": "org/pickled", "allow_pickle": True},
        {"model": "org/bare", "allow_pickle": True},
        {"model": "org/broken"},
        {"model": "org/gated"},
        {"model": "org/unknown"},
        {"model": "org/half@v9"},
        {"model": "org/checker"},
        {"model": "org/lora"},
        {"model": "org/file"},
        HF_ENDPOINT=hub.url,
    )
    assert half["commit"] == only_half["commit"] == allowed["commit"] == COMMIT
    assert UNET_FP16 in hub.fetched("org/half")
    assert not {UNET, "safety_checker/model.safetensors"} & hub.fetched("org/half")
    assert UNET_FP16 in hub.fetched("org/only-half")
    assert "no weights of unet" in refused["error"]
    assert "allow_pickle" in refused["error"]
    assert UNET_PICKLE in hub.fetched("org/pickled")
    assert bare["error"].startswith("org/bare has no weights of unet")
    assert "pickles" not in bare["error"]
    assert "org/broken" in broken["error"]
    assert "could not be asked" in broken["error"]
    assert "gated" in gated["error"]
    assert "HF_TOKEN" in gated["error"]
    assert f"{hub.url} has no model org/unknown" in unknown["error"]
    assert "no revision v9" in no_revision["error"]
    assert pickled_checker["commit"] == COMMIT
    assert checker in hub.fetched("org/checker")
    assert lora["error"].startswith("org/lora has no model_index.json, so it is not a diffusers model. It is a LoRA")
    assert "fetch it with `hf download org/file v1-4.safetensors`" in file["error"]


def test_a_hub_that_cannot_be_reached_is_told_and_the_cache_still_serves(pristine: Path, tmp_path: Path) -> None:
    snapshot = fill_cache(tmp_path, pristine)
    nowhere = "http://127.0.0.1:9"  # the discard port: nothing listens
    cached, unknown = ask(tmp_path, {"model": REPO}, {"model": "org/unknown"}, HF_ENDPOINT=nowhere)
    assert cached["folder"] == str(snapshot)
    assert nowhere in unknown["error"]
    assert "hf download org/unknown" in unknown["error"]
