"""`POST /score`: the online contract of Azure ML's text-to-image models.

The request is pandas' "split" form in `input_data`, as the model card, its notebooks and its command-line samples write it. The
answer is an array with an object for each picture, those of the first prompt first. What the reference answers with an empty
object (a wrong shape, an unknown member, a server that is down) is an error here, which names the member by its JSON path.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import Response

from mii_serve.config import HttpConfig
from mii_serve.errors import ContentBlockedError, InvalidRequestError, MiiServeError
from mii_serve.gateway.bodies import a_text, an_object, inside, no_others, shown
from mii_serve.gateway.door import Call
from mii_serve.gateway.parameters import settled
from mii_serve.gateway.pictures import (
    as_json,
    as_text,
    check_budget,
    draw_all,
    is_blocked,
    nsfw_flag,
    relocate,
    too_many,
)
from mii_serve.gateway.problems import OverLimitError, azure_problem, problem_response
from mii_serve.proto.codec import encode_request
from mii_serve.proto.dropped import dropped_headers, dropped_texts
from mii_serve.proto.v1 import image_generation_pb2 as pb
from mii_serve.server.desk import Desk
from mii_serve.types import ImageFormat, OutputOptions, RequestedParams

INPUT = "input_data"
DATA = f"{INPUT}.data"
COLUMNS = ("prompt", "negative_prompt")
PARAMETERS = (
    "num_inference_steps",
    "guidance_scale",
    "num_images_per_prompt",
    "negative_prompt",
    "height",
    "width",
    "seed",
    "scheduler",
)
LIMITED = frozenset({"num_inference_steps", "guidance_scale", "num_images_per_prompt", "height", "width", "seed"})
"""Numbers of the right kind that are out of bounds are 422: the request is well-formed, the server does not make it."""
FAILED_HEADER = "x-ms-run-function-failed"


Cells = dict[str, tuple[str, Any]]
"""A row by column: the cell's JSON path, and what is in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One prompt, and the JSON paths of its cells."""

    prompt: str = field(repr=False)
    negative_prompt: str | None = field(default=None, repr=False)
    paths: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRequest:
    """All rows, and the parameters that hold for each; `paths` says where each parameter stood."""

    rows: list[Row]
    parameters: dict[str, Any] = field(repr=False)
    paths: dict[str, str]

    def messages(self) -> list[pb.GenerateRequest]:
        """One request for each row.

        Raises:
            InvalidRequestError: a parameter is of the wrong kind.
        """
        return [self._message(index, row) for index, row in enumerate(self.rows)]

    def blame(self, index: int, error: InvalidRequestError) -> None:
        """Let the error name the member by its path."""
        relocate(error, {**self.paths, **self.rows[index].paths})

    def _message(self, index: int, row: Row) -> pb.GenerateRequest:
        parameters = dict(self.parameters)
        if row.negative_prompt is not None:
            parameters["negative_prompt"] = row.negative_prompt
        try:
            return encode_request(RequestedParams(prompt=row.prompt, **parameters), OutputOptions(format=ImageFormat.PNG))
        except InvalidRequestError as error:
            self.blame(index, error)
            raise


class AzureDialect:
    """Azure ML's and its inference server's readers."""

    def __init__(self, settings: HttpConfig) -> None:
        self._settings = settings

    def refusal(self, error: MiiServeError) -> Response:
        blocked = error if isinstance(error, ContentBlockedError) else None
        if blocked is not None and not self._settings.refuse_blocked_score:
            return blocked_answer(blocked)
        problem = azure_problem(error)
        has_failed = problem.status == 424 or problem.status >= 500
        more = {} if blocked is None else blocked_headers(blocked)
        return problem_response(problem, {FAILED_HEADER: str(has_failed), **more})

    def broken_off(self, error: MiiServeError) -> bytes:
        raise AssertionError("no answer of /score is a stream")


