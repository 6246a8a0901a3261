"""The commands and their flags. What a command does is in its own module, imported when it runs.

argparse, because typer builds its parameters with pydantic: `--help` would take twice as long to show the same text.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from mii_serve import __version__
from mii_serve.cli import bench_flags
from mii_serve.cli.exits import EPILOG, ExitCode, exit_codes, open_standard_streams, say
from mii_serve.extras import require
from mii_serve.safe_path import SAFE_PATH
from mii_serve.threads import wait_briefly
from mii_serve.types import ENGINE_CHOICES, PARAMETER_NAMES, PARAMETERS, RequestedParams

if TYPE_CHECKING:
    from mii_serve.cli.connection import Connection

DEFAULT_TARGET = "127.0.0.1:50050"
ENGINES = f"{{{','.join(ENGINE_CHOICES)}}}"
DTYPES = "{auto,fp32,fp16,bf16}"
MODELS = "hub id, diffusers folder, Azure ML model folder, or demo, the model in the package and the default"


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command named on the command line, and exit with its code."""
    open_standard_streams()
    os.environ[SAFE_PATH] = "1"  # for every Python that is started from here
    parser = build_parser()
    values = vars(parser.parse_args(argv))
    if (command := values.pop("command")) is None:
        parser.print_help(sys.stderr)
        sys.exit(ExitCode.INVALID)
    wait_briefly()  # before a command, or a process that it starts, loads torch
    with exit_codes():
        if (extra := _needed_extra(command, values)) is not None:
            require(extra)
        code = _COMMANDS[command](values)
        sys.stdout.flush()
        sys.exit(code)


class _Parser(argparse.ArgumentParser):
    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings, epilog=EPILOG, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        say(f"error: {message.removeprefix('argument ')} (see {self.prog} --help)")
        sys.exit(ExitCode.INVALID)


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="mii_serve", description="Serve Stable Diffusion v1.x: start a server, make a picture, look at a server."
    )
    parser.add_argument("--version", action="version", version=f"mii_serve {__version__}", help="show the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, usage, add_flags, line, more in (
        ("deploy", "[MODEL]", _add_server_flags, "start a server", _DEPLOY_MORE),
        ("generate", "PROMPT", _add_generate_flags, "make the picture of one prompt and write it to a file", ""),
        ("config", "show|schema", _add_config_flags, "show how a server would be configured, and why", _CONFIG_MORE),
        ("status", "", _add_status_flags, "show a server's health, what it runs and how busy it is", ""),
        ("verify", "[MODEL]", _add_verify_flags, "hold an engine against the FP32 reference, stage by stage", _VERIFY_MORE),
        ("doctor", "", _add_doctor_flags, "show what this machine has and what each engine needs", _DOCTOR_MORE),
        ("bench", "", _add_bench_flags, "load a server, time it, and check its pictures", bench_flags.MORE),
    ):
        described = f"{line[0].upper()}{line[1:]}.{more}"
        words = " ".join(("mii_serve", name, usage, "[options]")).replace("  ", " ")
        add_flags(commands.add_parser(name, usage=words, help=line, description=described))
    return parser


_DEPLOY_MORE = """

It runs until SIGTERM or Ctrl-C. When it is ready it prints one line on stdout:
ready grpc=HOST:PORT http=HOST:PORT

A flag beats the environment (MII_SERVE_REPLICAS, ...), which beats the file."""


_CONFIG_MORE = """

show takes the flags of deploy, and prints every setting's value; --effective says where each came from:
a flag, a variable, the file, or the default. schema prints the JSON schema of the file."""


_DOCTOR_MORE = """

It says for each engine what it needs, what was found, and the command that installs what is missing.
Exit code 0: the engine asked for can run here, with auto one of them; 1: it cannot."""


def _add_doctor_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--engine", choices=ENGINE_CHOICES, default="auto", help="for the exit code")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def _add_config_flags(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="show|schema", required=True)
    actions.add_parser("schema", help="print the JSON schema of the file")
    show = actions.add_parser("show", usage="mii_serve config show [MODEL] [options]", help="print every setting's value")
    show.add_argument("--effective", action="store_true", help="say where each value came from")
    show.add_argument("--json", action="store_true", help="print one JSON object")
    _add_deploy_flags(show)


def _add_server_flags(parser: argparse.ArgumentParser) -> None:
    _add_deploy_flags(parser)
    parser.add_argument("--mii-config", type=Path, metavar="FILE", help="settings in DeepSpeed-MII's words, in YAML")


