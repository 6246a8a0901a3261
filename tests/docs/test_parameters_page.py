"""The page of parameters is written from their declarations: `make goldens` writes it again."""

from __future__ import annotations

from pathlib import Path

import pytest

from mii_serve.types import (
    LORAS_HELP,
    MAX_LORA_SCALE,
    MAX_LORAS,
    OWN_STEPS,
    PARAMETERS,
    STRENGTH,
    GenerationDefaults,
    Limits,
    Parameter,
)

PAGE = Path(__file__).parents[2] / "docs" / "architecture" / "14-parameters.md"
HEAD = """# 14. Parameters

A request has these parameters, over every protocol. The names are diffusers', but for `seed`. Only `prompt` is required; a
parameter that is left out has the default of the model, or the default below. The bounds are those of a deployment without
settings of its own (`limits`); `GetServerInfo` and `/ui/info` have a deployment's own. The declarations are in
[`types/declarations.py`](../../mii_serve/types/declarations.py); this page, the command's flags, the JSON bodies and the
page's form are made from them.

| parameter | type | default | bounds | meaning |
|---|---|---|---|---|
"""
FOR_IMAGES = f"""
A request that starts from an image ([page 3](03-wire.md#images-to-start-from)) has the `image`, may have a
`mask_image` and an empty prompt ([page 22](22-images.md)), and in addition:

{HEAD[HEAD.index("| parameter") :]}"""
FOR_STEPS = f"""
Over gRPC, in JSON bodies and on the command line of `generate`, a request can say itself which steps are made
([page 23](23-conditioning.md#steps-of-ones-own)), by one of

{HEAD[HEAD.index("| parameter") :]}"""
BOUNDS = f"at most {MAX_LORAS}, each scale -{MAX_LORA_SCALE:g} to {MAX_LORA_SCALE:g}"
FOR_LORAS = f"""
A request may name LoRAs of the server ([page 21](21-loras.md)):

{HEAD[HEAD.index("| parameter") :]}| `loras` | names with numbers | none | {BOUNDS} | {LORAS_HELP} |
"""
KINDS = {str: "text", int: "whole number", float: "number"}


def row(parameter: Parameter) -> str:
    is_of_model = hasattr(GenerationDefaults(scheduler=""), parameter.name)
    default = "the model's" if is_of_model else {None: "", "": "empty"}.get(parameter.default, str(parameter.default))
    bounds = ""
    if parameter.bounds is not None:
        least, most = parameter.bounds(Limits())
        unit = " characters" if parameter.kind is str else ""
        bounds = f"{least:g} to {'2**64 - 1' if most == 2**64 - 1 else f'{most:g}'}{unit}"
    kind = KINDS[parameter.kind] if parameter.lengths is None else f"list of {KINDS[parameter.kind]}s"
    return f"| `{parameter.name}` | {kind} | {default} | {bounds} | {parameter.help} |"


def test_the_page_is_that_of_the_declarations(request: pytest.FixtureRequest):
    page = HEAD + "\n".join(map(row, PARAMETERS)) + "\n" + FOR_IMAGES + row(STRENGTH) + "\n"
    page += FOR_STEPS + "\n".join(map(row, OWN_STEPS)) + "\n" + FOR_LORAS
    if request.config.getoption("--update-goldens"):
        PAGE.write_text(page)
    assert PAGE.read_text() == page, "run: make goldens"
