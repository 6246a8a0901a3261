"""The Open Inference Protocol: what the tensors and parameters of a request mean, and what they are answered with.

gRPC and HTTP read and write the values of `types/open_inference.py`; everything that both must agree on is here. A parameter of
ours is given as an input, with one element or one for each prompt, or as a parameter of the request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mii_serve.errors import InvalidRequestError, MiiServeError, NotFoundError
from mii_serve.proto.codec import MAX_MESSAGE_BYTES
from mii_serve.server.call import CallContext
from mii_serve.server.dispatcher import Dispatcher
from mii_serve.server.model_names import ModelNames
from mii_serve.server.suggestions import unknown_member_rule
from mii_serve.types import (
    PARAMETERS,
    RANDOM_SEED,
    GenerationAnswer,
    GenerationParams,
    GenerationRequest,
    ImageReady,
    Priority,
    RequestedParams,
)
from mii_serve.types.open_inference import (
    MAX_IMAGES,
    MODEL_VERSION,
    InferRequest,
    InferResponse,
    ModelDescription,
    Scalar,
    TensorDescription,
)
from mii_serve.types.tensors import BYTES, FLOATS, INTEGERS, Tensor

SERVER_NAME = "mii_serve"
EXTENSIONS = ("binary_tensor_data", "model_configuration", "parameters", "schedule_policy")
"""Triton's names of its extensions that are answered here; the last are the parameters `priority` and `timeout`."""

GENERATED_IMAGE = "generated_image"
NSFW = "nsfw_content_detected"
MODERATION_BLOCKED = "moderation_blocked"
SEED = "seed"

PRIORITIES = (Priority.NORMAL, Priority.HIGH, Priority.NORMAL, Priority.LOW, Priority.BATCH)
"""By Triton's number, of which 1 is the first and 0 is left out."""

MAX_ID_CHARS = 1024
_ROOM_BYTES = 64 * 1024
"""Of an image's file beside its pixels."""
_NO_SEQUENCES = ("sequence_id", "sequence_start", "sequence_end")
_DATATYPES: Mapping[type, tuple[str, ...]] = {str: (BYTES,), int: ("INT32", *INTEGERS), float: ("FP32", *FLOATS, *INTEGERS)}
"""Those of a parameter's kind, the one that the model's description has first."""
_KINDS = {parameter.name: parameter.kind for parameter in PARAMETERS if parameter.kind in _DATATYPES}
_EFFECTIVE = (
    *(name for name in _KINDS if name not in ("prompt", "negative_prompt", SEED)),
    *("scheduler_class", "engine", "dtype", "model", "model_revision"),
)
"""Parameters of an answer, where they are the same for all of its images."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a request comes to. `places` say for each of the requests where its parameters were given."""

    requests: Sequence[GenerationRequest]
    places: Sequence[Mapping[str, str]]
    outputs: Sequence[str]
    timeout_s: float | None
    first: GenerationParams
    """Of the first request, for the log."""


