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
from mii_serve.cli import batch_flags, bench_flags, evaluate_flags, http_flags, lora_flags
from mii_serve.cli.exits import EPILOG, ExitCode, exit_codes, open_standard_streams, say
from mii_serve.extras import require
from mii_serve.safe_path import SAFE_PATH
from mii_serve.threads import wait_briefly
from mii_serve.types import ENGINE_CHOICES, OWN_STEPS, PARAMETER_NAMES, PARAMETERS, STRENGTH, ImageFormat, RequestedParams

if TYPE_CHECKING:
    from mii_serve.cli.connection import Connection

DEFAULT_TARGET = "127.0.0.1:50050"
ENGINES = f"{{{','.join(ENGINE_CHOICES)}}}"
DTYPES = "{auto,fp32,fp16,bf16}"
MODELS = "hub id, diffusers folder, single file, Azure ML model folder, or demo, the model in the package and the default"


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
        prog="mii_serve",
        description="Serve Stable Diffusion v1.x: start a server, make images, inspect and load-test a server.",
    )
    parser.add_argument("--version", action="version", version=f"mii_serve {__version__}", help="show the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, usage, add_flags, line, more in (
        ("deploy", "[MODEL]", _add_server_flags, "start a server", _DEPLOY_MORE),
        ("generate", "PROMPT", _add_generate_flags, "make the image of one prompt and write it to a file", ""),
        ("batch", "INPUT -o FOLDER", _add_batch_flags, batch_flags.LINE, batch_flags.MORE),
        ("export-mlflow", "MODEL DIR", _add_export_flags, "write a model as an MLflow model, without pickle", _EXPORT_MORE),
        ("evaluate", "PROMPTS -o FOLDER", _add_evaluate_flags, evaluate_flags.LINE, evaluate_flags.MORE),
        ("config", "show|schema", _add_config_flags, "show the settings of a server and where they come from", _CONFIG_MORE),
        ("status", "", _add_status_flags, "show a server's health, model and load", ""),
        ("verify", "[MODEL]", _add_verify_flags, "compare an engine with the FP32 reference, stage by stage", _VERIFY_MORE),
        ("doctor", "", _add_doctor_flags, "show what this machine has and what each engine needs", _DOCTOR_MORE),
        ("inspect", "FILE...", _add_inspect_flags, "show what image files say about where they come from", _INSPECT_MORE),
        ("bench", "", _add_bench_flags, "send load to a server, measure it, and check its images", bench_flags.MORE),
    ):
        described = f"{line[0].upper()}{line[1:]}.{more}"
        words = " ".join(("mii_serve", name, usage, "[options]")).replace("  ", " ")
        add_flags(commands.add_parser(name, usage=words, help=line, description=described))
    return parser


_DEPLOY_MORE = """

The server runs until SIGTERM or Ctrl-C. When it is ready it prints one line on stdout:
ready grpc=HOST:PORT http=HOST:PORT

Flags override the environment (MII_SERVE_REPLICAS, ...), which overrides the file."""


_CONFIG_MORE = """

show takes the flags of deploy and prints the value of every setting; with --effective also where it comes from:
a flag, a variable, the file, or the default. schema prints the JSON schema of the file."""


_DOCTOR_MORE = """

For each engine it shows what the engine needs, what was found, and the command that installs what is missing.
Exit code 0: the engine given with --engine can run here (with auto: any engine); 1: it cannot."""


def _add_doctor_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--engine", choices=ENGINE_CHOICES, default="auto", help="the engine that decides the exit code, default auto"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def _add_config_flags(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="show|schema", required=True)
    actions.add_parser("schema", help="print the JSON schema of the file")
    show = actions.add_parser("show", usage="mii_serve config show [MODEL] [options]", help="print every setting's value")
    show.add_argument("--effective", action="store_true", help="show where each value comes from")
    show.add_argument("--json", action="store_true", help="print one JSON object")
    _add_deploy_flags(show)


