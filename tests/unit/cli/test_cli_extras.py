"""What a command says where the extra that it needs is not installed."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from commands import Run

from mii_serve.cli import deploy, doctor, main
from mii_serve.cli.exits import ExitCode
from mii_serve.extras import EXTRAS, MissingExtraError, how_to_get


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MissingExtraError("server", "numpy"), f"numpy is not installed: {how_to_get('server')}"),
        (ModuleNotFoundError("No module named 'yaml'", name="yaml"), f"yaml is not installed: {how_to_get('bench')}"),
        (ModuleNotFoundError("No module named 'x'", name="x"), "x is not installed, and no extra of mii_serve includes it"),
    ],
)
def test_a_missing_module_is_one_line_with_its_own_exit_code(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: ModuleNotFoundError, said: str
) -> None:
    def fails(*_: object, **__: object) -> int:
        raise error

    monkeypatch.setattr("mii_serve.cli.status.run", fails)
    ran = run("status")
    assert (ran.code, ran.out) == (ExitCode.NOT_INSTALLED, "")
    assert ran.err.startswith(f"error: {said}") and ran.err.count("\n") == 1
    monkeypatch.setenv("MII_SERVE_DEBUG", "1")
    with pytest.raises(ModuleNotFoundError):
        main(["status"])


@pytest.mark.parametrize(
    "argv", [("deploy",), ("verify",), ("generate", "a"), ("config", "show"), ("config", "schema")], ids=" ".join
)
def test_a_command_that_needs_the_server_says_so_before_anything_else(
    run: Run, monkeypatch: pytest.MonkeyPatch, argv: tuple[str, ...]
) -> None:
    monkeypatch.setitem(EXTRAS, "server", ("no_such_module",))  # type: ignore[arg-type]
    ran = run(*argv)
    assert (ran.code, ran.out) == (ExitCode.NOT_INSTALLED, "")
    assert ran.err == f"error: no_such_module is not installed: {how_to_get('server')}\n"


async def test_without_the_extra_http_a_server_has_no_http_port_and_says_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.startswith("mii_serve.gateway")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    nothing: Any = None
    async with deploy._open_http(nothing, nothing, nothing, None, 1) as address:
        assert address is None
    assert capsys.readouterr().err == f"HTTP is off: uvicorn is not installed: {how_to_get('http')}\n"


def test_the_doctor_names_the_extras(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = doctor.Machine(system="s", python="3", num_cores=1, torch_error="ModuleNotFoundError: torch")
    monkeypatch.setattr(doctor, "inspect_machine", lambda: machine)
    said = run("doctor")
    assert said.code == 1 and "ModuleNotFoundError" not in said.out
    assert {extra for extra in EXTRAS if how_to_get(extra) in said.out} == {"server", "http", "deepspeed", "otel"}
