"""The names of the engines, stated once: flags, settings, the factory and `mii_serve doctor` read them here."""

from __future__ import annotations

from typing import Literal, get_args

EngineName = Literal["reference", "native", "deepspeed"]
EngineChoice = Literal["auto", EngineName]
"""What an operator can ask for: an engine, or the best one that works."""

ENGINES: tuple[EngineName, ...] = get_args(EngineName)
ENGINE_CHOICES: tuple[EngineChoice, ...] = ("auto", *ENGINES)