def _add_server_flags(parser: argparse.ArgumentParser) -> None:
    _add_deploy_flags(parser)
    parser.add_argument("--mii-config", type=Path, metavar="FILE", help="a YAML file with DeepSpeed-MII's settings")


def _add_deploy_flags(parser: argparse.ArgumentParser) -> None:
    # What is not on the command line must stay absent, so that the environment and the file can fill it in.
    def add(*names: str, help: str, **settings: Any) -> None:
        parser.add_argument(*names, default=argparse.SUPPRESS, help=help, **settings)

    add("model", nargs="?", metavar="MODEL", help=MODELS)
    add(
        "--served-model-name",
        action="append",
        metavar="NAME",
        help="name of the model for callers; repeat it for more names, answers have the first",
    )
    add("--engine", metavar=ENGINES, help="what computes the images, default auto")
    add("--replicas", type=int, metavar="N", help="copies of the model, default 1; each has GPUs of its own")
    add("--tensor-parallel", type=int, metavar="N", help="devices per copy, which compute each batch together, default 1")
    add("--parallelism", metavar="{rows,tensor}", help="what the devices of a copy split: rows of a batch (default) or weights")
    add("--dtype", metavar=DTYPES, help="precision of the model, default auto")
    add("--device", metavar="{auto,cpu,cuda}", help="where the model runs, default auto")
    add("--host", metavar="HOST", help="address to listen on, default 127.0.0.1")
    add("--grpc-port", type=int, metavar="PORT", help="port for gRPC, default 50050; 0 is any free port")
    add("--http-port", type=int, metavar="PORT", help="port for HTTP, default 5001; 0 is any free port")
    add(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help="API keys, one per line; everything but health checks, probes and metrics needs one",
    )
    add(
        "--jobs-folder",
        type=Path,
        metavar="DIR",
        help="turn on /v1/files and /v1/batches, and keep them here",
    )
    http_flags.add_flags(parser)
    add("--tls-cert", type=Path, metavar="FILE", help="certificate chain in PEM; turns TLS on for both ports")
    add("--tls-key", type=Path, metavar="FILE", help="its private key")
    add("--tls-client-ca", type=Path, metavar="FILE", help="require client certificates that one of these CAs signed")
    add("--deployment-name", metavar="NAME", help="name of the deployment; callers may use it as the model's name")
    add("--max-slots", type=int, metavar="N", help="images that run at once, per copy")
    add("--verify", action="store_true", help="compare the engine with the FP32 reference first, and serve only if it passes")
    add("--revision", metavar="REV", help="commit, tag or branch of a hub model")
    add("--tokenizer", type=Path, metavar="FOLDER", help="tokenizer of a model that is a single file, which has none")
    add("--vae", type=Path, metavar="PATH", help="a VAE, folder or file, in the place of the model's own")
    add(
        "--embedding",
        action="append",
        metavar="TOKEN=PATH",
        help="a word for prompts and its embedding (textual inversion); repeat it for more",
    )
    lora_flags.add_lora(parser.add_argument)
    add("--allow-pickle", action="store_true", help="load weights that can run code; only for models you trust")
    add(
        "--disable-safety-checker",
        dest="enable_safety_checker",
        action="store_false",
        help="return images without the model's safety check",
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="settings in YAML or TOML")
    add("--log-level", choices=("debug", "info", "warning", "error"), help="least level to log on stderr, default info")
    add("--log-format", choices=("text", "json"), help="format of log lines, default text; json is one object per line")


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
    add("--target", metavar="HOST:PORT", help="use this server; without it, load the model in this process")
    request = parser.add_argument_group(
        "the image; parameters that are left out get the model's defaults",
        "mii_serve status shows a server's defaults and schedulers.",
    )
    for parameter in PARAMETERS:
        if parameter.name != "prompt":
            flag = f"--{parameter.name.replace('_', '-')}"
            request.add_argument(flag, type=parameter.kind, metavar=_METAVARS[parameter.kind], help=parameter.help)
    request.add_argument(
        "--image", type=Path, metavar="FILE", help="start from this PNG, JPEG or WebP image; gives the size, too"
    )
    help = "an image of the same size: where it is light, the image is repainted, where it is dark, it stays"
    request.add_argument("--mask-image", type=Path, metavar="FILE", help=help)
    request.add_argument("--strength", type=float, metavar=_METAVARS[float], help=STRENGTH.help)
    for parameter in OWN_STEPS:
        name, metavar = f"--{parameter.name}", _METAVARS[parameter.kind]
        request.add_argument(name, type=parameter.kind, nargs="+", metavar=metavar, help=parameter.help)
    lora_flags.add_use_lora(request.add_argument)
    add = parser.add_argument_group("without --target").add_argument
    # No default: a flag that was not given leaves the choice to the environment.
    add("--model", default=argparse.SUPPRESS, metavar="MODEL", help=MODELS)
    add("--engine", default=argparse.SUPPRESS, metavar=ENGINES, help="what computes the image")
    add("--dtype", default=argparse.SUPPRESS, metavar=DTYPES, help="precision of the model")
    lora_flags.add_lora(add)
    add = parser.add_argument_group("the call").add_argument
    add("--timeout", type=float, metavar="SECONDS", help="give up after this time, not counting the loading of a model")
    add(
        "--embed-metadata",
        action=argparse.BooleanOptionalAction,
        help="write the parameters into the file; PNG only, on by default for PNG",
    )
    add("--json", action="store_true", help="print one JSON object instead of paths")
    _add_tls_flags(parser)


