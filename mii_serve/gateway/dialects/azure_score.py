"""`POST /score`: the online contract of Azure ML's text-to-image models.

The request is pandas' "split" form in `input_data`, as the model card, its notebooks and its command-line samples write it. The
answer is an array with an object for each picture, those of the first prompt first. What the reference answers with an empty
object (a wrong shape, an unknown member, a server that is down) is an error here, which names the member by its JSON path.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import AfterValidator, FailFast
from starlette.responses import Response

from mii_serve.config import HttpConfig
from mii_serve.errors import ContentBlockedError, InvalidRequestError, MiiServeError
from mii_serve.gateway.errors import OverLimitError, azure_problem, problem_response
from mii_serve.gateway.generation import check_budget, generate_all, relocate, to_base64, to_json, too_many
from mii_serve.gateway.json_body import JsonObject, broken_rule, one_of, path_of, shown, validated
from mii_serve.gateway.middleware import HttpCall
from mii_serve.gateway.parameters import Parameters, names_without, requested, with_parameters
from mii_serve.server.dispatcher import Dispatcher
from mii_serve.server.dropped_text import dropped_headers, dropped_texts
from mii_serve.types import PARAMETERS, GenerationAnswer, GenerationRequest, OutputOptions

INPUT = "input_data"
DATA = f"{INPUT}.data"
COLUMNS = ("prompt", "negative_prompt")
SCORE_PARAMETERS = names_without("prompt")
LIMITED = frozenset(parameter.name for parameter in PARAMETERS if parameter.kind is not str) - {"seed"}
"""Numbers of the right type that are out of bounds are 422: the request is well-formed, the server does not make it. The bounds
of a seed are those of its type."""
FAILED_HEADER = "x-ms-run-function-failed"


def _column_names(names: list[str]) -> list[str]:
    if len(set(names)) < len(names):
        raise broken_rule("must not name a column twice")
    if "prompt" not in names:
        raise broken_rule("must have the column prompt")
    return names


ScoreParameters = with_parameters(Parameters, SCORE_PARAMETERS)


class SplitData(JsonObject):
    """pandas' "split" form; what `data` holds depends on the columns."""

    columns: Annotated[list[Annotated[str, one_of(COLUMNS)]], FailFast(), AfterValidator(_column_names)]
    data: Any
    index: list[Any] | None = None
    parameters: ScoreParameters | None = None  # type: ignore[valid-type]


class ScoreBody(JsonObject):
    input_data: SplitData
    parameters: ScoreParameters | None = None  # type: ignore[valid-type]
    params: ScoreParameters | None = None  # type: ignore[valid-type]


Cells = dict[str, tuple[str, Any]]
"""A row by column: the cell's JSON path, and its value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRow:
    """One prompt, and the JSON paths of its cells."""

    prompt: str = field(repr=False)
    negative_prompt: str | None = field(default=None, repr=False)
    paths: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRequest:
    """All rows, and the parameters that hold for each; `paths` has the JSON path of each parameter."""

    rows: list[ScoreRow]
    parameters: dict[str, Any] = field(repr=False)
    paths: dict[str, str]

    def requests(self) -> list[GenerationRequest]:
        """One request for each row."""
        return [self._request(row) for row in self.rows]

    def relocate_error(self, index: int, error: InvalidRequestError) -> None:
        """Let the error of this row's request name the member by its path."""
        relocate(error, {**self.paths, **self.rows[index].paths})

    def _request(self, row: ScoreRow) -> GenerationRequest:
        values = {**self.parameters, "prompt": row.prompt}
        if row.negative_prompt is not None:
            values["negative_prompt"] = row.negative_prompt
        return GenerationRequest(params=requested(values), output=OutputOptions())


