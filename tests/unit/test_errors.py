"""Every error of the tree survives pickling and copying: it crosses processes and threads with all it says."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator

import pytest

from mii_serve.errors import (
    ConfigError,
    ContentBlockedError,
    InvalidRequestError,
    MiiServeError,
    NotFoundError,
    QueueFullError,
    RateLimitedError,
    UnusableEngineError,
)

BUILDERS: dict[type[MiiServeError], Callable[[], MiiServeError]] = {
    InvalidRequestError: lambda: InvalidRequestError("height", "must be a multiple of 8", "7"),
    ContentBlockedError: lambda: ContentBlockedError("prompt", {"Hate": 4, "Violence": 6}, stage="output", on_blocklist=True),
    NotFoundError: lambda: NotFoundError("no such model", "model_not_found"),
    QueueFullError: lambda: QueueFullError("full", 2.5),
    RateLimitedError: lambda: RateLimitedError("too many", 0.5),
    ConfigError: lambda: ConfigError("dtype", "must be fp32"),
    UnusableEngineError: lambda: UnusableEngineError("deepspeed needs a GPU"),
}
"""Of the classes that take more, or other, arguments than a text."""

COPIERS: dict[str, Callable[[MiiServeError], MiiServeError]] = {
    **{f"pickle {protocol}": lambda error, p=protocol: pickle.loads(pickle.dumps(error, p)) for protocol in range(6)},
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
}


def tree(root: type[MiiServeError] = MiiServeError) -> Iterator[type[MiiServeError]]:
    yield root
    for child in root.__subclasses__():
        if child.__module__ == "mii_serve.errors":
            yield from tree(child)


@pytest.mark.parametrize("copier", COPIERS)
@pytest.mark.parametrize("cls", list(tree()), ids=lambda cls: cls.__name__)
def test_an_error_survives_with_all_its_attributes(cls, copier):
    error = BUILDERS.get(cls, lambda: cls("it failed: 7 of 8"))()
    error.add_note("seen by a test")
    again = COPIERS[copier](error)
    assert type(again) is cls and again is not error
    assert (str(again), again.args) == (str(error), error.args)
    assert vars(again) == vars(error)
    assert (again.grpc_code, again.http_status) == (error.grpc_code, error.http_status)


def test_every_class_with_attributes_of_its_own_is_built_with_real_arguments():
    with_init = {cls for cls in tree() if cls.__init__ is not MiiServeError.__init__}
    assert with_init == set(BUILDERS)