def _add_batch_flags(parser: argparse.ArgumentParser) -> None:
    batch_flags.add_flags(parser)
    _add_job_flags(parser, ("prompt", "seed"))


def _add_job_flags(parser: argparse.ArgumentParser, left_out: Sequence[str]) -> None:
    """Parameters for all rows of a job but those left out, and the server that makes them."""
    group = parser.add_argument_group("parameters of rows that do not name them")
    for parameter in PARAMETERS:
        if parameter.name not in left_out:
            flag = f"--{parameter.name.replace('_', '-')}"
            group.add_argument(flag, type=parameter.kind, metavar=_METAVARS[parameter.kind], help=parameter.help)
    lora_flags.add_use_lora(group.add_argument)
    add = parser.add_argument_group("without --target").add_argument
    add("--model", default=argparse.SUPPRESS, metavar="MODEL", help=MODELS)
    add("--replicas", type=int, default=argparse.SUPPRESS, metavar="N", help="copies of the model, default 1")
    add("--engine", default=argparse.SUPPRESS, metavar=ENGINES, help="what computes the images")
    add("--dtype", default=argparse.SUPPRESS, metavar=DTYPES, help="precision of the model")
    lora_flags.add_lora(add)
    _add_tls_flags(parser)


_EXPORT_MORE = """

DIR gets the model's files, the code that makes its images and a signature with the column prompt and all parameters.
mlflow.pyfunc.load_model loads it; mlflow models predict and mlflow models serve run it. Settings of the loaded model are
environment variables (MII_SERVE_ENGINE, CONTENT_SAFETY_ENDPOINT, ...). mii_serve deploy takes DIR, too."""


def _add_export_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="hub id, diffusers folder, or demo")
    parser.add_argument("directory", type=Path, metavar="DIR", help="folder to write; new or empty")


def _add_evaluate_flags(parser: argparse.ArgumentParser) -> None:
    evaluate_flags.add_flags(parser)
    _add_job_flags(parser, ("prompt", "seed", "guidance_scale"))


def _add_status_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--target", default=DEFAULT_TARGET, metavar="HOST:PORT", help=f"the server, default {DEFAULT_TARGET}")
    add("--timeout", type=float, default=5.0, metavar="SECONDS", help="give up after this time, default 5")
    add("--json", action="store_true", help="print one JSON object instead of a table")
    _add_tls_flags(parser)


_VERIFY_MORE = """

First it compares the reference with diffusers' own pipeline on this model. Then the reference and the engine run a fixed set
of prompts, samplers and sizes, the engine both one by one and in a batch. It prints how far the text encoder, single UNet
calls, the VAE and whole images differ. The exit code is 1 if a difference exceeds its limit.
Settings come from flags, the environment and the file, as for deploy."""


