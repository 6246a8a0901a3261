"""`mii_serve deploy`: merge the settings, hand over to the server, and say when it is ready."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mii_serve import __version__
from mii_serve.cli.exits import ExitCode, say, say_as_json, silence
from mii_serve.extras import EXTRAS, how_to_get
from mii_serve.logs import configure_logs
from mii_serve.tracing import flush_traces, start_tracing

if TYPE_CHECKING:
    from mii_serve.config import DeployConfig
    from mii_serve.server.deploy import Ready
    from mii_serve.server.dispatcher import Dispatcher
    from mii_serve.server.keys import KeyRing
    from mii_serve.server.tls import Tls

EXAMPLE_PROMPT = "a red circle on a blue background"
logger = logging.getLogger(__name__)


def run(flags: dict[str, Any], file: Path | None, mii_file: Path | None = None) -> int:
    """Serve until a signal stops it, and return the exit code.

    Raises:
        ConfigError: a setting breaks a rule.
        ModelError: the model cannot be used.
    """
    _end_on_signals()  # until the deployment can drain, and again after it
    log_format = flags.get("log_format") or os.environ.get("MII_SERVE_LOG_FORMAT") or ("text" if file is None else None)
    if log_format == "json":
        say_as_json()
    if is_early := "model" in flags and log_format is not None:
        _announce(flags["model"])  # now, because the imports below take a moment
    from mii_serve.config import DeployConfig

    config = DeployConfig.load(flags, file, None if mii_file is None else _translated(file, mii_file))
    if config.log_format == "json":
        say_as_json()
    configure_logs(config.log_level, config.log_format, is_whole=True)
    if not is_early:
        _announce(config.model)
    start_tracing()
    from mii_serve.server.deploy import Listener, run_deployment

    try:
        return run_deployment(config, Listener(on_listening=_tell_address, on_ready=_tell_ready, open_http=_open_http))
    finally:
        _end_on_signals()
        flush_traces()


def _end_on_signals() -> None:
    """Nothing is served, so SIGTERM and Ctrl-C end the process at once, and in good order."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os._exit(ExitCode.OK))


def _translated(file: Path | None, mii_file: Path) -> dict[str, Any]:
    """The settings of the MII file as ours; its settings for the hub go into this process's environment."""
    from mii_serve.compat.mii_config import read_mii_file, translate
    from mii_serve.errors import ConfigError

    if file is not None:
        raise ConfigError("--mii-config", "cannot be combined with --config")
    translated = translate(read_mii_file(mii_file))
    for name, value in translated.environment.items():
        os.environ.setdefault(name, value)
    return translated.settings


def _announce(model: str) -> None:
    say(f"mii_serve {__version__}: deploying {model}")


def _tell_address(address: str) -> None:
    say(f"listening on {address}, loading the model")


def _tell_ready(ready: Ready) -> None:
    info = ready.info
    checker = "with a safety checker" if info.has_safety_checker else "WITHOUT a safety checker"
    say(f"serving {info.model} {info.model_revision} by {info.engine} {info.dtype} on {info.device}, {checker}")
    say(f'try: mii_serve generate "{EXAMPLE_PROMPT}" --target {ready.grpc}')
    try:
        print(f"ready grpc={ready.grpc} http={ready.http}", flush=True)
    except OSError as error:
        logger.warning("the ready line could not be written to stdout: %s", error.strerror)
        silence(sys.stdout)


def _open_http(
    config: DeployConfig, dispatcher: Dispatcher, keys: KeyRing, tls: Tls | None, max_connections: int
) -> AbstractAsyncContextManager[str | None]:
    try:
        from mii_serve.gateway.app import serve_http
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in EXTRAS["http"]:
            raise
        say(f"HTTP is off: {error.name} is not installed: {how_to_get('http')}")
        return _no_http()
    return serve_http(config, dispatcher, keys, tls, max_connections)


@asynccontextmanager
async def _no_http() -> AsyncIterator[None]:
    yield None