class OpenInference:
    """Answers for the one model of a deployment."""

    def __init__(self, dispatcher: Dispatcher, names: ModelNames) -> None:
        self._dispatcher = dispatcher
        self._names = names

    @property
    def is_ready(self) -> bool:
        return self._dispatcher.is_ready

    async def names(self) -> tuple[str, ...]:
        """Raises:
        UnavailableError: no replica has described itself yet.
        """
        return await self._names.all()

    async def is_model_ready(self, name: str, version: str) -> bool:
        """Whether a request for this model would be worked on now."""
        try:
            await self.model(name, version)
        except MiiServeError:
            return False
        return self.is_ready

    async def model(self, name: str, version: str) -> str:
        """The model's name that was meant.

        Raises:
            NotFoundError: there is no such model, or no such version of it.
        """
        known = await self._names.check(name)
        if version not in ("", MODEL_VERSION):
            raise NotFoundError(
                f"there is no version {version[:60]!r} of {known} here, only {MODEL_VERSION}", "model_not_found"
            )
        return known

    async def describe(self, name: str, version: str) -> ModelDescription:
        """Raises:
        NotFoundError: there is no such model, or no such version of it.
        """
        known = await self.model(name, version)
        inputs = tuple(TensorDescription(name=name, datatype=_datatype(name), is_optional=name != "prompt") for name in _KINDS)
        outputs = tuple(TensorDescription(name=name, datatype=datatype) for name, datatype in (await self._outputs()).items())
        return ModelDescription(name=known, inputs=inputs, outputs=outputs)

    async def infer(
        self, asked: InferRequest, call: CallContext, check: Callable[[Sequence[GenerationRequest]], None] | None = None
    ) -> tuple[InferResponse, list[GenerationAnswer]]:
        """The answer to a request, and what it was made from. `check` may refuse the requests that it comes to.

        The requests run side by side. One that fails ends the others.

        Raises:
            MiiServeError: an `InvalidRequestError` names the tensor or the parameter.
        """
        name = await self.model(asked.model_name, asked.model_version)
        plan = self._plan(asked, await self._outputs())
        if check is not None:
            check(plan.requests)
        call = _with_timeout(call, plan.timeout_s)
        call.log["num_prompts"] = len(plan.requests)
        parts = [call] if len(plan.requests) == 1 else [call.for_part(i, "-") for i in range(len(plan.requests))]
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._generate(request, part, places))
                    for request, part, places in zip(plan.requests, parts, plan.places, strict=True)
                ]
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None
        finally:
            call.log.add_params(plan.first)  # each part has logged its own
        answers = [task.result() for task in tasks]
        outputs = _outputs_of([image for answer in answers for image in answer.images])
        response = InferResponse(
            model_name=name,
            id=asked.id,
            parameters=_effective(answers),
            outputs=tuple(outputs[wanted] for wanted in plan.outputs),
        )
        return response, answers

    async def _generate(self, request: GenerationRequest, call: CallContext, places: Mapping[str, str]) -> GenerationAnswer:
        try:
            return await self._dispatcher.generate(request, call)
        except InvalidRequestError as error:
            _rename(error, places)
            raise

    async def _outputs(self) -> dict[str, str]:
        """The datatypes of the outputs, which depend on what the deployment checks."""
        outputs = {GENERATED_IMAGE: BYTES}
        if (await self._names.info()).has_safety_checker:
            outputs[NSFW] = "BOOL"
        if self._dispatcher.has_content_safety:
            outputs[MODERATION_BLOCKED] = "BOOL"
        return outputs | {SEED: "UINT64"}

    def _plan(self, asked: InferRequest, outputs: Mapping[str, str]) -> Plan:
        """Read and check the whole request.

        Raises:
            InvalidRequestError: naming the tensor or the parameter.
        """
        if len(asked.id) > MAX_ID_CHARS:
            raise InvalidRequestError("id", f"must be at most {MAX_ID_CHARS} characters", str(len(asked.id)))
        wanted = _wanted(asked.outputs, outputs)
        for_all = dict(asked.parameters)
        timeout_s, priority = _timeout_s(for_all.pop("timeout", 0)), _priority(for_all.pop("priority", 0))
        rows, places = _rows(asked.inputs, for_all)
        requests, first, num_images, num_bytes = list[GenerationRequest](), None, 0, 0
        is_one_seed = len(rows) > 1 and places[0].get(SEED) == places[1].get(SEED)
        for row, at in zip(rows, places, strict=True):
            request = GenerationRequest(params=RequestedParams(**row), priority=priority)
            try:
                params = self._dispatcher.resolve(request).params
            except InvalidRequestError as error:
                _rename(error, at)
                raise
            if is_one_seed and row[SEED] is not None:  # image k of the answer is made from seed + k
                request = replace(request, params=replace(request.params, seed=params.seed_of(num_images)))
            num_images += params.num_images_per_prompt
            num_bytes += params.num_images_per_prompt * (params.height * params.width * 3 + _ROOM_BYTES)
            _refuse_too_much(num_images, num_bytes, at.get("num_images_per_prompt", "inputs.prompt"))
            requests.append(request)
            first = first or params
        assert first is not None
        return Plan(requests=requests, places=places, outputs=wanted, timeout_s=timeout_s, first=first)


# ---- reading -----------------------------------------------------------------------------------------------------


def _rows(inputs: Sequence[Tensor], for_all: Mapping[str, Scalar]) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """The parameters of each prompt, and where each was given."""
    tensors = _by_name(inputs)
    if "prompt" not in tensors:
        raise InvalidRequestError("inputs.prompt", "is missing")
    num_rows = len(tensors["prompt"].values)
    common, paths = dict[str, Any](), dict[str, str]()
    for name, value in for_all.items():
        _check_known(f"parameters.{_plain(name)}", name)
        if name in tensors:
            raise InvalidRequestError(f"parameters.{name}", f"must be left out, because there is an input {name}")
        common[name], paths[name] = value, f"parameters.{name}"
    rows: list[dict[str, Any]] = [dict(common) for _ in range(num_rows)]
    places = [dict(paths) for _ in range(num_rows)]
    for name, tensor in tensors.items():
        values = [_value(f"inputs.{name}", i, value) for i, value in enumerate(tensor.values)]
        if len(values) not in (1, num_rows):
            rule = f"must be of one element, or of one for each of the {num_rows} prompts"
            raise InvalidRequestError(f"inputs.{name}.shape", rule, str(len(values)))
        for i, (row, at) in enumerate(zip(rows, places, strict=True)):
            is_own = len(values) == num_rows > 1
            row[name], at[name] = values[i if is_own else 0], f"inputs.{name}[{i}]" if is_own else f"inputs.{name}"
    for row in rows:
        seed = row.get(SEED)
        row[SEED] = None if seed == RANDOM_SEED and not isinstance(seed, bool) else seed
    return rows, places