def _add_verify_flags(parser: argparse.ArgumentParser) -> None:
    def add(*names: str, help: str, **settings: Any) -> None:
        parser.add_argument(*names, default=argparse.SUPPRESS, help=help, **settings)

    add("model", nargs="?", metavar="MODEL", help=MODELS)
    add("--engine", metavar=ENGINES, help="the engine to verify")
    add("--dtype", metavar=DTYPES, help="its precision")
    add("--device", metavar="{auto,cpu,cuda}", help="where the engine and the reference run")
    add("--max-slots", type=int, metavar="N", help="images that run at once: the size of the batch")
    add("--revision", metavar="REV", help="commit, tag or branch of a hub model")
    add("--tokenizer", type=Path, metavar="FOLDER", help="tokenizer of a model that is a single file, which has none")
    add("--allow-pickle", action="store_true", help="load weights that can run code; only for models you trust")
    parser.add_argument("--config", type=Path, metavar="FILE", help="settings in YAML or TOML")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report to this file, as JSON")
    parser.add_argument(
        "--picture", type=Path, metavar="FILE", help="write the images side by side to this file: .png, .jpg or .webp"
    )
    levels = ("debug", "info", "warning", "error")
    parser.add_argument("--log-level", choices=levels, default="warning", help="least level to log on stderr, default warning")


_INSPECT_MORE = """

It reads the digital source type, model and revision in the XMP, checks C2PA Content Credentials with the C2PA library (extra
provenance), and looks for the watermark of Stable Diffusion's script. Formats: PNG, JPEG, WebP.

Exit code 0: every file is marked as generated, and no signature is wrong; 1: one is not marked, or was changed after it was
signed, or with --trust is not signed by whom it should be; 2: a file is no image that can be read; 6: Content Credentials were
found and the extra is missing."""


def _add_inspect_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("files", nargs="+", type=Path, metavar="FILE", help="image files")
    add("--trust", type=Path, metavar="FILE", help="certificates in PEM; signers must be vouched for by one of them")
    add("--json", action="store_true", help="print one JSON array with an object for each file")


def _add_bench_flags(parser: argparse.ArgumentParser) -> None:
    parser.usage = bench_flags.USAGE
    bench_flags.add_flags(parser)
    _add_tls_flags(parser)


def _add_tls_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("a server with TLS or API keys", "The API key is read from MII_SERVE_API_KEY.")
    group.add_argument("--tls-ca", type=Path, metavar="FILE", help="use TLS, and trust certificates signed by these CAs")
    group.add_argument("--tls-cert", type=Path, metavar="FILE", help="client certificate, if the server requires one")
    group.add_argument("--tls-key", type=Path, metavar="FILE", help="its private key")


def _needed_extra(command: str, values: dict[str, Any]) -> str | None:
    """The extra that the command needs in any case; None if it needs none."""
    match command:
        case "config" | "deploy" | "evaluate" | "verify":
            return "server"
        case "generate":
            return "server" if values["target"] is None else None
        case "export-mlflow":
            return "mlflow"
        case "batch":
            return "server" if values["target"] is None and not values["only_check"] else None
        case _:
            return None


def _connection(values: dict[str, Any]) -> Connection:
    from mii_serve.cli.connection import Connection

    return Connection(**{name: values[name] for name in ("target", "tls_ca", "tls_cert", "tls_key")})


def _deploy(values: dict[str, Any]) -> int:
    from mii_serve.cli.deploy import run

    file, mii_file = values.pop("config"), values.pop("mii_config")
    return run(http_flags.grouped(values), file, mii_file)


def _config(values: dict[str, Any]) -> int:
    from mii_serve.cli import config

    if values.pop("action") == "schema":
        return config.schema()
    file, is_effective, is_json = values.pop("config"), values.pop("effective"), values.pop("json")
    return config.show(http_flags.grouped(values), file, is_effective=is_effective, is_json=is_json)


