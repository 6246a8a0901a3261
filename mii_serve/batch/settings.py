"""What a job was begun with, and what must not change while it goes on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from mii_serve.batch.rows import Row
from mii_serve.batch.seeds import seed_of_row
from mii_serve.errors import ConfigError, InvalidRequestError
from mii_serve.types import PARAMETER_NAMES, Capabilities, ImageFormat, RequestedParams, ServerInfo

Packing = Literal["folder", "webdataset"]
"""Whether pictures stay files, or are packed into tar files in the end."""
DEFAULT_NAMES = (*(name for name in PARAMETER_NAMES if name not in ("prompt", "seed")), "loras")
"""Parameters that the job can set for all rows that do not name them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSettings:
    """`defaults` are parameters for rows that do not name them; `seed` decides the seeds of rows that name none."""

    defaults: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    format: ImageFormat = ImageFormat.PNG
    shards: Packing = "folder"

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "format": self.format.value, "defaults": dict(self.defaults)}

    def requested(self, row: Row, n: int) -> RequestedParams:
        """The row's parameters with the job's defaults, and its seed."""
        given = {name: getattr(row.params, name) for name in (*PARAMETER_NAMES, "loras")}
        for name, value in self.defaults.items():
            if given[name] is None:
                given[name] = value
        if given["seed"] is None:
            given["seed"] = seed_of_row(self.seed, str(n) if row.id is None else row.id)
        return RequestedParams(**given)


@dataclass(frozen=True, slots=True)
class Maker:
    """What makes the pictures of a job; pictures of two makers are not the same."""

    model: str
    model_revision: str
    engine: str
    dtype: str

    @classmethod
    def of(cls, info: ServerInfo) -> Maker:
        return cls(info.model, info.model_revision, info.engine, info.dtype)


def check_unchanged(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """See to it that a job goes on with what it was begun with.

    Raises:
        ConfigError: naming what differs, old and new.
    """
    for name in [*before, *(name for name in now if name not in before)]:
        old, new = before.get(name), now.get(name)
        if old == new:
            continue
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            check_unchanged(old, new)
        else:
            raise ConfigError(
                name, f"this job was begun with {old!r}, and it is {new!r} now; use another output folder for that"
            )


class MakerChangedError(ConfigError):
    """Another model, engine or precision answers than the one the job was begun with."""


def check_maker(before: Maker, now: Maker) -> None:
    """Raises:
    MakerChangedError: naming what differs, old and new.
    """
    try:
        check_unchanged(asdict(before), asdict(now))
    except ConfigError as error:
        raise MakerChangedError(error.setting, error.rule) from None


def check_defaults(settings: JobSettings, capabilities: Capabilities) -> None:
    """Raises:
    InvalidRequestError: a default breaks a rule, whatever the row.
    """
    try:
        capabilities.resolve(RequestedParams(prompt="a", **settings.defaults), fallback_seed=0)
    except InvalidRequestError as error:
        raise InvalidRequestError(f"--{error.field.replace('_', '-')}", error.rule) from None