class AzureDialect:
    """For Azure ML's client, and for what reads the answers of its inference server."""

    def __init__(self, settings: HttpConfig) -> None:
        self._settings = settings

    def refusal(self, error: MiiServeError, request_id: str) -> Response:
        blocked = error if isinstance(error, ContentBlockedError) else None
        if blocked is not None and not self._settings.refuse_blocked_score:
            return blocked_answer(blocked)
        problem = azure_problem(error)
        has_failed = problem.status == 424 or problem.status >= 500
        more = {} if blocked is None else blocked_headers(blocked)
        return problem_response(problem, {FAILED_HEADER: str(has_failed), **more})

    def last_event(self, error: MiiServeError, request_id: str) -> bytes:
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

    def __init__(self, dispatcher: Dispatcher, settings: HttpConfig) -> None:
        self._dispatcher = dispatcher
        self._settings = settings

    async def __call__(self, call: HttpCall) -> Response:
        score = parse(call.body, max_rows=self._settings.max_images)
        requests = score.requests()
        call.context.log["num_prompts"] = len(requests)
        check_budget(self._settings, requests, self._dispatcher.capabilities.defaults.num_inference_steps)
        try:
            answers = await generate_all(self._dispatcher, call.context, requests, score.relocate_error)
        except InvalidRequestError as error:
            raise over_limit(error) or error from None
        body = await asyncio.to_thread(_to_json, score.rows, answers)
        images = [image for answer in answers for image in answer.images]
        headers = {
            FAILED_HEADER: "False",
            "x-ms-run-fn-exec-ms": f"{call.context.seconds * 1000:.3f}",
            "x-mii-seeds": ",".join(str(image.seed) for image in images),
            **dropped_headers([answer.parameters for answer in answers]),
        }
        if any(image.moderation_blocked for image in images):
            headers["x-mii-blocked"] = "output"
        return Response(body, 200, headers, "application/json")


def over_limit(error: InvalidRequestError) -> OverLimitError | None:
    """The refusal of a request as the error of a limit, if it is of one."""
    if type(error) is not InvalidRequestError or error.field.rpartition(".")[2] not in LIMITED:
        return None
    return OverLimitError(error.field, str(error).removeprefix(f"{error.field}: "))


def _to_json(rows: Iterable[ScoreRow], answers: Iterable[GenerationAnswer]) -> bytes:
    return to_json(
        [
            {
                "prompt": row.prompt,
                "generated_image": "" if image.moderation_blocked else to_base64(image.encoded),
                "nsfw_content_detected": image.nsfw_content_detected,
                **dropped_texts(answer.parameters),
            }
            for row, answer in zip(rows, answers, strict=True)
            for image in answer.images
        ]
    )


# ---- reading the body --------------------------------------------------------------------------------------------


def parse(value: Any, *, max_rows: int) -> ScoreRequest:
    """The rows and parameters of a body.

    Raises:
        InvalidRequestError: naming the JSON path and the rule.
        OverLimitError: it has more rows than one call may have images; none of them has been looked at.
    """
    body = validated(ScoreBody, value)
    split = body.input_data
    rows = _rows(split.data, split.columns, max_rows)
    if split.index is not None and len(split.index) != len(rows):
        raise InvalidRequestError(f"{INPUT}.index", f"must have an entry for each of {len(rows)} rows", str(len(split.index)))
    parameters, paths = _merged({f"{INPUT}.parameters": split.parameters, "parameters": body.parameters, "params": body.params})
    return ScoreRequest(rows=rows, parameters=parameters, paths=paths)


def _rows(value: Any, columns: list[str], max_rows: int) -> list[ScoreRow]:
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


def _row(cells: Cells) -> ScoreRow:
    negative_path, negative = cells.get("negative_prompt", ("", None))
    paths = {"prompt": cells["prompt"][0]}
    if negative is not None:
        paths["negative_prompt"] = negative_path
        negative = _text(negative_path, negative)
    return ScoreRow(prompt=_text(*cells["prompt"]), negative_prompt=negative, paths=paths)


def _text(path: str, value: Any) -> str:
    if not isinstance(value, str):
        raise InvalidRequestError(path, "must be text", shown(value))
    return value


def _merged(places: dict[str, Parameters | None]) -> tuple[dict[str, Any], dict[str, str]]:
    """The parameters of all places, and the path of each. Places may agree, not contradict each other."""
    merged: dict[str, Any] = {}
    paths: dict[str, str] = {}
    for place, parameters in places.items():
        for name, value in ({} if parameters is None else parameters.given()).items():
            path = path_of(place, name)
            if name in merged and merged[name] != value:
                raise InvalidRequestError(path, f"contradicts {paths[name]}")
            merged[name], paths[name] = value, path
    return merged, paths