def _by_name(inputs: Sequence[Tensor]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for tensor in inputs:
        path = f"inputs.{_plain(tensor.name)}"
        _check_known(path, tensor.name)
        if tensor.name in found:
            raise InvalidRequestError(path, "must not be there twice")
        if tensor.datatype not in (allowed := _DATATYPES[_KINDS[tensor.name]]):
            raise InvalidRequestError(f"{path}.datatype", f"must be {_one_of(allowed)}", tensor.datatype)
        found[tensor.name] = tensor
    return found


def _value(path: str, index: int, value: object) -> Any:
    if not isinstance(value, bytes):
        return value
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise InvalidRequestError(f"{path}[{index}]", "must be valid UTF-8 text") from None


def _check_known(path: str, name: str) -> None:
    if name in _NO_SEQUENCES:
        raise InvalidRequestError(path, "is not supported: no request depends on another")
    if name not in _KINDS:
        raise InvalidRequestError(path, unknown_member_rule(name, _KINDS))


def _wanted(names: Sequence[str], known: Mapping[str, str]) -> Sequence[str]:
    for name in names:
        if name == NSFW and name not in known:
            raise InvalidRequestError(f"outputs.{name}", "is not there: this model has no safety checker")
        if name not in known:
            raise InvalidRequestError(f"outputs.{_plain(name)}", unknown_member_rule(name, known))
    if len(set(names)) < len(names):
        raise InvalidRequestError("outputs", "must not name one twice")
    return names or tuple(known)


def _timeout_s(microseconds: Scalar) -> float | None:
    """Triton's unit; 0 is none."""
    if isinstance(microseconds, bool) or not isinstance(microseconds, int) or microseconds < 0:
        raise InvalidRequestError("parameters.timeout", "must be a whole number of microseconds", ascii(microseconds)[:60])
    return microseconds / 1e6 if microseconds else None


def _priority(number: Scalar) -> Priority:
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < len(PRIORITIES):
        rule = "must be 1 (high), 2 (normal), 3 (low) or 4 (batch)"
        raise InvalidRequestError("parameters.priority", rule, ascii(number)[:60])
    return PRIORITIES[number]


def _refuse_too_much(num_images: int, num_bytes: int, path: str) -> None:
    if num_images > MAX_IMAGES:
        raise InvalidRequestError(path, f"must be for at most {MAX_IMAGES} images in one call", str(num_images))
    if num_bytes > MAX_MESSAGE_BYTES:
        rule = f"must be for images of at most {MAX_MESSAGE_BYTES} bytes in one call, which is the most of a message"
        raise InvalidRequestError(path, rule, f"{num_bytes} for {num_images}")


def _with_timeout(call: CallContext, timeout_s: float | None) -> CallContext:
    if timeout_s is None:
        return call
    deadline = call.started_at + timeout_s
    return replace(call, deadline=deadline if call.deadline is None else min(deadline, call.deadline))


def _rename(error: InvalidRequestError, places: Mapping[str, str]) -> None:
    if (path := places.get(error.field)) is not None:
        error.rename(path)


def _datatype(name: str) -> str:
    return "UINT64" if name == SEED else _DATATYPES[_KINDS[name]][0]


def _one_of(names: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(names))


def _plain(name: str) -> str:
    """Short and plain enough for an error's text, which is metadata."""
    return name[:60].encode("ascii", "backslashreplace").decode()


# ---- answers -----------------------------------------------------------------------------------------------------


def _outputs_of(images: Sequence[ImageReady]) -> dict[str, Tensor]:
    """All outputs, with an element for each image."""

    def tensor(name: str, datatype: str, values: Sequence[Any]) -> Tensor:
        return Tensor(name=name, datatype=datatype, shape=(len(values),), values=values)

    outputs = (
        tensor(GENERATED_IMAGE, BYTES, [image.encoded for image in images]),
        tensor(NSFW, "BOOL", [bool(image.nsfw_content_detected) for image in images]),
        tensor(MODERATION_BLOCKED, "BOOL", [bool(image.moderation_blocked) for image in images]),
        tensor(SEED, "UINT64", [image.seed for image in images]),
    )
    return {output.name: output for output in outputs}


def _effective(answers: Sequence[GenerationAnswer]) -> dict[str, Scalar]:
    first, *others = (answer.parameters for answer in answers)
    values = {name: getattr(first, name) for name in _EFFECTIVE}
    return {
        name: value
        for name, value in values.items()
        if value is not None and all(getattr(other, name) == value for other in others)
    }