def _add_deploy_flags(parser: argparse.ArgumentParser) -> None:
    # What is not on the command line must stay absent, so that the environment and the file can fill it in.
    def add(*names: str, help: str, **settings: Any) -> None:
        parser.add_argument(*names, default=argparse.SUPPRESS, help=help, **settings)

    add("model", nargs="?", metavar="MODEL", help=MODELS)
    add(
        "--served-model-name",
        action="append",
        metavar="NAME",
        help="what callers call the model; give it several times for several names, the first is the one that is told",
    )
    add("--engine", metavar=ENGINES, help="how pictures are computed")
    add("--replicas", type=int, metavar="N", help="copies of the model")
    add("--tensor-parallel", type=int, metavar="N", help="devices for each copy; this release has 1 only")
    add("--dtype", metavar=DTYPES, help="precision of the model")
    add("--device", metavar="{auto,cpu,cuda}", help="where the model runs")
    add("--host", metavar="HOST", help="address to listen on, default 127.0.0.1")
    add("--grpc-port", type=int, metavar="PORT", help="port for gRPC, default 50050; 0 is any free port")
    add("--http-port", type=int, metavar="PORT", help="port for HTTP, default 5001; 0 is any free port")
    add("--api-key-file", type=Path, metavar="FILE", help="a key per line; calls that cost something are refused without one")
    add("--tls-cert", type=Path, metavar="FILE", help="certificate chain in PEM; both ports speak TLS then")
    add("--tls-key", type=Path, metavar="FILE", help="its private key")
    add("--tls-client-ca", type=Path, metavar="FILE", help="clients must show a certificate signed by one of these")
    add("--deployment-name", metavar="NAME", help="name that callers are told, and may say for the model")
    add("--max-slots", type=int, metavar="N", help="most images in work at once, in each copy")
    add("--verify", action="store_true", help="hold the engine against the FP32 reference first; serve only if it passes")
    add("--revision", metavar="REV", help="commit, tag or branch of a hub model")
    add("--allow-pickle", action="store_true", help="load weights that can run code; only for models you trust")
    add(
        "--disable-safety-checker",
        dest="enable_safety_checker",
        action="store_false",
        help="deliver images without the model's safety check",
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="settings in YAML or TOML")
    levels = ("debug", "info", "warning", "error")
    parser.add_argument("--log-level", choices=levels, default="info", help="how much to log on stderr")
    parser.add_argument("--log-format", choices=("text", "json"), default="text", help="json is one object a line")


_METAVARS: dict[type, str] = {str: "TEXT", int: "N", float: "X"}


def _add_generate_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("prompt", metavar="PROMPT", help="what the image should show")
    add(
        "-o",
        "--output",
        type=Path,
        default=Path("out.png"),
        metavar="FILE",
        help=".png, .jpg, .jpeg or .webp, default out.png; several images become out-0.png, out-1.png, ...",
    )
    add("--target", metavar="HOST:PORT", help="ask this server; without it, the model is loaded here")
    request = parser.add_argument_group(
        "the image; what is left out gets the model's own default", "mii_serve status shows a server's defaults and schedulers."
    )
    for parameter in PARAMETERS:
        if parameter.name != "prompt":
            flag = f"--{parameter.name.replace('_', '-')}"
            request.add_argument(flag, type=parameter.kind, metavar=_METAVARS[parameter.kind], help=parameter.help)
    add = parser.add_argument_group("without --target").add_argument
    # No default: a flag that was not given leaves the choice to the environment.
    add("--model", default=argparse.SUPPRESS, metavar="MODEL", help=MODELS)
    add("--engine", default=argparse.SUPPRESS, metavar=ENGINES, help="how the picture is computed")
    add("--dtype", default=argparse.SUPPRESS, metavar=DTYPES, help="precision of the model")
    add = parser.add_argument_group("the call").add_argument
    add("--timeout", type=float, metavar="SECONDS", help="give up after this long, loading a model not counted")
    add(
        "--embed-metadata",
        action=argparse.BooleanOptionalAction,
        help="write the parameters into the file; PNG only, where it is the default",
    )
    add("--json", action="store_true", help="print one JSON object instead of paths")
    _add_tls_flags(parser)


def _add_status_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--target", default=DEFAULT_TARGET, metavar="HOST:PORT", help=f"the server to look at, default {DEFAULT_TARGET}")
    add("--timeout", type=float, default=5.0, metavar="SECONDS", help="give up after this long, default 5")
    add("--json", action="store_true", help="print one JSON object instead of a table")
    _add_tls_flags(parser)


