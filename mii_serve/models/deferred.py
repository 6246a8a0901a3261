"""Modules that diffusers and transformers import at the top of their files and that drawing does not use, deferred.

They are a third of the time that a replica's imports take: torch's compiler with everything below it, scipy's statistics and
optimisers, and the list of all models that transformers knows. In place of each stands a module that answers what is asked of
it while the libraries are imported, and that loads the real one as soon as anything else is wanted of it. So nothing is
missing, and a release of a library that imports something else is only slower. For processes of our own: a program that has
us as a library keeps its imports.
"""

from __future__ import annotations

import gc
import importlib
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from mii_serve.models.quiet import quiet_libraries


def import_for_drawing(*modules: str) -> None:
    """Import these modules of ours, and with them the libraries. To be called before anything imports torch."""
    defer_unused_modules()
    gc.disable()  # what imports make stays: to look through it again and again is another sixth of their time
    try:
        with quiet_libraries():
            for module in modules:
                importlib.import_module(module)
    finally:
        gc.freeze()
        gc.enable()


def defer_unused_modules() -> None:
    """A module that is there already stays as it is."""
    _defer(
        "torch._dynamo",
        # What these mark matters to code that is compiled, and no process that calls us compiles any.
        allow_in_graph=_unchanged,
        assume_constant_result=_unchanged,
        disable=_unchanged,
        eval_frame=SimpleNamespace(OptimizedModule=_NeverMade),
        trace_rules=SimpleNamespace(clear_lru_cache=_nothing),
    )
    _defer_function("torch._dynamo._trace_wrapped_higher_order_op", "TransformGetItemToIndex")
    _defer_function("scipy.optimize", "linear_sum_assignment")
    _defer("scipy.integrate")
    _defer("scipy.stats")
    _defer_list_of_models()


class _Deferred(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked of every module there is, by whatever looks through them
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return getattr(_load(self.__name__), name)


class _RealPath:
    """Where the modules below a package are looked for. An import of one of them needs the package itself."""

    def __init__(self, package: str) -> None:
        self._package = package

    def __iter__(self) -> Iterator[str]:
        return iter(_load(self._package).__path__)


def _defer(name: str, **attributes: object) -> None:
    if name in sys.modules:
        return
    module = _Deferred(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    vars(module).update({"__path__": _RealPath(name), **attributes})
    sys.modules[name] = module


def _defer_function(module: str, name: str) -> None:
    """A module of which the libraries import one function by its name, and do not call it."""
    _defer(module, **{name: lambda *args, **kwargs: getattr(_load(module), name)(*args, **kwargs)})


def _load(name: str) -> ModuleType:
    """The real module, which from now on is the one that others import."""
    if isinstance(sys.modules.get(name), _Deferred):
        del sys.modules[name]
    return importlib.import_module(name)


def _defer_list_of_models() -> None:
    """transformers' package of models, without a search through its hundreds of folders; each model is found by its name."""
    spec = importlib.util.find_spec("transformers")
    if spec is not None and spec.submodule_search_locations:
        folder = Path(next(iter(spec.submodule_search_locations))) / "models"
        _defer("transformers.models", __path__=[str(folder)], __file__=str(folder / "__init__.py"))


def _nothing() -> None:
    pass


def _unchanged(function: Callable[..., Any] | None = None, *_: object, **__: object) -> Callable[..., Any]:
    return _unchanged if function is None else function


class _NeverMade:
    """For questions whether an object is one of these."""
