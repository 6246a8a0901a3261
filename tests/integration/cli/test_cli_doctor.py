"""`mii_serve doctor` on the machine the tests run on: every line is held against what can be found out otherwise."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
from dataclasses import replace

import pytest
import torch
from commands import Run
from machines import COMPLETE, MISSING

from mii_serve.cli import doctor
from mii_serve.engine.engine_times import EngineTimes, EngineTimesFile
from mii_serve.engine.kernel_choices import Choice, ChoiceFile, Measurement, choices_folder
from mii_serve.types import ENGINES

WITHOUT_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without CUDA")


@WITHOUT_CUDA
def test_it_is_right_about_every_line(run: Run) -> None:
    ran = run("doctor", "--json")
    said = json.loads(ran.out)
    assert ran.code == 0 and said["auto"] == "native"
    for name, version in said["machine"]["packages"].items():
        assert version == importlib.metadata.version(name)
    assert said["machine"]["gpus"] == []
    lines = {
        (engine, line["what"].partition(" of ")[0]): line
        for engine, verdict in said["engines"].items()
        for line in verdict["requirements"]
    }
    for engine in ENGINES:
        assert lines[engine, "torch that can be imported"]["found"] == torch.__version__
        for package in ("diffusers", "transformers", "safetensors"):
            assert lines[engine, package] == {
                "what": package,
                "found": importlib.metadata.version(package),
                "is_met": True,
                "remedy": "",
            }
    assert [said["engines"][engine]["is_usable"] for engine in ENGINES] == [True, True, False]
    gpu = lines["deepspeed", "a CUDA device"]
    assert (gpu["found"], gpu["is_met"]) == ("none", False) and gpu["remedy"]
    built = lines["deepspeed", "torch built for CUDA"]
    assert built["is_met"] == (torch.version.cuda is not None)
    assert lines["deepspeed", "deepspeed 0.19"]["is_met"]
    extensions = lines["deepspeed", "DeepSpeed's extensions, built for this torch and its CUDA"]
    assert (extensions["found"], extensions["is_met"]) == ("not built", False)
    assert said["extras"]["http"] == {"is_installed": True, "remedy": ""}
    assert said["extras"]["mii"]["is_installed"] is False and "--no-deps deepspeed-mii" in said["extras"]["mii"]["remedy"]


@WITHOUT_CUDA
def test_the_table_says_the_same_and_each_lack_has_its_command_below(run: Run) -> None:
    table, said = run("doctor").out, json.loads(run("doctor", "--json").out)
    for engine, verdict in said["engines"].items():
        assert f"{engine}: {'can run' if verdict['is_usable'] else 'cannot run'}" in table
        for line in verdict["requirements"]:
            mark = "ok     " if line["is_met"] else "missing"
            command = f"          {line['remedy']}\n" if line["remedy"] else ""
            assert f"  {mark} {line['what']}: {line['found']}\n{command}" in table
    assert "auto takes: native" in table


@WITHOUT_CUDA
@pytest.mark.parametrize(("engine", "code"), [("auto", 0), ("reference", 0), ("native", 0), ("deepspeed", 1)])
def test_the_exit_code_is_about_the_engine_asked_for(run: Run, engine: str, code: int) -> None:
    assert run("doctor", "--engine", engine).code == code


def test_it_shows_the_kernels_that_were_chosen_on_a_device(monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    times = {"torch": 1.0, "triton": 0.5}
    measured = Measurement(operation="attention", shape=(8, 40, 4096, 4096), size=2, ms=times)
    choice = Choice(device="NVIDIA H100", measurements=(measured,), refused={"geglu: triton": "0.1 off"})
    ChoiceFile({"device": "NVIDIA H100"}, choices_folder()).write(choice)
    (choices_folder() / "damaged.json").write_text("{")
    chosen = "attention triton 1; not geglu: triton (0.1 off)"
    doctor.run("native", is_json=True)
    assert json.loads(capsys.readouterr().out)["fused_kernels"] == [{"device": "NVIDIA H100", "chosen": chosen}]
    doctor.run("native", is_json=False)
    assert f"  NVIDIA H100: {chosen}\n" in capsys.readouterr().out


def test_an_unknown_engine_is_wrong_usage(run: Run) -> None:
    assert run("doctor", "--engine", "tensorrt").code == 2


@pytest.mark.parametrize("machine", [COMPLETE, *(machine for machine, *_ in MISSING.values())], ids=["complete", *MISSING])
def test_any_machine_can_be_told_in_json(machine, monkeypatch, capsys, tmp_path) -> None:
    """`auto` is the engine that a start has measured to be faster, where both can run."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(doctor, "inspect_machine", lambda: machine)
    assert doctor.run("deepspeed", is_json=True) == (0 if machine is COMPLETE else 1)
    assert json.loads(capsys.readouterr().out)["auto"] == "native"
    times = EngineTimes(device="NVIDIA H100", native_ms=(2.5, 20.0), deepspeed_ms=(2.25, 20.0))
    EngineTimesFile({"device": "NVIDIA H100"}).write(times)
    doctor.run("auto", is_json=True)
    taken = json.loads(capsys.readouterr().out)["auto"]
    assert taken == ("deepspeed" if machine is COMPLETE else "native")
    assert doctor.run("auto", is_json=False) == 0
    printed = capsys.readouterr().out
    assert f"auto takes: {taken}" in printed
    assert "NVIDIA H100: a UNet call takes 2.2, 20.0 ms with deepspeed, 2.5, 20.0 ms with native" in printed


@pytest.mark.parametrize(("system", "num_gpus", "num_ranks"), [("Linux 6", 4, 4), ("Linux 6", 0, 0), ("Darwin 24", 2, 1)])
def test_it_says_how_many_gpus_ranks_can_have(system, num_gpus, num_ranks, monkeypatch, capsys) -> None:
    machine = replace(COMPLETE, system=system, gpus=COMPLETE.gpus * num_gpus)
    monkeypatch.setattr(doctor, "inspect_machine", lambda: machine)
    doctor.run("auto", is_json=True)
    assert json.loads(capsys.readouterr().out)["max_gpu_ranks"] == num_ranks
    doctor.run("auto", is_json=False)
    assert f"{num_ranks} on GPUs, over all replicas; --tensor-parallel N takes N for each" in capsys.readouterr().out


def test_a_broken_nvcc_is_no_nvcc(tmp_path, monkeypatch) -> None:
    (tmp_path / "bin").mkdir()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.write_text("#!/bin/sh\nexit 3\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(subprocess.CalledProcessError):
        subprocess.run([str(nvcc)], check=True, timeout=10)
    assert doctor.inspect_machine().nvcc is None