_VERIFY_MORE = """

First the reference is compared with diffusers' own pipeline on the model. Then a fixed set of prompts, samplers and
sizes is drawn with the reference and with the engine, there alone and in a batch, and printed is how far the
text encoder, single UNet calls, the VAE and whole pictures are off. The exit code is 1 when a limit is broken.
Settings come from flags, the environment and the file, as for deploy."""


def _add_verify_flags(parser: argparse.ArgumentParser) -> None:
    def add(*names: str, help: str, **settings: Any) -> None:
        parser.add_argument(*names, default=argparse.SUPPRESS, help=help, **settings)

    add("model", nargs="?", metavar="MODEL", help=MODELS)
    add("--engine", metavar=ENGINES, help="the engine to verify")
    add("--dtype", metavar=DTYPES, help="its precision")
    add("--device", metavar="{auto,cpu,cuda}", help="where the model runs, the reference too")
    add("--max-slots", type=int, metavar="N", help="most images in work at once, which is the size of the batch")
    add("--revision", metavar="REV", help="commit, tag or branch of a hub model")
    add("--allow-pickle", action="store_true", help="load weights that can run code; only for models you trust")
    parser.add_argument("--config", type=Path, metavar="FILE", help="settings in YAML or TOML")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there, as JSON")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="write the pictures side by side: .png, .jpg or .webp")
    levels = ("debug", "info", "warning", "error")
    parser.add_argument("--log-level", choices=levels, default="warning", help="how much to log on stderr")


def _add_bench_flags(parser: argparse.ArgumentParser) -> None:
    parser.usage = bench_flags.USAGE
    bench_flags.add_flags(parser)
    _add_tls_flags(parser)


def _add_tls_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("a server that wants more", "An API key is taken from MII_SERVE_API_KEY.")
    group.add_argument("--tls-ca", type=Path, metavar="FILE", help="speak TLS, and trust certificates signed by these")
    group.add_argument("--tls-cert", type=Path, metavar="FILE", help="certificate to show to the server")
    group.add_argument("--tls-key", type=Path, metavar="FILE", help="its private key")


def _needed_extra(command: str, values: dict[str, Any]) -> str | None:
    """The extra without which a command can do nothing of what it is asked to."""
    match command:
        case "config" | "deploy" | "verify":
            return "server"
        case "generate":
            return "server" if values["target"] is None else None
        case _:
            return None


def _connection(values: dict[str, Any]) -> Connection:
    from mii_serve.cli.connection import Connection

    return Connection(**{name: values[name] for name in ("target", "tls_ca", "tls_cert", "tls_key")})


def _deploy(values: dict[str, Any]) -> int:
    from mii_serve.cli.deploy import run

    file, log_level, log_format = values.pop("config"), values.pop("log_level"), values.pop("log_format")
    return run(values, file, log_level, log_format, values.pop("mii_config"))


def _config(values: dict[str, Any]) -> int:
    from mii_serve.cli import config

    if values.pop("action") == "schema":
        return config.schema()
    file, is_effective, is_json = values.pop("config"), values.pop("effective"), values.pop("json")
    del values["log_level"], values["log_format"]
    return config.show(values, file, is_effective=is_effective, is_json=is_json)


def _generate(values: dict[str, Any]) -> int:
    from mii_serve.cli.generate import run

    return run(
        RequestedParams(**{name: values[name] for name in PARAMETER_NAMES}),
        output=values["output"],
        embed_metadata=values["embed_metadata"],
        connection=None if values["target"] is None else _connection(values),
        flags={name: values[name] for name in ("model", "engine", "dtype") if name in values},
        timeout=values["timeout"],
        is_json=values["json"],
    )


def _status(values: dict[str, Any]) -> int:
    from mii_serve.cli.status import run

    return run(_connection(values), timeout=values["timeout"], is_json=values["json"])


def _verify(values: dict[str, Any]) -> int:
    from mii_serve.cli.verify import run

    file, report_file, picture_file = values.pop("config"), values.pop("json"), values.pop("picture")
    log_level = values.pop("log_level")
    return run(values, file, report_file=report_file, picture_file=picture_file, log_level=log_level)


def _doctor(values: dict[str, Any]) -> int:
    from mii_serve.cli.doctor import run

    return run(values["engine"], is_json=values["json"])


def _bench(values: dict[str, Any]) -> int:
    from mii_serve.cli import bench

    if values.pop("action") == "compare":
        return bench.compare(values["files"], is_json=values["is_json"])
    values["target"] = values["target"] or DEFAULT_TARGET
    return bench.run(values, _connection(values))


_COMMANDS = {
    "bench": _bench,
    "config": _config,
    "deploy": _deploy,
    "doctor": _doctor,
    "generate": _generate,
    "status": _status,
    "verify": _verify,
}
