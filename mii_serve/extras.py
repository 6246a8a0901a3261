"""The extras of the package: which modules each brings, which one a missing module is in, and what to tell the user.

`pyproject.toml` states the same in distributions. Nothing is imported to find out what is installed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping

EXTRAS: Mapping[str, tuple[str, ...]] = {
    "bench": ("httpx2", "matplotlib", "numpy", "prometheus_client", "yaml"),
    "server": (
        "torch",
        "diffusers",
        "transformers",
        "safetensors",
        "huggingface_hub",
        "numpy",
        "scipy",
        "grpc_reflection",
        "prometheus_client",
        "pydantic",
        "pydantic_settings",
        "yaml",
    ),
    "http": ("h11", "starlette", "uvicorn"),
    "deepspeed": ("deepspeed",),
    "azure": ("azure", "aiohttp"),
    "otel": ("opentelemetry",),
    "parquet": ("pyarrow",),
    "mlflow": ("mlflow", "pandas"),
    "ray": ("ray", "cryptography"),
    "provenance": ("c2pa", "numpy"),
}
"""Top-level modules by extra, small extras first. All but `bench`, `parquet` and `provenance` bring those of `server`, too."""


def how_to_get(extra: str) -> str:
    """What to do where an extra is missing. The package is on no public index, so the command depends on where it came from."""
    return f"install mii_serve with the extra {extra}: see README, Install"


def extra_with(module: str) -> str | None:
    """The smallest extra that brings this module, perhaps a submodule; None where none does."""
    top = module.partition(".")[0]
    return next((extra for extra, modules in EXTRAS.items() if top in modules), None)


def require(extra: str) -> None:
    """See to it that the modules of an extra are installed.

    Raises:
        MissingExtraError: naming the first that is not.
    """
    for module in EXTRAS[extra]:
        if not is_installed(module):
            raise MissingExtraError(extra, module)


class MissingExtraError(ModuleNotFoundError):
    """A module is not installed; `extra` brings it."""

    def __init__(self, extra: str, module: str) -> None:
        super().__init__(f"No module named {module!r}; {how_to_get(extra)}", name=module)
        self.extra = extra


def is_installed(module: str) -> bool:
    """Whether this top-level module can be found; it is not imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # ValueError: something put a bare module object of that name into sys.modules
        return False
