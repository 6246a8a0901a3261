"""The configurations of proxies, each with the real proxy before the real server: calls are answered, and streams stream."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from deployment_tools import ROOT, tool
from deployments import ENDLESS, Deployment, deployed, until
from patience import PATIENCE_S

from mii_serve.client import Client, Step

PROXY = ROOT / "deployment" / "proxy"


@pytest.fixture(scope="module")
def server() -> Iterator[Deployment]:
    with deployed("demo") as running:
        yield running


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def with_ports(text: str, server: Deployment, ports: dict[str, str]) -> str:
    """The same configuration between other ports."""
    ports = ports | {"5001": server.http.rpartition(":")[2], "50050": server.grpc.rpartition(":")[2]}
    marked = re.sub(r"\b(5001|50050|8080|8081)\b", lambda found: ports[found[0]], text)
    assert marked != text
    return marked


def nginx(file: Path) -> list[str]:
    temporary = "".join(
        f"{name}_temp_path {file.parent}/{name};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    file.write_text(file.read_text().replace("http {", "http {" + temporary, 1))
    options = f"daemon off; pid {file.parent}/pid; error_log stderr; worker_processes 1;"
    if os.geteuid() == 0:
        options += " user root;"
    return [tool("nginx"), "-p", str(file.parent), "-c", str(file), "-g", options]


def envoy(file: Path) -> list[str]:
    return [tool("envoy"), "-c", str(file), "--concurrency", "1", "--use-dynamic-base-id", "-l", "warning"]


@pytest.fixture(params=[("nginx.conf", nginx), ("envoy.yaml", envoy)], ids=["nginx", "envoy"], scope="module")
def proxy(request, server, tmp_path_factory) -> Iterator[tuple[str, str]]:
    """Its addresses for HTTP and for gRPC."""
    name, command_for = request.param
    http, grpc = free_port(), free_port()
    file = tmp_path_factory.mktemp("proxy") / name
    file.write_text(with_ports((PROXY / name).read_text(), server, {"8080": http, "8081": grpc}))
    command: list[str] = command_for(file)
    with (file.parent / "log").open("w+") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            answers = is_answering(process, f"http://127.0.0.1:{http}/readyz")
            until(answers, f"{name} answers")
            yield f"127.0.0.1:{http}", f"127.0.0.1:{grpc}"
        finally:
            process.terminate()
            process.wait(PATIENCE_S)
            log.seek(0)
            print(log.read()[-4000:])


def is_answering(process: subprocess.Popen[bytes], address: str) -> Callable[[], bool]:
    def asked() -> bool:
        assert process.poll() is None, "the proxy has ended"
        try:
            with urllib.request.urlopen(address, timeout=10) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    return asked


def test_grpc_calls_pass_and_their_errors_keep_the_field(proxy):
    with Client(proxy[1]) as client:
        client.wait_ready(PATIENCE_S)
        assert len(client.generate("a red circle", num_inference_steps=2).images) == 1
        with pytest.raises(Exception, match="num_inference_steps") as caught:
            client.generate("a red circle", num_inference_steps=100_000)
        assert getattr(caught.value, "field", None) == "num_inference_steps"


def test_events_of_grpc_arrive_while_the_request_runs(proxy, server):
    """The request never ends by itself: what comes has not waited for its end."""
    with Client(proxy[1]) as client, client.stream("a red circle", **ENDLESS) as events:
        steps = [event.step for event, _ in zip((found for found in events if isinstance(found, Step)), range(3), strict=False)]
        assert steps == sorted(steps) and len(steps) == 3
    with Client(server.grpc) as client:
        until(lambda: client.server_info().activity.num_running == 0, "leaving the proxy's stream cancels the request")


def test_http_requests_pass(proxy):
    request = {"prompt": "a red circle", "n": 1, "response_format": "b64_json"}
    with urllib.request.urlopen(posted(proxy[0], request), timeout=PATIENCE_S) as answer:
        assert json.load(answer)["data"][0]["b64_json"]


def test_partial_images_of_http_arrive_while_the_request_runs(proxy):
    request = {"prompt": "a red circle", "stream": True, "partial_images": 3}
    with urllib.request.urlopen(posted(proxy[0], request), timeout=PATIENCE_S) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        kinds = [line.decode().split()[1] for line in answer if line.startswith(b"event: ")]
    assert kinds[-1] == "image_generation.completed" and "image_generation.partial_image" in kinds[:-1]


def test_figures_are_not_for_callers(proxy):
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"http://{proxy[0]}/metrics", timeout=PATIENCE_S)


def posted(address: str, body: dict[str, object]) -> urllib.request.Request:
    url = f"http://{address}/v1/images/generations"
    return urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
