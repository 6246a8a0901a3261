"""`mii_serve config`."""

from __future__ import annotations

import json

from commands import Run


def test_show_says_where_each_value_came_from(run: Run, tmp_path, monkeypatch) -> None:
    file = tmp_path / "deploy.yaml"
    file.write_text("deployment_name: mine\n")
    monkeypatch.setenv("NUM_REPLICAS", "2")
    ran = run("config", "show", "--effective", "--config", str(file), "--grpc-port", "7")
    assert ran.code == 0, ran.err
    rows = {line.split()[0]: line.split(maxsplit=2)[1:] for line in ran.out.splitlines()}
    assert rows["grpc_port"] == ["7", "flag"]
    assert rows["replicas"] == ["2", "environment NUM_REPLICAS"]
    assert rows["deployment_name"] == ['"mine"', f"file {file}"]
    assert rows["limits.max_prompt_chars"] == ["4096", "default"]


def test_show_as_json(run: Run) -> None:
    assert json.loads(run("config", "show", "--json").out)["limits"]["max_prompt_chars"] == 4096
    shown = json.loads(run("config", "show", "--json", "--effective", "demo").out)
    assert shown["model"] == {"value": "demo", "origin": "flag"}


def test_what_deploy_would_refuse_is_refused(run: Run) -> None:
    ran = run("config", "show", "--replicas", "0")
    assert ran.code == 2 and "replicas" in ran.err


def test_the_schema_names_every_setting(run: Run) -> None:
    schema = json.loads(run("config", "schema").out)
    assert {"model", "replicas", "limits", "api_key_file"} <= set(schema["properties"])
