"""AUTOMATIC1111's names of samplers and of schedule types, and the schedulers of diffusers that they stand for.

A sampler there is a solver; how its noise levels are spaced is the schedule type, of its own or at the end of the sampler's
name (`DPM++ 2M Karras`). `Automatic` is the type that the sampler declares. DDIM, PLMS, UniPC and LCM have none there either.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mii_serve.errors import InvalidRequestError
from mii_serve.types import MAX_SCHEDULER_CHARS, Capabilities

AUTOMATIC = "Automatic"
OWN_SAMPLER = "Default"
"""The model's own scheduler, for which that API has no name."""
SCHEDULE_TYPES: Mapping[str, str] = {"Uniform": "", "Karras": "karras", "Exponential": "exponential", "Beta": "beta"}
"""Their names, and how ours end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampler:
    """`ours` is the solver; `automatic` the schedule type that it declares, None where it has none at all.

    `eta` is the value of that parameter that `ours` has, None where it has no such parameter; `without_eta` the solver that it
    is for an `eta` of 0. One that `takes_eta` has it from the request.
    """

    name: str
    ours: str
    alias: str
    automatic: str | None = "Uniform"
    eta: float | None = None
    without_eta: str | None = None
    takes_eta: bool = False


SAMPLERS = (
    Sampler(name="DPM++ 2M", ours="dpm++_2m", alias="k_dpmpp_2m", automatic="Karras"),
    Sampler(name="DPM++ SDE", ours="dpm++_sde", alias="k_dpmpp_sde", automatic="Karras", eta=1.0),
    Sampler(name="DPM++ 2M SDE", ours="dpm++_2m_sde", alias="k_dpmpp_2m_sde", automatic="Exponential", eta=1.0),
    Sampler(name="DPM++ 3M SDE", ours="dpm++_3m_sde", alias="k_dpmpp_3m_sde", automatic="Exponential", eta=1.0),
    Sampler(name="Euler a", ours="euler_a", alias="k_euler_a", eta=1.0, without_eta="euler"),
    Sampler(name="Euler", ours="euler", alias="k_euler"),
    Sampler(name="LMS", ours="lms", alias="k_lms"),
    Sampler(name="Heun", ours="heun", alias="k_heun"),
    Sampler(name="DPM2", ours="kdpm2", alias="k_dpm_2", automatic="Karras"),
    Sampler(name="DPM2 a", ours="kdpm2_a", alias="k_dpm_2_a", automatic="Karras", eta=1.0, without_eta="kdpm2"),
    Sampler(name="DDIM", ours="ddim", alias="ddim", automatic=None, eta=0.0, takes_eta=True),
    Sampler(name="PLMS", ours="pndm", alias="plms", automatic=None),
    Sampler(name="UniPC", ours="unipc", alias="unipc", automatic=None),
    Sampler(name="LCM", ours="lcm", alias="k_lcm", automatic=None),
)
_BY_NAME = {spelling.casefold(): sampler for sampler in SAMPLERS for spelling in (sampler.name, sampler.alias)}
_OWN = (OWN_SAMPLER.casefold(), "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """`scheduler` is our name, None for the model's own; the others are what that API calls it."""

    scheduler: str | None
    sampler: str
    schedule_type: str = AUTOMATIC
    eta: float | None = None


