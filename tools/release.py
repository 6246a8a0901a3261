#!/usr/bin/env python3
"""Makes everything of a release in one folder, from the committed files alone, and tries it.

    make release                                        into dist/
    python tools/release.py --draft --out /tmp/trial    before the changelog has its section

It checks that version and changelog agree, builds the source distribution and from it the wheel, both twice, under different
circumstances, and compares every byte. Then it installs the wheel into an empty environment, draws a picture with it and
inspects it, writes what that environment holds as a CycloneDX SBOM, and the licence of every package of the tested set.
Packages come over the network. What is published, and where, is left to the person who runs it.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import venv
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import release_checks
from release_checks import ROOT, ReleaseError

BUILD_ENVIRONMENT = ROOT / ".release"
REQUIREMENTS = ROOT / "tools" / "release_requirements.txt"
SHIPPED_EXTRAS = "azure,bench,http,otel,parquet,provenance,server"
"""What the tried environment has; DeepSpeed and Ray are left out, because they are not for every machine."""
IN_SOURCE = (
    "Makefile",
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "LICENSE",
    "NOTICE",
    "constraints.txt",
    "pyproject.toml",
    "mii_serve/__init__.py",
    "tests/conftest.py",
    "tools/release.py",
    "benchmarks/README.md",
    "deployment/helm/Chart.yaml",
    "docs/architecture/README.md",
)
IN_WHEEL = ("mii_serve/__init__.py", "mii_serve/py.typed", "mii_serve/gateway/page/assets/page.js")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder for the files, default dist/")
    parser.add_argument(
        "--draft", action="store_true", help="take the changelog's section Unreleased, and files that are not committed"
    )
    parser.add_argument("--no-trial", action="store_true", help="only build: no installation, no SBOM")
    asked = parser.parse_args()
    try:
        made = make(asked.out, is_draft=asked.draft, has_trial=not asked.no_trial)
    except (ReleaseError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for file in made:
        print(file)
    return 0


def make(out: Path, *, is_draft: bool, has_trial: bool) -> list[Path]:
    """All files of the release.

    Raises:
        ReleaseError: something is not as it must be.
        CalledProcessError: a program failed; its output has the reason.
    """
    number = release_checks.version()
    notes = release_checks.section_of(number, is_draft=is_draft)
    licences = list(release_checks.licences())
    if problems := [one.problem for one in licences if one.problem]:
        raise ReleaseError("; ".join(problems))
    if not is_draft and (changed := _output("git", "status", "--porcelain", cwd=ROOT)):
        raise ReleaseError(f"there are files that are not committed:\n{changed}")
    out.mkdir(parents=True, exist_ok=True)
    _build_environment()
    with tempfile.TemporaryDirectory(prefix="release-") as folder:
        built = _built_twice(Path(folder), is_draft=is_draft)
        made = [Path(shutil.copy(file, out)) for file in built]
        _check_contents(*made)
        stem = f"mii_serve-{number}"
        made.append(_written(out / f"{stem}-notes.md", f"# mii_serve {number}\n\n{notes.text}\n"))
        lines = [f"{one.name} {one.version}\t{one.licence}\n" for one in licences]
        made.append(_written(out / f"{stem}-licences.txt", "".join(lines)))
        if has_trial:
            made.append(_tried(made[1], Path(folder) / "trial", out / f"{stem}.cdx.json"))
    digests = [f"{_digest(file)}  {file.name}\n" for file in made]
    return [*made, _written(out / "SHA256SUMS", "".join(digests))]


def _build_environment() -> None:
    if not (BUILD_ENVIRONMENT / "bin" / "python").exists():
        venv.create(BUILD_ENVIRONMENT, with_pip=True)
    _run(BUILD_ENVIRONMENT / "bin" / "pip", "install", "-q", "-r", REQUIREMENTS)


def _built_twice(folder: Path, *, is_draft: bool) -> tuple[Path, Path]:
    """The source distribution and the wheel, if two builds give the same bytes."""
    epoch = _output("git", "log", "-1", "--format=%ct", cwd=ROOT) or "946684800"
    builds = []
    for number in (1, 2):
        source, target = folder / f"source-{'x' * number}", folder / f"built-{number}"
        _copy_sources(source, is_draft=is_draft, is_private=number == 2)
        environment = {"SOURCE_DATE_EPOCH": epoch, "PYTHONHASHSEED": str(number), "TZ": ("UTC", "Asia/Tokyo")[number - 1]}
        python = BUILD_ENVIRONMENT / "bin" / "python"
        # Without --sdist or --wheel, the wheel is made from the source distribution.
        _run(python, "-m", "build", "--no-isolation", "--outdir", target, source, environment=environment)
        builds.append((next(target.glob("*.tar.gz")), next(target.glob("*.whl"))))
    for first, second in zip(*builds, strict=True):
        if _digest(first) != _digest(second):
            raise ReleaseError(f"two builds of {first.name} differ: {first} and {second}")
    return builds[0]


def _copy_sources(target: Path, *, is_draft: bool, is_private: bool) -> None:
    """What is committed; of a draft, also what is changed and new. `is_private`: only the owner may read the copies."""
    listed = _output("git", "ls-files", "-z", "--cached", *(("--others", "--exclude-standard") if is_draft else ()), cwd=ROOT)
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)
            if is_private:
                (target / name).chmod((target / name).stat().st_mode & 0o700)


def _check_contents(source: Path, wheel: Path) -> None:
    with tarfile.open(source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    if missing := [name for name in IN_SOURCE if name not in names]:
        raise ReleaseError(f"{source.name} lacks {', '.join(missing)}")
    with zipfile.ZipFile(wheel) as files:
        held = set(files.namelist())
    if missing := [name for name in IN_WHEEL if name not in held]:
        raise ReleaseError(f"{wheel.name} lacks {', '.join(missing)}")
    if foreign := {name.partition("/")[0] for name in held if not name.startswith(("mii_serve/", "mii_serve-"))}:
        raise ReleaseError(f"{wheel.name} has {', '.join(sorted(foreign))} beside the package")


def _tried(wheel: Path, folder: Path, bill: Path) -> Path:
    """Install the wheel where nothing is: first the client, then the server, which draws. Write what is there then."""
    venv.create(folder, with_pip=True)
    python, command = folder / "bin" / "python", folder / "bin" / "mii_serve"
    constraints = ("-c", ROOT / "constraints.txt")
    _run(python, "-m", "pip", "install", "-q", *constraints, wheel)
    if (told := _output(command, "--version", cwd=folder)) != f"mii_serve {release_checks.version()}":
        raise ReleaseError(f"the installed command says {told!r}")
    _run(command, "batch", "--help", cwd=folder)
    _run(python, "-m", "pip", "install", "-q", *constraints, f"{wheel}[{SHIPPED_EXTRAS}]")
    _run(python, "-m", "pip", "check")
    picture = folder / "picture.png"
    _run(command, "generate", "a red circle on a blue background", "--seed", "7", "-o", picture, cwd=folder)
    _run(command, "inspect", picture, cwd=folder)
    about = ("--pyproject", ROOT / "pyproject.toml", "--output-reproducible", "--of", "JSON")
    _run(BUILD_ENVIRONMENT / "bin" / "cyclonedx-py", "environment", *about, "-o", bill, python)
    return bill


def _written(file: Path, text: str) -> Path:
    file.write_text(text)
    return file


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _run(*command: str | Path, cwd: Path | None = None, environment: Mapping[str, str] | None = None) -> None:
    """Run a program with the output on stderr, and say how long it took."""
    start, words = time.monotonic(), list(map(str, command))
    subprocess.run(words, cwd=cwd, env={**_clean(), **(environment or {})}, stdout=sys.stderr, check=True)
    print(f"{time.monotonic() - start:6.1f} s  {' '.join(words[:4])} ...", file=sys.stderr)


def _output(*command: str | Path, cwd: Path) -> str:
    words: Sequence[str] = list(map(str, command))
    return subprocess.run(words, cwd=cwd, env=_clean(), capture_output=True, text=True, check=True).stdout.strip("\n")


def _clean() -> dict[str, str]:
    """This process's environment without settings of a server and without other places for modules."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH" and not name.startswith("MII_SERVE_")}


if __name__ == "__main__":
    sys.exit(main())