def blocked_answer(error: ContentBlockedError) -> Response:
    """The answer to a prompt that content safety blocked: an empty object, which existing clients read as that."""
    return Response(b"{}", 200, {FAILED_HEADER: "False", **blocked_headers(error)}, "application/json")


def blocked_headers(error: ContentBlockedError) -> dict[str, str]:
    """At which stage content safety blocked, and for what."""
    return {
        "x-mii-blocked": error.stage,
        "x-mii-blocked-category": ",".join(error.categories),
        "x-mii-blocked-severity": ",".join(str(severity) for severity in error.categories.values()),
    }


class Score:
    """The answer to `POST /score`."""

    def __init__(self, desk: Desk, settings: HttpConfig) -> None:
        self._desk = desk
        self._settings = settings

    async def __call__(self, call: Call) -> Response:
        asked = parse(call.body, max_rows=self._settings.max_images)
        messages = asked.messages()
        call.facts["num_prompts"] = len(messages)
        check_budget(self._settings, messages, self._desk.capabilities.defaults.num_inference_steps)
        try:
            answers = await draw_all(self._desk, call, messages, asked.blame)
        except InvalidRequestError as error:
            raise over_limit(error) or error from None
        body = await asyncio.to_thread(_rendered, asked.rows, answers)
        headers = {
            FAILED_HEADER: "False",
            "x-ms-run-fn-exec-ms": f"{call.seconds * 1000:.3f}",
            "x-mii-seeds": ",".join(str(image.seed) for answer in answers for image in answer.images),
            **dropped_headers([answer.parameters for answer in answers]),
        }
        if any(is_blocked(image) for answer in answers for image in answer.images):
            headers["x-mii-blocked"] = "output"
        return Response(body, 200, headers, "application/json")


def over_limit(error: InvalidRequestError) -> OverLimitError | None:
    """What the desk refuses, as the error of a limit, if it is of one."""
    if type(error) is not InvalidRequestError or error.field.rpartition(".")[2] not in LIMITED:
        return None
    return OverLimitError(error.field, str(error).removeprefix(f"{error.field}: "))


def _rendered(rows: Iterable[Row], answers: Iterable[pb.GenerateResponse]) -> bytes:
    return as_json(
        [
            {
                "prompt": row.prompt,
                "generated_image": "" if is_blocked(image) else as_text(image.data),
                "nsfw_content_detected": nsfw_flag(image),
                **dropped_texts(answer.parameters),
            }
            for row, answer in zip(rows, answers, strict=True)
            for image in answer.images
        ]
    )


# ---- reading the body --------------------------------------------------------------------------------------------


def parse(body: Any, *, max_rows: int) -> ScoreRequest:
    """The rows and parameters of a body.

    Raises:
        InvalidRequestError: naming the JSON path and the rule.
        OverLimitError: it has more rows than one call may have pictures; none of them has been looked at.
    """
    top = an_object("", body)
    no_others("", top, (INPUT, "params", "parameters"))
    if INPUT not in top:
        raise InvalidRequestError(INPUT, "is missing")
    split = an_object(INPUT, top[INPUT])
    no_others(INPUT, split, ("columns", "data", "index", "parameters"))
    for name in ("columns", "data"):
        if split.get(name) is None:
            raise InvalidRequestError(f"{INPUT}.{name}", "is missing")
    rows = _rows(split["data"], _columns(split["columns"]), max_rows)
    _check_index(split.get("index"), len(rows))
    parameters, paths = _parameters((INPUT, split, "parameters"), ("", top, "parameters"), ("", top, "params"))
    return ScoreRequest(rows=rows, parameters=settled(parameters), paths=paths)


def _columns(value: Any) -> list[str]:
    path = f"{INPUT}.columns"
    if not isinstance(value, list):
        raise InvalidRequestError(path, "must be an array of names", shown(value))
    for position, name in enumerate(value):
        if not isinstance(name, str) or name not in COLUMNS:
            raise InvalidRequestError(f"{path}[{position}]", f"must be one of {', '.join(COLUMNS)}", shown(name))
    if len(set(value)) < len(value):
        raise InvalidRequestError(path, "must not name a column twice")
    if "prompt" not in value:
        raise InvalidRequestError(path, "must have the column prompt")
    return value


