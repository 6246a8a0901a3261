"""`mii_serve generate`: one prompt, on a server or in this process, to files."""

from __future__ import annotations

import itertools
import json
import sys
import time
import uuid
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mii_serve import __version__
from mii_serve.cli.connection import Connection
from mii_serve.cli.exits import ExitCode, say
from mii_serve.cli.files import check_output, output_paths, write_all
from mii_serve.cli.interrupt import CtrlC
from mii_serve.errors import DeadlineExceededError, InvalidRequestError
from mii_serve.types import Done, GenerationRequest, ImageFormat, OutputOptions, Queued, RequestedParams, Started, Step
from mii_serve.types import Event as ServerEvent

if TYPE_CHECKING:
    from mii_serve.client import Event, GenerationResult


def run(
    asked: RequestedParams,
    *,
    output: Path,
    embed_metadata: bool | None,
    connection: Connection | None,
    flags: dict[str, Any],
    timeout: float | None,
    is_json: bool,
) -> int:
    """Make the images, write them, print what was done and return the exit code.

    Raises:
        MiiServeError: what went wrong; no file was written.
    """
    image_format = check_output(output)
    embed = image_format is ImageFormat.PNG if embed_metadata is None else embed_metadata
    options = OutputOptions.checked(format=image_format, quality=None, embed_metadata=embed)
    if connection is not None and flags:
        name = next(iter(flags))
        raise InvalidRequestError(f"--{name}", "cannot be combined with --target: the server has chosen it")

    is_quiet = is_json or not sys.stderr.isatty()
    request = GenerationRequest(params=asked, output=options)
    if connection is None:
        result = _generate_here(request, flags, timeout, is_quiet=is_quiet, is_json=is_json)
    else:
        result = _ask(connection, request, timeout, is_quiet=is_quiet)

    paths = output_paths(output, len(result.encoded))
    write_all(paths, result.encoded)
    _report(result, paths, is_json=is_json)
    return ExitCode.OK


def _ask(connection: Connection, request: GenerationRequest, timeout: float | None, *, is_quiet: bool) -> GenerationResult:
    options: dict[str, Any] = {
        **asdict(request.params),
        "output_format": request.output.format.value,
        "embed_metadata": request.output.embed_metadata,
        "timeout": timeout,
    }
    with CtrlC() as ctrl_c, connection.open() as client, client.stream(**options) as stream:
        ctrl_c.cancels(stream)
        _show(stream, is_quiet=is_quiet)
        return stream.result()


def _generate_here(
    request: GenerationRequest, flags: dict[str, Any], timeout: float | None, *, is_quiet: bool, is_json: bool
) -> GenerationResult:
    from mii_serve.client.arguments import check_timeout
    from mii_serve.client.results import ResultBuilder

    timeout = check_timeout(timeout)
    from mii_serve.config import DeployConfig

    config = DeployConfig.load(flags)
    if not is_json:
        say(f"mii_serve {__version__}: loading {config.model}")
    from mii_serve.models.deferred import import_for_drawing
    from mii_serve.replica.local import open_local

    import_for_drawing("mii_serve.engine.factory")
    builder = ResultBuilder(uuid.uuid4().hex)
    with open_local(config) as local, closing(_within(timeout, local.stream(request))) as events:
        _show(map(builder.add, events), is_quiet=is_quiet)
    return builder.result()


def _within(timeout: float | None, events: Iterator[ServerEvent]) -> Generator[ServerEvent, None, None]:
    """The events for as long as there is time, looked at after each; closing this cancels the request."""
    start = time.monotonic()
    try:
        for event in events:
            yield event
            if timeout is not None and time.monotonic() - start > timeout and not isinstance(event, Done):
                raise DeadlineExceededError(f"the images were not ready within {timeout:g} s")
    finally:
        if isinstance(events, Generator):
            events.close()


# ---- what the user sees --------------------------------------------------------------------------------------------


def _show(events: Iterable[Event], *, is_quiet: bool) -> None:
    """Follow the events to their end, with a bar for each image on a terminal."""
    if is_quiet:
        for _ in events:
            pass
        return
    with _bars() as bars:
        tasks: dict[int, Any] = {}
        waiting = bars.add_task("waiting", total=None, left="")
        for event in events:
            match event:
                case Queued(num_samples_ahead=ahead):
                    words = f"waiting, {ahead} ahead" if ahead else "waiting"
                    bars.update(waiting, description=words, left=_duration(event.estimated_wait_s))
                case Started(image_index=index) | Step(image_index=index):
                    bars.update(waiting, visible=False)
                    if index not in tasks:
                        tasks[index] = bars.add_task(f"image {index}", total=None, left="")
                    if isinstance(event, Step):
                        left = _duration(event.estimated_left_s)
                        bars.update(tasks[index], completed=event.step, total=event.num_steps, left=left)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"about {seconds:.0f} s" if seconds >= 1 else "under 1 s"


@contextmanager
def _bars() -> Iterator[Any]:
    """A bar for each task, with the server's own estimate of what is left."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[left]}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        yield bars


def _report(result: GenerationResult, paths: list[Path], *, is_json: bool) -> None:
    done = result.parameters
    reasons = {
        "the safety checker flagged it": result.nsfw_content_detected,
        "content safety blocked it": result.moderation_blocked,
    }
    for reason, flags in reasons.items():
        for path in itertools.compress(paths, flags or ()):
            say(f"warning: {path} is entirely black because {reason}")
    for name, dropped in (("prompt", done.dropped_prompt), ("negative prompt", done.dropped_negative_prompt)):
        if dropped:
            say(f"warning: the {name} is too long for the text encoder; not used: {dropped!r}")
    if is_json:
        answer = {
            "request_id": result.request_id,
            "paths": [str(path) for path in paths],
            "seeds": result.seeds,
            "nsfw_content_detected": result.nsfw_content_detected,
            "moderation_blocked": result.moderation_blocked,
            "parameters": done.as_record(),
            "timings": {"queued_s": result.queued_s, "total_s": result.total_s},
        }
        print(json.dumps(answer))
        return
    say(
        f"seed {done.seed}, {done.scheduler}, {done.num_inference_steps} steps, guidance {done.guidance_scale:g}, "
        f"{done.width}x{done.height}, {done.engine} {done.dtype} on {done.device}, {result.total_s:.1f} s"
    )
    for path in paths:
        print(path)
