"""What is found out about the machine the tests run on."""

from __future__ import annotations

from mii_serve.engine.machine import inspect_machine


def test_this_machine_is_seen_as_it_is():
    import torch

    machine = inspect_machine()
    assert machine.packages["torch"] == torch.__version__
    assert machine.torch_cuda == torch.version.cuda and len(machine.gpus) == torch.cuda.device_count()
    assert machine.packages["deepspeed"].startswith("0.19.")
    assert machine.extensions is not None, "what DeepSpeed's set-up has written can be read"
    from deepspeed.git_version_info import installed_ops

    assert machine.extensions.names == {name for name, is_built in installed_ops.items() if is_built}


def test_a_deepspeed_that_says_nothing_about_itself_has_no_extensions(tmp_path, monkeypatch):
    (tmp_path / "deepspeed").mkdir()
    (tmp_path / "deepspeed" / "__init__.py").write_text("raise ImportError('must not be imported')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "deepspeed", raising=False)
    assert inspect_machine().extensions is None
    (tmp_path / "deepspeed" / "git_version_info_installed.py").write_text("installed_ops = open('/etc/passwd')")
    assert inspect_machine().extensions is None, "read as data, never run"