def _rows(value: Any, columns: list[str], max_rows: int) -> list[Row]:
    prompts = value.get("prompt") if isinstance(value, dict) else value
    if isinstance(prompts, list) and len(prompts) > max_rows:
        raise too_many("images", len(prompts), max_rows)
    if isinstance(value, dict):
        cells = _transposed(value, columns)
    elif isinstance(value, list):
        cells = [_cells(f"{DATA}[{position}]", row, columns) for position, row in enumerate(value)]
    else:
        raise InvalidRequestError(DATA, "must be an array of rows", shown(value))
    if not cells:
        raise InvalidRequestError(DATA, "must have at least one row")
    return [_row(row) for row in cells]


def _transposed(value: dict[str, Any], columns: list[str]) -> list[Cells]:
    """Rows of what was given by column."""
    for name in columns:
        if not isinstance(value.get(name), list):
            raise InvalidRequestError(f"{DATA}.{name}", "must be an array with a cell for each row", shown(value.get(name)))
    lengths = {len(value[name]) for name in columns}
    if len(lengths) > 1:
        raise InvalidRequestError(DATA, "must have columns of one length")
    return [{name: (f"{DATA}.{name}[{row}]", value[name][row]) for name in columns} for row in range(lengths.pop())]


def _cells(path: str, row: Any, columns: list[str]) -> Cells:
    if isinstance(row, list):
        if len(row) != len(columns):
            raise InvalidRequestError(path, f"must have {len(columns)} cells, one for each column", str(len(row)))
        return {name: (f"{path}[{column}]", row[column]) for column, name in enumerate(columns)}
    if isinstance(row, dict):
        if "prompt" not in row:
            raise InvalidRequestError(f"{path}.prompt", "is missing")
        return {name: (f"{path}.{name}", row.get(name)) for name in columns}
    if len(columns) > 1:
        rule = f"must be an array or an object with a cell for each of {len(columns)} columns"
        raise InvalidRequestError(path, rule, shown(row))
    return {"prompt": (path, row)}


def _row(cells: Cells) -> Row:
    negative_path, negative = cells.get("negative_prompt", ("", None))
    paths = {"prompt": cells["prompt"][0]}
    if negative is not None:
        paths["negative_prompt"] = negative_path
        negative = a_text(negative_path, negative)
    return Row(prompt=a_text(*cells["prompt"]), negative_prompt=negative, paths=paths)


def _check_index(value: Any, num_rows: int) -> None:
    path = f"{INPUT}.index"
    if value is None:
        return
    if not isinstance(value, list):
        raise InvalidRequestError(path, "must be an array with an entry for each row", shown(value))
    if len(value) != num_rows:
        raise InvalidRequestError(path, f"must have an entry for each of {num_rows} rows", str(len(value)))


def _parameters(*places: tuple[str, dict[str, Any], str]) -> tuple[dict[str, Any], dict[str, str]]:
    """What the places say, and where; null is not said. Places may agree, not contradict each other."""
    found: dict[str, Any] = {}
    paths: dict[str, str] = {}
    for above, members, name in places:
        if (value := members.get(name)) is None:
            continue
        place = inside(above, name)
        given = an_object(place, value)
        no_others(place, given, (*PARAMETERS, "eta"))
        for key, setting in given.items():
            path = f"{place}.{key}"
            if setting is None:
                continue
            if key in found and (type(found[key]), found[key]) != (type(setting), setting):
                raise InvalidRequestError(path, f"contradicts {paths[key]}")
            found[key], paths[key] = setting, path
    if (eta := found.pop("eta", None)) not in (None, 0) or isinstance(eta, bool):
        raise InvalidRequestError(paths["eta"], "must be 0: the scheduler decides how much noise it adds", shown(eta))
    return found, paths