def _generate(values: dict[str, Any]) -> int:
    from mii_serve.cli.files import read_image
    from mii_serve.cli.generate import run

    given = {name: values[name] for name in (*PARAMETER_NAMES, STRENGTH.name, "loras")}
    given |= {one.name: None if values[one.name] is None else tuple(values[one.name]) for one in OWN_STEPS}
    for name, flag in (("image", "--image"), ("mask_image", "--mask-image")):
        given[name] = None if values[name] is None else read_image(flag, values[name])
    return run(
        RequestedParams(**given),
        output=values["output"],
        embed_metadata=values["embed_metadata"],
        connection=None if values["target"] is None else _connection(values),
        flags={name: values[name] for name in ("model", "engine", "dtype", "lora") if name in values},
        timeout=values["timeout"],
        is_json=values["json"],
    )


def _batch(values: dict[str, Any]) -> int:
    from mii_serve.batch.settings import DEFAULT_NAMES, JobSettings
    from mii_serve.cli.batch import BatchFlags, run

    flags = BatchFlags(
        given=values["input"],
        output=values["output"],
        max_in_flight=values["max_in_flight"],
        max_errors=values["max_errors"],
        max_stall_s=values["max_stall"],
        retry_failed=values["retry_failed"],
        only_check=values["only_check"],
        is_json=values["json"],
        restart=values["restart"],
        index=values["index"],
    )
    defaults = {name: values[name] for name in DEFAULT_NAMES if values[name] is not None}
    settings = JobSettings(
        defaults=defaults, seed=values["seed"], format=ImageFormat(values["format"]), shards=values["shards"]
    )
    return run(flags, settings, None if values["target"] is None else _connection(values), _own_server(values))


def _own_server(values: dict[str, Any]) -> dict[str, Any]:
    """The flags for a server that the command starts for itself."""
    return {name: values[name] for name in ("model", "replicas", "engine", "dtype", "lora") if name in values}


def _evaluate(values: dict[str, Any]) -> int:
    from mii_serve.batch.settings import DEFAULT_NAMES
    from mii_serve.cli.evaluate import EvaluateFlags, run

    flags = EvaluateFlags(**{name: values[name] for name in evaluate_flags.NAMES})
    defaults = {name: values[name] for name in DEFAULT_NAMES if values.get(name) is not None}
    return run(flags, defaults, None if values["target"] is None else _connection(values), _own_server(values))


def _status(values: dict[str, Any]) -> int:
    from mii_serve.cli.status import run

    return run(_connection(values), timeout=values["timeout"], is_json=values["json"])


def _export_mlflow(values: dict[str, Any]) -> int:
    from mii_serve.cli.export_mlflow import run

    return run(values["model"], values["directory"])


def _verify(values: dict[str, Any]) -> int:
    from mii_serve.cli.verify import run

    file, report_file, picture_file = values.pop("config"), values.pop("json"), values.pop("picture")
    log_level = values.pop("log_level")
    return run(values, file, report_file=report_file, picture_file=picture_file, log_level=log_level)


def _doctor(values: dict[str, Any]) -> int:
    from mii_serve.cli.doctor import run

    return run(values["engine"], is_json=values["json"])


def _inspect(values: dict[str, Any]) -> int:
    from mii_serve.cli.inspect import run

    return run(values["files"], values["trust"], is_json=values["json"])


def _bench(values: dict[str, Any]) -> int:
    from mii_serve.cli import bench

    if values.pop("action") == "compare":
        return bench.compare(values["files"], is_json=values["is_json"])
    values["target"] = values["target"] or DEFAULT_TARGET
    return bench.run(values, _connection(values))


_COMMANDS = {
    "batch": _batch,
    "bench": _bench,
    "config": _config,
    "deploy": _deploy,
    "doctor": _doctor,
    "export-mlflow": _export_mlflow,
    "evaluate": _evaluate,
    "generate": _generate,
    "inspect": _inspect,
    "status": _status,
    "verify": _verify,
}
