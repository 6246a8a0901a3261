"""`mii_serve deploy --verify`, with real processes: it serves what passes, and ends with the stage's name where it does not."""

from __future__ import annotations

import os
from pathlib import Path

from deployments import deployed, finished, start

from mii_serve.client import Client

FAULT = """
import sys
if "mii_serve.replica.process" in sys.orig_argv:
    from mii_serve.engine.kernels.native import NativeKernels
    project = NativeKernels.project_prompts
    def without_the_last_key(self, embeds):
        key_values = project(self, embeds)
        key_values[:, -1, : self.prompt_width // 2] = 0
        return key_values
    NativeKernels.project_prompts = without_the_last_key
"""
"""Python runs this when a process starts. The front has no fault, the replica's kernels lose the last token's key."""


def test_a_deployment_that_passes_serves():
    with deployed("demo", "--verify", "--engine", "native") as running, Client(running.grpc) as client:
        made = client.generate("a red circle", num_inference_steps=2, seed=1)
        assert len(made.images) == 1
        assert made.nsfw_content_detected is not None, "the safety checker is on again"


def test_a_deployment_that_fails_ends_with_the_name_of_the_stage(tmp_path: Path):
    (tmp_path / "sitecustomize.py").write_text(FAULT)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    with start("demo", "--verify", "--engine", "native", env={"PYTHONPATH": path}) as process:
        out, err = finished(process)
    assert process.returncode == 1
    assert out == "", "it was never ready"
    last = err.splitlines()[-1]
    assert last.startswith("error: native fp32 on cpu is not the reference: the unet fails first (timestep ")
