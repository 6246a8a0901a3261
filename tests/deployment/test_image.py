"""The CPU image, built by buildah on a Debian that mmdebstrap made, and run as its user on a read-only root file system.

No registry of images is needed. Needs root, as buildah does without user namespaces; elsewhere it is skipped.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from deployment_tools import ROOT, TOOLS, tool
from deployments import read_line
from patience import PATIENCE_S

from mii_serve.client import Client

CONTAINERS = TOOLS / "containers"
ROOTFS = TOOLS / "rootfs.tar"
CERTIFICATES = "/etc/ssl/certs"
"""The host's: its way out may have a proxy with a certificate of its own."""
FOLDERS = ("/", "/etc", "/opt/python", "/opt/mii_serve", "/tmp", "/models")
LABELS = {"title", "description", "licenses", "version", "revision"}


class Buildah:
    """buildah with everything it stores in a folder that the test removes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._program = tool("buildah")

    def __call__(self, *arguments: str | Path) -> str:
        storage = ["--root", self._folder / "storage", "--runroot", self._folder / "run", "--storage-driver", "vfs"]
        command = ["nice", self._program, *map(str, storage), *map(str, arguments)]
        configuration = {"CONTAINERS_REGISTRIES_CONF": str(CONTAINERS / "etc/containers/registries.conf")}
        environment = {**os.environ, **configuration}
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
        assert ended.returncode == 0, f"buildah {arguments[0]}: {ended.stdout[-3000:]}\n{ended.stderr[-3000:]}"
        return ended.stdout

    def build(self, file: Path, tag: str, context: Path, *options: str) -> None:
        policy = ["--signature-policy", CONTAINERS / "etc/containers/policy.json", "--isolation", "chroot", "--pull-never"]
        self("bud", *policy, *options, "-f", file, "-t", tag, context)


def torch_flags(folder: Path) -> list[str]:
    """Where torch comes from: the wheel of this machine's own CPU build, if pip finds it, or what the Dockerfile says."""
    ours = version("torch")
    if not ours.endswith("+cpu"):
        return []
    pip = [str(ROOT / ".venv/bin/pip"), "download", "-q", "--no-deps", "-d", str(folder), f"torch==={ours}"]
    if subprocess.run(pip, capture_output=True, check=False).returncode != 0:
        return []
    return ["--build-arg", "TORCH_FLAGS=--no-index --no-deps --find-links /wheels", "--volume", f"{folder}:/wheels:ro"]


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> Iterator[tuple[dict[str, Any], Path]]:
    """The image's configuration, and its root file system."""
    if os.geteuid() != 0:
        pytest.skip("building an image needs root here")
    if not ROOTFS.exists():
        pytest.skip("mmdebstrap could not make a Debian; see tools/install_deployment_tools.sh")
    folder = tmp_path_factory.mktemp("image")
    buildah = Buildah(folder)
    try:
        (folder / "base").mkdir()
        shutil.copy(ROOTFS, folder / "base")
        (folder / "base" / "Dockerfile").write_text("FROM scratch\nADD rootfs.tar /\n")
        buildah.build(folder / "base" / "Dockerfile", "localhost/debian:1", folder / "base")
        arguments = ["--build-arg", "BASE_IMAGE=localhost/debian:1", "--build-arg", "EXTRAS=server,http"]
        arguments += ["--build-arg", "REVISION=trial", "--volume", f"{CERTIFICATES}:{CERTIFICATES}:ro"]
        arguments += torch_flags(folder / "wheels")
        buildah.build(ROOT / "deployment/docker/Dockerfile", "localhost/mii-serve:1", ROOT, *arguments)
        config = json.loads(buildah("inspect", "--type", "image", "localhost/mii-serve:1"))["OCIv1"]["config"]
        container = buildah("from", "--pull-never", "localhost/mii-serve:1").strip()
        yield config, Path(buildah("mount", container).strip())
        buildah("umount", container)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def contained(config: dict[str, Any], root: Path, *command: str) -> list[str]:
    """A command in the image: its user and variables, a root that is read-only, and a /tmp and a /models of its own."""
    script = """
        mount --make-rprivate / && mount --bind "$1" "$1" && mount --rbind /dev "$1/dev" && mount -t proc proc "$1/proc" &&
        mount -o remount,ro,bind "$1" &&
        for own in tmp models; do mount -t tmpfs -o mode=1777 tmpfs "$1/$own" || exit; done &&
        user=$2 root=$1 && shift 2 && exec chroot --userspec="$user" "$root" "$@"
    """
    variables = ["/usr/bin/env", "-i", "--chdir", config["WorkingDir"], *config["Env"]]
    return ["unshare", "--mount", "sh", "-c", script, "sh", str(root), config["User"], *variables, *command]


def test_the_image_says_what_it_is(image):
    config, _ = image
    assert {name.removeprefix("org.opencontainers.image.") for name in config["Labels"]} >= LABELS
    assert config["User"] == "10001:10001" and config["StopSignal"] == "SIGTERM"
    assert set(config["ExposedPorts"]) == {"50050", "5001"} or set(config["ExposedPorts"]) == {"50050/tcp", "5001/tcp"}


def test_nothing_of_the_image_can_be_written_but_tmp_and_models(image):
    said = subprocess.run(
        contained(*image, "sh", "-c", f"id -u; for at in {' '.join(FOLDERS)}; do touch $at/x && echo $at; done"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert said.stdout.split() == ["10001", "/tmp", "/models"], said.stderr


def test_it_serves_and_drains(image):
    config, root = image
    assert config["Entrypoint"][:2] == ["tini", "--"] and config["Cmd"][0] == "deploy"
    command = contained(config, root, *config["Entrypoint"], "deploy", "--grpc-port", "0", "--http-port", "0")
    with (
        (root.parent / "log").open("w+") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as process,
    ):
        try:
            address = re.fullmatch(r"ready grpc=(\S+:\d+) http=(\S+:\d+)\n", read_line(process, log))
            assert address
            with Client(address[1]) as client:
                picture = client.generate("a red circle on a blue background", num_inference_steps=10, seed=1).images[0]
            assert len(picture.getcolors(picture.width * picture.height)) > 10
            process.terminate()
            assert process.wait(PATIENCE_S) == 0
        finally:
            process.kill()
