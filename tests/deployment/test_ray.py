"""The application on a real Ray, in a network that has only loopback: Ray's gRPC proxy listens on all addresses.

One scenario runs for all tests (`ray_scenario.py`, some minutes); each test reads one part of what it told.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from deployment_tools import ROOT, TOOLS

PYTHON = TOOLS / "ray" / "bin" / "python"
LIMIT_S = 1500.0
OWN_SPACES = ["unshare", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
"""All that the scenario starts ends with it."""

Told = dict[str, Any]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Told:
    if not PYTHON.exists():
        pytest.skip("Ray is not installed; tools/install_deployment_tools.sh could not get it")
    spaces = OWN_SPACES if os.geteuid() == 0 else [*OWN_SPACES, "--map-root-user"]
    if subprocess.run([*spaces, "true"], capture_output=True).returncode != 0:
        pytest.skip("unshare may make no network here, and without one Ray would listen on this machine's addresses")
    folder = tmp_path_factory.mktemp("ray")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
    command = [*spaces, PYTHON, ROOT / "tests" / "support" / "ray_scenario.py", folder]
    with (folder / "scenario.log").open("w") as log:
        ran = subprocess.run(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment, timeout=LIMIT_S)
    if ran.returncode != 0:
        pytest.fail(f"the scenario ended with {ran.returncode}: {ends_of(folder)}")
    return json.loads(ran.stdout.splitlines()[-1])


def ends_of(folder: Path) -> str:
    return "\n".join(f"{file.name}: {file.read_text()[-3000:]}" for file in sorted(folder.glob("*.log")))


def part(told: Told, name: str) -> Told:
    assert "failed" not in told[name], told[name]["failed"]
    return told[name]


def test_serve_run_starts_it_and_rays_grpc_proxy_listens_on_all_addresses(told):
    assert part(told, "starts")["listening"] == {"8000": "127.0.0.1", "9000": "::"}


def test_our_sdk_works_through_the_proxy_unmodified(told):
    seen = part(told, "clients")
    assert (seen["seeds"], seen["same"], seen["health"]) == ([5], True, "SERVING")
    assert [*seen["events"][:2], *seen["events"][-2:]] == ["Queued", "Started", "PictureReady", "Done"]


def test_errors_keep_their_field_and_deadlines_reach_admission(told):
    seen = part(told, "clients")
    assert (seen["unary error"][0], seen["unary error"][2]) == ("InvalidRequestError", "num_inference_steps")
    assert (seen["stream error"][0], seen["stream error"][2]) == ("InvalidRequestError", "height")
    assert seen["deadline"][0] == "DeadlineExceededError" and "this takes about" in seen["deadline"][1]


def test_callers_of_other_addresses_are_refused_while_host_is_loopback(told):
    assert part(told, "clients")["from elsewhere"][0] == "PermissionDeniedError"


def test_miis_client_works_unmodified(told):
    seen = part(told, "clients")["mii"]
    if seen is None:
        pytest.skip("MII's client is not installed; make clients")
    assert seen["same"] and seen["single"]["sizes"] == [[64, 64]] and len(seen["several"]["sizes"]) == 4
    assert (seen["invalid"]["code"], seen["terminate"]["code"]) == ("INVALID_ARGUMENT", "PERMISSION_DENIED")


def test_openais_client_works_unmodified(told):
    seen = part(told, "clients")["openai"]
    if seen is None:
        pytest.skip("OpenAI's client is not installed; make clients")
    assert (seen["signature"], seen["seed"]) == ("89504e47", 5)
    assert seen["events"] == ["image_generation.completed"] and seen["error"] == [400, "size"]


def test_http_works_through_the_proxy_and_on_the_fronts_own_port(told):
    seen = part(told, "clients")
    assert seen["http"] == {"/readyz": 200, "/metrics": 200, "/": 200, "/nothing": 404}
    assert seen["direct http"] == 200


def test_queued_work_makes_two_replicas_of_one_and_its_end_one_of_two(told):
    seen = part(told, "scales")
    assert (set(seen["answers"]), seen["most"]) == ({"ok"}, 2)


def test_a_redeploy_under_load_loses_no_request(told):
    seen = part(told, "redeploys")
    assert set(seen["answers"]) == {"ok"} and seen["name"] == "redeployed"


def test_the_requests_of_a_replica_that_is_killed_with_all_the_work_are_answered_with_the_right_pictures(told):
    seen = part(told, "survives")
    assert (seen["before"], seen["answers"]) == ([0, 12], {"ok": 12})
    assert len(seen["differences"]) == 12 and max(seen["differences"]) <= 1


def test_the_ranks_of_a_replica_share_one_placement_group(told):
    seen = part(told, "ranks")
    assert (seen["num_ranks"], seen["seeds"]) == (2, [5])
    assert "'CPU': 1.0" in seen["groups"]