def chosen(sampler_name: str, schedule_type: str, eta: float | None, capabilities: Capabilities) -> Chosen:
    """The scheduler that a request names.

    Raises:
        InvalidRequestError: the model has no such sampler, or the sampler no such schedule type or `eta`.
    """
    name, spacing = sampler_name.strip()[:MAX_SCHEDULER_CHARS], _spacing(schedule_type)
    if name.casefold() in _OWN:
        if spacing is not None:
            raise InvalidRequestError("scheduler", f"needs a sampler_name other than {OWN_SAMPLER}", repr(spacing))
        return Chosen(scheduler=None, sampler=OWN_SAMPLER)
    sampler, ending = _sampler(name)
    if sampler is None:
        try:
            ours = capabilities.scheduler_named(name)
        except InvalidRequestError:
            known = [one.name for one in _served(capabilities)]
            rule = f"must be one of {', '.join((OWN_SAMPLER, *known))}, or a scheduler's name as the other protocols have it"
            raise InvalidRequestError("sampler_name", rule, repr(name[:60])) from None
        if spacing is not None:
            raise InvalidRequestError("scheduler", "is in the name of this sampler already", repr(spacing))
        return Chosen(scheduler=ours, sampler=ours)
    spacing = ending or spacing if sampler.automatic is not None else None
    ours, is_automatic = _with_eta(sampler, eta), spacing is None
    if sampler.automatic is not None:
        spacing = spacing or sampler.automatic
        ours += f"_{SCHEDULE_TYPES[spacing]}" if SCHEDULE_TYPES[spacing] else ""
    if ours not in capabilities.schedulers:
        field = "sampler_name" if is_automatic else "scheduler"
        raise InvalidRequestError(field, f"this model has no {sampler.name} of the type {spacing or AUTOMATIC}")
    return Chosen(
        scheduler=capabilities.schedulers[ours],
        sampler=sampler.name,
        schedule_type=AUTOMATIC if is_automatic or spacing is None else spacing,
        eta=eta if sampler.takes_eta else None,
    )


def samplers_to_json(capabilities: Capabilities) -> list[dict[str, Any]]:
    """The answer to `GET /sdapi/v1/samplers`."""
    listed: list[dict[str, Any]] = [{"name": OWN_SAMPLER, "aliases": ["default"], "options": {}}]
    for sampler in _served(capabilities):
        declared = SCHEDULE_TYPES[sampler.automatic] if sampler.automatic is not None else ""
        options = {"scheduler": declared} if declared else {}
        listed.append({"name": sampler.name, "aliases": [sampler.alias], "options": options})
    return listed


def schedulers_to_json() -> list[dict[str, Any]]:
    """The answer to `GET /sdapi/v1/schedulers`."""
    rhos = {"Karras": 7.0}
    return [
        {"name": name.lower(), "label": name, "aliases": None, "default_rho": rhos.get(name, -1), "need_inner_model": False}
        for name in (AUTOMATIC, *SCHEDULE_TYPES)
    ]


def _served(capabilities: Capabilities) -> Iterator[Sampler]:
    return (sampler for sampler in SAMPLERS if sampler.ours in capabilities.schedulers)


def _spacing(schedule_type: str) -> str | None:
    """The schedule type's name; None where it is the sampler's to declare."""
    plain = schedule_type.strip().casefold()
    if plain in ("", AUTOMATIC.casefold()):
        return None
    for name in SCHEDULE_TYPES:
        if plain == name.casefold():
            return name
    rule = f"must be one of {', '.join((AUTOMATIC, *SCHEDULE_TYPES))}"
    raise InvalidRequestError("scheduler", rule, repr(schedule_type[:60]))


def _sampler(name: str) -> tuple[Sampler | None, str | None]:
    """The sampler of this name, and the schedule type that the name ends with."""
    plain = name.casefold()
    if (found := _BY_NAME.get(plain)) is not None:
        return found, None
    for ending in SCHEDULE_TYPES:
        start = plain.removesuffix(f" {ending.casefold()}")
        if start != plain and (found := _BY_NAME.get(start)) is not None and found.automatic is not None:
            return found, ending
    return None, None


def _with_eta(sampler: Sampler, eta: float | None) -> str:
    """The solver for this `eta`; samplers without the parameter take no notice of it, there as here."""
    if eta is None or sampler.eta is None or sampler.takes_eta or eta == sampler.eta:
        return sampler.ours
    if eta == 0 and sampler.without_eta is not None:
        return sampler.without_eta
    values = f"{sampler.eta:g}" if sampler.without_eta is None else f"0 or {sampler.eta:g}"
    raise InvalidRequestError("eta", f"must be {values} with {sampler.name}", str(eta)[:40])
