"""The requests and answers of the Open Inference Protocol as values, the same over gRPC and HTTP."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from mii_serve.types.tensors import Tensor

Scalar: TypeAlias = str | bool | int | float

MODEL_VERSION = "1"
"""A deployment has one model, and never another version of it; a request may leave the version out."""
PLATFORM = "mii_serve"
READY, UNAVAILABLE = "READY", "UNAVAILABLE"
"""States of a model in the index."""

MAX_TENSORS = 64
"""Inputs, outputs or parameters of one request: far more than there are names."""
MAX_ELEMENTS = 64
"""Of one input: prompts of one call."""
MAX_IMAGES = 64
"""Of one call, all prompts together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InferRequest:
    """`outputs` are the names of those that are wanted; none means all."""

    model_name: str
    model_version: str = ""
    id: str = ""
    parameters: Mapping[str, Scalar] = field(default_factory=dict, repr=False)
    inputs: tuple[Tensor, ...] = ()
    outputs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class InferResponse:
    model_name: str
    id: str
    parameters: Mapping[str, Scalar]
    outputs: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorDescription:
    """What a tensor of this name is; each has one dimension of any size."""

    name: str
    datatype: str
    is_optional: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDescription:
    name: str
    inputs: tuple[TensorDescription, ...]
    outputs: tuple[TensorDescription, ...]
